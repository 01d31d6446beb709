"""Watches an NVIDIA GPU from a thread: how busy it is, and how much of its memory is in use."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

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
        self.busy: list[float] = []
        self.memory: list[float] = []
        self.power: list[float] = []

    @property
    def use(self) -> GpuUse | None:
        """What was seen; None without a GPU."""
        if not self.busy:
            return None
        return GpuUse(
            busy=statistics.fmean(self.busy),
            peak_memory_gib=max(self.memory),
            power_w=statistics.fmean(self.power),
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
            watch.busy.append(pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)
            watch.memory.append(pynvml.nvmlDeviceGetMemoryInfo(device).used / 2**30)
            watch.power.append(pynvml.nvmlDeviceGetPowerUsage(device) / 1000)
