"""A TIFF means the same pixels and um per pixel as a slide and as an image."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from serve.images.decode import decode_picture
from serve.images.readers import channels, generic_tiff
from serve.images.readers.errors import SlideChannelsError, SlideError, SlideFormatError
from serve.images.readers.generic_tiff import MAX_PIXELS
from serve.images.readers.reader import Bounds
from serve.images.readers.registry import open_reader
from serve.images.readers.tiff_pages import TiledPage
from serve.images.tiff import TiffImage, find_image
from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.slides import tissue_pixels, write_aperio
from tests.support.vendor_tiffs import write_philips, write_ventana_tiff

PIXELS = tissue_pixels(192, 256)
Pixels = NDArray[np.uint8]


def written(pixels: Pixels = PIXELS, **options: Any) -> Callable[[Path], None]:
    """Writes pixels in tiles."""
    options = {"photometric": "rgb", "tile": (64, 64), "metadata": None, **options}
    return lambda path: tifffile.imwrite(path, pixels, **options)


def thumbnail_first(**options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tifffile.TiffWriter(path) as tiff:
            for pixels, kind, px_per_cm in ((PIXELS[::8, ::8], 1, 5000), (PIXELS, 0, 40_000)):
                tiff.write(
                    np.ascontiguousarray(pixels),
                    photometric="rgb",
                    tile=(64, 64),
                    subfiletype=kind,
                    metadata=None,
                    resolution=(px_per_cm, px_per_cm),
                    resolutionunit="CENTIMETER",
                    **options,
                )

    return write


def macro_first(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for pixels, mpp in ((PIXELS[::8, ::8], 2.0), (PIXELS, 0.25)):
            sizes = {f"PhysicalSize{axis}": mpp for axis in "XY"}
            tiff.write(
                np.ascontiguousarray(pixels),
                photometric="rgb",
                tile=(64, 64),
                metadata={"axes": "YXS", **sizes},
            )


def with_alpha(alpha: int) -> Pixels:
    return np.dstack([PIXELS, np.full(PIXELS.shape[:2], alpha, np.uint8)])


def turned(value: int) -> dict[str, Any]:
    return {"extratags": [(274, "H", 1, value, True)]}


def by_channels(names: str) -> Callable[[Path], None]:
    order = ["RGB".index(name) for name in names]
    metadata = {"axes": "CYX", "Channel": {"Name": list(names)}}
    return written(
        np.moveaxis(PIXELS[..., order], -1, 0), photometric="minisblack", metadata=metadata
    )


@pytest.mark.parametrize(
    "write",
    [
        written(),
        written(compression="jpeg"),
        written(compression="jpeg2000"),  # OpenSlide reads none in plain TIFFs
        written(compression="lzma"),
        thumbnail_first(),
        thumbnail_first(compression="jpeg"),
        macro_first,
        written(**turned(6)),
        written(compression="jpeg", **turned(3)),
        written(metadata={"axes": "YXS"}, **turned(8)),
        written(np.moveaxis(PIXELS, -1, 0), planarconfig="separate"),
        written(np.moveaxis(PIXELS, -1, 0), planarconfig="separate", compression="jpeg"),
        written(with_alpha(255), extrasamples=["UNASSALPHA"]),
        written(with_alpha(100), extrasamples=["UNASSALPHA"]),
        written(with_alpha(0), extrasamples=["UNSPECIFIED"]),
        written(np.dstack([PIXELS, PIXELS[..., :2]])),
        written(PIXELS, photometric="cielab", compression="lzw"),
        written(PIXELS, photometric="cielab", metadata={"axes": "YXS"}),
        by_channels("RGB"),
        by_channels("GBR"),
        written(description=b"ImageJ=1.48\nunit=\xb5m\n", resolution=(4, 4), resolutionunit="NONE"),
        written(description="Aperio Image Library v12|AppMag = 40|MPP = 0,2520"),
    ],
)
def test_a_slide_has_the_pixels_and_the_scale_of_the_image(
    write: Callable[[Path], None], tmp_path: Path
):
    path = tmp_path / "a.ome.tif"
    write(path)
    image = decode_picture(path.read_bytes())
    with open_reader(path) as slide:
        pixels = slide.read(0, 0, 0, slide.width_px, slide.height_px)
        np.testing.assert_array_equal(pixels, image.pixels)
        assert (slide.pixel_size, slide.mpp_source) == (image.pixel_size, image.mpp_source)


def test_a_stack_of_images_is_no_slide(tmp_path: Path):
    path = tmp_path / "stack.tif"
    written(np.stack([PIXELS, PIXELS]), compression="jpeg")(path)
    with raises(SlideChannelsError, path.name, "2 pages"):
        open_reader(path)


@pytest.mark.parametrize(
    "content", [b"", b"II", b"II*\0", b"\x89PNG\r\n\x1a\n", b"II*\0\xff\xff\xff\xff"]
)
def test_what_is_no_whole_tiff_is_named(content: bytes, tmp_path: Path):
    path = tmp_path / "a.ome.tif"
    path.write_bytes(content)
    with raises(SlideFormatError, path.name):
        open_reader(path, "ome-tiff")
    with raises(SlideFormatError, tmp_path.name):
        open_reader(tmp_path, "ome-tiff")


@pytest.mark.parametrize(
    ("write", "told"),
    [(thumbnail_first(), "first page"), (written(**turned(6)), "orientation 6")],
)
def test_what_is_too_large_for_a_picture_is_refused(
    write: Callable[[Path], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = "serve.images.readers.generic_tiff.MAX_PIXELS"
    assert MAX_PIXELS > 10**8
    monkeypatch.setattr(module, PIXELS.size // 3 - 1)
    path = tmp_path / "large.tif"
    write(path)
    with raises(SlideFormatError, path.name, told):
        open_reader(path)


def test_the_pyramid_of_a_jpeg_ome_tiff_is_read(tmp_path: Path):
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(PIXELS, subifds=1, metadata={"axes": "YXS"}, **options)
        tiff.write(PIXELS[::4, ::4].copy(), subfiletype=1, metadata=None, **options)
    with open_reader(path) as slide:
        assert [(level.width_px, level.height_px) for level in slide.levels] == [
            (256, 192),
            (64, 48),
        ]


def test_a_level_of_another_shape_is_no_level(tmp_path: Path):
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg"}
    size = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    label = np.zeros((64, 32, 3), np.uint8)
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(PIXELS, subifds=2, metadata={"axes": "YXS", **size}, **options)
        tiff.write(PIXELS[::2, ::2].copy(), subfiletype=1, metadata=None, **options)
        tiff.write(label, subfiletype=1, metadata=None, **options)
    with open_reader(path) as slide:
        assert [level.is_whole for level in slide.levels] == [True, True, False]
        assert slide.thumbnail(4.0).min() > 50


HALF = np.ascontiguousarray(PIXELS[::2, ::2])


@pytest.mark.parametrize(
    ("level", "options", "kind", "told"),
    [
        (HALF.astype(np.uint16), {}, SlideChannelsError, "uint16"),
        (HALF[..., 0], {"photometric": "minisblack"}, SlideChannelsError, "RGB"),
        (np.dstack([HALF, HALF]), {}, SlideChannelsError, "RGB"),
        (np.moveaxis(HALF, -1, 0), {"planarconfig": "separate"}, SlideChannelsError, "RGB"),
        (HALF, {"tile": None}, SlideFormatError, "not stored in tiles"),
    ],
    ids=["deep", "grey", "more channels", "planes", "strips"],
)
def test_a_level_that_is_stored_otherwise_than_in_tiles_of_8_bit_rgb_is_refused(
    level: NDArray[Any], options: dict[str, Any], kind: type, told: str, tmp_path: Path
):
    path = tmp_path / "a.ome.tif"
    shared: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64)}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(PIXELS, subifds=1, metadata={"axes": "YXS"}, **shared)
        tiff.write(level, subfiletype=1, metadata=None, **{**shared, **options})
    with raises(kind, path.name, told):
        open_reader(path)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("compression", [None, "jpeg", "deflate"])
def test_each_file_of_a_set_of_ome_tiffs_is_its_own_slide(
    compression: str | None, order: tuple[int, int], tmp_path: Path
) -> None:
    """The OME-XML of each file states the images of all, here of one size."""
    scales, pixels = (0.25, 0.5), (PIXELS, 255 - PIXELS)
    images = "".join(
        f'<Image ID="Image:{i}"><Pixels ID="Pixels:{i}" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="256" SizeY="192" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{scales[i]}" '
        f'PhysicalSizeY="{scales[i]}"><Channel ID="Channel:{i}:0" SamplesPerPixel="3"/>'
        f'<TiffData IFD="0"><UUID FileName="{i}.ome.tif">urn:uuid:{i}</UUID></TiffData>'
        "</Pixels></Image>"
        for i in order
    )
    names = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    options: dict[str, Any] = {"compression": compression, "photometric": "rgb", "metadata": None}
    for i in order:
        with tifffile.TiffWriter(tmp_path / f"{i}.ome.tif") as tiff:
            text = f'<OME xmlns="{names}" UUID="urn:uuid:{i}">{images}</OME>'
            tiff.write(pixels[i], description=text, subifds=1, tile=(64, 64), **options)
            tiff.write(pixels[i][::2, ::2].copy(), tile=(64, 64), **options)
    for i in order:
        path = tmp_path / f"{i}.ome.tif"
        assert decode_picture(path.read_bytes()).pixel_size == (scales[i], scales[i])
        with open_reader(path) as slide:
            assert (slide.name, slide.mpp, len(slide.levels)) == ("ome-tiff", scales[i], 2)
            found = slide.read(0, 0, 0, 256, 192).astype(int)
        assert np.abs(found - pixels[i]).max() < 60


@pytest.mark.parametrize(
    ("name", "value"), [("TileWidth", 2**31 - 16), ("TileByteCounts", 2**31 - 1)]
)
@pytest.mark.parametrize("write", [write_philips, write_ventana_tiff, write_aperio])
def test_tiles_too_large_for_any_memory_are_refused(
    name: str, value: int, write: Callable[[Path, Pixels], Path], tmp_path: Path
) -> None:
    """OpenSlide 4.0.1 would end the process."""
    path = write(tmp_path / "large.tif", tissue_pixels(256, 256))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page = next(page for page in tiff.pages if page.is_tiled)
        found = page.tags[name].value
        values = [found] if isinstance(found, int) else list(found)
        values[-1] = value
        page.tags[name].overwrite(values, dtype="I")
    with raises(SlideFormatError, path.name, value):
        open_reader(path)


@pytest.mark.parametrize("side", [0, 16.0, (1, 2)])
def test_tiles_whose_sides_are_no_numbers_of_pixels_are_refused(side: Any, tmp_path: Path) -> None:
    page = SimpleNamespace(imagewidth=64, imagelength=64, tilewidth=16, tilelength=side)
    with raises(SlideFormatError, "a.tif", side):
        TiledPage(cast(tifffile.TiffPage, page), tmp_path / "a.tif")


def test_a_slide_all_of_whose_tiles_are_missing_is_white(tmp_path: Path):
    path = tmp_path / "empty.tif"
    written(compression="lzw")(path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = tiff.pages.first.tags[name]
            tag.overwrite([0] * tag.count)
    with open_reader(path) as slide:
        assert slide.bounds == Bounds(0, 0, 256, 192)
        assert slide.read(0, 0, 0, 256, 192).min() == 255


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("ImageLength", 4, 2), ("SamplesPerPixel", 8, 0)],  # of two lengths; of no channels
)
def test_an_ome_tiff_whose_structure_is_damaged_is_told(
    name: str, place: int, value: int, tmp_path: Path
):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(PIXELS, subifds=1, photometric="rgb", tile=(64, 64))
        tiff.write(PIXELS[::2, ::2].copy(), photometric="rgb", tile=(64, 64))
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags[name].offset
    content[tag + place] = value
    path.write_bytes(content)
    with raises(SlideFormatError, path.name):
        open_reader(path, "ome-tiff")


def test_the_tags_are_read_once_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(data: Any) -> TiffImage:
        calls.append(1)
        return find_image(data)

    monkeypatch.setattr(generic_tiff, "find_image", counted)
    path = tmp_path / "slide.tif"
    for num_calls, mpp in enumerate((0.5, 0.25), start=1):
        written(resolution=(10_000 / mpp,) * 2, resolutionunit="CENTIMETER")(path)
        for _ in range(2):
            with open_reader(path) as slide:
                assert slide.mpp == pytest.approx(mpp)
        assert len(calls) == num_calls


@pytest.mark.parametrize("size", [0, 16, 5000])
@pytest.mark.parametrize(
    ("module", "place"), [(generic_tiff, "find_image"), (channels, "read_pages")]
)
def test_a_tiff_that_is_cut_short_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, place: str, size: int
) -> None:
    path = tmp_path / "slide.svs"
    if module is channels:
        write_aperio(path, PIXELS)
    else:
        written()(path)
    before_call(monkeypatch, module, place, lambda: os.truncate(path, size))
    with pytest.raises(SlideError, match=path.name):
        open_reader(path)
