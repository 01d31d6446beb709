"""Checkpoints: weights in safetensors and, beside them, a JSON that says what they are.

No pickle: a checkpoint from anywhere can be opened safely.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from serve.contract.errors import BackendUnavailableError
from serve.contract.refusal import first_problem
from serve.contract.unchanged import while_unchanged
from train.data.folder import read_classes
from train.errors import CheckpointError
from train.files import sha256_of, whole_file, write_errors_explained
from train.model.build import build_segmenter
from train.model.segmenter import Segmenter
from train.model.weight_files import differing
from train.settings import LabelClass, Settings, upgrade_settings

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
MAX_WEIGHTS_BYTES = 2**31 - 2**26
"""Most float32 weights that can be exported. Protobuf, which ONNX is written in, ends at 2 GiB; the
rest is for the folded constants (17 MB at 1024 pixels) and the graph itself."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data set that a checkpoint was trained on."""

    name: str
    """Of its folder."""
    num_training_tiles: int
    num_validation_tiles: int


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """What one part of the model started from, and under which terms that is published."""

    part: Literal["image encoder and decoder", "pathology encoder", "whole model"]
    name: str
    """Such as "SAM ViT-B", or "SAM-Path checkpoint"."""
    file: str
    """Name of the file or run, without its folder."""
    sha256: str | None = None
    """Of that file."""
    licence: str
    """Its authors' terms, or a note that FocalPath does not know them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointCard:
    """What a checkpoint's weights are."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    settings: Annotated[Settings, BeforeValidator(upgrade_settings)]
    classes: tuple[LabelClass, ...]
    mpp: float | None
    """um per pixel at which the network sees tissue; None where it is not known."""
    data: TrainingData | None = None
    """None where the file does not say."""
    pixel_frequencies: tuple[float, ...] | None
    """Each class's share of the labelled training pixels; None for an import without its data."""
    class_attention_bias: tuple[float, ...]
    """The bias of each class after training."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scores on the validation tiles."""
    origins: tuple[WeightsOrigin, ...] = ()
    """What the weights started from; empty where everything started at random."""
    imported_from: str | None = None
    """The software that trained the model, such as "SAM-Path"; None where FocalPath did."""
    label_note: str = ""
    """How the labels of images that are resampled differ from those of the software that trained
    the model. Empty where they do not, or where FocalPath trained it."""
    weights_sha256: str | None = None
    """Of the file of weights; None in checkpoints of older versions."""
    code_version: str = field(default_factory=lambda: version("focalpath"))

    @property
    def input_mpp(self) -> float | None:
        """Um per pixel of the square that the model is given, which it may resize itself."""
        model = self.settings.model
        return self.mpp and self.mpp * model.tile_size_px / model.input_px

    @property
    def shares(self) -> tuple[float, ...]:
        """Each class's share of the labelled training pixels; NaN where it is not known."""
        return self.pixel_frequencies or (math.nan,) * len(self.classes)

    @property
    def iou_head_trained(self) -> bool:
        """Whether the predicted IoU was trained; else `iou_scores` mean nothing."""
        return self.settings.loss.iou_weight > 0


def save_checkpoint(folder: Path, segmenter: Segmenter, card: CheckpointCard) -> Path:
    """Write the weights and their card, with the weights' checksum, into `folder`.

    Each file appears whole or not at all.

    Returns:
        The path of the weights.

    Raises:
        StorageError: the disk is full, or cannot be written.
    """
    with write_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu() for name, value in segmenter.state_dict().items()}
    # Nested, so that both are renamed at the end: a crash hardly ever leaves one without the other.
    with whole_file(folder / WEIGHTS_FILE) as partial, whole_file(folder / CARD_FILE) as card_file:
        save_file(weights, partial)
        card = replace(card, weights_sha256=sha256_of(partial))
        card_file.write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    return folder / WEIGHTS_FILE


def load_checkpoint(path: Path) -> tuple[Segmenter, CheckpointCard]:
    """Load a model in evaluation mode, on the CPU, from its weights or the folder that has them.

    Raises:
        CheckpointError: a file is missing or damaged, a weight is not a finite number, or the
            weights are of another architecture.
    """
    card, weights = read_checkpoint(path)
    segmenter = build_segmenter(card.settings.model, len(card.classes))
    if problems := differing(weights, segmenter.state_dict()):
        raise CheckpointError(
            f"{weights_file(path)} is of another architecture than {CARD_FILE} describes, "
            f"{len(problems)} weights differ: {'; '.join(problems[:3])}. Take both files from the "
            "same run."
        )
    segmenter.load_state_dict(weights)
    return segmenter.eval(), card


def read_checkpoint(path: Path) -> tuple[CheckpointCard, dict[str, torch.Tensor]]:
    """Read what a checkpoint is, with the weights' checksum, and the weights.

    Both are of one epoch, also where the training goes on or another one replaces its run.

    Raises:
        CheckpointError: a file is missing, cannot be read or damaged, or a weight is not a finite
            number.
    """
    file = weights_file(path)
    names = (file.name, _card_file(path).name)
    try:
        return while_unchanged(
            file.parent, lambda: _read_weights(file, read_card(path)), names=names
        )
    except BackendUnavailableError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_card(path: Path) -> CheckpointCard:
    """Read what a checkpoint is, from a run's folder or the path of its weights.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is not of this version.
    """
    card_path = _card_file(path)
    if not card_path.is_file():
        raise _missing(card_path)
    try:
        card = _CARD.validate_json(card_path.read_bytes())
    except OSError as error:
        raise _unreadable(card_path, error) from error
    except ValidationError as error:
        raise CheckpointError(
            f"{card_path} is not a checkpoint's description: {first_problem(error)}. Train "
            "again, or take the file of the same run."
        ) from error
    read_classes(card_path, [asdict(entry) for entry in card.classes], CheckpointError)
    if problem := _contradiction(card):
        raise CheckpointError(
            f"{card_path} contradicts itself: {problem}. Take the file that the training wrote."
        )
    return card


def _contradiction(card: CheckpointCard) -> str | None:
    """What of a card does not fit the rest of it, as in one that was edited by hand."""
    if card.mpp != card.settings.model.mpp:
        return f"mpp is {card.mpp}, and settings.model.mpp {card.settings.model.mpp}"
    values = {"class_attention_bias": card.class_attention_bias}
    if card.pixel_frequencies is not None:
        values["pixel_frequencies"] = card.pixel_frequencies
    for name, numbers in values.items():
        if len(numbers) != len(card.classes) or not all(map(math.isfinite, numbers)):
            return f"{name} is {numbers}; expected a finite number for each of the classes"
    return None


def _with_scale(stored: Any) -> Any:
    """Work out the scale at which a checkpoint of version 0.1 sees tissue.

    It squeezed every image to the tile, and its card has the um per pixel of the images, not of the
    network. Where scores were counted at the images' size, this tells how far they were squeezed.
    """
    try:
        model = stored["settings"]["model"]
        if "mpp" in model:
            return stored
        model = {**model, "mpp": stored.get("mpp"), "squeeze": True}
        if (side := model.pop("score_size_px", None)) and model["mpp"]:
            model["mpp"] *= side / model["tile_size_px"]
        return {
            **stored,
            "mpp": model["mpp"],
            "settings": {**stored["settings"], "model": model},
        }
    except (KeyError, TypeError):
        return stored  # the validation says what is wrong


_CARD: TypeAdapter[CheckpointCard] = TypeAdapter(
    Annotated[CheckpointCard, BeforeValidator(_with_scale)]
)


def _read_weights(
    file: Path, card: CheckpointCard
) -> tuple[CheckpointCard, dict[str, torch.Tensor]]:
    """The weights that `card` describes, and the card with their checksum."""
    if not file.is_file():
        raise _missing(file)
    try:
        found = sha256_of(file)
        weights = load_file(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({error}). Copy it again."
        ) from error
    if card.weights_sha256 not in (None, found):
        raise CheckpointError(
            f"{file} has the SHA-256 {found}, and {CARD_FILE} says {card.weights_sha256}: the file "
            "was damaged, changed or exchanged. Copy both files of the run again."
        )
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{file} has {len(broken)} weights that are not finite numbers, such as {broken[0]}; "
            "the model would answer nonsense. Train again with a lower --learning-rate or "
            "--precision 32-true."
        )
    return replace(card, weights_sha256=found), weights


def weights_file(path: Path) -> Path:
    """The file of weights of a run's folder, or `path` itself."""
    return path / WEIGHTS_FILE if path.is_dir() else path


def _card_file(path: Path) -> Path:
    return path / CARD_FILE if path.is_dir() else path.with_suffix(".json")


def check_classes(card: CheckpointCard, described: str, classes: tuple[LabelClass, ...]) -> None:
    """Refuse a checkpoint of other classes than a data set's.

    Raises:
        CheckpointError: the names differ, or their order.
    """
    found, wanted = ([entry.name for entry in entries] for entries in (card.classes, classes))
    if found != wanted:
        raise CheckpointError(
            f"{described} has the classes {', '.join(found)}; the data set has "
            f"{', '.join(wanted)}. Expected the same names in the same order: each class has its "
            "own token. Take one that was trained on the same classes."
        )


def _missing(file: Path) -> CheckpointError:
    return CheckpointError(
        f"no checkpoint: {file} does not exist. Give a run's folder or its {WEIGHTS_FILE}, with "
        f"{CARD_FILE} beside it; `python -m train fit` writes both."
    )


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read ({error.strerror}). Check the permissions of the file."
    )
