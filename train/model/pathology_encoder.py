"""The pathology encoder: any timm vision transformer, run densely on the whole tile."""

import re
from difflib import get_close_matches
from typing import Any, cast

import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import EncoderError
from train.model.encoder_kinds import ENCODER_KINDS, with_kind_written_out
from train.model.image_encoder import PATCH_SIZE
from train.settings import ModelSettings

PATCH_SIZES = (14, 16)
"""Patches of 14 pixels see the tile at 14/16 of its side, so that there are as many as SAM's."""
_LAYER_SCALE = 1e-5
"""Where LayerScale starts, as in DINOv2 and UNI."""
MLP_LAYERS = {
    name: getattr(timm.layers, name) for name in ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked")
}
"""What timm's argument `mlp_layer` can be, by the names that settings can hold."""


class PathologyEncoder(nn.Module):
    """A timm ViT whose patch tokens are laid out as an image.

    The class, register and other prefix tokens take part in the attention and are dropped at the
    end. SAM-Path (arXiv 2307.09570) takes HIPT's ViT-S/16, a DINO ViT-S.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: ModelSettings) -> None:
        """Build the encoder with random weights.

        Raises:
            EncoderError: timm does not know it, or it is not a vision transformer that fits.
        """
        super().__init__()
        model = with_kind_written_out(model)
        self.vit = _create(model)
        self.embed_dim: int = self.vit.num_features
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.positions = model.pathology_positions
        given = {"mean": model.pathology_mean, "std": model.pathology_std}
        for buffer, values in given.items():
            values = values or self.vit.pretrained_cfg[buffer]
            scaled = 255 * torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1)
            self.register_buffer(buffer, scaled, persistent=False)
        _check_grid(self, model)

    def forward(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) float32, RGB in [0, 255], to (B, D, H/16, W/16)."""
        batch, _, height, width = images.shape
        grid = (height // PATCH_SIZE, width // PATCH_SIZE)
        images = (images - self.mean) / self.std
        if self.patch_size != PATCH_SIZE:
            size = [side * self.patch_size for side in grid]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        tokens: Tensor = self.vit.forward_features(images)
        patches = tokens[:, self.vit.num_prefix_tokens :]  # B x (H/16 * W/16) x D
        return patches.transpose(1, 2).reshape(batch, self.embed_dim, *grid)

    def patch_kernel(self) -> Tensor:
        """The patch embedding's weights on the tile's own pixels, (D, 3, 16, 16).

        Bilinear interpolation from 16 to 14 pixels takes every pixel of a patch of 14 from the same
        16 pixels of the tile. So resizing and the patch embedding are one convolution, exactly.
        """
        kernel: Tensor = self.vit.patch_embed.proj.weight
        if self.patch_size == PATCH_SIZE:
            return kernel
        pixels = torch.eye(PATCH_SIZE, dtype=kernel.dtype, device=kernel.device)[None]
        resize = F.interpolate(pixels, self.patch_size, mode="linear", align_corners=False)[0]
        return resize @ kernel @ resize.T  # 16 x 14 on both sides


def timm_args(model: ModelSettings) -> dict[str, Any]:
    """The arguments of timm's that the settings stand for, by their names there."""
    args: dict[str, Any] = dict(model.pathology_args)
    if model.pathology_encoder_depth is not None:
        args["depth"] = model.pathology_encoder_depth
    if model.pathology_layer_scale:
        args.setdefault("init_values", _LAYER_SCALE)
    return args


def architecture(model: ModelSettings) -> str:
    """The encoder's name in timm."""
    kind = ENCODER_KINDS.get(model.pathology_encoder)
    return model.pathology_encoder if kind is None else kind.architecture


def _create(model: ModelSettings) -> Any:
    """Create timm's model.

    Raises:
        EncoderError: timm does not know it or its arguments, or it is not such a transformer.
    """
    name, args = architecture(model), timm_args(model)
    if not timm.is_model(name):
        known = [*ENCODER_KINDS, *timm.list_models("*patch1[46]*")]
        close = get_close_matches(name, known, n=3)
        raise EncoderError(
            f"timm has no model {name!r}; expected a published encoder "
            f"({', '.join(ENCODER_KINDS)}) or a vision transformer of timm's with patches of 14 or "
            f"16 pixels, such as {', '.join(close) or 'vit_small_patch16_224'}"
        )
    patch_size = _patch_size(name, args)
    if "mlp_layer" in args:
        args["mlp_layer"] = _mlp_layer(args["mlp_layer"])
    try:
        img_size = model.tile_size_px // PATCH_SIZE * patch_size
        vit = cast(Any, timm.create_model(name, img_size=img_size, num_classes=0, **args))
        found = tuple(vit.patch_embed.patch_size)
        _ = vit.num_prefix_tokens  # where there is none, there are no tokens
    except (TypeError, AttributeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise EncoderError(
            f"{name} is not a plain vision transformer of timm's, or not with these settings "
            f"({error}); expected one that turns patches of 14 or 16 pixels into tokens, such as "
            "vit_small_patch16_224"
        ) from error
    if found != (patch_size, patch_size):
        raise EncoderError(
            f"{name} cuts patches of {' x '.join(map(str, found))} pixels where {patch_size} were "
            "expected. Take another model."
        )
    return vit


def _patch_size(name: str, args: dict[str, Any]) -> int:
    """The side of a patch, by the arguments or the model's name.

    Raises:
        EncoderError: it is neither 14 nor 16.
    """
    in_name = re.search(r"patch(\d+)", name)
    size = args.get("patch_size", int(in_name[1]) if in_name else PATCH_SIZE)
    if size not in PATCH_SIZES:
        raise EncoderError(
            f"{name} cuts patches of {size} pixels; expected 14 or 16, so that they join SAM's. "
            "Take a model with patch14 or patch16 in its name."
        )
    return int(size)


def _mlp_layer(name: object) -> Any:
    if name not in MLP_LAYERS:
        raise EncoderError(
            f"pathology_args has mlp_layer {name!r}; expected one of {', '.join(MLP_LAYERS)}"
        )
    return MLP_LAYERS[str(name)]


def _check_grid(encoder: PathologyEncoder, model: ModelSettings) -> None:
    """Refuse an encoder whose tokens are not the tile's grid, by its shapes alone.

    Raises:
        EncoderError: it fails on an image of this size, or gives other tokens.
    """
    with torch.device("meta"):
        image = torch.empty(1, 3, model.tile_size_px, model.tile_size_px)
    tensors = (*encoder.named_parameters(), *encoder.named_buffers())
    try:
        with torch.no_grad():
            torch.func.functional_call(encoder, {n: v.to("meta") for n, v in tensors}, (image,))
    except (RuntimeError, AssertionError, TypeError, ValueError, AttributeError) as error:
        raise EncoderError(
            f"{model.pathology_encoder} cannot turn a tile of {model.tile_size_px} pixels into one "
            f"token per 16 x 16 pixels ({error}). Take another encoder, or another --tile-size-px."
        ) from error
