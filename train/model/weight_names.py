"""Gives vision transformers timm's names: those of DINO, HIPT, DINOv2, iBOT and transformers.

`as_timm` changes no value. It joins tensors that timm keeps in one, and adds the class token's
position to the class token if timm keeps no position for it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from train.errors import WeightsError
from train.model.weight_files import Weights, tensors

Positions = Literal["timm", "dino"]

_NESTED = (
    *("teacher", "state_dict_ema", "model_ema"),
    *("state_dict", "model_state_dict", "model"),
)
"""Keys under which training software stores the weights, means over the training first: DINO's
teacher, and those that timm takes first, too."""
_WRAPPERS = ("module.", "_orig_mod.", "backbone.", "vit.", "dinov2.", "model.")
_IN_TRANSFORMERS = "embeddings.patch_embeddings.projection.weight"
_TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.(layernorm_before|norm1)\.", ".norm1."),
    (r"\.(layernorm_after|norm2)\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
"""Names in the transformers library (ViTModel, Dinov2Model with or without registers), and ours."""


@dataclass(frozen=True)
class VitWeights:
    """A vision transformer's weights under timm's names."""

    tensors: Weights
    positions: Positions
    """How the original software resizes position embeddings."""


@dataclass(frozen=True)
class VitFacts:
    """What the shapes of a vision transformer's weights say about it."""

    patch_size: int
    embed_dim: int
    depth: int
    mlp_width: int
    """Outputs of an MLP's first layer."""
    num_registers: int
    has_layer_scale: bool
    has_swiglu: bool
    """The MLP is gated: its first layer is twice as wide as its second layer's input."""


def as_timm(content: Mapping[str, Any], path: Path) -> VitWeights:
    """Rename the weights in a file to timm's names.

    Raises:
        WeightsError: there are no tensors, or two have the same name.
    """
    nested = next((key for key in _NESTED if isinstance(content.get(key), Mapping)), None)
    source = tensors(content if nested is None else content[nested], path)
    unwrapped = _without_wrappers(source, path)
    is_dino = nested == "teacher" or any("backbone." in name for name in source)
    if _IN_TRANSFORMERS in unwrapped:
        return VitWeights(_of_dinov2(_of_transformers(unwrapped)), "timm")
    if "register_tokens" in unwrapped:
        return VitWeights(_of_dinov2(unwrapped), "timm")  # DINOv2 resizes those as timm does
    if "mask_token" in unwrapped:
        is_dino = True
    return VitWeights(_of_dinov2(unwrapped), "dino" if is_dino else "timm")


def vit_facts(weights: Weights) -> VitFacts | None:
    """Read the architecture from the shapes; None if the names are not VisionTransformer's."""
    patches = weights.get("patch_embed.proj.weight")
    first, second = (weights.get(f"blocks.0.mlp.fc{index}.weight") for index in (1, 2))
    if patches is None or patches.ndim != 4 or first is None or second is None:
        return None
    if first.ndim != 2 or second.ndim != 2:
        return None
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    registers = weights.get("reg_token")
    return VitFacts(
        patch_size=patches.shape[-1],
        embed_dim=patches.shape[0],
        depth=len(blocks),
        mlp_width=first.shape[0],
        num_registers=registers.shape[1] if registers is not None and registers.ndim > 1 else 0,
        has_layer_scale="blocks.0.ls1.gamma" in weights,
        has_swiglu=first.shape[0] == 2 * second.shape[1],
    )


def _without_wrappers(source: Weights, path: Path) -> Weights:
    """Remove the prefixes of modules around the transformer, and the student beside a teacher."""
    teacher = re.compile(r"^(module\.|model\.)?teacher\.")
    if any(teacher.match(name) for name in source):
        source = {teacher.sub("", n): v for n, v in source.items() if teacher.match(n)}
    source = {name.replace("_fsdp_wrapped_module.", ""): v for name, v in source.items()}
    while wrapper := next((w for w in _WRAPPERS if any(n.startswith(w) for n in source)), None):
        unwrapped: Weights = {}
        for name, value in source.items():
            if (short := name.removeprefix(wrapper)) in unwrapped:
                raise WeightsError(
                    f"{path} has two weights that are called {short!r} without {wrapper!r}; "
                    "expected one vision transformer. Save the encoder's weights alone."
                )
            unwrapped[short] = value
        source = unwrapped
    return source


def _of_transformers(source: Weights) -> Weights:
    renamed: Weights = {}
    for name, value in source.items():
        if name.startswith("pooler."):
            continue
        for pattern, ours in _TRANSFORMERS:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if renamed.keys() >= set(parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".query.", ".qkv.")] = joined
    return renamed


def _of_dinov2(source: Weights) -> Weights:
    """Rename from DINOv2's own code; other names stay."""
    renamed: Weights = {}
    for name, value in source.items():
        # Blocks in chunks: blocks.CHUNK.INDEX, where the index counts through all chunks.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        name = re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", name)
        renamed[re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", name)] = value
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        token, positions = renamed.get("cls_token"), renamed.get("pos_embed")
        shapes = [value.shape[2:] for value in (token, positions) if value is not None]
        if token is not None and positions is not None and shapes[0] and shapes[0] == shapes[1]:
            renamed["cls_token"] = token + positions[:, :1]
            renamed["pos_embed"] = positions[:, 1:]
    return renamed
