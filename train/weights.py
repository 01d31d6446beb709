"""Published weights: SAM, pathology encoders (DINO, HIPT, timm) and whole SAM-Path checkpoints.

Files are read with `weights_only=True` or as safetensors, so that opening one runs no code of it.
Every tensor of a file is loaded or left out for a stated reason; else the load is refused.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from train.checkpoint import CheckpointCard, save_checkpoint
from train.dataset import class_frequencies, read_tile_folder
from train.errors import FocalPathError
from train.mask_decoder import MaskDecoder
from train.segmenter import Segmenter
from train.settings import BiasSettings, Settings, bcss

Weights = dict[str, Tensor]

WHERE_TO_GET_WEIGHTS = """\
  SAM (Apache-2.0): sam_vit_b_01ec64.pth, linked from github.com/facebookresearch/segment-anything
  HIPT ViT-S/16 (Apache-2.0 with Commons Clause: no sale): vit256_small_dino.pth, from
    github.com/mahmoodlab/HIPT
  UNI ViT-L/16 (CC-BY-NC-ND 4.0: no commercial use, no derivatives), after registration with
    huggingface.co/MahmoodLab/UNI; take --pathology-encoder vit_large_patch16_224
    --pathology-layer-scale --pathology-mean 0.485 0.456 0.406 --pathology-std 0.229 0.224 0.225"""

_NO_PROMPT = "prompts are not used"
_OTHER_NECK = "the fusion neck replaces it"
_NOT_OURS_IN_SAM = {
    r"prompt_encoder\.(point_embeddings|not_a_point_embed|mask_downscaling)\b": _NO_PROMPT,
    r"image_encoder\.neck\.": _OTHER_NECK,
    r"pixel_(mean|std)$": "the model has its own",
}
_HEADS = {
    r"(head|fc_norm|head_drop|mask_token)\b": "the encoder's features are taken, not its head",
}


def read_weights(path: Path) -> dict[str, Any]:
    """Read a .pth, .pt, .ckpt or .safetensors file without running code from it.

    Raises:
        FocalPathError: the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise FocalPathError(
            f"no weights at {path}. Download them first; where they come from:\n"
            f"{WHERE_TO_GET_WEIGHTS}"
        )
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # DINO's files carry the command line that made them.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise FocalPathError(
            f"{path} cannot be read as plain weights: {str(error).splitlines()[0]} "
            "Download it again; a file that needs code to be opened is refused."
        ) from error
    if not isinstance(content, dict):
        raise FocalPathError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors by name"
        )
    return content


def load_sam_weights(segmenter: Segmenter, path: Path) -> None:
    """Load SAM's published encoder, prompt and decoder weights, resized to the tile.

    Each mask token's hypernetwork starts as a copy of SAM's single-mask one, as in SAM-Path; the
    class tokens and the last layer of the IoU head start at random.

    Raises:
        FocalPathError: the file is not of this architecture.
    """
    source = _tensors(read_weights(path), path)
    _resize_image_encoder(source, segmenter)
    target = segmenter.state_dict()
    single = {name.removeprefix(_MLP_0): source[name] for name in source if name.startswith(_MLP_0)}
    for index in range(segmenter.num_classes + 2):
        for name, value in single.items():
            source[f"{_MLPS}{index}.{name}"] = value
    own_tokens = {
        r"mask_decoder\.mask_tokens\.weight$": "one token a class",
        rf"mask_decoder\.iou_prediction_head\.layers\.{_last_layer(segmenter)}\.": "one a class",
        re.escape(_MLPS): "one a class",
    }
    tokens = source.get("mask_decoder.mask_tokens.weight")
    if tokens is not None:
        mixed = target["mask_decoder.mask_tokens.weight"].clone()
        if tokens.shape[1:] == mixed.shape[1:]:
            mixed[0] = tokens[0]
        source["mask_decoder.mask_tokens.weight"] = mixed
    expected = {name for name in target if name.split(".")[0] in _SAM_PARTS}
    left_out = {**_NOT_OURS_IN_SAM, **own_tokens}
    may_stay = {name for name in expected if re.match("|".join(own_tokens), name)}
    _load(segmenter, source, expected - may_stay, left_out, path)


def load_pathology_weights(segmenter: Segmenter, path: Path) -> None:
    """Load a timm, DINO or HIPT vision transformer, position embeddings resized to the tile.

    Of a DINO training file the teacher is taken.

    Raises:
        FocalPathError: the file is not of this architecture.
    """
    source = _tensors(_teacher(read_weights(path)), path)
    source = {re.sub(r"^(module\.)?(backbone\.)?", "", name): v for name, v in source.items()}
    vit = segmenter.pathology_encoder.vit
    _resize_position_embedding(source, vit)
    _load(vit, source, set(vit.state_dict()), _HEADS, path)


def load_sampath_weights(segmenter: Segmenter, path: Path) -> None:
    """Load a SAM-Path Lightning checkpoint (arXiv 2307.09570), key by key.

    Raises:
        FocalPathError: a key is not accounted for, or of another shape.
    """
    content = read_weights(path)
    source = {}
    for name, value in _tensors(content.get("state_dict", content), path).items():
        for theirs, ours in _SAMPATH_NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        source[name] = value
    _resize_image_encoder(source, segmenter)
    vit_prefix = "pathology_encoder.vit."
    vit = {k.removeprefix(vit_prefix): v for k, v in source.items() if k.startswith(vit_prefix)}
    _resize_position_embedding(vit, segmenter.pathology_encoder.vit)
    source |= {vit_prefix + name: value for name, value in vit.items()}
    left_out = {
        **_NOT_OURS_IN_SAM,
        r"pathology_encoder\.vit\.head\b": "the encoder's features are taken, not its head",
        r"(train|valid|test)_metrics\.": "scores are counted anew",
    }
    expected = set(segmenter.state_dict()) - {"class_attention_bias.delta"}
    _load(segmenter, source, expected, left_out, path)


def num_sampath_classes(path: Path) -> int:
    """How many classes a SAM-Path checkpoint has: its mask tokens are 2 + C.

    Raises:
        FocalPathError: the file has no mask tokens.
    """
    content = read_weights(path)
    weights = content.get("state_dict", content)
    name = "model.model.mask_decoder.mask_tokens.weight"
    if name not in weights:
        raise FocalPathError(
            f"{path} is no SAM-Path checkpoint: {name} is missing. Expected a Lightning .ckpt of "
            "its late fusion model."
        )
    return int(weights[name].shape[0]) - 2


def import_sampath(
    checkpoint: Path, run: Path, data: Path, settings: Settings | None = None
) -> Path:
    """Convert a SAM-Path checkpoint to one of ours, without a bias.

    Args:
        checkpoint: The Lightning .ckpt file.
        run: The folder to write.
        data: The data set that it was trained on.
        settings: The architecture; by default SAM-Path's own.

    Returns:
        The path of the weights.

    Raises:
        FocalPathError: a weight is not accounted for, or the classes are not as many.
    """
    folder = read_tile_folder(data)
    num_classes = num_sampath_classes(checkpoint)
    if num_classes != len(folder.classes):
        raise FocalPathError(
            f"{checkpoint} has {num_classes} classes, {data} {len(folder.classes)}; expected the "
            "data set that it was trained on"
        )
    settings = replace(settings or bcss(), bias=BiasSettings(bias="none"))
    bias = torch.zeros(num_classes)
    segmenter = Segmenter(settings, bias)
    load_sampath_weights(segmenter, checkpoint)
    card = CheckpointCard(
        settings=settings,
        classes=folder.classes,
        mpp=folder.mpp,
        pixel_frequencies=tuple(class_frequencies(folder).tolist()),
        class_attention_bias=tuple(bias.tolist()),
    )
    return save_checkpoint(run, segmenter, card)


_SAM_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
_MLPS = "mask_decoder.output_hypernetworks_mlps."
_MLP_0 = f"{_MLPS}0."
_SAMPATH_NAMES = {
    "model.model.": "",
    "model.fusion_neck.": "neck.",
    "model.extra_encoder.model.": "pathology_encoder.vit.",
}


def _last_layer(segmenter: Segmenter) -> int:
    assert isinstance(segmenter.mask_decoder, MaskDecoder)
    return len(segmenter.mask_decoder.iou_prediction_head.layers) - 1


def _teacher(content: dict[str, Any]) -> dict[str, Any]:
    for key in ("teacher", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return dict(content[key])
    return content


def _tensors(content: Mapping[str, Any], path: Path) -> Weights:
    other = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if other or not content:
        raise FocalPathError(
            f"{path} has {', '.join(map(repr, other[:3])) or 'nothing'} where tensors were "
            "expected. Give the weights' own file."
        )
    return dict(content)


def _resize_image_encoder(source: Weights, segmenter: Segmenter) -> None:
    """Resize absolute and relative position embeddings of another tile size, in place."""
    for name, target in segmenter.image_encoder.state_dict().items():
        value = source.get(f"image_encoder.{name}")
        if value is None or value.shape == target.shape:
            continue
        if name == "pos_embed" and value.shape[-1] == target.shape[-1]:
            grid = target.shape[1:3]
            value = F.interpolate(value.permute(0, 3, 1, 2), grid, mode="bicubic", antialias=False)
            source[f"image_encoder.{name}"] = value.permute(0, 2, 3, 1)
        elif ".rel_pos_" in name and value.shape[1:] == target.shape[1:]:
            value = F.interpolate(value.T[None], target.shape[0], mode="linear")
            source[f"image_encoder.{name}"] = value[0].T


def _resize_position_embedding(source: Weights, vit: Any) -> None:
    value, target = source.get("pos_embed"), vit.pos_embed
    if value is None or value.shape == target.shape or value.shape[-1] != target.shape[-1]:
        return
    source["pos_embed"] = resample_abs_pos_embed(
        value, new_size=list(vit.patch_embed.grid_size), num_prefix_tokens=vit.num_prefix_tokens
    )


def _load(
    module: nn.Module,
    source: Weights,
    expected: set[str],
    left_out: Mapping[str, str],
    path: Path,
) -> None:
    """Copy the weights that fit, after accounting for every name on both sides."""
    target = module.state_dict()
    skipped = re.compile("|".join(f"(?:{pattern})" for pattern in left_out))
    fitting = {n: v for n, v in source.items() if n in target and v.shape == target[n].shape}
    unknown = [name for name in source if name not in fitting and not skipped.match(name)]
    problems = [
        f"{name} is {tuple(source[name].shape)}, expected "
        f"{tuple(target[name].shape) if name in target else 'no such weight'}"
        for name in unknown
    ]
    problems += [f"{name} is missing" for name in sorted(expected - set(source))]
    if problems:
        layer_scale = any(name.endswith(".ls1.gamma") for name in unknown)
        raise FocalPathError(
            f"{path} does not fit the model, {len(problems)} weights differ: "
            f"{'; '.join(problems[:3])}. Choose the encoder that the file is of"
            f"{' (it has LayerScale: --pathology-layer-scale)' if layer_scale else ''}."
        )
    module.load_state_dict(fitting, strict=False)
