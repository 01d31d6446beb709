"""A folder with a pathology encoder's weights and its config.json, timm's or transformers'."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.contract.json_text import parse_json
from train.errors import WeightsError

CONFIG_FILE = "config.json"
_PREPROCESSOR_FILE = "preprocessor_config.json"

Rgb = tuple[float, float, float]

_DECIDED_HERE = (
    *("img_size", "num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad"),
    *("strict_img_size", "drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate"),
    *("proj_drop_rate", "attn_drop_rate", "weight_init", "fix_init", "in_chans", "output_fmt"),
)
"""Arguments of timm's that the segmenter decides, or that only matter in pretraining."""
_SAME_IN_TIMM = {"gelu", "gelu_python"}
_NORM_EPSILON = 1e-6
"""Of timm's vision transformers."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What a config.json says about the encoder beside it."""

    architecture: str
    """timm's name."""
    args: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    mean: Rgb | None = None
    std: Rgb | None = None
    licence: str | None = None


def read_encoder_config(folder: Path) -> EncoderConfig | None:
    """Read a folder's config.json; None where there is none.

    Raises:
        WeightsError: it cannot be read, or is not a config of timm's or of transformers' ViT.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    config = _read_json(path)
    if "architecture" in config:
        return _of_timm(config, path)
    if "model_type" in config:
        return _of_transformers(config, path)
    raise WeightsError(
        f"{path} has neither 'architecture' (timm's) nor 'model_type' (transformers'); expected "
        "the config.json that was published with the weights. Give the file of weights itself and "
        "--pathology-encoder to do without."
    )


def _of_timm(config: dict[str, Any], path: Path) -> EncoderConfig:
    pretrained = config.get("pretrained_cfg", config)
    args = config.get("model_args", {})
    if not isinstance(pretrained, dict) or not isinstance(args, dict):
        raise WeightsError(f"{path} has no objects in pretrained_cfg and model_args; see timm's.")
    if args.get("in_chans", 3) != 3:
        raise WeightsError(
            f"{path} has in_chans {args['in_chans']}; expected 3, an encoder of RGB images"
        )
    kept = {name: value for name, value in args.items() if name not in _DECIDED_HERE}
    kept = {name: value for name, value in kept.items() if value is not None}
    odd = [name for name, value in kept.items() if not isinstance(value, bool | int | float | str)]
    if odd:
        raise WeightsError(
            f"{path} has model_args {odd[0]} = {kept[odd[0]]!r}; expected numbers, words, true or "
            "false. Give the file of weights itself, and --pathology-args."
        )
    return EncoderConfig(
        architecture=str(config["architecture"]),
        args=kept,
        mean=_rgb(pretrained.get("mean"), "mean", path),
        std=_rgb(pretrained.get("std"), "std", path),
        licence=pretrained.get("license"),
    )


def _of_transformers(config: dict[str, Any], path: Path) -> EncoderConfig:
    """A ViTModel or Dinov2Model of transformers (Phikon, Hibou, Midnight), as timm builds it."""
    kind = config["model_type"]
    is_dinov2 = str(kind).startswith("dinov2")
    if kind != "vit" and not is_dinov2:
        raise WeightsError(
            f"{path} has the model_type {kind!r}; expected vit, dinov2 or dinov2_with_registers"
        )
    activation, epsilon = config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12)
    if activation not in _SAME_IN_TIMM or epsilon != _NORM_EPSILON:
        raise WeightsError(
            f"{path} has hidden_act {activation!r} and layer_norm_eps {epsilon}; timm's vision "
            f"transformers have gelu and {_NORM_EPSILON:g}, so their features would differ. "
            "Convert the weights to timm's format first."
        )
    try:
        args: dict[str, bool | int | float | str] = {
            "patch_size": int(config["patch_size"]),
            "embed_dim": int(config["hidden_size"]),
            "depth": int(config["num_hidden_layers"]),
            "num_heads": int(config["num_attention_heads"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is not complete ({type(error).__name__}: {error}); expected patch_size, "
            "hidden_size, num_hidden_layers and num_attention_heads"
        ) from error
    if not config.get("qkv_bias", True):
        args["qkv_bias"] = False
    preprocessor = path.with_name(_PREPROCESSOR_FILE)
    inputs = _read_json(preprocessor) if preprocessor.is_file() else {}
    return EncoderConfig(
        architecture="vit_base_patch16_224",
        # The widths of the MLP, LayerScale and registers are read off the weights.
        args=args,
        mean=_rgb(inputs.get("image_mean"), "image_mean", preprocessor),
        std=_rgb(inputs.get("image_std"), "image_std", preprocessor),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _rgb(value: object, name: str, path: Path) -> Rgb | None:
    if value is None:
        return None
    is_rgb = isinstance(value, list) and len(value) == 3
    if not is_rgb or not all(isinstance(n, int | float) and 0 <= n <= 1 for n in value):  # type: ignore[attr-defined]
        raise WeightsError(
            f"{path} has {name} {value!r}; expected three numbers in [0, 1], of RGB in [0, 1]"
        )
    red, green, blue = map(float, value)  # type: ignore[call-overload]
    return red, green, blue
