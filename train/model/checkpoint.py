"""Checkpoints: weights in safetensors and, beside them, a JSON that says what they are.

No pickle: a checkpoint from anywhere can be opened safely.
"""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from train.errors import FocalPathError
from train.files import whole_file, write_errors_explained
from train.model.segmenter import Segmenter
from train.settings import Settings, TissueClass

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data set that a checkpoint was trained on."""

    name: str
    """Of its folder."""
    num_training_tiles: int
    num_validation_tiles: int


@dataclass(frozen=True, kw_only=True)
class CheckpointCard:
    """What a checkpoint's weights are."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    settings: Settings
    classes: tuple[TissueClass, ...]
    mpp: float | None
    data: TrainingData | None = None
    """None where the file does not say."""
    pixel_frequencies: tuple[float, ...]
    """Each class's share of the labelled training pixels."""
    class_attention_bias: tuple[float, ...]
    """The bias of each class after training."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scores on the validation tiles."""
    code_version: str = field(default_factory=lambda: version("focalpath"))


def save_checkpoint(folder: Path, segmenter: Segmenter, card: CheckpointCard) -> Path:
    """Write the weights and their card into `folder`; each file appears whole or not at all.

    Returns:
        The path of the weights.

    Raises:
        FocalPathError: the disk is full, or may not be written.
    """
    with write_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu() for name, value in segmenter.state_dict().items()}
    with whole_file(folder / WEIGHTS_FILE) as partial:
        save_file(weights, partial)
    with whole_file(folder / CARD_FILE) as partial:
        partial.write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    return folder / WEIGHTS_FILE


def load_checkpoint(path: Path) -> tuple[Segmenter, CheckpointCard]:
    """Load a model in evaluation mode, on the CPU, from its weights or the folder that has them.

    Raises:
        FocalPathError: a file is missing or damaged, or the weights are of another architecture.
    """
    weights_path = path / WEIGHTS_FILE if path.is_dir() else path
    card = read_card(path)
    if not weights_path.is_file():
        raise _missing(weights_path)
    try:
        weights = load_file(weights_path)
    except SafetensorError as error:
        raise FocalPathError(
            f"{weights_path} is not a readable safetensors file ({error}). Copy it again."
        ) from error
    segmenter = Segmenter(card.settings, torch.zeros(len(card.classes)))
    _check_shapes(segmenter, weights, weights_path)
    segmenter.load_state_dict(weights)
    return segmenter.eval(), card


def read_card(path: Path) -> CheckpointCard:
    """Read what a checkpoint is, from a run's folder or the path of its weights.

    Raises:
        FocalPathError: the file is missing, or not of this version.
    """
    card_path = path / CARD_FILE if path.is_dir() else path.with_suffix(".json")
    if not card_path.is_file():
        raise _missing(card_path)
    try:
        return TypeAdapter(CheckpointCard).validate_json(card_path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FocalPathError(
            f"{card_path} is not a checkpoint's description: {place}: {first['msg']}. Train "
            "again, or take the file of the same run."
        ) from error


def _missing(file: Path) -> FocalPathError:
    return FocalPathError(
        f"no checkpoint: {file} does not exist. Give a run's folder or its {WEIGHTS_FILE}, with "
        f"{CARD_FILE} beside it; `python -m train fit` writes both."
    )


def _check_shapes(
    segmenter: Segmenter, weights: dict[str, torch.Tensor], weights_path: Path
) -> None:
    expected = {name: tuple(value.shape) for name, value in segmenter.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    differing = [name for name in expected | found if expected.get(name) != found.get(name)]
    if differing:
        first = "; ".join(
            f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in differing[:3]
        )
        raise FocalPathError(
            f"{weights_path} is of another architecture than {CARD_FILE} describes, "
            f"{len(differing)} weights differ: {first}. Take both files from the same run."
        )
