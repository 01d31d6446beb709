"""SAM's image encoder (arXiv 2304.02643), taken before its neck."""

from typing import Any, Literal

from segment_anything.modeling import ImageEncoderViT
from torch import nn

PATCH_SIZE = 16

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 128, "depth": 4, "num_heads": 4, "global_attn_indexes": (1, 3)},
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "global_attn_indexes": (5, 11, 17, 23),
    },
    "vit_h": {
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "global_attn_indexes": (7, 15, 23, 31),
    },
}


def build_image_encoder(
    size: Literal["tiny", "vit_b", "vit_l", "vit_h"], tile_size_px: int
) -> tuple[nn.Module, int]:
    """Build SAM's ViT without its neck.

    Returns:
        The encoder, (B, 3, H, W) float32 normalised to (B, D, H/16, W/16), and D.
    """
    values = _SIZES[size]
    encoder = ImageEncoderViT(
        img_size=tile_size_px,
        patch_size=PATCH_SIZE,
        mlp_ratio=4,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=14 if size != "tiny" else 8,
        norm_layer=_norm_layer,
        **values,
    )
    encoder.neck = nn.Identity()
    return encoder, values["embed_dim"]


def size_of_image_encoder(embed_dim: int) -> str | None:
    """The name of the encoder with so many channels; None where there is none."""
    names = [name for name, values in _SIZES.items() if values["embed_dim"] == embed_dim]
    return names[0] if names else None


def _norm_layer(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)
