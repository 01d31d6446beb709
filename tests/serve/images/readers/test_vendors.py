"""Slides in the layouts of vendors whose files are not at hand, written here, read by OpenSlide."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from serve.images.readers.errors import SlideChannelsError
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import open_reader
from serve.images.readers.scaled import ScaledView
from tests.support.coordinates import coordinate_colors, largest_error_px
from tests.support.dicom_slides import write_dicom_slide
from tests.support.errors import raises
from tests.support.slides import tissue_pixels
from tests.support.vendor_tiffs import GARISH, Region, tiled, write_leica, write_philips
from tests.support.vendors import REGIONS, SCENES, VENDORS, Vendor
from tests.support.zeiss import write_zeiss

SCALES = (1, 1.3, 2, 3.1, 4)
"""Um per pixel of the views, over the slide's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("vendors")
    for vendor in VENDORS.values():
        vendor.make(found)
    return found


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=VENDORS)
def test_a_slide_is_described(vendor: Vendor, folder: Path) -> None:
    path = folder / vendor.file
    assert openslide.OpenSlide.detect_format(path) == vendor.name
    with open_reader(path) as slide:
        assert slide.name == "openslide"
        assert (slide.height_px, slide.width_px) == (vendor.height_px, vendor.width_px)
        assert slide.mpp == pytest.approx(vendor.mpp)
        assert slide.mpp_source == f"OpenSlide ({vendor.name})"
        assert slide.bounds == vendor.bounds
        downsamples = [2**place for place in range(vendor.num_levels)]
        if vendor.name in ("leica", "dicom") or vendor.file.endswith(".vmu"):
            downsamples = [1, 4]
        assert [level.downsample_x for level in slide.levels] == downsamples
        assert [level.downsample_y for level in slide.levels] == downsamples


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=VENDORS)
def test_pixels_are_right_to_half_a_pixel_at_every_scale(vendor: Vendor, folder: Path) -> None:
    with open_reader(folder / vendor.file) as slide:
        for scale in SCALES:
            view = slide.at_mpp(vendor.mpp * scale)
            for region in vendor.scanned:
                check_view(view, region)
                check_um(slide, region, scale)


def check_view(view: ScaledView, region: Region) -> None:
    """Compare a square of a view with what its place in level 0 should show."""
    (y, x), (step_y, step_x) = view.origin_px, view.step_px
    top, left = math.ceil((region.y - y) / step_y) + 1, math.ceil((region.x - x) / step_x) + 1
    side = math.floor(min(region.width / step_x, region.height / step_y)) - 3
    pixels = view.read(top, left, side, side)
    corner = y + top * step_y, x + left * step_x
    assert largest_error_px(pixels, corner, view.step_px) <= max(view.step_px) / 2


def check_um(slide: RegionReader, region: Region, scale: float) -> None:
    """Compare a square that is read at its place in um."""
    margin = math.ceil(3 * scale)
    y, x = region.y + margin, region.x + margin
    side = math.floor((min(region.width, region.height) - 2 * margin) / scale)
    mpp = slide.require_pixel_size().mean
    pixels = slide.read_um(y * mpp, x * mpp, side, side, mpp * scale)
    assert largest_error_px(pixels, (y, x), scale) <= scale / 2


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=VENDORS)
def test_what_was_not_scanned_is_white_and_no_label_is_seen(vendor: Vendor, folder: Path) -> None:
    with open_reader(folder / vendor.file) as slide:
        for index, level in enumerate(slide.levels[:3]):
            step = round(level.downsample_x)
            pixels = slide.read(index, 0, 0, level.width_px, level.height_px).astype(int)
            assert np.abs(pixels - GARISH).sum(axis=-1).min() > 100
            near = vendor.is_scanned(grow_px=2 * step)[step // 2 :: step, step // 2 :: step]
            height, width = (min(pair) for pair in zip(near.shape, pixels.shape[:2], strict=True))
            outside = ~near[:height, :width]
            assert (pixels[:height, :width][outside] == 255).all()
            assert outside.any() == (len(vendor.scanned) > 1)


@pytest.mark.parametrize("name", ["philips", "leica", "ventana", "trestle", "ndpi"])
def test_the_fast_reader_steps_aside(name: str, folder: Path) -> None:
    path = folder / VENDORS[name].file
    with open_reader(path, "tiff") as fast, open_reader(path, "openslide") as slow:
        for index, level in enumerate(fast.levels):
            region = (index, 0, 0, level.width_px + 3, level.height_px + 5)
            assert np.array_equal(fast.read(*region), slow.read(*region))


@pytest.mark.parametrize("vendor", ["aperio", "generic-tiff"])
def test_of_focal_planes_the_fast_reader_shows_the_one_that_openslide_shows(
    vendor: str, tmp_path: Path
) -> None:
    path = tmp_path / "planes.tif"
    pixels = tissue_pixels(300, 400)
    text = "Aperio Image Library v12\r\n400x300 (240x240) JPEG/RGB|MPP = 0.5"
    options = tiled(description=text) if vendor == "aperio" else tiled()
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, **options)
        tiff.write(255 - pixels, subfiletype=1, **options)
        tiff.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, **options)
    assert openslide.OpenSlide.detect_format(path) == vendor
    with open_reader(path) as fast, open_reader(path, "openslide") as slow:
        assert fast.name == "tiff"
        for level in range(3):
            found = fast.read(level, 10, 20, 100, 90).astype(int)
            assert np.abs(found - slow.read(level, 10, 20, 100, 90)).max() <= 1
        assert np.abs(fast.read(0, 0, 0, 400, 300).astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("name", ["tiff", "openslide"])
def test_a_reduced_copy_of_an_aperio_slide_has_its_own_mpp(name: str, tmp_path: Path) -> None:
    text = "Aperio Image Library v12\r\n4000x3000 (240x240) -> 400x300 JPEG/RGB|MPP = 0.25"
    tifffile.imwrite(tmp_path / "a.svs", tissue_pixels(300, 400), **tiled(description=text))
    with open_reader(tmp_path / "a.svs", name) as reader:
        assert (reader.mpp, reader.mpp_source) == (pytest.approx(2.5), "Aperio MPP")


def test_tiles_that_philips_left_out_are_white(tmp_path: Path) -> None:
    pixels = coordinate_colors(256, 320)
    with open_reader(
        write_philips(tmp_path / "sparse.tiff", pixels, missing_tiles=[(1, 2)])
    ) as slide:
        found = slide.read(0, 0, 0, 320, 256)
    assert (found[64:128, 128:192] == 255).all()
    found[64:128, 128:192] = pixels[64:128, 128:192]
    assert np.abs(found.astype(int) - pixels).max() < 8


def test_philips_states_the_height_of_a_pixel_first(tmp_path: Path) -> None:
    path = write_philips(tmp_path / "flat.tiff", coordinate_colors(128, 128), mpp=(0.25, 0.5))
    with open_reader(path) as slide:
        assert slide.pixel_size == pytest.approx((0.25, 0.5))


def test_the_smallest_levels_have_the_scale_that_they_were_made_with(tmp_path: Path) -> None:
    """704 / 5 is 140.8, and 5 pixels are what is left of a 128th of 704."""
    factors = (2, 4, 8, 16, 32, 64, 128)
    path = write_philips(tmp_path / "deep.tiff", coordinate_colors(576, 704), downsamples=factors)
    with open_reader(path) as slide:
        assert [level.downsample_x for level in slide.levels] == [1, *factors]
        assert [level.downsample_y for level in slide.levels] == [1, *factors]


def test_pixels_of_dicom_state_the_height_first(tmp_path: Path) -> None:
    path = write_dicom_slide(tmp_path, coordinate_colors(128, 128), mpp=(0.25, 0.5))
    with open_reader(path) as slide:
        assert slide.pixel_size == pytest.approx((0.25, 0.5))


def test_a_fluorescent_leica_slide_is_refused(tmp_path: Path) -> None:
    path = write_leica(
        tmp_path / "dark.scn", coordinate_colors(640, 768), REGIONS, light="fluorescence"
    )
    with raises(SlideChannelsError, "dark.scn", "brightfield"):
        open_reader(path)


def aperio(path: Path, pixels: NDArray[np.uint8 | np.uint16], **options: object) -> None:
    description = "Aperio Image Library v12\r\n320x256 (64x64)|MPP = 0.5"
    tifffile.imwrite(path, pixels, description=description, **options)


def trestle(path: Path, pixels: NDArray[np.uint8 | np.uint16], **options: object) -> None:
    text = {"description": "OverlapsXY= 0 0", "software": "MedScan"}
    tifffile.imwrite(path, pixels, resolution=(0.5, 0.5), **text, **options)


def generic_tiff(path: Path, pixels: NDArray[np.uint8 | np.uint16], **options: object) -> None:
    tifffile.imwrite(path, pixels, **options)


@pytest.mark.parametrize("write", [aperio, trestle, generic_tiff])
@pytest.mark.parametrize(("kind", "bits"), [("grey", "8"), ("grey", "16"), ("rgb", "16")])
def test_a_tiff_that_is_not_8_bit_rgb_is_refused(
    kind: str, bits: str, write: Callable[..., None], tmp_path: Path
) -> None:
    """OpenSlide would show it: grey as grey, and the upper 8 bits of 16."""
    pixels = coordinate_colors(256, 320)[..., 0 if kind == "grey" else slice(None)]
    deep = pixels if bits == "8" else pixels.astype(np.uint16) * 16
    photometric = "minisblack" if kind == "grey" else "rgb"
    path = tmp_path / "deep.tif"
    write(path, deep, tile=(64, 64), photometric=photometric, metadata=None)
    assert openslide.OpenSlide.detect_format(path) == write.__name__.replace("_", "-")
    with raises(SlideChannelsError, path.name, f"{bits} bits"):
        open_reader(path)


def test_a_zeiss_slide_of_16_bits_is_refused(tmp_path: Path) -> None:
    path = write_zeiss(tmp_path / "deep.czi", coordinate_colors(640, 768), SCENES, is_deep=True)
    with raises(SlideChannelsError, path.name, "Bgr48"):
        open_reader(path)


def test_a_fluorescent_mirax_slide_is_refused(tmp_path: Path) -> None:
    path = VENDORS["mirax"].make(tmp_path)
    text = tmp_path / "m" / "Slidedat.ini"
    content = text.read_bytes()
    assert b"_BRIGHTFIELD" in content
    text.write_bytes(content.replace(b"_BRIGHTFIELD", b"_FLUORESCENCE"))
    with raises(SlideChannelsError, path.name, "fluorescence"):
        open_reader(path)


@pytest.mark.parametrize(("line", "other"), [("=36", "=24"), ("=RGB", "=BGR"), ("PixelOrder", "x")])
def test_a_vmu_slide_of_other_colours_is_refused(line: str, other: str, tmp_path: Path) -> None:
    """OpenSlide 4.0.1 crashes when it opens such a slide."""
    path = VENDORS["vmu"].make(tmp_path)
    path.write_text(path.read_text().replace(line, other))
    with raises(SlideChannelsError, path.name, "BitsPerPixel"):
        open_reader(path)
