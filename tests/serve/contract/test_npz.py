import ast
import gc
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from serve.contract.npz import read_npz


@pytest.fixture
def collected_often() -> Iterator[None]:
    """Have CPython 3.11 collect garbage at each object of a syntax tree."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


def npz(save: Callable[..., None] = np.savez) -> bytes:
    buffer = io.BytesIO()
    save(buffer, labels=np.arange(6), name=np.array("crypt"))
    return buffer.getvalue()


@pytest.mark.usefixtures("collected_often")
def test_another_thread_that_parses_meanwhile_does_no_harm() -> None:
    parsed = []

    def parse_elsewhere(phase: str, _: object) -> None:
        """What a collection may do: run code that lets another thread run."""
        if phase == "start" and len(parsed) < 3 and sys._getframe(1).f_code is ast.parse.__code__:
            parsed.append(phase)
            thread = Thread(target=ast.literal_eval, args=("[1]",))
            thread.start()
            thread.join()

    content = io.BytesIO(npz())
    gc.callbacks.append(parse_elsewhere)
    try:
        arrays = read_npz(content)
    finally:
        gc.callbacks.remove(parse_elsewhere)
    assert parsed or sys.version_info >= (3, 12), "nothing was parsed meanwhile"
    assert arrays["labels"].tolist() == list(range(6))
    assert arrays["name"] == "crypt"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_one_error(save: Callable[..., None]) -> None:
    content = npz(save)
    refused = 0
    for place in range(len(content)):
        for value in (0, 0xFF):
            damaged = content[:place] + bytes([value]) + content[place + 1 :]
            try:
                read_npz(io.BytesIO(damaged))
            except (OSError, ValueError):
                refused += 1
    assert refused > len(content)


def member(name: str, content: bytes) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    buffer.seek(0)
    return buffer


def array_of_shape(shape: str) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"abc"


@pytest.mark.parametrize("shape", [f"({2**50},)", f"({2**70},)", "(-3,)", "3", "((((3", "{}"])
def test_a_shape_that_cannot_be_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_npz(member("labels.npy", array_of_shape(shape)))


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is no array"):
        read_npz(member("name", b"crypt"))
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(ValueError, match="a single array"):
        read_npz(tmp_path / "one.npy")
    (tmp_path / "none.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="No data"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "other.npz")


def test_python_objects_are_not_read() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, labels=np.array([{}], object))
    buffer.seek(0)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_npz(buffer)
