"""Watches the memory of a process and its children, and says whether it grows."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
from pydantic import BaseModel

_SAMPLE_EVERY_S = 0.5
_MEBIBYTE = 2**20


class Memory(BaseModel):
    """Resident memory of the service and its workers."""

    at_s: list[float]
    mebibytes: list[float]
    growth_in_second_half: float
    """Growth along a line fitted to the second half, as a share of the line's first value."""


@dataclass
class MemoryWatch:
    """Samples the memory of a process and its children."""

    pid: int
    _start: float = field(default_factory=time.perf_counter)
    _at_s: list[float] = field(default_factory=list)
    _mebibytes: list[float] = field(default_factory=list)

    async def run(self) -> None:
        """Sample until cancelled."""
        process = psutil.Process(self.pid)
        while True:
            nbytes = 0
            for one in (process, *process.children(recursive=True)):
                try:
                    nbytes += one.memory_info().rss
                except psutil.NoSuchProcess:  # it has just ended
                    continue
            self._at_s.append(round(time.perf_counter() - self._start, 2))
            self._mebibytes.append(round(nbytes / _MEBIBYTE, 1))
            await asyncio.sleep(_SAMPLE_EVERY_S)

    def report(self) -> Memory:
        """The samples so far, and their growth."""
        half = len(self._at_s) // 2
        growth = growth_of(self._at_s[half:], self._mebibytes[half:])
        return Memory(at_s=self._at_s, mebibytes=self._mebibytes, growth_in_second_half=growth)


def growth_of(at_s: Sequence[float], values: Sequence[float]) -> float:
    """Growth along the best fitting straight line, as a share of the line's first value."""
    if len(at_s) < 2:
        return 0.0
    slope, offset = np.polyfit(at_s, values, 1)
    begin, end = offset + slope * at_s[0], offset + slope * at_s[-1]
    return float(end / begin - 1)
