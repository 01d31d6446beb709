"""The encoder that is pretrained, a plain timm vision transformer, and its folder.

ENCODER/model.safetensors, config.json   timm.create_model("local-dir:ENCODER", pretrained=True)
ENCODER/README.md                        what it is, what it was trained on, what it is not
"""

from pathlib import Path
from typing import Any, cast

import timm
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from train.errors import EncoderError, SettingsError
from train.model.encoder_folder import read_encoder_config
from train.model.pathology_encoder import PATCH_SIZES
from train.model.pretrained import NOT_OURS_IN_VIT, load_accounted, resize_position_embedding
from train.model.weight_files import read_weights, weights_file
from train.model.weight_names import as_timm
from train.pretraining.settings import PretrainSettings

_LAYER_SCALE = 1e-5
CARD_FILE = "README.md"


def create_encoder(settings: PretrainSettings, *, drop_path: float = 0.0) -> nn.Module:
    """Create the encoder with random weights, for any image whose side is a multiple of the patch.

    Raises:
        EncoderError: timm does not know it, or it is not such a vision transformer.
        SettingsError: views are no whole number of patches.
    """
    encoder = settings.encoder
    if not timm.is_model(encoder.encoder):
        raise EncoderError(
            f"timm has no model {encoder.encoder!r}; expected a vision transformer such as "
            "vit_small_patch16_224. Change --encoder."
        )
    config = timm.get_pretrained_cfg(encoder.encoder)
    side = settings.views.view_px
    overlay = {
        "tag": "",
        "url": "",
        "hf_hub_id": None,
        "file": "",
        "input_size": (3, side, side),
        "mean": config.mean if config else (0.5, 0.5, 0.5),
        "std": config.std if config else (0.5, 0.5, 0.5),
        "license": "apache-2.0",
    }
    try:
        vit = timm.create_model(
            encoder.encoder,
            num_classes=0,
            drop_path_rate=drop_path,
            pretrained_cfg_overlay=overlay,
            **architecture(settings),
        )
    except (TypeError, AttributeError, ValueError, AssertionError) as error:
        raise EncoderError(
            f"{encoder.encoder} cannot be pretrained with these settings ({error}); expected a "
            "plain vision transformer of timm's, such as vit_small_patch16_224"
        ) from error
    _check(vit, settings)
    return vit


def _check(vit: nn.Module, settings: PretrainSettings) -> None:
    """Refuse an encoder that cannot be distilled or handed on, and views that it cannot cut.

    Raises:
        EncoderError: it is no plain vision transformer with a class token and patches of 14 or 16.
        SettingsError: views are no whole number of patches.
    """
    name = settings.encoder.encoder
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token:
        raise EncoderError(
            f"{name} is a {type(vit).__name__}, perhaps without a class token; expected a plain "
            "vision transformer of timm's with one, such as vit_small_patch16_224"
        )
    size = patch_size(vit)
    if size not in PATCH_SIZES:
        raise EncoderError(
            f"{name} cuts patches of {size} pixels; expected 14 or 16, which the segmenter takes. "
            "Take a model with patch14 or patch16 in its name."
        )
    views = settings.views
    sides = {"view_px": views.view_px, "local_px": views.local_px if views.num_local else size}
    for side, pixels in sides.items():
        if pixels % size:
            raise SettingsError(
                f"{side} is {pixels}; expected a multiple of the {size} pixels of a patch of "
                f"{name}. Change --{side.replace('_', '-')}, for example to "
                f"{max(1, round(pixels / size)) * size}."
            )


def load_encoder(vit: nn.Module, path: Path) -> None:
    """Start from published weights: timm's, DINO's or HIPT's file, or an encoder's folder.

    Position embeddings are resized to the views; a folder's config.json also says the mean and
    deviation of the inputs.

    Args:
        vit: the encoder of `create_encoder`; receives them.
        path: the file or folder.

    Raises:
        WeightsError: they cannot be read, or are not of this architecture.
    """
    file = weights_file(path)
    weights = as_timm(read_weights(file), file)
    source = dict(weights.tensors)
    resize_position_embedding(source, vit, weights.positions, file)
    load_accounted(vit, source, set(vit.state_dict()), NOT_OURS_IN_VIT, file)
    if path.is_dir() and (config := read_encoder_config(path)) is not None:
        stated = {"mean": config.mean, "std": config.std}
        known = {name: value for name, value in stated.items() if value is not None}
        cast(Any, vit).pretrained_cfg = {**cast(Any, vit).pretrained_cfg, **known}


def architecture(settings: PretrainSettings) -> dict[str, Any]:
    """How the encoder differs from the named architecture. timm needs this to build it again."""
    encoder = settings.encoder
    given = {
        "depth": encoder.depth,
        "embed_dim": encoder.embed_dim,
        "num_heads": encoder.num_heads,
        "init_values": _LAYER_SCALE if encoder.layer_scale else None,
    }
    different = {name: value for name, value in given.items() if value is not None}
    return {"img_size": settings.views.view_px, "dynamic_img_size": True, **different}


def patch_size(vit: nn.Module) -> int:
    """Side of the encoder's patches in pixels.

    Raises:
        EncoderError: patches are not square.
    """
    height, width = cast(Any, vit).patch_embed.patch_size
    if height != width:
        raise EncoderError(f"the encoder's patches are {height} x {width}; expected squares")
    return int(height)


def write_encoder(vit: nn.Module, folder: Path, settings: PretrainSettings, card: str) -> None:
    """Write the folder that timm opens with `local-dir:`.

    Args:
        vit: the teacher's encoder.
        folder: where to; it must not exist yet, or be an earlier encoder's.
        settings: of the run.
        card: Markdown for people.
    """
    save_for_hf(vit, str(folder), model_args=architecture(settings), safe_serialization=True)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
