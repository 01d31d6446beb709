from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serve.images.readers import scaled
from serve.images.readers.reader import Bounds, Level, pyramid
from serve.images.readers.scaled import choose_level
from serve.images.tiles import resample
from tests.support.slides import VirtualSlide, position_byte


def slide(folder: Path, **options: object) -> VirtualSlide:
    path = folder / "slide"
    path.touch()
    return VirtualSlide(path, (3000, 4100), **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0, 1.9, 2.0, 3.3, 8.0, 0.3])
@pytest.mark.parametrize("bounds", [None, Bounds(333, 215, 2900, 2500)])
def test_a_view_is_right_to_half_a_pixel(mpp: float, bounds: Bounds | None, tmp_path: Path) -> None:
    view = slide(tmp_path, downsamples=(1, 4), bounds=bounds).at_mpp(mpp)
    whole = view.read(0, 0, view.height_px, view.width_px)
    for axis, channel in ((0, 1), (1, 0)):
        count = (view.height_px, view.width_px)[axis]
        place = view.origin_px[axis] + (np.arange(count) + 0.5) * view.step_px[axis]
        line = whole[view.height_px // 2] if axis else whole[:, view.width_px // 2]
        found = line[:, channel].astype(float)
        half = mpp / 0.5 / 2  # half a pixel of the view, in pixels of level 0
        near = [position_byte(place + shift).astype(float) for shift in (-half, 0, half)]
        turns = np.abs(np.abs(position_byte(place).astype(float) - 100) - 100) < 2 + mpp
        assert ((found >= np.min(near, axis=0) - 1) & (found <= np.max(near, axis=0) + 1))[
            ~turns
        ].all()


@pytest.mark.slow
@pytest.mark.parametrize("mpp", [0.5, 0.77, 2.0, 5.1])
def test_a_pixel_does_not_depend_on_the_region_that_it_is_read_in(
    mpp: float, tmp_path: Path
) -> None:
    view = slide(tmp_path, downsamples=(1, 4.01)).at_mpp(mpp)
    whole = view.read(0, 0, view.height_px, view.width_px)
    rng = np.random.default_rng(1)
    for _ in range(10):
        y, x = (int(rng.integers(0, size - 20)) for size in whole.shape[:2])
        height, width = (
            int(rng.integers(1, size - at + 1))
            for size, at in zip(whole.shape[:2], (y, x), strict=True)
        )
        part = view.read(y, x, height, width)
        assert np.array_equal(part, whole[y : y + height, x : x + width])


@pytest.mark.slow
def test_a_view_resamples_as_the_whole_image_is_resampled(tmp_path: Path) -> None:
    opened = slide(tmp_path)
    view = opened.at_mpp(1.3)
    whole = Image.fromarray(opened.read(0, 0, 0, opened.width_px, opened.height_px))
    expected = whole.resize((view.width_px, view.height_px), Image.Resampling.BICUBIC)
    found = view.read(0, 0, view.height_px, view.width_px)
    assert np.abs(np.asarray(expected).astype(int) - found).max() <= 1


def test_the_coarsest_level_that_suffices_is_taken() -> None:
    levels = pyramid([(40_003, 30_001), (10_000, 7500), (2500, 1875)])
    assert [level.downsample_x for level in levels] == [1, 4, 16]
    assert [choose_level(levels, (scale, scale)) for scale in (0.5, 1, 3.9, 4, 15, 16, 99)] == [
        *(0, 0, 0, 1, 1, 2, 2)
    ]
    assert choose_level((levels[0], Level(10, 10, 4.05, 4.05)), (4, 4), tolerance=0.02) == 1


def test_a_level_within_the_tolerance_is_copied(tmp_path: Path) -> None:
    opened = slide(tmp_path, downsamples=(1, 4))
    assert not opened.at_mpp(2.03, tolerance=0.02).is_resampled
    assert opened.at_mpp(2.03).is_resampled


def test_a_region_is_read_at_any_place_and_scale(tmp_path: Path) -> None:
    opened = slide(tmp_path, downsamples=(1, 2, 4))
    found = opened.read_um(100.3, 200.7, 60, 80, 1.5)
    place = 200.7 / 0.5 + (np.arange(80) + 0.5) * 3
    turns = np.abs(np.abs(position_byte(place).astype(float) - 100) - 100) < 3
    assert found.shape == (60, 80, 3)
    assert np.abs(found[30, :, 0].astype(float) - position_byte(place))[~turns].max() <= 1.5
    beyond = opened.read_um(-50, -50, 20, 20, 1.0)
    assert (beyond == 255).all()


@pytest.mark.parametrize("mpp", [0.4, 0.5, 0.625, 2.5])
def test_pixels_at_the_slides_edge_are_made_of_the_slide_alone(mpp: float, tmp_path: Path) -> None:
    (tmp_path / "slide").touch()
    opened = VirtualSlide(tmp_path / "slide", (300, 400))
    whole = opened.read(0, 0, 0, opened.width_px, opened.height_px)
    height, width = (round(side * 0.5 / mpp) for side in whole.shape[:2])
    expected = resample(whole, height, width).astype(int)
    inner = opened.read_um(0, 0, height, width, mpp)
    assert np.abs(inner - expected).max() <= 1
    outer = opened.read_um(-3 * mpp, -2 * mpp, height + 8, width + 7, mpp)
    assert np.abs(outer[3:-5, 2:-5] - expected).max() <= 1
    for beyond in (outer[:3], outer[-5:], outer[:, :2], outer[:, -5:]):
        assert (beyond == 255).all()


def test_a_pixel_that_reaches_beyond_the_slide_has_the_slides_colour(tmp_path: Path) -> None:
    (tmp_path / "slide").touch()
    opened = VirtualSlide(tmp_path / "slide", (300, 400))
    rows = opened.read_um(0, 0, 30, 40, 5.0).astype(int)
    shifted = opened.read_um(-0.4 * 5, 0, 32, 40, 5.0).astype(int)
    assert np.abs(shifted[[0, 30]] - rows[[0, 29]]).max() <= 8
    assert (shifted[31] == 255).all()


@pytest.mark.parametrize(
    "read_whole",
    [
        lambda slide: slide.thumbnail(5),
        lambda slide: slide.at_mpp(0.5).overview(10),
        lambda slide: slide.read_um(10.2, 20.6, 290, 190, 5),
    ],
)
def test_a_slide_without_a_pyramid_is_read_in_parts(
    read_whole: Callable[[VirtualSlide], NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = slide(tmp_path)
    sizes: list[int] = []
    read = opened.read

    def counted(level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        sizes.append(width * height)
        return read(level, x, y, width, height)

    whole = read_whole(opened).astype(int)
    monkeypatch.setattr(scaled, "_PIXELS_AT_ONCE", 1_000_000)
    monkeypatch.setattr(opened, "read", counted)
    assert np.abs(read_whole(opened) - whole).max() <= 1
    assert len(sizes) > 3
    assert max(sizes) < 1_500_000
