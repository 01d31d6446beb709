"""Models for tests of whole slides, whose answers are known from the pixels."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from serve.contract.manifest import LOW_RES_STRIDE, TissueClass
from serve.inference.batching import TileAnswer
from serve.slides.plan import ModelInfo

CLASSES = (
    TissueClass(name="Left", color="#d62728"),
    TissueClass(name="Top", color="#2ca02c"),
    TissueClass(name="Other", color="#1f77b4"),
)


def model_info(tile: int = 64, mpp: float = 0.5) -> ModelInfo:
    return ModelInfo(
        name="position",
        version="1",
        checkpoint_sha256="0" * 64,
        artefact_sha256="1" * 64,
        precision="fp32",
        runs_on="test",
        mpp=mpp,
        tile_size_px=tile,
        classes=CLASSES,
    )


def mean_colors(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What `PositionModel` answers: the mean red, green and blue of each cell, (3, h, w)."""
    height, width = (length // LOW_RES_STRIDE for length in pixels.shape[:2])
    cells = pixels.reshape(height, LOW_RES_STRIDE, width, LOW_RES_STRIDE, 3)
    means = np.rint(cells.mean(axis=(1, 3), dtype=np.float64)).astype(np.uint8)
    return np.moveaxis(means, -1, 0)


class PositionModel:
    """Answers each tile with the mean colours of its cells; counts the tiles."""

    def __init__(self) -> None:
        self.num_tiles = 0
        self._lock = threading.Lock()

    def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[TileAnswer]:
        assert list(outputs) == ["low_res_probabilities"]
        with self._lock:
            self.num_tiles += 1
        future: Future[TileAnswer] = Future()
        future.set_result({"low_res_probabilities": mean_colors(tile)})
        return future

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        pass
