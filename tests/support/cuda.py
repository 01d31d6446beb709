"""CUDA in tests, which skip with the reason where ONNX Runtime does not run on a GPU."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from serve.contract import cuda
from serve.inference.probe import probe

MEBIBYTE = 2**20


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


def free_memory() -> int:
    """Bytes of the GPU's memory that nobody has taken."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert _runtime().cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


@contextmanager
def nearly_full_gpu(left_mib: int) -> Iterator[None]:
    """Take the GPU's memory, as another process would, but for about `left_mib`.

    Memory is in pieces, so what is not to be had at once is taken in smaller and smaller parts. One
    that is refused leaves an error behind, which the next caller of CUDA would take for its own.
    """
    runtime, places = _runtime(), list[ctypes.c_void_p]()
    left = left_mib * MEBIBYTE
    try:
        part = free_memory() - left
        while part >= MEBIBYTE:
            place = ctypes.c_void_p()
            if runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(part)) == 0:
                places.append(place)
                part = min(part, free_memory() - left)
            else:
                runtime.cudaGetLastError()
                part //= 2
        yield
    finally:
        for place in places:
            runtime.cudaFree(place)


def _runtime() -> ctypes.CDLL:
    """CUDA's runtime of this process; ONNX Runtime has loaded it."""
    return ctypes.CDLL(_loaded("libcudart.so"))


def _loaded(name: str) -> str:
    """Path of a library that this process has loaded."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return next(line.split()[-1] for line in maps if f"/{name}" in line)
