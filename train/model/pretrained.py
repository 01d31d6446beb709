"""Published weights: SAM and pathology encoders (DINO, HIPT, timm).

Files are read with `weights_only=True` or as safetensors, so that opening one runs no code of it.
Every tensor of a file is loaded or left out for a stated reason; else the load is refused.
"""

import hashlib
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from train.errors import FocalPathError
from train.model.mask_decoder import MaskDecoder
from train.model.segmenter import Segmenter

Weights = dict[str, Tensor]

WHERE_TO_GET_WEIGHTS = """\
  SAM (Apache-2.0), linked from github.com/facebookresearch/segment-anything:
    sam_vit_b_01ec64.pth, or with --image-encoder vit_l or vit_h sam_vit_l_0b3195.pth or
    sam_vit_h_4b8939.pth
  HIPT ViT-S/16 (Apache-2.0 with Commons Clause: no sale): vit256_small_dino.pth, from
    github.com/mahmoodlab/HIPT
  UNI ViT-L/16 (CC-BY-NC-ND 4.0: no commercial use, no derivatives), after registration with
    huggingface.co/MahmoodLab/UNI; take --pathology-encoder vit_large_patch16_224
    --pathology-layer-scale --pathology-mean 0.485 0.456 0.406 --pathology-std 0.229 0.224 0.225"""

_NO_PROMPT = "prompts are not used"
_OTHER_NECK = "the fusion neck replaces it"
NOT_OURS_IN_SAM = {
    r"prompt_encoder\.(point_embeddings|not_a_point_embed|mask_downscaling)\b": _NO_PROMPT,
    r"image_encoder\.neck\.": _OTHER_NECK,
    r"pixel_(mean|std)$": "the model has its own",
}
_HEADS = {
    r"(head|fc_norm|head_drop|mask_token)\b": "the encoder's features are taken, not its head",
}


class _Inert:
    """Stands for an object beside the weights: made from anything, keeps and does nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _InertList(list[Any]):
    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*arguments: object) -> dict[Any, Any]:
    return {}


_INERT: dict[Any, tuple[str, ...]] = {
    # python-box and Lightning: the configuration in a Lightning file's hyper_parameters.
    OrderedDict: (
        "box.box.Box",
        "box.config_box.ConfigBox",
        "box.shorthand_box.SBox",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
    ),
    _InertList: ("box.box_list.BoxList",),
    _plain_dict: ("collections.defaultdict",),
    _Inert: (
        "argparse.Namespace",  # the command line that made a DINO file
        "pathlib.Path",
        "pathlib.PosixPath",
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        *("numpy.dtype", "numpy.ndarray"),
        *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "bool", "str")),
        *("typing.Any", "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
        *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
        *(
            f"omegaconf.nodes.{kind}Node"
            for kind in ("Any", "Integer", "Float", "Boolean", "String", "Path", "Enum", "Bytes")
        ),
    ),
}
"""What is read in the place of objects that say nothing about the weights, so that no code of
theirs runs, and none of it need be installed."""

_DAMAGED = (
    *(UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError, TypeError),
    *(ValueError, AttributeError, AssertionError, ArithmeticError, MemoryError, struct.error),
)
"""What a damaged file can make torch's reader raise."""


def read_weights(path: Path) -> dict[str, Any]:
    """Read a file of PyTorch's or of safetensors', whatever its name, running no code of it.

    Raises:
        FocalPathError: the file is missing, damaged, something else, or holds what is no tensor.
    """
    _refuse_missing(path)
    try:
        kind = _kind(path)
        if kind == "safetensors":
            return dict(load_file(path))
        if kind != "PyTorch":
            raise FocalPathError(
                f"{path} is {kind}; expected weights of PyTorch or safetensors. Download it again."
            )
        stand_ins = [(stand_in, name) for stand_in, names in _INERT.items() for name in names]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FocalPathError:
        raise
    except OSError as error:
        raise FocalPathError(
            f"{path} cannot be read: {error.strerror}. Check its access."
        ) from error
    except _DAMAGED as error:
        raise FocalPathError(f"{path} {_damage(error)}") from error
    if not isinstance(content, dict):
        raise FocalPathError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors by name"
        )
    return content


@cache
def weights_sha256(path: Path) -> str:
    """SHA-256 of a file of weights.

    Raises:
        FocalPathError: the file is missing.
    """
    _refuse_missing(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise FocalPathError(
            f"no weights at {path}. Download them first; where they come from:\n"
            f"{WHERE_TO_GET_WEIGHTS}"
        )


def _kind(path: Path) -> str:
    """What a file is by its first bytes: PyTorch, safetensors, or what it looks like instead."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "PyTorch"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    text = start.lstrip().lower()
    if not text:
        return "empty"
    for beginning, name in _OTHER_KINDS.items():
        if text.startswith(beginning):
            return name
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
    return "plain text" if is_text else "neither"


_OTHER_KINDS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file itself (`git lfs pull` gets it)",
    b"<": "an HTML or XML page, such as a download that needs a login gives",
    b"{": "JSON",
    b"[": "JSON",
    b"\x1f\x8b": "a gzip archive, to be unpacked first",
}


def _damage(error: BaseException) -> str:
    """Say in our words why a file cannot be read: torch advises to let it run its code."""
    needed = re.search(r"GLOBAL (\S+)", str(error))
    if needed:
        return (
            f"holds an object of {needed[1]}; expected tensors alone: a file that needs code to be "
            "opened is refused. Save its weights alone, with torch.save(model.state_dict(), ...)."
        )
    return (
        "is damaged or cut short; expected weights of PyTorch or safetensors. Download it again, "
        "and compare its checksum where one is published."
    )


def load_sam_weights(segmenter: Segmenter, path: Path) -> None:
    """Load SAM's published encoder, prompt and decoder weights, resized to the tile.

    Each mask token's hypernetwork starts as a copy of SAM's single-mask one, as in SAM-Path; the
    class tokens and the last layer of the IoU head start at random.

    Raises:
        FocalPathError: the file is not of this architecture.
    """
    source = tensors(read_weights(path), path)
    resize_image_encoder(source, segmenter)
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
    left_out = {**NOT_OURS_IN_SAM, **own_tokens}
    may_stay = {name for name in expected if re.match("|".join(own_tokens), name)}
    load_accounted(segmenter, source, expected - may_stay, left_out, path)


def load_pathology_weights(segmenter: Segmenter, path: Path) -> None:
    """Load a timm, DINO or HIPT vision transformer, position embeddings resized to the tile.

    Of a DINO training file the teacher is taken.

    Raises:
        FocalPathError: the file is not of this architecture.
    """
    source = tensors(_teacher(read_weights(path)), path)
    source = {re.sub(r"^(module\.)?(backbone\.)?", "", name): v for name, v in source.items()}
    vit = segmenter.pathology_encoder.vit
    resize_position_embedding(source, vit)
    load_accounted(vit, source, set(vit.state_dict()), _HEADS, path)


_SAM_PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
_MLPS = "mask_decoder.output_hypernetworks_mlps."
_MLP_0 = f"{_MLPS}0."


def _last_layer(segmenter: Segmenter) -> int:
    assert isinstance(segmenter.mask_decoder, MaskDecoder)
    return len(segmenter.mask_decoder.iou_prediction_head.layers) - 1


def _teacher(content: dict[str, Any]) -> dict[str, Any]:
    for key in ("teacher", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return dict(content[key])
    return content


def tensors(content: Any, path: Path) -> Weights:
    """Check that what a file holds is tensors by name.

    Raises:
        FocalPathError: it is something else.
    """
    if not isinstance(content, Mapping):
        raise FocalPathError(
            f"{path} has a {type(content).__name__} where a dictionary of tensors by name was "
            "expected. Give the weights' own file."
        )
    other = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if other or not content:
        raise FocalPathError(
            f"{path} has {', '.join(map(repr, other[:3])) or 'nothing'} where tensors were "
            "expected. Give the weights' own file."
        )
    return dict(content)


def resize_image_encoder(source: Weights, segmenter: Segmenter) -> None:
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


def resize_position_embedding(source: Weights, vit: Any) -> None:
    """Resize the position embedding of another tile size, in place."""
    value, target = source.get("pos_embed"), getattr(vit, "pos_embed", None)
    if value is None or target is None:
        return
    if value.shape == target.shape or value.shape[-1] != target.shape[-1]:
        return
    source["pos_embed"] = resample_abs_pos_embed(
        value, new_size=list(vit.patch_embed.grid_size), num_prefix_tokens=vit.num_prefix_tokens
    )


def load_accounted(
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
