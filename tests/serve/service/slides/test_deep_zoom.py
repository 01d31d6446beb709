import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serve.images.readers.reader import Bounds
from serve.service.slides.deep_zoom import DeepZoom, tile_jpeg
from tests.support.slides import VirtualSlide


class _Counting(VirtualSlide):
    """Knows how many pixels were read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_pixels = 0

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        self.num_pixels += width * height
        return super().read(level, x, y, width, height)


@pytest.mark.parametrize("downsamples", [(1,), (1, 4)])
@pytest.mark.parametrize("size", [(2967, 2220), (700, 3001), (130, 90), (1, 1)])
def test_no_level_reads_much_more_than_the_slide(
    size: tuple[int, int], downsamples: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "slide").touch()
    slide = _Counting(tmp_path / "slide", size, downsamples=downsamples if min(size) > 4 else (1,))
    zoom = DeepZoom(slide.bounds)
    whole = np.prod(np.array(size) + 250)
    for level in range(zoom.num_levels):
        slide.num_pixels = 0
        with Image.open(io.BytesIO(tile_jpeg(slide, level, 0, 0))) as tile:
            assert tile.size == zoom.place(level, 0, 0)[2:]
        assert slide.num_pixels <= whole, level


@pytest.mark.parametrize("bounds", [None, Bounds(200, 100, 1500, 2300)])
def test_levels_below_the_thumbnail_show_what_it_shows(
    bounds: Bounds | None, tmp_path: Path
) -> None:
    (tmp_path / "slide").touch()
    slide = VirtualSlide(tmp_path / "slide", (2967, 2220), bounds=bounds)
    zoom = DeepZoom(slide.bounds)
    for level in range(3, 7):
        with Image.open(io.BytesIO(tile_jpeg(slide, level, 0, 0))) as tile:
            shown = np.asarray(tile.convert("L"))  # a JPEG has colours of half the pixels
        scale = zoom.scale(level)
        rows, columns = (side // scale for side in (slide.bounds.height, slide.bounds.width))
        for row, column in np.ndindex(rows, columns):
            place = slide.bounds.x + column * scale, slide.bounds.y + row * scale
            covered = Image.fromarray(slide.read(0, *place, scale, scale)).convert("L")
            expected = np.asarray(covered).mean()
            assert shown[row, column] == pytest.approx(expected, abs=12), (level, row, column)
