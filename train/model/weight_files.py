"""Reads files of weights safely: PyTorch or safetensors, whatever their names.

PyTorch files are read with `weights_only=True`, so that no code in them runs.
"""

import errno
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from train.errors import WeightsError
from train.files import sha256_of

Weights = dict[str, Tensor]
"""Tensors by name."""

WHERE_TO_GET_WEIGHTS = """\
  SAM (Apache-2.0), linked from github.com/facebookresearch/segment-anything:
    sam_vit_b_01ec64.pth, or with --image-encoder vit_l or vit_h sam_vit_l_0b3195.pth or
    sam_vit_h_4b8939.pth
  HIPT ViT-S/16 (Apache-2.0 with Commons Clause: no sale): vit256_small_dino.pth, from
    github.com/mahmoodlab/HIPT
  UNI, UNI2-h, Virchow2, H-optimus, GigaPath, Phikon, Hibou, Midnight: see docs/encoders.md for the
    page, the licence (UNI: CC-BY-NC-ND 4.0, no commercial use) and the --pathology-encoder of
    each"""


class _Inert:
    """Stands in for an object beside the weights: accepts any arguments and ignores them."""

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
"""Replacements for objects that say nothing about the weights. None of their code runs, and their
packages need not be installed."""

DAMAGED = (
    *(UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError, TypeError),
    *(ValueError, AttributeError, AssertionError, ArithmeticError, MemoryError, struct.error),
    *(zipfile.BadZipFile, NotImplementedError),
)
"""What a damaged file can make torch's reader raise."""


def read_weights(path: Path) -> dict[str, Any]:
    """Read a PyTorch or safetensors file, whatever its name, without running code in it.

    Args:
        path: The file, or a folder with one file of weights in it.

    Raises:
        WeightsError: the file is missing, damaged, something else, or holds objects that are not
            tensors or plain values.
    """
    path = weights_file(path)
    try:
        kind = _kind(path)
        if kind == "safetensors":
            return dict(load_file(path))
        if kind != "PyTorch":
            raise WeightsError(
                f"{path} is {kind}; expected weights of PyTorch or safetensors. Download it again."
            )
        check_sums(path)
        stand_ins = [(stand_in, name) for stand_in, names in _INERT.items() for name in names]
        with (
            torch.serialization.safe_globals(stand_ins),  # type: ignore[arg-type]
            warnings.catch_warnings(action="ignore"),  # of pickles that torch did not write
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except (OSError, *DAMAGED) as error:
        # Looking for the end of a file that is cut short, torch asks for a place before its start.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise WeightsError(
                f"{path} cannot be read: {error.strerror}. Check its permissions."
            ) from error
        raise WeightsError(f"{path} {_damage(error)}") from error
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors by name"
        )
    return content


def check_sums(path: Path) -> None:
    """Compare what is in a PyTorch file with its checksums, which torch does not look at.

    Raises:
        zipfile.BadZipFile: something differs.
    """
    if not zipfile.is_zipfile(path):
        return  # of PyTorch before 1.6, which has none
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.CRC == 0:
                continue  # empty, or written without (torch.serialization.set_crc32_options)
            with archive.open(entry) as part:
                while part.read(_CHUNK_BYTES):
                    pass


@cache
def weights_sha256(path: Path) -> str:
    """SHA-256 of a file of weights, or of the one file of weights in a folder.

    Raises:
        WeightsError: the file is missing.
    """
    return sha256_of(weights_file(path))


def weights_file(path: Path) -> Path:
    """The file of weights at `path`: the file itself, or the one in a folder.

    Raises:
        WeightsError: there is none, or the folder has several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(
            f"no weights at {path}. Download them first; where they come from:\n"
            f"{WHERE_TO_GET_WEIGHTS}"
        )
    for name in _NAMES_IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    found = sorted(file for ending in _ENDINGS for file in path.glob(f"*{ending}"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise WeightsError(
            f"{path} has {len(found)} files of weights ({names}); expected "
            f"{' or '.join(_NAMES_IN_FOLDERS)}. Give the path of the file itself."
        )
    return found[0]


_DTYPES = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32)
)
"""Whole numbers of 32 and 64 bits are counters and indices; shorter ones are quantised weights."""
_CHUNK_BYTES = 2**24
_NAMES_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")


def _kind(path: Path) -> str:
    """Recognise a file by its first bytes: PyTorch, safetensors, or what else it seems to be."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[:4] == b"PK\x03\x04":
        return _kind_of_archive(path)
    if start[:1] == b"\x80":
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


def _kind_of_archive(path: Path) -> str:
    """What a zip archive is, as `_kind`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        return "PyTorch"  # cut short
    if "constants.pkl" in names:
        return "a TorchScript program, not weights alone (save its state_dict())"
    return "PyTorch" if "data.pkl" in names else "a zip archive of something else"


_OTHER_KINDS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file itself (`git lfs pull` gets it)",
    b"<": "an HTML or XML page, such as a download that needs a login gives",
    b"{": "JSON",
    b"[": "JSON",
    b"\x1f\x8b": "a gzip archive, to be unpacked first",
}


def _damage(error: BaseException) -> str:
    """Say why a file cannot be read. torch's own message would advise to allow its code."""
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


def tensors(content: Any, path: Path) -> Weights:
    """Check that the content of a file is a dictionary of tensors by name.

    Raises:
        WeightsError: it is something else, or empty.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} has a {type(content).__name__} where a dictionary of tensors by name was "
            "expected. Give the weights' own file."
        )
    other = [
        name
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if other or not content:
        raise WeightsError(
            f"{path} has {', '.join(map(repr, other[:3])) or 'nothing'} where tensors were "
            "expected. Give the weights' own file."
        )
    for name, value in content.items():
        if value.dtype not in _DTYPES or value.layout != torch.strided or value.is_meta:
            form = "without content" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise WeightsError(
                f"{path} has weights that cannot be used as they are stored ({name} is {form}); "
                "expected dense ones of 16 bits or more. Save them so, or take the original file."
            )
    return dict(content)


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Tell of each name that one of both lacks, or whose shapes differ."""
    shapes, wanted = (
        {name: tuple(value.shape) for name, value in weights.items()}
        for weights in (found, expected)
    )
    return [
        f"{name} is {shapes.get(name, 'missing')}, expected {wanted.get(name, 'no such weight')}"
        for name in wanted | shapes
        if shapes.get(name) != wanted.get(name)
    ]
