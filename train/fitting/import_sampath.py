"""SAM-Path's own checkpoints (arXiv 2307.09570): Lightning files, converted key by key to ours."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from serve.images.tiles import SAME_MPP
from train.config import SETTINGS_FILE
from train.data.convert import bcss, bdsa, crag
from train.data.convert.class_mapping import PALETTE
from train.data.folder import TileFolder, read_classes, read_tile_folder
from train.data.pixels import class_frequencies
from train.errors import CheckpointError, DestinationError, SettingsError
from train.files import write_errors_explained
from train.fitting.metrics_file import METRICS_FILE
from train.fitting.run import FIGURE_FILE, LAST_FILE, at_scale
from train.fitting.run_lock import only_run
from train.fitting.scores import evaluate
from train.model.checkpoint import (
    WEIGHTS_FILE,
    CheckpointCard,
    WeightsOrigin,
    save_checkpoint,
)
from train.model.encoder_kinds import ENCODER_KINDS
from train.model.pretrained import (
    NOT_OURS_IN_SAM,
    NOT_OURS_IN_VIT,
    load_accounted,
    resize_image_encoder,
    resize_pathology_positions,
)
from train.model.segmenter import Segmenter
from train.model.weight_files import Weights, read_weights, tensors, weights_sha256
from train.presets import CRAG_MPP
from train.settings import BiasName, LabelClass, Settings

_NAMES = {
    "model.model.": "",
    "model.fusion_neck.": "neck.",
    "model.extra_encoder.model.": "pathology_encoder.vit.",
}
"""Beginnings of SAM-Path's names, and of ours."""
_WRAPPERS = re.compile(r"^module\.|\b(_forward_module|_orig_mod)\.")
"""Words that data parallelism, Lightning's strategies and torch.compile put into names."""
_MASK_TOKENS = "model.model.mask_decoder.mask_tokens.weight"
_SCORES = r"(train|valid|val|test)_metrics\."
_CLASSES = {"bcss": bcss.CLASSES, "bdsa": bdsa.CLASSES, "crag": crag.CLASSES}
"""Classes of the data sets that SAM-Path and the paper were trained on, by preset."""
_MPP_OF_IMAGES = {"crag": CRAG_MPP}
"""um per pixel of the images, by preset, where SAM-Path resized them."""


def import_sampath(
    checkpoint: Path,
    run: Path,
    settings: Settings,
    *,
    data: Path | None = None,
    class_names: Sequence[str] = (),
    overwrite: bool = False,
    score: bool = True,
) -> CheckpointCard:
    """Convert a SAM-Path checkpoint to one of ours, without a bias.

    Args:
        checkpoint: The Lightning .ckpt file.
        run: The folder to write.
        settings: The preset of the data that it was trained on, with the um per pixel at which it
            saw that data; without one, the data set's counts.
        data: That data set, for class names, um per pixel and pixel shares; None does without.
        class_names: Names of the classes in the order of their labels, where there is no data set;
            by default those of the preset.
        overwrite: Replace the trained model that `run` has, with what its training left there.
        score: Score the validation tiles of `data`, so that HCFA can take the run as its baseline.

    Returns:
        What was written.

    Raises:
        WeightsError: a weight is not accounted for.
        CheckpointError: the file is of another model, or the number of classes differs.
        DestinationError: the folder has a trained model.
        RunError: another process trains there.
        SettingsError: both a data set and class names are given.
    """
    if data is not None and class_names:
        raise SettingsError(
            f"both --data and --class-names are given; expected one of them, as {data} names the "
            "classes. Leave out --class-names, or correct the data set's dataset.json."
        )
    _refuse_trained(run, may_exist=overwrite)
    folder = None if data is None else read_tile_folder(data)
    weights = _read(checkpoint)
    num_classes = len(weights[_MASK_TOKENS]) - 2  # one token for a single mask, one for unlabelled
    classes = _classes(checkpoint, num_classes, settings.preset, folder, class_names)
    if folder is not None:
        settings = at_scale(settings, folder, ("validation",) if score else ())
    resized_from_px, label_note = _resizing(settings, folder)
    model = replace(
        settings.model,
        bias=BiasName("none"),
        pathology_positions="dino",
        resized_from_px=resized_from_px,
    )
    settings = replace(settings, model=model)
    segmenter = Segmenter(settings.model, len(classes))
    _load(segmenter, weights, checkpoint)
    card = CheckpointCard(
        settings=settings,
        classes=classes,
        mpp=settings.model.mpp,
        pixel_frequencies=None if folder is None else tuple(class_frequencies(folder).tolist()),
        class_attention_bias=(0.0,) * len(classes),
        origins=_origins(checkpoint, settings),
        imported_from="SAM-Path",
        label_note=label_note,
    )
    if score and data is not None:
        card = replace(card, metrics=evaluate(segmenter, card, data, "validation"))
    with write_errors_explained(run):
        run.mkdir(parents=True, exist_ok=True)
        with only_run(run, is_first=True):
            _refuse_trained(run, may_exist=overwrite)
            save_checkpoint(run, segmenter, card)
            for name in (LAST_FILE, METRICS_FILE, FIGURE_FILE, SETTINGS_FILE):
                # Else `fit --resume` would go on with another model.
                (run / name).unlink(missing_ok=True)
    return card


def _refuse_trained(run: Path, *, may_exist: bool) -> None:
    if any((run / name).exists() for name in (WEIGHTS_FILE, LAST_FILE)) and not may_exist:
        raise DestinationError(
            f"{run} has a trained model; expected a new folder. Add --overwrite to replace it."
        )


def _resizing(settings: Settings, folder: TileFolder | None) -> tuple[int | None, str]:
    """How the images that SAM-Path resized to its tile get there.

    CRAG's are of 1536 pixels, and the tile of 1024.

    Returns:
        Side of the images that the model resizes itself, as SAM-Path does; None where it does not.
        And what to tell of its labels: empty where they are SAM-Path's.
    """
    images_mpp = _MPP_OF_IMAGES.get(settings.preset) if folder is None else folder.mpp
    model = settings.model
    if images_mpp is None or model.mpp is None or abs(model.mpp / images_mpp - 1) <= SAME_MPP:
        return None, ""
    step = model.tile_size_px // 4  # so that labels are enlarged by a whole number
    wanted = model.tile_size_px * model.mpp / images_mpp
    side = round(wanted / step) * step
    if abs(side / wanted - 1) <= SAME_MPP and side > model.tile_size_px:
        return side, ""
    return None, (
        f"SAM-Path resized images of {images_mpp:.4g} um per pixel to the model's "
        f"{model.mpp:.4g} in its own way. The model can do so where a tile covers images of 5, 6, "
        f"7, ... quarters of its {model.tile_size_px} pixels; here these are of {wanted:.4g}. So "
        "such images are resampled as all others are, and some of their labels differ from "
        "SAM-Path's."
    )


def _load(segmenter: Segmenter, weights: Weights, path: Path) -> None:
    """Load a SAM-Path checkpoint's weights, key by key.

    Position embeddings of the pathology encoder are resized as SAM-Path does, in DINO's way.

    Raises:
        WeightsError: a key is not accounted for, or of another shape.
    """
    source: Weights = {}
    for name, value in weights.items():
        for theirs, ours in _NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        source[name] = value
    resize_image_encoder(source, segmenter)
    resize_pathology_positions(source, segmenter, "dino", path)
    left_out = {
        **NOT_OURS_IN_SAM,
        **{rf"pathology_encoder\.vit\.{name}": why for name, why in NOT_OURS_IN_VIT.items()},
        _SCORES: "scores are computed again",
    }
    expected = {n for n in segmenter.state_dict() if not n.startswith("class_attention_bias.")}
    load_accounted(segmenter, source, expected, left_out, path)


def _read(path: Path) -> Weights:
    """Read a Lightning file of SAM-Path's late fusion model.

    Raises:
        CheckpointError: it is of another model.
    """
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}; expected a Lightning .ckpt of SAM-Path. Give its path."
        )
    content = read_weights(path)
    stored = tensors(content.get("state_dict", content), path)
    weights = {_WRAPPERS.sub("", name): value for name, value in stored.items()}
    tokens = weights.get(_MASK_TOKENS)
    if tokens is None or tokens.ndim != 2 or len(tokens) < 3 or len(weights) < len(stored):
        found = "missing" if tokens is None else f"{tuple(tokens.shape)}, of {len(stored)} weights"
        raise CheckpointError(
            f"{path} is not a SAM-Path checkpoint: {_MASK_TOKENS} is {found}. Expected a Lightning "
            ".ckpt of its late fusion model, with a token per class and two more."
        )
    parts = {name.split(".")[1] for name in weights if name.startswith("model.")}
    other = sorted(parts - {name.split(".")[1] for name in _NAMES})
    missing = sorted({name.split(".")[1] for name in _NAMES} - parts)
    if other or missing:
        told = [f"{name} (not known here)" for name in other]
        told += [f"no {name}" for name in missing]
        raise CheckpointError(
            f"{path} is another variant of SAM-Path: it has {', '.join(told)}. FocalPath has the "
            "late fusion of SAM's and one pathology encoder without prompts, and cannot compute "
            "what the other parts do. Give a checkpoint of the late fusion model."
        )
    return weights


def _classes(
    checkpoint: Path,
    num_classes: int,
    preset: str,
    folder: TileFolder | None,
    names: Sequence[str],
) -> tuple[LabelClass, ...]:
    """The classes, as many as the checkpoint has.

    Raises:
        CheckpointError: their number is not the checkpoint's, or the preset is for other data.
    """
    of_preset = _CLASSES.get(preset, ())
    fitting = [name for name, classes in _CLASSES.items() if len(classes) == num_classes]
    if of_preset and fitting and len(of_preset) != num_classes:
        raise CheckpointError(
            f"{checkpoint} has {num_classes} classes; the preset {preset} is for "
            f"{len(of_preset)} ({_listed(of_preset)}). Expected the preset of its data, such as "
            f"{' or '.join(fitting)}."
        )
    if folder is not None:
        classes, said_by = folder.classes, str(folder.root)
    elif names:
        classes = tuple(
            LabelClass(name=name, color=PALETTE[index % len(PALETTE)])
            for index, name in enumerate(names)
        )
        said_by = "--class-names"
    else:
        classes, said_by = of_preset, f"the preset {preset}"
    if len(classes) != num_classes or len({entry.name for entry in classes}) < num_classes:
        raise CheckpointError(
            f"{checkpoint} has {num_classes} classes, {said_by} names {len(classes)} "
            f"({_listed(classes) or 'none'}). Expected as many different names, in the order of "
            "the labels 1, 2, ...: give --data or --class-names."
        )
    return read_classes(Path(said_by), [asdict(entry) for entry in classes], CheckpointError)


def _listed(classes: Sequence[LabelClass]) -> str:
    return ", ".join(entry.name for entry in classes)


def _origins(checkpoint: Path, settings: Settings) -> tuple[WeightsOrigin, ...]:
    hipt = ENCODER_KINDS["hipt"]
    return (
        WeightsOrigin(
            part="whole model",
            name="SAM-Path checkpoint, trained with SAM-Path's own code",
            file=checkpoint.name,
            sha256=weights_sha256(checkpoint),
            licence="that of whoever trained it; SAM-Path's repository states none",
        ),
        WeightsOrigin(
            part="image encoder and decoder",
            name=f"SAM {settings.model.image_encoder}",
            file=checkpoint.name,
            licence="Apache-2.0",
        ),
        WeightsOrigin(
            part="pathology encoder", name=hipt.title, file=checkpoint.name, licence=hipt.licence
        ),
    )
