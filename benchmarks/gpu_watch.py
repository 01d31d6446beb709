"""Watches an NVIDIA GPU from a thread: how busy it is, and how much of its memory is in use."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

import numpy as np

from serve.contract.strict import Strict

_EVERY_S = 0.05


class GpuUse(Strict):
    """What the driver said during a measurement."""

    busy: float
    """Mean share of the time in which a kernel ran, as the driver samples it."""
    peak_memory_gib: float
    """Of all processes."""
    power_w: float
    """Mean."""


class _Watch:
    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float, float]] = []
        """Time of the clock, share of the time in which a kernel ran, GiB and watts."""

    def use(self, since: float = 0.0) -> GpuUse | None:
        """What was seen after a time of `time.perf_counter`; None without a GPU."""
        seen = [values for at, *values in self.samples if at > since]
        if not seen:
            return None
        busy, memory, power = np.array(seen).T
        return GpuUse(
            busy=float(busy.mean()),
            peak_memory_gib=float(memory.max()),
            power_w=float(power.mean()),
        )


@contextmanager
def watched_gpu() -> Iterator[_Watch]:
    """Watch the first GPU while the body runs; sees nothing where there is no GPU."""
    watch, stop = _Watch(), threading.Event()
    thread = threading.Thread(target=_sample, args=(watch, stop), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()


def _sample(watch: _Watch, stop: threading.Event) -> None:
    try:
        pynvml = import_module("pynvml")
    except ImportError:
        return
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not stop.wait(_EVERY_S):
            busy = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            memory = pynvml.nvmlDeviceGetMemoryInfo(device).used / 2**30
            power = pynvml.nvmlDeviceGetPowerUsage(device) / 1000
            watch.samples.append((time.perf_counter(), busy, memory, power))
