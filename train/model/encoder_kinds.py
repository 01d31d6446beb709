"""The published pathology encoders that have a short name: architecture and preprocessing of each.

To add one, add an entry to `ENCODER_KINDS`. The command line (`--pathology-encoder NAME`), the
licences in checkpoints and the table in docs/encoders.md follow from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from train.settings import ModelSettings

Rgb = tuple[float, float, float]
TimmArgs = Mapping[str, bool | int | float | str]

_HALF: Rgb = (0.5, 0.5, 0.5)
_IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
_IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)
_OPTIMUS_MEAN: Rgb = (0.707223, 0.578729, 0.703617)
_OPTIMUS_STD: Rgb = (0.211883, 0.230117, 0.177517)
_HIBOU_MEAN: Rgb = (0.7068, 0.5755, 0.722)
_HIBOU_STD: Rgb = (0.195, 0.2316, 0.1816)

_SWIGLU: TimmArgs = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_LAYER_SCALE: TimmArgs = {"init_values": 1e-5}
_NON_COMMERCIAL = "CC-BY-NC-ND 4.0 (no commercial use, no derivatives)"
_OWKIN = "Owkin's non-commercial licence"


@dataclass(frozen=True, kw_only=True)
class EncoderKind:
    """A published encoder: how timm builds it, and what its inputs look like."""

    title: str
    architecture: str
    """timm's name."""
    args: TimmArgs = field(default_factory=dict)
    """Arguments that differ from the architecture's own."""
    mean: Rgb = _IMAGENET_MEAN
    """Of its RGB inputs, in [0, 1]."""
    std: Rgb = _IMAGENET_STD
    positions: Literal["timm", "dino"] = "timm"
    """How its authors resize position embeddings, see `ModelSettings.pathology_positions`."""
    licence: str
    """As its page on `source` states it."""
    source: str
    """Where its authors publish the weights."""


ENCODER_KINDS: dict[str, EncoderKind] = {
    "hipt": EncoderKind(
        title="HIPT ViT-S/16",
        architecture="vit_small_patch16_224",
        mean=_HALF,
        std=_HALF,
        positions="dino",
        licence="Apache-2.0 with the Commons Clause (no sale)",
        source="github.com/mahmoodlab/HIPT",
    ),
    "uni": EncoderKind(
        title="UNI",
        architecture="vit_large_patch16_224",
        args=_LAYER_SCALE,
        licence=_NON_COMMERCIAL,
        source="huggingface.co/MahmoodLab/UNI",
    ),
    "uni2-h": EncoderKind(
        title="UNI2-h",
        architecture="vit_giant_patch14_224",
        args={
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "no_embed_class": True,
            "reg_tokens": 8,
            **_SWIGLU,
            **_LAYER_SCALE,
        },
        licence=_NON_COMMERCIAL,
        source="huggingface.co/MahmoodLab/UNI2-h",
    ),
    "virchow2": EncoderKind(
        title="Virchow2",
        architecture="vit_huge_patch14_224",
        args={"mlp_ratio": 5.3375, "reg_tokens": 4, **_SWIGLU, **_LAYER_SCALE},
        licence=_NON_COMMERCIAL,
        source="huggingface.co/paige-ai/Virchow2",
    ),
    "h-optimus-0": EncoderKind(
        title="H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        args=_LAYER_SCALE,
        mean=_OPTIMUS_MEAN,
        std=_OPTIMUS_STD,
        licence="Apache-2.0",
        source="huggingface.co/bioptimus/H-optimus-0",
    ),
    "h-optimus-1": EncoderKind(
        title="H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        args=_LAYER_SCALE,
        mean=_OPTIMUS_MEAN,
        std=_OPTIMUS_STD,
        licence=_NON_COMMERCIAL,
        source="huggingface.co/bioptimus/H-optimus-1",
    ),
    "gigapath": EncoderKind(
        title="Prov-GigaPath",
        architecture="vit_giant_patch14_dinov2",
        args={"patch_size": 16, "mlp_ratio": 5.33334, **_LAYER_SCALE},
        licence="Prov-GigaPath's own licence",
        source="huggingface.co/prov-gigapath/prov-gigapath",
    ),
    "phikon": EncoderKind(
        title="Phikon",
        architecture="vit_base_patch16_224",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        licence=_OWKIN,
        source="huggingface.co/owkin/phikon",
    ),
    "phikon-v2": EncoderKind(
        title="Phikon-v2",
        architecture="vit_large_patch16_224",
        args=_LAYER_SCALE,
        licence=_OWKIN,
        source="huggingface.co/owkin/phikon-v2",
    ),
    "hibou-b": EncoderKind(
        title="Hibou-B",
        architecture="vit_base_patch14_reg4_dinov2",
        mean=_HIBOU_MEAN,
        std=_HIBOU_STD,
        licence="Apache-2.0",
        source="huggingface.co/histai/hibou-b",
    ),
    "hibou-l": EncoderKind(
        title="Hibou-L",
        architecture="vit_large_patch14_reg4_dinov2",
        mean=_HIBOU_MEAN,
        std=_HIBOU_STD,
        licence="Apache-2.0",
        source="huggingface.co/histai/hibou-L",
    ),
    "midnight": EncoderKind(
        title="Midnight-12k",
        architecture="vit_giant_patch14_dinov2",
        mean=_HALF,
        std=_HALF,
        licence="MIT",
        source="huggingface.co/kaiko-ai/midnight",
    ),
}

_KNOWN_FILES = {"vit256_small_dino.pth": "hipt"}
"""File names that only one published encoder has."""


def kind_of(model: ModelSettings, file_name: str | None = None) -> EncoderKind | None:
    """The published encoder that a short name or a file name means; None for any other."""
    known = _KNOWN_FILES.get(file_name or "", "")
    kind = ENCODER_KINDS.get(model.pathology_encoder)
    if kind is None and known and ENCODER_KINDS[known].architecture == model.pathology_encoder:
        kind = ENCODER_KINDS[known]
    return kind


def with_kind_written_out(model: ModelSettings) -> ModelSettings:
    """Write the arguments and preprocessing of a short name into the settings.

    What the settings already say stays. A checkpoint then keeps its meaning when the registry
    changes.
    """
    kind = ENCODER_KINDS.get(model.pathology_encoder)
    if kind is None:
        return model
    return replace(
        model,
        pathology_args={**kind.args, **model.pathology_args},
        pathology_mean=model.pathology_mean or kind.mean,
        pathology_std=model.pathology_std or kind.std,
        pathology_positions=model.pathology_positions or kind.positions,
    )
