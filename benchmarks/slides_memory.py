"""Measures the memory of the slide engine, on a slide that is generated as it is read.

`benchmarks.slides` runs it in another process, with a limit for its memory. It imports no torch.
"""

import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.stub_models import InstantModel
from serve.contract.machine import peak_memory_mib
from serve.contract.manifest import LOW_RES_STRIDE, TissueClass
from serve.images.readers.reader import Bounds, RegionReader, pyramid
from serve.images.readers.registry import READERS
from serve.slides.cohort import SlideTask
from serve.slides.engine import Watcher
from serve.slides.local import LocalEngine
from serve.slides.options import RunOptions
from serve.slides.outputs.registry import formats_of
from serve.slides.plan import ModelInfo
from serve.slides.run import Cohort, run_cohort

_TILE, _MPP = 1024, 0.25
_DOWNSAMPLES = (1, 4, 16, 64)
_SUFFIX = ".generated"


class GeneratedSlide(RegionReader):
    """A slide whose pixels are computed when they are read; its file holds only its size."""

    name: ClassVar[str] = "generated"

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        super().__init__(path, mpp=mpp or _MPP)
        width, height = json.loads(path.read_text())
        self.levels = pyramid([(width // step, height // step) for step in _DOWNSAMPLES])
        self.bounds = Bounds(0, 0, width, height)
        self.properties = {}
        self.version = "1"

    @classmethod
    def takes(cls, path: Path) -> bool:
        """See `RegionReader.takes`."""
        return path.suffix == _SUFFIX

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `RegionReader.read`."""
        step = _DOWNSAMPLES[level]
        rows, columns = (
            (np.arange(start, start + size) * step // 16 % 120).astype(np.uint8)
            for start, size in ((y, height), (x, width))
        )
        found = np.empty((height, width, 3), np.uint8)
        found[..., 0] = 200
        found[..., 1] = rows[:, None] + 20
        found[..., 2] = columns[None, :] + 100
        return found

    def close(self) -> None:
        """See `RegionReader.close`."""


def _smooth_maps(num_classes: int) -> NDArray[np.uint8]:
    """Eight probability maps of a tile: (8, C, T/4, T/4) uint8."""
    rng = np.random.default_rng(0)
    side = _TILE // LOW_RES_STRIDE
    coarse = rng.random((8, num_classes, side // 32, side // 32)) ** 4
    maps = coarse.repeat(32, axis=2).repeat(32, axis=3)
    answers: NDArray[np.uint8] = (maps / maps.sum(axis=1, keepdims=True) * 255).astype(np.uint8)
    return answers


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Segment a generated slide, and print time and memory."""

    width: int = 100_000
    height: int = 150_000
    classes: int = 20
    limit_gib: float = 4.0
    """Limit for the private memory of this process (RLIMIT_DATA)."""
    format: tuple[str, ...] = ("ome-zarr", "overview", "ome-tiff", "geojson")


def measure(command: Memory) -> dict[str, float]:
    """Run, and return seconds, tiles and the peak of the resident memory in GiB."""
    READERS[GeneratedSlide.name] = f"{__name__}:GeneratedSlide"
    colors = [
        f"#{40 + 10 * n:02x}{(37 * n) % 256:02x}{(91 * n) % 256:02x}"
        for n in range(command.classes)
    ]
    model = ModelInfo(
        name="stub",
        version="1",
        checkpoint_sha256="0" * 64,
        artefact_sha256="0" * 64,
        precision="fp32",
        runs_on="nothing",
        mpp=_MPP,
        tile_size_px=_TILE,
        classes=tuple(
            TissueClass(name=f"Class {n}", color=color) for n, color in enumerate(colors)
        ),
    )
    engine = LocalEngine(InstantModel(_smooth_maps(command.classes)), model, max_batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / f"slide{_SUFFIX}"
        slide.write_text(json.dumps([command.width, command.height]))
        cohort = Cohort(
            Path(folder) / "out",
            engine,
            RunOptions(tissue="none"),
            formats_of(command.format),
            Watcher(),
        )
        started = time.perf_counter()
        (outcome,) = run_cohort(cohort, [SlideTask(path=slide, name="slide")])
    assert outcome.status == "done", outcome.reason
    return {
        "seconds": time.perf_counter() - started,
        "tiles": outcome.num_tiles,
        "peak_gib": peak_memory_mib() / 2**10,
    }


if __name__ == "__main__":
    # The reader is looked up by the module's name.
    from benchmarks import slides_memory

    command = tyro.cli(slides_memory.Memory)
    limit = int(command.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(json.dumps(slides_memory.measure(command)))
