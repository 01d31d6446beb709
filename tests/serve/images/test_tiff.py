"""TIFFs of many makes: the right pixels, or a refusal that names what was found."""

import contextlib
import io
import struct
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import ImageError
from serve.images.decode import Picture, decode_picture
from tests.support.errors import raises
from tests.support.pictures import blobs, encoded, swapped_profile

IMAGE = blobs(64, 96)
PLANES = np.ascontiguousarray(IMAGE.transpose(2, 0, 1))  # 3 x H x W
RAMP = np.arange(256, dtype=np.uint8)


def lut(color: str) -> NDArray[np.uint8]:
    """ImageJ's lookup table of a colour."""
    return np.stack([RAMP if name == color else 0 * RAMP for name in ("red", "green", "blue")])


def tiff(*pages: NDArray[Any], file: dict[str, Any] | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **(file or {})) as writer:
        for page in pages:
            writer.write(page, **options)
    return buffer.getvalue()


def pages(*described: tuple[NDArray[Any], dict[str, Any]], **file: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **file) as writer:
        for page, options in described:
            writer.write(page, **{"metadata": None, **options})
    return buffer.getvalue()


def imagej(order: str = "<", **metadata: Any) -> bytes:
    file = {"imagej": True, "byteorder": order}
    return tiff(PLANES, file=file, metadata={"axes": "CYX", **metadata})


def ome(
    planes: NDArray[Any] = PLANES,
    axes: str = "CYX",
    planarconfig: str | None = None,
    **metadata: Any,
) -> bytes:
    options = {"photometric": "minisblack", "metadata": {"axes": axes, **metadata}}
    return tiff(planes, file={"ome": True}, planarconfig=planarconfig, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"bigtiff": True, "byteorder": ">"},
    ],
)
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tile": (32, 32)},
        {"rowsperstrip": 7},
        {"planarconfig": "separate", "photometric": "rgb"},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzw", "tile": (16, 48)},
        {"compression": "packbits"},
        {"compression": "lzma"},
        {"compression": "zstd"},
        {"compression": "webp", "compressionargs": {"lossless": True}},
        {"compression": "webp", "compressionargs": {"lossless": True}, "tile": (48, 64)},
        {"compression": "jpeg2000", "compressionargs": {"level": 0}},
        {"compression": "lerc"},
        {"compression": "png", "tile": (48, 64)},
        {"compression": "jpegxl", "compressionargs": {"lossless": True}},
    ],
    ids=str,
)
def test_a_lossless_rgb_tiff_is_read_whatever_its_layout(
    options: dict[str, Any], layout: dict[str, Any]
) -> None:
    if "compression" in layout:
        pytest.importorskip("imagecodecs")
    planes = PLANES if layout.get("planarconfig") == "separate" else IMAGE
    content = tiff(planes, file=options, **{"photometric": "rgb", **layout})
    assert np.array_equal(decode_picture(content).pixels, IMAGE)


@pytest.mark.parametrize("compression", [33003, 33005, 34712])
def test_jpeg_2000_in_aperios_kinds_has_the_right_colours(compression: int) -> None:
    pytest.importorskip("imagecodecs")
    kind = tifffile.COMPRESSION(compression)
    content = tiff(IMAGE, photometric="rgb", compression=kind)  # with its own colour transform
    assert np.array_equal(decode_picture(content).pixels, IMAGE)
    if compression == 33003:
        stored = np.asarray(Image.fromarray(IMAGE).convert("YCbCr"))
        plain = {"compressionargs": {"mct": False}}
        content = tiff(stored, photometric="rgb", compression=kind, **plain)
        assert np.abs(decode_picture(content).pixels.astype(int) - IMAGE).max() <= 3


CODECS = ["webp", "jpeg2000", "png", "lerc", "jpegxl"]
LOSSLESS = {
    "webp": {"compressionargs": {"lossless": True}},
    "jpegxl": {"compressionargs": {"lossless": True}},
    "jpeg2000": {"compressionargs": {"level": 0}},
}


@pytest.mark.parametrize("compression", ["zlib", *CODECS])
@pytest.mark.parametrize("kind", ["ASSOCALPHA", "UNASSALPHA", "UNSPECIFIED"])
def test_a_fourth_channel_is_what_the_tiff_says(compression: str, kind: str) -> None:
    pytest.importorskip("imagecodecs")
    alpha = np.full(IMAGE.shape[:2], 255, np.uint8)
    alpha[:8], alpha[8:16] = 0, 128
    share = alpha[..., None] / 255
    stored = np.rint(IMAGE * share).astype(np.uint8) if kind == "ASSOCALPHA" else IMAGE
    expected = IMAGE if kind == "UNSPECIFIED" else IMAGE * share + 255 * (1 - share)
    options = {"extrasamples": [kind], "compression": compression, **LOSSLESS.get(compression, {})}
    picture = decode_picture(tiff(np.dstack([stored, alpha]), photometric="rgb", **options))
    assert np.abs(picture.pixels - expected).max() <= 2
    assert bool(picture.notes) == (kind != "UNSPECIFIED")


@pytest.mark.parametrize("compression", [None, "zlib", *CODECS])
def test_a_tiffs_colour_profile_is_applied_whatever_its_compression(compression: str) -> None:
    pytest.importorskip("imagecodecs")
    profile = swapped_profile()
    options = {"compression": compression, **LOSSLESS.get(compression, {})}
    picture = decode_picture(tiff(IMAGE, photometric="rgb", iccprofile=profile, **options))
    assert np.abs(picture.pixels.astype(int) - IMAGE[..., ::-1]).max() <= 3
    assert picture.notes


@pytest.mark.parametrize("tag", [[], [(274, 3, 1, 1, True)], [(274, 3, 1, 6, True)]])
@pytest.mark.parametrize("compression", [None, "lzw", "webp"])
def test_a_tiffs_tag_says_which_way_is_up_and_not_xmp(
    tag: list[tuple[Any, ...]], compression: str | None
) -> None:
    pytest.importorskip("imagecodecs")
    xmp = b'<rdf:Description tiff:Orientation="8"/>'
    tags = [*tag, (700, 1, len(xmp), xmp, True)]
    options = {"compression": compression, "metadata": None, **LOSSLESS.get(compression or "", {})}
    resolution = {"resolution": (40_000, 20_000), "resolutionunit": "CENTIMETER"}
    content = tiff(IMAGE, photometric="rgb", extratags=tags, **options, **resolution)
    picture = decode_picture(content)
    is_turned = bool(tag) and tag[0][3] == 6
    assert np.array_equal(picture.pixels, np.rot90(IMAGE, -1) if is_turned else IMAGE)
    assert picture.pixel_size == pytest.approx((0.5, 0.25) if is_turned else (0.25, 0.5))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "webp"])
def test_a_tiff_is_turned_upright(orientation: int, compression: str | None) -> None:
    pytest.importorskip("imagecodecs")
    tag = (274, 3, 1, orientation, True)
    content = tiff(
        IMAGE, compression=compression, compressionargs={"lossless": True}, extratags=[tag]
    ) if compression else tiff(IMAGE, extratags=[tag])  # fmt: skip
    upright = {
        1: IMAGE,
        2: IMAGE[:, ::-1],
        3: IMAGE[::-1, ::-1],
        4: IMAGE[::-1],
        5: IMAGE.transpose(1, 0, 2),
        6: np.rot90(IMAGE, -1),
        7: np.rot90(IMAGE, 2).transpose(1, 0, 2),
        8: np.rot90(IMAGE),
    }
    picture = decode_picture(content)
    assert np.array_equal(picture.pixels, upright[orientation])
    assert bool(picture.notes) == (orientation != 1)


SHOWN = [-16776961, 16711935, 65535]
"""OME's red, green and blue."""
NAMED = {"Channel": {"Name": ["Red", "Green", "Blue"]}}


@pytest.mark.parametrize(
    ("content", "mpp"),
    [
        (ome(**NAMED, PhysicalSizeX=0.5, PhysicalSizeY=0.5), 0.5),
        (ome(Channel={"Name": ["r", "g", "b"]}), None),
        (ome(Channel={"Color": SHOWN}), None),
        (ome(Channel={"Name": ["C1", "C2", "C3"], "Color": SHOWN}), None),
        (ome(PLANES[::-1].copy(), Channel={"Name": ["Blue", "Green", "Red"]}), None),
        (ome(IMAGE, "YXC", planarconfig="contig", **NAMED), None),  # all in one page
        (ome(planarconfig="separate", **NAMED), None),
        *(
            (imagej(order, **metadata), None)
            for order in "<>"
            for metadata in (
                {"mode": "composite"},
                {"mode": "color", "LUTs": [lut("red"), lut("green"), lut("blue")]},
                {"Labels": ["Red", "Green", "Blue"]},
            )
        ),
    ],
)
def test_planes_that_say_that_they_are_red_green_and_blue_are_one_image(
    content: bytes, mpp: float | None
) -> None:
    picture = decode_picture(content)
    assert np.array_equal(picture.pixels, IMAGE)
    assert picture.mpp == mpp


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (imagej(mode="grayscale"), "channels 3"),
        (imagej(mode="color", LUTs=[lut("red"), lut("green"), lut("red")]), "channels 3"),
        (ome(Channel={"Name": ["DAPI", "FITC", "TRITC"]}), "DAPI, FITC, TRITC"),
        (ome(Channel={"Name": ["TRITC", "FITC", "DAPI"], "Color": SHOWN}), "TRITC, FITC, DAPI"),
        (ome(Channel={"EmissionWavelength": [600, 520, 460], "Color": SHOWN}), "C 3"),
        (ome(Channel={**NAMED["Channel"], "Fluor": ["TRITC", "FITC", "DAPI"]}), "C 3"),
        (ome(), "C 3"),
        (ome(axes="ZYX"), "Z 3"),
        (ome(PLANES[:2].copy()), "C 2"),
        (tiff(IMAGE, 255 - IMAGE, metadata=None), "2 pages of 96 x 64"),
        (tiff(IMAGE[..., 0], IMAGE[..., 1], IMAGE[..., 2], metadata=None), "3 pages"),
        (tiff(IMAGE, photometric="minisblack", planarconfig="contig"), "3 channels"),
        (tiff(PLANES, photometric="minisblack", planarconfig="separate"), "3 channels"),
        (tiff(IMAGE[..., :2], photometric="minisblack", planarconfig="contig"), "2 channels"),
    ],
)
def test_planes_that_do_not_say_their_colours_are_refused(content: bytes, found: str) -> None:
    with raises(ImageError, found, code="image_stack"):
        decode_picture(content)


SMALL = IMAGE[::4, ::4].copy()
LARGE_LABEL = blobs(128, 128)


def lens(magnification: float) -> tuple[int, int, int, float, bool]:
    """Hamamatsu's tag: -1 is the macro."""
    return 65421, 11, 1, magnification, True


@pytest.mark.parametrize(
    "content",
    [
        pages((SMALL, {"subfiletype": 1}), (IMAGE, {})),
        pages((SMALL, {}), (IMAGE, {})),
        pages((IMAGE, {}), (SMALL, {"subfiletype": 1})),
        pages((LARGE_LABEL, {"subfiletype": 1}), (IMAGE, {}), (SMALL, {"subfiletype": 9})),
        pages((LARGE_LABEL, {"description": "Label_Image"}), (IMAGE, {})),
        pages((IMAGE, {}), (LARGE_LABEL, {"description": "Aperio Image\nmacro 128x128"})),
        pages((SMALL, {}), (IMAGE, {"tile": (32, 32)}), bigtiff=True, byteorder=">"),
        pages((IMAGE, {"extratags": [lens(20.0)]}), (LARGE_LABEL, {"extratags": [lens(-1.0)]})),
        pages((IMAGE, {"description": "Map of the tissue"}), (SMALL, {})),
        pages((LARGE_LABEL, {"description": "Macro 128x128"}), (IMAGE, {})),
        pages((LARGE_LABEL, {"description": "Aperio\nlabel 128x128\n|a"}), (IMAGE, {})),
    ],
)
def test_the_largest_page_of_full_resolution_is_read(content: bytes) -> None:
    assert np.array_equal(decode_picture(content).pixels, IMAGE)


def test_the_pages_own_resolution_counts() -> None:
    content = pages(
        (SMALL, {"resolution": (10_000, 10_000), "resolutionunit": "CENTIMETER"}),
        (IMAGE, {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}),
    )
    assert decode_picture(content).mpp == pytest.approx(0.25)


@pytest.mark.parametrize(
    "description", ["ImageJ=1.54\nunit=um\n", "Aperio Image\n96x64|MPP = 0.25|"]
)
def test_the_pages_own_description_counts(description: str) -> None:
    own = {"description": description, "resolution": (4, 4), "resolutionunit": "NONE"}
    content = pages((SMALL, {"subfiletype": 1, "description": "thumbnail"}), (IMAGE, own))
    assert decode_picture(content).mpp == 0.25


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
def test_numbers_that_are_not_unsigned_8_bit_are_refused(dtype: type, photometric: str) -> None:
    pixels = IMAGE if photometric == "rgb" else IMAGE[..., 0]
    with raises(ImageError, f"{np.dtype(dtype).itemsize * 8} bits", code="image_depth"):
        decode_picture(tiff((pixels // 2).astype(dtype), photometric=photometric))


def test_bilevel_palette_grey_and_inverted_grey_become_rgb() -> None:
    grey = IMAGE[..., 0]
    bilevel = decode_picture(encoded(Image.fromarray(grey > 128), "TIFF")).pixels
    assert np.array_equal(bilevel[..., 1], np.where(grey > 128, 255, 0))
    palette = Image.fromarray(IMAGE).quantize(16)
    found = decode_picture(encoded(palette, "TIFF")).pixels
    assert np.array_equal(found, np.asarray(palette.convert("RGB")))
    inverted = decode_picture(tiff(255 - grey, photometric="miniswhite")).pixels
    assert np.array_equal(inverted, np.dstack([grey] * 3))


@pytest.mark.parametrize(
    ("photometric", "colors"), [("rgb", IMAGE), ("minisblack", IMAGE[..., :1])]
)
def test_an_alpha_channel_is_composited_on_white_and_said(
    photometric: str, colors: NDArray[np.uint8]
) -> None:
    alpha = np.full(IMAGE.shape[:2], 255, np.uint8)
    alpha[:8] = 0
    options = {"planarconfig": "contig", "extrasamples": ["unassalpha"]}
    content = tiff(np.dstack([colors, alpha]), photometric=photometric, **options)
    picture = decode_picture(content)
    assert (picture.pixels[:8] == 255).all()
    assert np.array_equal(picture.pixels[8:], np.broadcast_to(colors, IMAGE.shape)[8:])
    assert picture.notes


@pytest.mark.parametrize(
    ("num_samples", "options", "code", "named"),
    [
        (1, {"photometric": "cfa"}, "image_colors", ("colour filter array",)),
        (5, {"photometric": "separated"}, "image_colors", ("5 channels", "CMYK")),
        (4, {"photometric": "cielab"}, "image_colors", ("4 channels", "CIELab")),
        (3, {"compression": tifffile.COMPRESSION(34934)}, "image_compression", ("JPEG XR",)),
    ],
)
def test_pixels_that_are_not_read_are_named(
    num_samples: int, options: dict[str, Any], code: str, named: tuple[str, ...]
) -> None:
    pytest.importorskip("imagecodecs")
    pixels = np.dstack([IMAGE[..., :1]] * num_samples).squeeze()
    extra = {"extrasamples": ["UNASSALPHA"]} if num_samples > 3 else {}
    with raises(ImageError, *named, code=code):
        decode_picture(tiff(pixels, **{"photometric": "rgb", **options, **extra}))


def test_a_compression_of_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imagecodecs")
    content = tiff(IMAGE, compression="lerc", photometric="rgb")
    monkeypatch.setattr("serve.images.tiff_codecs.imagecodecs", None)
    with raises(ImageError, "LERC", "'.[slides]'", code="image_compression"):
        decode_picture(content)


def test_a_tile_that_is_larger_than_the_tiff_says_is_not_decoded() -> None:
    """The tile of 16 pixels holds a WebP of 2000."""
    pytest.importorskip("imagecodecs")
    content = tiff(IMAGE[:16, :16].copy(), compression="webp", photometric="rgb")
    huge = encoded(Image.new("RGB", (2_000, 2_000)), "WEBP", quality=1, method=0)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        counts, offsets = page.tags[279], page.tags[273]
    patched = bytearray(content)
    patched[counts.valueoffset : counts.valueoffset + 4] = len(huge).to_bytes(4, "little")
    patched[offsets.valueoffset : offsets.valueoffset + 4] = len(content).to_bytes(4, "little")
    with raises(ImageError, "(2000, 2000, 3)", code="image_damaged"):  # known from its header
        decode_picture(bytes(patched) + huge)


@pytest.mark.parametrize("compression", ["lzw", "webp"])
def test_a_small_page_of_huge_tiles_is_refused(compression: str) -> None:
    content = bytearray(tiff(IMAGE, tile=(16, 16), compression=compression, photometric="rgb"))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        width = file.pages[0].tags[322]
    content[width.valueoffset : width.valueoffset + 2] = (65_520).to_bytes(2, "little")
    with raises(ImageError, code="image_bomb"):
        decode_picture(bytes(content))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("make", [ome, imagej, lambda: tiff(IMAGE, compression="webp")])
def test_a_truncated_tiff_is_refused(share: float, make: Any) -> None:
    content = make()
    with pytest.raises(ImageError):
        decode_picture(content[: int(share * len(content))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_random_damage_to_the_tags_is_refused_or_decoded_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    whole = [
        ome(Channel={"Name": ["Red", "Green", "Blue"]}),
        imagej(mode="composite"),
        pages((SMALL, {"subfiletype": 1}), (IMAGE, {"compression": "webp", "tile": (32, 32)})),
    ]
    for index in range(300):
        damaged = bytearray(whole[index % 3])
        for place in rng.integers(0, 700, size=rng.choice([1, 3, 20])):
            damaged[place] = rng.integers(256)
        try:
            picture: Picture = decode_picture(bytes(damaged), max_pixels=10**6)
        except ImageError:
            continue
        assert picture.pixels.dtype == np.uint8
        assert picture.pixels.shape[2] == 3


def test_a_segment_whose_own_header_tells_a_huge_size_is_damaged() -> None:
    pytest.importorskip("imagecodecs")
    content = bytearray(tiff(IMAGE, photometric="rgb", compression="jpeg2000", metadata=None))
    size = content.index(b"\xff\x51")  # SIZ of ISO/IEC 15444-1: marker, length, profile, width
    content[size + 6 : size + 14] = b"\x00\x10\x00\x00" * 2
    with raises(ImageError, code="image_damaged"):
        decode_picture(bytes(content))


def test_rows_per_strip_without_a_value_are_those_of_the_image() -> None:
    pytest.importorskip("imagecodecs")
    options = {"photometric": "rgb", "compression": "webp", "metadata": None}
    content = bytearray(tiff(IMAGE, compressionargs={"lossless": True}, **options))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        entry = file.pages[0].tags["RowsPerStrip"].offset
    content[entry + 2 : entry + 4] = b"\x02\x00"  # text, which has no number
    assert np.array_equal(decode_picture(bytes(content)).pixels, IMAGE)


@pytest.mark.parametrize("tag", [257, 258, 274, 277, 278, 279, 284, 296])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tag_that_is_no_number_is_refused_or_ignored(tag: int, value: float) -> None:
    orientation = [(274, 3, 1, 1, True)]
    content = bytearray(tiff(IMAGE, photometric="rgb", metadata=None, extratags=orientation))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        entry = file.pages[0].tags[tag].offset
    struct.pack_into("<HLf", content, entry + 2, 11, 1, value)
    with contextlib.suppress(ImageError):
        assert decode_picture(bytes(content)).pixels.shape[2] == 3
