"""SAM-Path's own checkpoints (arXiv 2307.09570): Lightning files, converted key by key to ours."""

from dataclasses import replace
from pathlib import Path

from train.data.folder import read_tile_folder
from train.data.pixels import class_frequencies
from train.errors import FocalPathError
from train.fitting.run import evaluate
from train.model.checkpoint import WEIGHTS_FILE, CheckpointCard, save_checkpoint
from train.model.pretrained import (
    NOT_OURS_IN_SAM,
    load_accounted,
    resize_image_encoder,
    resize_position_embedding,
)
from train.model.segmenter import Segmenter
from train.model.weight_files import read_weights, tensors
from train.settings import BiasName, Settings

_NAMES = {
    "model.model.": "",
    "model.fusion_neck.": "neck.",
    "model.extra_encoder.model.": "pathology_encoder.vit.",
}
"""Beginnings of SAM-Path's names, and of ours."""


def import_sampath(
    checkpoint: Path,
    run: Path,
    data: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    score: bool = True,
) -> CheckpointCard:
    """Convert a SAM-Path checkpoint to one of ours, without a bias.

    Args:
        checkpoint: The Lightning .ckpt file.
        run: The folder to write.
        data: The data set that it was trained on.
        settings: The architecture and the sizes of tiles and scores.
        overwrite: Replace the trained model that `run` has.
        score: Score the validation tiles, so that HCFA can take the run for its baseline.

    Returns:
        What was written.

    Raises:
        FocalPathError: a weight is not accounted for, the classes are not as many, or the folder
            has a trained model.
    """
    if (run / WEIGHTS_FILE).exists() and not overwrite:
        raise FocalPathError(
            f"{run} has a trained model; expected a new folder. Add --overwrite to replace it."
        )
    folder = read_tile_folder(data)
    num_classes = num_sampath_classes(checkpoint)
    if num_classes != len(folder.classes):
        raise FocalPathError(
            f"{checkpoint} has {num_classes} classes, {data} {len(folder.classes)}; expected the "
            "data set that it was trained on"
        )
    settings = replace(settings, model=replace(settings.model, bias=BiasName("none")))
    segmenter = Segmenter(settings.model, num_classes)
    load_sampath_weights(segmenter, checkpoint)
    card = CheckpointCard(
        settings=settings,
        classes=folder.classes,
        mpp=folder.mpp,
        pixel_frequencies=tuple(class_frequencies(folder).tolist()),
        class_attention_bias=(0.0,) * num_classes,
    )
    if score:
        card = replace(card, metrics=evaluate(segmenter, card, data, "validation"))
    save_checkpoint(run, segmenter, card)
    return card


def load_sampath_weights(segmenter: Segmenter, path: Path) -> None:
    """Load a SAM-Path checkpoint, key by key.

    Raises:
        FocalPathError: a key is not accounted for, or of another shape.
    """
    source = {}
    content = read_weights(path)
    for name, value in tensors(content.get("state_dict", content), path).items():
        for theirs, ours in _NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        source[name] = value
    resize_image_encoder(source, segmenter)
    vit_prefix = "pathology_encoder.vit."
    vit = {k.removeprefix(vit_prefix): v for k, v in source.items() if k.startswith(vit_prefix)}
    resize_position_embedding(vit, segmenter.pathology_encoder.vit, "dino", path)
    source |= {vit_prefix + name: value for name, value in vit.items()}
    left_out = {
        **NOT_OURS_IN_SAM,
        r"pathology_encoder\.vit\.head\b": "the encoder's features are taken, not its head",
        r"(train|valid|test)_metrics\.": "scores are counted anew",
    }
    expected = set(segmenter.state_dict()) - {"class_attention_bias.delta"}
    load_accounted(segmenter, source, expected, left_out, path)


def num_sampath_classes(path: Path) -> int:
    """How many classes a SAM-Path checkpoint has: its mask tokens are 2 + C.

    Raises:
        FocalPathError: the file has no mask tokens.
    """
    content = read_weights(path)
    weights = tensors(content.get("state_dict", content), path)
    name = "model.model.mask_decoder.mask_tokens.weight"
    if name not in weights:
        raise FocalPathError(
            f"{path} is no SAM-Path checkpoint: {name} is missing. Expected a Lightning .ckpt of "
            "its late fusion model."
        )
    return int(weights[name].shape[0]) - 2
