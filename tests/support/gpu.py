"""What the tests marked `gpu` run on.

They skip where torch sees no GPU. FOCALPATH_GPU_TESTS=cpu runs them on the CPU instead: that proves
nothing of a GPU, but finds mistakes in the tests themselves.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

DEVICE = torch.device(os.environ.get("FOCALPATH_GPU_TESTS", "cuda"))
ON_GPU = DEVICE.type == "cuda"
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@contextmanager
def no_gpu() -> Iterator[None]:
    """Let torch and Lightning see no GPU meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep convolutions and products in float32 from being rounded to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """Refuse whatever makes the CPU wait for the GPU."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
