"""Published weights: SAM's and pathology encoders', checked against the model and loaded into it.

Every tensor of a file is loaded or left out for a stated reason; otherwise the load is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from train.errors import WeightsError
from train.model.image_encoder import size_of_image_encoder
from train.model.mask_decoder import MaskDecoder
from train.model.segmenter import Segmenter
from train.model.weight_files import Weights, differing, read_weights, tensors
from train.model.weight_names import Positions, VitWeights, vit_facts

_NO_PROMPT = "prompts are not used"
_OTHER_NECK = "the fusion neck replaces it"
NOT_OURS_IN_SAM = {
    r"prompt_encoder\.(point_embeddings|not_a_point_embed|mask_downscaling)\b": _NO_PROMPT,
    r"image_encoder\.neck\.": _OTHER_NECK,
    r"pixel_(mean|std)$": "the model has its own",
}
NOT_OURS_IN_VIT = {
    r"(head|fc_norm|head_drop|attn_pool|pooler|dino_head|ibot_head)\b": (
        "the encoder's features are taken, not its head"
    ),
    r"mask_token$": "no patch is masked",
}
_SAM_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
_MLPS = "mask_decoder.output_hypernetworks_mlps."
_MLP_0 = f"{_MLPS}0."
_VIT = "pathology_encoder.vit."


def load_sam_weights(segmenter: Segmenter, path: Path) -> None:
    """Load SAM's published encoder, prompt and decoder weights, resized to the tile.

    Each mask token's hypernetwork starts as a copy of SAM's single-mask one, as in SAM-Path; the
    class tokens and the last layer of the IoU head start at random.

    Raises:
        WeightsError: the file is not of this architecture.
    """
    source = _without_wrapper(read_weights(path), path)
    _check_sam_size(source, segmenter, path)
    resize_image_encoder(source, segmenter)
    target = segmenter.state_dict()
    single = {name.removeprefix(_MLP_0): source[name] for name in source if name.startswith(_MLP_0)}
    for index in range(segmenter.num_classes + 2):
        for name, value in single.items():
            source[f"{_MLPS}{index}.{name}"] = value
    assert isinstance(segmenter.mask_decoder, MaskDecoder)
    last = len(segmenter.mask_decoder.iou_prediction_head.layers) - 1
    own_tokens = {
        r"mask_decoder\.mask_tokens\.weight$": "one token per class",
        rf"mask_decoder\.iou_prediction_head\.layers\.{last}\.": "one per class",
        re.escape(_MLPS): "one per class",
    }
    tokens = source.get("mask_decoder.mask_tokens.weight")
    if tokens is not None:
        mixed = target["mask_decoder.mask_tokens.weight"].clone()
        if len(tokens.shape) == 2 and len(tokens) and tokens.shape[1:] == mixed.shape[1:]:
            mixed[0] = tokens[0]
        source["mask_decoder.mask_tokens.weight"] = mixed
    expected = {name for name in target if name.split(".")[0] in _SAM_PARTS}
    left_out = {**NOT_OURS_IN_SAM, **own_tokens}
    may_stay = {name for name in expected if re.match("|".join(own_tokens), name)}
    load_accounted(segmenter, source, expected - may_stay, left_out, path)


def _without_wrapper(content: Mapping[str, Any], path: Path) -> Weights:
    """SAM's weights from a file of a training, which may nest them or put a word before names."""
    nested = (content[key] for key in ("state_dict", "model") if key in content)
    source = tensors(next(nested, content), path)
    positions = "image_encoder.pos_embed"
    wrapper = next((n.removesuffix(positions) for n in source if n.endswith(positions)), "")
    return {name.removeprefix(wrapper): value for name, value in source.items()}


def load_vit(segmenter: Segmenter, weights: VitWeights, path: Path) -> None:
    """Load a vision transformer's weights into the pathology encoder.

    Position embeddings are resized to the tile.

    Raises:
        WeightsError: they are not of this architecture.
    """
    encoder = segmenter.pathology_encoder
    source = dict(weights.tensors)
    resize_position_embedding(source, encoder.vit, encoder.positions or weights.positions, path)
    load_accounted(encoder.vit, source, set(encoder.vit.state_dict()), NOT_OURS_IN_VIT, path)


def _check_sam_size(source: Weights, segmenter: Segmenter, path: Path) -> None:
    """Refuse SAM's file of another size, and name the option for it."""
    name = "patch_embed.proj.weight"
    found = source.get(f"image_encoder.{name}")
    ours = segmenter.image_encoder.state_dict()[name]
    if found is None or found.ndim != ours.ndim or found.shape[0] == ours.shape[0]:
        return
    size = size_of_image_encoder(found.shape[0])
    if size is not None:
        raise WeightsError(
            f"{path} is SAM's {size} ({found.shape[0]} channels); the model's image encoder is "
            f"{size_of_image_encoder(ours.shape[0]) or 'another'} ({ours.shape[0]} channels). Add "
            f"--image-encoder {size}, or take the file of the other size."
        )


def resize_image_encoder(source: Weights, segmenter: Segmenter) -> None:
    """Resize absolute and relative position embeddings of another tile size, in place."""
    for name, target in segmenter.image_encoder.state_dict().items():
        value = source.get(f"image_encoder.{name}")
        if value is None or value.shape == target.shape:
            continue
        if value.ndim != target.ndim or not value.numel() or not value.is_floating_point():
            continue  # told with all others that do not fit
        if name == "pos_embed" and value.shape[-1] == target.shape[-1]:
            grid = target.shape[1:3]
            value = F.interpolate(value.permute(0, 3, 1, 2), grid, mode="bicubic", antialias=False)
            source[f"image_encoder.{name}"] = value.permute(0, 2, 3, 1)
        elif ".rel_pos_" in name and value.shape[1:] == target.shape[1:]:
            value = F.interpolate(value.T[None], target.shape[0], mode="linear")
            source[f"image_encoder.{name}"] = value[0].T


def resize_pathology_positions(
    source: Weights, segmenter: Segmenter, way: Positions, path: Path
) -> None:
    """Resize the pathology encoder's position embedding under the segmenter's names, in place.

    Raises:
        WeightsError: the positions are not those of a square image.
    """
    vit = {n.removeprefix(_VIT): value for n, value in source.items() if n.startswith(_VIT)}
    resize_position_embedding(vit, segmenter.pathology_encoder.vit, way, path)
    source |= {_VIT + name: value for name, value in vit.items()}


def resize_position_embedding(source: Weights, vit: Any, way: Positions, path: Path) -> None:
    """Resize the position embedding of another tile size, in place.

    Args:
        source: The weights; only `pos_embed` is changed.
        vit: The transformer that they are for.
        way: timm: bicubic with antialiasing. dino: bicubic without, with scale (new side + 0.1) /
            old side, as DINO's, HIPT's and SAM-Path's code has it.
        path: The file, for messages.

    Raises:
        WeightsError: the positions are not those of a square image.
    """
    value, target = source.get("pos_embed"), getattr(vit, "pos_embed", None)
    if value is None or target is None or value.shape == target.shape:
        return
    if value.ndim != target.ndim or not value.is_floating_point():
        return  # told with all others that do not fit
    grid: int = vit.patch_embed.grid_size[0]
    num_prefix = target.shape[1] - grid**2
    num_patches = value.shape[1] - num_prefix
    side = round(max(num_patches, 0) ** 0.5)
    if value.shape[-1] != target.shape[-1] or side == 0:
        return  # told with the other weights of another width
    if side**2 != num_patches:
        raise WeightsError(
            f"{path} has {value.shape[1]} position embeddings, of which the model expects "
            f"{num_prefix} for the class and register tokens and a square number for patches. Set "
            "the encoder's registers with --pathology-args reg_tokens N no_embed_class True (or "
            "False, where these tokens have positions)."
        )
    if way == "timm":
        source["pos_embed"] = resample_abs_pos_embed(
            value, new_size=[grid, grid], num_prefix_tokens=num_prefix
        )
        return
    prefix, patches = value[:, :num_prefix], value[:, num_prefix:]
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    assert patches.shape[-2:] == (grid, grid), patches.shape
    source["pos_embed"] = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def load_accounted(
    module: nn.Module,
    source: Weights,
    expected: set[str],
    left_out: Mapping[str, str],
    path: Path,
) -> None:
    """Copy the weights that fit, after accounting for every name on both sides.

    Args:
        module: Receives the weights.
        source: Weights by the module's names.
        expected: Names that must be there.
        left_out: Patterns of names that are not for the module, and why.
        path: The file, for messages.

    Raises:
        WeightsError: a weight is unknown, missing, of another shape, or not a finite number.
    """
    target = module.state_dict()
    skipped = re.compile("|".join(f"(?:{pattern})" for pattern in left_out))
    fitting = {n: v for n, v in source.items() if n in target and v.shape == target[n].shape}
    ours = {n: v for n, v in source.items() if n in fitting or not skipped.match(n)}
    problems = differing(ours, {n: target[n] for n in target if n in expected or n in ours})
    if problems:
        raise WeightsError(
            f"{path} does not fit the model, {len(problems)} weights differ: "
            f"{'; '.join(problems[:3])}. {_advice(source)}"
        )
    whole = [n for n, v in fitting.items() if target[n].is_floating_point() > v.is_floating_point()]
    if whole:
        raise WeightsError(
            f"{path} has whole numbers for {len(whole)} weights, such as {whole[0]}; expected "
            "floating point. Take the file from before it was quantised or rounded."
        )
    broken = [
        name
        for name, value in fitting.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise WeightsError(
            f"{path} has {len(broken)} weights that are not finite numbers, such as {broken[0]}. "
            "Download it again, or take an earlier checkpoint of that training."
        )
    module.load_state_dict(fitting, strict=False)


def _advice(source: Weights) -> str:
    """What to do about weights that do not fit."""
    facts = vit_facts(source)
    if facts is None:
        return "Choose the encoder that the file is of."
    extras = [
        f"{facts.num_registers} register tokens" if facts.num_registers else "",
        "LayerScale" if facts.has_layer_scale else "",
        "SwiGLU" if facts.has_swiglu else "",
    ]
    return (
        f"The file is of a transformer with {facts.depth} blocks of {facts.embed_dim} channels, "
        f"patches of {facts.patch_size} pixels, {', '.join(filter(None, extras)) or 'no registers'}"
        "; choose it with --pathology-encoder and --pathology-args (see docs/encoders.md)."
    )
