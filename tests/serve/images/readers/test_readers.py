import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import OptionError
from serve.images.readers.errors import (
    ReaderMissingError,
    SlideChannelsError,
    SlideFormatError,
    SlideReadError,
    SlideScaleError,
)
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import READERS, open_reader, reader_class
from tests.support.errors import raises
from tests.support.real_slide import real_dicom, real_slide
from tests.support.slides import tissue_pixels, write_aperio, write_ome_zarr

HEIGHT, WIDTH = 1003, 1302


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return tissue_pixels(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory, pixels: NDArray[np.uint8]) -> Path:
    return write_aperio(tmp_path_factory.mktemp("slides") / "tiny.svs", pixels)


def write_ome_tiff(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        shared: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", **options}
        tiff.write(pixels, subifds=1, metadata=metadata, **shared)
        tiff.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, **shared)
    return path


def written(kind: str, folder: Path, pixels: NDArray[np.uint8]) -> Path:
    match kind:
        case "ome-zarr":
            return write_ome_zarr(folder / "slide.zarr", pixels)
        case "ome-tiff":
            return write_ome_tiff(folder / "slide.ome.tif", pixels, compression="zlib")
        case "picture":
            path = folder / "slide.png"
            Image.fromarray(pixels).save(path)
            return path
        case _:
            return write_aperio(folder / "slide.svs", pixels)


@pytest.mark.parametrize(
    ("kind", "mpp_source"),
    [
        ("tiff", "Aperio MPP"),
        ("ome-tiff", "OME-XML"),
        ("openslide", "Aperio MPP"),
        ("ome-zarr", "OME-Zarr scale"),
        ("picture", "unknown"),
    ],
)
def test_every_reader_is_chosen_and_gives_regions_with_white_beyond_the_edges(
    kind: str, mpp_source: str, tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = written(kind, tmp_path, pixels)
    with open_reader(path) as slide:
        assert slide.name == (kind if kind != "openslide" else "tiff")
    with open_reader(path, kind) as slide:
        assert (slide.height_px, slide.width_px) == (HEIGHT, WIDTH)
        assert slide.mpp_source == mpp_source
        assert (slide.mpp, len(slide.levels)) == ((None, 1) if kind == "picture" else (0.5, 2))
        whole = slide.read(0, 0, 0, WIDTH, HEIGHT)
        around = slide.read(0, -3, -5, WIDTH + 10, HEIGHT + 9)
    assert np.abs(whole.astype(int) - pixels).mean() < 3  # JPEG
    assert np.array_equal(around[5 : 5 + HEIGHT, 3 : 3 + WIDTH], whole)
    around[5 : 5 + HEIGHT, 3 : 3 + WIDTH] = 255
    assert (around == 255).all()


@pytest.mark.slow
def test_the_fast_reader_gives_the_pixels_of_openslide_on_a_real_slide() -> None:
    with open_reader(real_slide()) as fast, open_reader(real_slide(), "openslide") as slow:
        assert fast.name == "tiff"
        assert (fast.mpp, fast.levels, fast.bounds) == (slow.mpp, slow.levels, slow.bounds)
        region = (0, 301, -7, 1950, 3000)
        assert np.array_equal(fast.read(*region), slow.read(*region))
        assert fast.fingerprint() == slow.fingerprint()


def test_the_fast_reader_gives_the_pixels_of_openslide_on_every_level(svs: Path) -> None:
    with open_reader(svs, "tiff") as fast, open_reader(svs, "openslide") as slow:
        for level in range(2):
            found = fast.read(level, 0, 0, 250, 200)
            assert np.abs(found.astype(int) - slow.read(level, 0, 0, 250, 200)).max() <= 1


@pytest.mark.slow
def test_openslide_gives_a_pixel_the_same_value_whatever_region_it_is_read_in(
    tmp_path: Path,
) -> None:
    path = write_aperio(tmp_path / "odd.svs", tissue_pixels(1201, 1703))  # 1703 / 425 is not 4
    with open_reader(path, "openslide") as slide:
        level = slide.levels[1]
        whole = slide.read(1, 0, 0, level.width_px, level.height_px)
        part = slide.read(1, 101, 57, 200, 130)
    assert np.array_equal(part, whole[57:187, 101:301])


@pytest.mark.parametrize("tile", [(128, 256), (256, 128)])
def test_tiles_need_not_be_squares(
    tile: tuple[int, int], tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, pixels, tile=tile, photometric="rgb", compression="jpeg", metadata=None)
    region = (0, 301, -7, WIDTH, 900)
    with open_reader(path) as fast, open_reader(path, "openslide") as slow:
        assert fast.name == "tiff"
        found = fast.read(*region).astype(int)
        assert np.abs(found - slow.read(*region)).max() <= 1


@pytest.mark.parametrize("compression", [None, "jpeg", "zlib"])
def test_a_tile_that_an_ome_tiff_leaves_out_is_white(
    compression: str | None, tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = write_ome_tiff(
        tmp_path / "sparse.ome.tif", pixels, tile=(128, 256), compression=compression
    )
    with open_reader(path) as slide:
        expected = slide.read(0, 0, 0, WIDTH, HEIGHT)
    set_tile(path, 8, TileOffsets=0, TileByteCounts=0)
    expected[128:256, 512:768] = 255  # in rows of 6
    with open_reader(path) as slide:
        assert slide.name == "ome-tiff"
        assert np.array_equal(slide.read(0, 0, 0, WIDTH, HEIGHT), expected)


def test_a_tile_that_a_scanner_left_out_is_as_openslide_shows_it(
    tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = write_aperio(tmp_path / "sparse.svs", pixels)
    set_tile(path, 1, page=2, TileOffsets=0, TileByteCounts=0)
    with open_reader(path, "tiff") as fast, open_reader(path, "openslide") as slow:
        region = (1, 0, 0, WIDTH // 4, HEIGHT // 4)
        assert np.array_equal(fast.read(*region), slow.read(*region))


def test_a_tile_of_which_the_file_has_the_beginning_is_told(
    tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    """The rest of such a JPEG would be grey."""
    path = write_ome_tiff(tmp_path / "cut.ome.tif", pixels, tile=(128, 256), compression="jpeg")
    content = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        place, size = tiff.pages.first.dataoffsets[8], tiff.pages.first.databytecounts[8]
    set_tile(path, 8, TileOffsets=len(content))
    with path.open("ab") as file:
        file.write(content[place : place + size - 100])
    with open_reader(path) as slide, raises(SlideReadError, "x 512, y 128", "100 bytes early"):
        slide.read(0, 0, 0, WIDTH, HEIGHT)


def set_tile(path: Path, index: int, *, page: int = 0, **values: int) -> None:
    """Change where the file says that a tile of a page is, or how many bytes it has."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in values.items():
            tag = tiff.pages[page].tags[name]
            tag.overwrite([*tag.value[:index], value, *tag.value[index + 1 :]])


def test_a_dicom_series_is_opened_by_its_folder() -> None:
    with open_reader(real_dicom()) as slide:
        assert (slide.name, slide.width_px, slide.height_px) == ("openslide", 2220, 2967)
        assert slide.mpp == pytest.approx(0.499)


def test_threads_share_a_reader(svs: Path) -> None:
    with open_reader(svs) as slide:
        places = [(x, y) for x in range(0, 1000, 101) for y in range(0, 700, 97)]
        alone = [slide.read(0, x, y, 200, 150) for x, y in places]
        with ThreadPoolExecutor(8) as pool:
            shared = list(pool.map(lambda place: slide.read(0, *place, 200, 150), places))
    assert all(np.array_equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_an_open_slide_is_not_sent_to_another_process(svs: Path) -> None:
    with open_reader(svs) as slide, pytest.raises(TypeError, match="open it there"):
        pickle.dumps(slide)


def test_a_slide_without_um_per_pixel_is_named_and_not_guessed(
    tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = write_aperio(tmp_path / "unscaled.svs", pixels, mpp=None)
    with open_reader(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (None, "unknown")
        with raises(SlideScaleError, path.name, "--mpp"):
            slide.at_mpp(0.5)
    with open_reader(path, mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "request")


@pytest.mark.parametrize(("dpi", "mpp"), [(72, "352.8"), (2400, "10.58"), (7200, "3.528")])
@pytest.mark.parametrize(("compression", "reader"), [(None, "openslide"), ("jpeg", "tiff")])
def test_resolutions_of_screens_and_printers_are_not_believed_of_slides_either(
    dpi: int,
    mpp: str,
    compression: str | None,
    reader: str,
    tmp_path: Path,
    pixels: NDArray[np.uint8],
) -> None:
    path = tmp_path / "printed.tif"
    tiled = {"tile": (256, 256), "photometric": "rgb", "compression": compression}
    tifffile.imwrite(path, pixels, resolution=(dpi, dpi), resolutionunit=2, metadata=None, **tiled)
    with open_reader(path) as slide:
        assert (slide.name, slide.mpp_source) == (reader, "unknown")
        with raises(SlideScaleError, str(dpi), mpp, "--mpp"):
            slide.require_pixel_size()


def _flat(path: Path, pixels: NDArray[np.uint8], per_cm: tuple[float, float]) -> Path:
    """A tiled TIFF with other resolutions along x and y."""
    tiled = {"tile": (256, 256), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, pixels, resolution=per_cm, resolutionunit=3, **tiled)
    return path


def test_a_slide_whose_pixels_are_not_square_is_scaled_along_each_axis(
    tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = _flat(tmp_path / "flat.tif", pixels, (40_000, 20_000))
    with open_reader(path) as slide:
        assert slide.pixel_size == pytest.approx((0.25, 0.5))
        view = slide.at_mpp(0.5)
        assert (view.height_px, view.width_px) == (slide.height_px, round(slide.width_px / 2))
        assert view.step_px == pytest.approx((1, 2), rel=0.01)
        assert slide.read_um(0, 0, 100, 100, 0.5).shape == (100, 100, 3)
        part = slide.read_um(50, 25, 64, 64, 0.5)
    assert np.abs(part.astype(int) - _halved_along_x(pixels)[100:164, 50:114]).mean() < 1


def _halved_along_x(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    height, width = pixels.shape[0], pixels.shape[1] // 2
    half = Image.fromarray(pixels[:, : 2 * width]).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(half, np.int64)


def test_a_slide_whose_pixels_are_far_from_squares_is_named(
    tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    path = _flat(tmp_path / "line.tif", pixels, (40_000, 4_000))
    with open_reader(path) as slide, raises(SlideScaleError, "line.tif", "0.25", "2.5"):
        slide.require_pixel_size()


@pytest.mark.parametrize("mpp", [0.0, -1.0, 400.0, float("nan")])
def test_an_absurd_um_per_pixel_is_refused(mpp: float, svs: Path) -> None:
    with pytest.raises(OptionError):
        open_reader(svs, mpp=mpp)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with raises(SlideFormatError, "gone.svs"):
        open_reader(tmp_path / "gone.svs")
    with raises(SlideFormatError, tmp_path.name, "folder"):
        open_reader(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.svs", "JPEG"), ("a", "PNG"), ("a.ndpi", "WEBP"), ("b.svs", "TIFF")]
)
def test_a_picture_that_is_called_otherwise_is_told(
    name: str, kind: str, tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    Image.fromarray(pixels).save(tmp_path / name, kind)
    with raises(SlideFormatError, name, "`picture`"):
        open_reader(tmp_path / name)
    with open_reader(tmp_path / name, "picture") as slide:
        assert (slide.width_px, slide.height_px) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_a_truncated_slide_fails_where_it_is_cut(
    reader: str, tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    whole = write_aperio(tmp_path / "whole.svs", pixels)
    with tifffile.TiffFile(whole) as tiff:
        page = tiff.pages[0]
        place = page.dataoffsets[5]
        size = page.databytecounts[5]
    broken = tmp_path / "broken.svs"
    content = bytearray(whole.read_bytes())
    content[place : place + size] = bytes(size)
    broken.write_bytes(content)
    with open_reader(broken, reader) as slide:
        slide.read(0, 0, 0, 100, 100)
        for _ in range(2):  # a thread that reads ahead asks OpenSlide again after its failure
            with raises(SlideReadError, broken.name):
                slide.read(0, 0, 0, WIDTH, HEIGHT)


def test_a_compression_without_a_codec_is_named(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    path = write_aperio(tmp_path / "codec.svs", pixels, compression="jpeg2000")
    with raises(SlideFormatError, path.name, "compression"):
        open_reader(path)


def test_deep_and_fluorescent_slides_are_refused_by_name(
    tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    deep = tmp_path / "deep.tif"
    tifffile.imwrite(deep, pixels.astype(np.uint16), tile=(256, 256), photometric="rgb")
    stack = tmp_path / "stack.ome.tif"
    tifffile.imwrite(
        stack,
        np.moveaxis(pixels, -1, 0)[[0, 1, 2, 0]],
        tile=(256, 256),
        photometric="minisblack",
        metadata={"axes": "CYX"},
    )
    deep_zarr = write_ome_zarr(tmp_path / "deep.zarr", pixels.astype(np.uint16))
    two_channels = write_ome_zarr(tmp_path / "two.zarr", pixels[..., :2])
    for path in (deep, stack, deep_zarr, two_channels):
        with raises(SlideChannelsError, path.name):
            open_reader(path)


def test_unknown_readers_and_missing_libraries_are_told(
    svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(ReaderMissingError, "bioformats", "openslide"):
        open_reader(svs, "bioformats")
    monkeypatch.setitem(READERS, "other", "a_library_that_is_not_there:Reader")
    with raises(ReaderMissingError, "install"):
        reader_class("other")


def test_a_reader_is_added_by_one_entry(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "again", "serve.images.readers.openslide:OpenSlideReader")
    with open_reader(svs, "again") as slide:
        assert isinstance(slide, RegionReader)


def test_an_openslide_with_known_security_faults_is_refused(
    svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openslide, "__library_version__", "4.0.0")
    for name in ("tiff", "openslide"):
        with raises(ReaderMissingError, "4.0.0"):
            open_reader(svs, name)


def test_a_slide_is_read_whose_description_is_not_utf_8(tmp_path: Path) -> None:
    """OpenSlide lists such a property, and then does not find it."""
    slide = write_aperio(tmp_path / "latin.svs", tissue_pixels(300, 300))
    content = slide.read_bytes()
    slide.write_bytes(content.replace(b"|AppMag = ", b"|A\xfcpMag = "))
    with open_reader(slide) as reader:
        assert reader.mpp == 0.5
        assert reader.read(0, 0, 0, 300, 300).std() > 10


def test_a_tiff_that_lists_fewer_tiles_than_it_has_is_damaged(tmp_path: Path) -> None:
    slide = write_ome_tiff(tmp_path / "short.ome.tif", tissue_pixels(600, 600))
    with tifffile.TiffFile(slide, mode="r+b") as tiff:
        tiff.pages.first.tags["ImageLength"].overwrite(6000)
    with open_reader(slide) as reader, raises(SlideReadError, "tiles"):
        reader.read(0, 0, 5000, 300, 300)
