"""The evaluation of a set of encoders, from slides with masks to a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from train.errors import EncoderError, SettingsError
from train.pretraining.encoder import create_encoder, patch_size
from train.pretraining.magnification.evaluate import EncoderResult, Evaluation
from train.pretraining.magnification.labelled import open_labelled
from train.pretraining.magnification.measured import measured_once
from train.pretraining.magnification.report import write_report
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.settings import PretrainSettings

RANDOM = "random"


def compare_encoders(
    encoders: Mapping[str, Sequence[Path]],
    architecture: PretrainSettings,
    data: Path,
    out: Path,
    settings: EvaluationSettings,
) -> Path:
    """Measure encoders side by side, an untrained one always among them, and write the report.

    Args:
        encoders: folders that timm opens with local-dir:, by name, one per seed.
        architecture: what the untrained encoder looks like.
        data: slides with masks; test slides must be unseen by every encoder.
        out: the report's folder; what was measured is kept beside it, in `measured`.
        settings: which tiles.

    Returns:
        The report's README.md.

    Raises:
        FocalPathError: an encoder cannot be opened, or the slides have too few labelled tiles.
    """
    opened = _open_encoders(encoders, settings)
    evaluation = Evaluation(open_labelled(data), settings)
    num_seeds = max((len(folders) for folders in encoders.values()), default=1)
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        opened.setdefault(RANDOM, []).append(create_encoder(architecture))
    kept = out.with_name("measured")
    results: dict[str, list[EncoderResult]] = {}
    for name in (RANDOM, *encoders):
        results[name] = [
            measured_once(evaluation, model, kept / name / f"seed{seed}.json")
            for seed, model in enumerate(opened[name])
        ]
        print(f"{name}: measured", flush=True)
    return write_report(
        results, settings, evaluation.num_classes, len(evaluation.bootstrap.cases), out
    )


def check_study(
    encoders: Mapping[str, Sequence[Path]],
    architecture: PretrainSettings,
    data: Path,
    settings: EvaluationSettings,
) -> None:
    """Check what an evaluation needs, before hours are spent on training its encoders.

    Args:
        encoders: those that are there already.
        architecture: what the others will look like.
        data: slides with masks.
        settings: which tiles.

    Raises:
        FocalPathError: an encoder cannot be opened, or the slides have too few labelled tiles.
    """
    _open_encoders(encoders, settings)
    _check_patches(architecture.encoder.encoder, create_encoder(architecture), settings)
    Evaluation(open_labelled(data), settings)


def _open_encoders(
    encoders: Mapping[str, Sequence[Path]], settings: EvaluationSettings
) -> dict[str, list[nn.Module]]:
    opened = {
        name: [open_encoder(folder) for folder in folders] for name, folders in encoders.items()
    }
    for name, models in opened.items():
        for model in models:
            _check_patches(name, model, settings)
    return opened


def _check_patches(name: str, model: nn.Module, settings: EvaluationSettings) -> None:
    """Raise SettingsError where tiles are no whole number of an encoder's patches."""
    if settings.patch_px % (size := patch_size(model)):
        raise SettingsError(
            f"the encoder {name} has patches of {size} pixels, and --patch-px is "
            f"{settings.patch_px}; expected a multiple of all encoders' patches. Change --patch-px "
            "and --tile-px."
        )


def open_encoder(folder: Path) -> nn.Module:
    """Open an encoder's folder with timm.

    Raises:
        EncoderError: it is not an encoder's folder, or its files contradict each other.
    """
    if not (folder / "config.json").is_file():
        raise EncoderError(
            f"{folder} is not an encoder's folder: config.json is missing. Expected what `train "
            "pretrain` writes into RUN/encoder, or timm's save_for_hf."
        )
    try:
        model = timm.create_model(
            f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise EncoderError(
            f"{folder} cannot be opened by timm ({str(error).splitlines()[0]}); its config.json "
            "and weights may contradict each other"
        ) from error
    return model


def named_folders(given: Sequence[str], taken: Sequence[str] = ()) -> dict[str, list[Path]]:
    """Read NAME=FOLDER; the same name again is another seed.

    Args:
        given: as on the command line.
        taken: names of other encoders of the study.

    Raises:
        SettingsError: one has another form, or the name of another encoder.
    """
    folders: dict[str, list[Path]] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not folder or name in ("", ".", "..", RANDOM, *taken) or "/" in name:
            raise SettingsError(
                f"--encoders has {text!r}; expected NAME=FOLDER, such as mine=runs/mad/encoder, "
                f"with a name, without a slash, other than {', '.join((RANDOM, *taken))}"
            )
        folders.setdefault(name, []).append(Path(folder))
    return folders
