"""SAM's image encoder (arXiv 2304.02643), taken before its neck, and our small ones.

Shape letters: B images, H x W pixels, h = H/16, w = W/16, D channels.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from train.model.image_attention import ImageAttention
from train.settings import ImageEncoderName

PATCH_SIZE = 16

SKIP_STRIDES = (8, 4)
"""Pixels of the image for one of a skip connection's, in the decoder's order: it enlarges its maps
to an eighth, and then to a quarter of the image's side."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoderKind:
    """An image encoder: SAM's transformer in some size."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    window_size: int = 14
    stem_dims: tuple[int, ...] = field(default=())
    """Channels of a convolutional stem at a half, a quarter, an eighth and a sixteenth of the
    image's side. Without them, one linear layer embeds each patch, as in SAM."""
    has_skips: bool = False
    """Whether the decoder also takes the stem's maps at `SKIP_STRIDES`."""

    @property
    def skip_dims(self) -> tuple[int, ...]:
        """Channels of each skip connection, one per entry of `SKIP_STRIDES`; none without them."""
        return tuple(self.stem_dims[stage_of(s)] for s in SKIP_STRIDES) if self.has_skips else ()


_TINY_CONV = ImageEncoderKind(
    embed_dim=128,
    depth=2,
    num_heads=4,
    global_attn_indexes=(1,),
    window_size=8,
    stem_dims=(24, 48, 96, 128),
)

IMAGE_ENCODERS: dict[ImageEncoderName, ImageEncoderKind] = {
    "tiny": ImageEncoderKind(
        embed_dim=128, depth=4, num_heads=4, global_attn_indexes=(1, 3), window_size=8
    ),
    "tiny_conv": _TINY_CONV,
    "tiny_pyramid": replace(_TINY_CONV, has_skips=True),
    "vit_b": ImageEncoderKind(
        embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)
    ),
    "vit_l": ImageEncoderKind(
        embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)
    ),
    "vit_h": ImageEncoderKind(
        embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)
    ),
}


class ConvolutionalStem(nn.Module):
    """Embeds patches with small strided convolutions instead of one linear layer.

    A transformer that starts from random weights then learns faster and from less data ("Early
    Convolutions Help Transformers See Better", arXiv 2106.14881). The residual convolution behind
    each stride is our choice, and so is the instance norm in place of the paper's batch norm: it
    takes each tile's own stain out, which few patients cannot teach.
    """

    def __init__(self, dims: tuple[int, ...], embed_dim: int) -> None:
        """Build one stage per entry of `dims`; each halves the side of the image."""
        super().__init__()
        inputs = (3, *dims[:-1])
        # Not called `blocks`: those are the transformer's, by which half precision is decided.
        self.stages = nn.Sequential(
            *(_Stage(size, dim) for size, dim in zip(inputs, dims, strict=True))
        )
        self.proj = nn.Conv2d(dims[-1], embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W) float32 as (B, h, w, D), as SAM's patch embedding does."""
        return self.embed(self.maps(images)[-1])

    def maps(self, images: Tensor) -> list[Tensor]:
        """Every stage's output, (B, D_stage, H/2, W/2) to (B, D_stage, H/16, W/16)."""
        found: list[Tensor] = []
        for stage in self.stages:
            images = stage(images)
            found.append(images)
        return found

    def embed(self, coarsest: Tensor) -> Tensor:
        """Tokens (B, h, w, D) of the last stage's output."""
        embedded: Tensor = self.proj(coarsest)
        return embedded.permute(0, 2, 3, 1)


class PyramidEncoder(ImageEncoderViT):  # type: ignore[misc]
    """SAM's encoder behind a convolutional stem whose finer maps go to the decoder, too.

    A token of 16 x 16 pixels has little room for where a boundary runs, and nothing tells it before
    training what to keep. Skip connections past the transformer keep it, as in a U-Net (arXiv
    1505.04597) and as SAM 2 gives its mask decoder maps at strides 4 and 8 (arXiv 2408.00714).
    """

    def forward(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) float32, normalised.

        Returns:
            (B, D + sum of skip channels, h, w): the tokens, then each map of `SKIP_STRIDES` with
            the pixels of a token side by side as channels.
        """
        maps = self.patch_embed.maps(images)
        tokens = self.patch_embed.embed(maps[-1])
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        skips = [
            pixel_unshuffle(maps[stage_of(stride)], PATCH_SIZE // stride) for stride in SKIP_STRIDES
        ]
        return torch.cat([tokens.permute(0, 3, 1, 2), *skips], dim=1)


def stage_of(stride: int) -> int:
    """The stem's stage whose map has one pixel for `stride` pixels of the image."""
    return stride.bit_length() - 2


class _Stage(nn.Module):
    """Halves the side, then adds a 3 x 3 convolution of the result."""

    def __init__(self, num_inputs: int, dim: int) -> None:
        super().__init__()
        self.reduce = convolution(num_inputs, dim, stride=2)
        self.refine = convolution(dim, dim, stride=1)

    def forward(self, images: Tensor) -> Tensor:
        reduced: Tensor = self.reduce(images)
        return reduced + self.refine(reduced)  # type: ignore[no-any-return]


def convolution(num_inputs: int, dim: int, *, stride: int) -> nn.Sequential:
    """A 3 x 3 convolution with an instance norm, (B, num_inputs, H, W) to (B, dim, H/s, W/s)."""
    return nn.Sequential(
        nn.Conv2d(num_inputs, dim, 3, stride=stride, padding=1, bias=False),
        nn.InstanceNorm2d(dim, affine=True),
        nn.ReLU(),
    )


def build_image_encoder(size: ImageEncoderName, tile_size_px: int) -> nn.Module:
    """Build SAM's ViT without its neck.

    Returns:
        The encoder, (B, 3, H, W) float32 normalised to (B, D, H/16, W/16). Behind its D channels,
        one with skip connections has theirs (see `PyramidEncoder`).
    """
    kind = IMAGE_ENCODERS[size]
    encoder = (PyramidEncoder if kind.has_skips else ImageEncoderViT)(
        img_size=tile_size_px,
        patch_size=PATCH_SIZE,
        mlp_ratio=4,
        qkv_bias=True,
        use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        embed_dim=kind.embed_dim,
        depth=kind.depth,
        num_heads=kind.num_heads,
        global_attn_indexes=kind.global_attn_indexes,
        window_size=kind.window_size,
    )
    if kind.stem_dims:
        encoder.patch_embed = ConvolutionalStem(kind.stem_dims, kind.embed_dim)
    encoder.neck = nn.Identity()
    for block in encoder.blocks:
        block.attn.__class__ = ImageAttention  # has SAM's weights and no state of its own
    return encoder


def size_of_image_encoder(embed_dim: int) -> str | None:
    """The name of the encoder with this many channels; None if there is none."""
    return next((n for n, kind in IMAGE_ENCODERS.items() if kind.embed_dim == embed_dim), None)
