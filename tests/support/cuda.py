"""CUDA in tests, which skip with the reason where ONNX Runtime does not run on a GPU."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from serve.contract import cuda
from serve.inference.probe import probe

_MEBIBYTE = 2**20


@cache
def _problem() -> str | None:
    if not cuda.is_built_in():
        return "the installed ONNX Runtime has no CUDA"
    return probe("cuda").problem


def needs_cuda() -> None:
    """Skip the test where ONNX Runtime does not run on a GPU."""
    found = _problem()
    if found is not None:
        pytest.skip(found)


@contextmanager
def nearly_full_gpu(left_mib: int) -> Iterator[None]:
    """Take the GPU's memory, as another process would, but for `left_mib`."""
    runtime = ctypes.CDLL(_loaded("libcudart.so"))
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    place = ctypes.c_void_p()
    taken = ctypes.c_size_t(free.value - left_mib * _MEBIBYTE)
    assert runtime.cudaMalloc(ctypes.byref(place), taken) == 0
    try:
        yield
    finally:
        assert runtime.cudaFree(place) == 0


def _loaded(name: str) -> str:
    """Path of a library that this process has loaded."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return next(line.split()[-1] for line in maps if f"/{name}" in line)
