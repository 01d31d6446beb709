"""Files that state their um per pixel, in the spellings that programs have for it."""

import pytest
from PIL import Image

from serve.contract.errors import ImageError, OptionError
from serve.images.decode import decode_picture
from serve.images.mpp import UNKNOWN, check_aspect, check_mpp
from serve.images.units import um_per_unit
from tests.support.errors import raises
from tests.support.pictures import blobs, encoded

IMAGE = blobs(40, 60)
ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, DESCRIPTION = 274, 282, 283, 296, 270
INCH, CENTIMETRE, NO_UNIT, MILLIMETRE, MICROMETRE = 2, 3, 1, 4, 5


def tiff(x: float, y: float, unit: int | None, description: str | bytes = "") -> bytes:
    tags = {X_RESOLUTION: x, Y_RESOLUTION: y, DESCRIPTION: description}
    if unit is not None:
        tags[RESOLUTION_UNIT] = unit
    return encoded(IMAGE, "TIFF", tiffinfo=tags)


def ome(attributes: str, before: str = "", resolution: float = 72.0) -> bytes:
    """An OME-TIFF whose other tags say 72 dpi, as its writers do."""
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?>{before}<OME xmlns="http://www.openmicroscopy.org">'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" {attributes}><Channel/></Pixels>'
    )
    return tiff(resolution, resolution, CENTIMETRE, xml.encode())


def imagej(unit: str, per_unit: float = 4.0) -> bytes:
    description = f"ImageJ=1.54u\nunit={unit}\nname=a.png\n"
    return tiff(per_unit, per_unit, NO_UNIT, description.encode())


def aperio(text: str) -> bytes:
    return tiff(72.0, 72.0, INCH, text)


@pytest.mark.parametrize(
    ("unit", "per_unit"),
    [
        (r"\u00B5m", 4.0),
        (r"\u00b5m", 4.0),
        (r"\u03BCm", 4.0),
        ("\u00b5m", 4.0),
        ("\u03bcm", 4.0),
        ("um", 4.0),
        ("micron", 4.0),
        ("Microns", 4.0),
        ("micrometer", 4.0),
        ("micrometers", 4.0),
        ("micrometres", 4.0),
        ("mm", 4000.0),
        ("nm", 0.004),
        ("cm", 40_000.0),
        ("inch", 101_600.0),
        ("m", 4e6),
        ("\u00c2\u00b5m", 4.0),
        ("um/px", 4.0),
    ],
)
def test_an_imagej_tiff_states_its_mpp_in_its_own_unit(unit: str, per_unit: float) -> None:
    picture = decode_picture(imagej(unit, per_unit))
    assert (picture.mpp, picture.mpp_source) == (pytest.approx(0.25), "ImageJ unit")


@pytest.mark.parametrize(
    ("content", "mpp", "source"),
    [
        (
            tiff(4, 4, NO_UNIT, b"ImageJ=1.37c\nunit=\xb5m\n"),
            0.25,
            "ImageJ unit",
        ),
        (tiff(4, 4000, NO_UNIT, "ImageJ=1.54u\nunit=um\nyunit=mm\n"), 0.25, "ImageJ unit"),
        (tiff(40_000.0, 40_000.0, CENTIMETRE), 0.25, "TIFF resolution"),
        (tiff(50_800.0, 50_800.0, INCH), 0.5, "TIFF resolution"),
        (tiff(50_800.0, 50_800.0, None), 0.5, "TIFF resolution"),
        (tiff(4_000.0, 4_000.0, MILLIMETRE), 0.25, "TIFF resolution"),
        (tiff(4.0, 4.0, MICROMETRE), 0.25, "TIFF resolution"),
        (encoded(IMAGE, "PNG", dpi=(50_800, 50_800)), 0.5, "PNG density"),
        (encoded(IMAGE, "JPEG", dpi=(50_800, 50_800)), 0.5, "JPEG density"),
        (ome('PhysicalSizeX="0.25" PhysicalSizeY="0.25"'), 0.25, "OME-XML"),
        (ome('PhysicalSizeX="0.25"'), 0.25, "OME-XML"),
        (ome('PhysicalSizeX="0,25" PhysicalSizeY="0,25"'), 0.25, "OME-XML"),
        (ome('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00b5m"'), 0.5, "OME-XML"),
        (ome('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u03bcm"'), 0.5, "OME-XML"),
        (ome('PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m"'), 0.5, "OME-XML"),
        (ome("PhysicalSizeX='500' PhysicalSizeXUnit='nm'"), 0.5, "OME-XML"),
        (ome("PhysicalSizeX='5000' PhysicalSizeXUnit='\u00c5'"), 0.5, "OME-XML"),
        (ome('PhysicalSizeY="0.5"'), 0.5, "OME-XML"),
        (ome('PhysicalSizeX="5e-10" PhysicalSizeXUnit="km"'), 0.5, "OME-XML"),
        (ome('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00c2\u00b5m"'), 0.5, "OME-XML"),
        (
            aperio(
                '\r\n <?xml version="1.0"?><OME><Image><Pixels PhysicalSizeX="0.5"/></Image></OME>'
            ),
            *(0.5, "OME-XML"),
        ),
        (
            ome(
                'PhysicalSizeXUnit="mm" PhysicalSizeYUnit="nm" '
                'PhysicalSizeX="5e-4" PhysicalSizeY="500"'
            ),
            *(0.5, "OME-XML"),
        ),
        # Of two images, that of the page's size counts.
        (
            ome(
                'SizeX="9" SizeY="9" PhysicalSizeX="7.0"/><Pixels '
                'SizeX="60" SizeY="40" PhysicalSizeX="0.5"'
            ),
            *(0.5, "OME-XML"),
        ),
        # The first statement that can be believed counts.
        (ome('SizeX="60" SizeY="40"', resolution=40_000.0), 0.25, "TIFF resolution"),
        (ome('PhysicalSizeX="1000"', resolution=40_000.0), 0.25, "TIFF resolution"),
        (ome('SizeX="600" SizeY="400" PhysicalSizeX="0.25"', "", 4_000.0), 2.5, "TIFF resolution"),
        (
            aperio("Aperio Image Library v11.2.1\r\n46000x32914 -> |MPP = 0.2525|Left = 1"),
            *(0.2525, "Aperio MPP"),
        ),
        (aperio("Aperio Leica Biosystems GT450|AppMag = 20|MPP = 0.5"), 0.5, "Aperio MPP"),
        (aperio("Aperio Image Library|AppMag = 20|MPP = 5.0E-01|Left = 1"), 0.5, "Aperio MPP"),
        (aperio("Aperio\n600x400 -> 60x40 - |AppMag = 20|MPP = 0.25|Left = 1"), 2.5, "Aperio MPP"),
        (aperio("Aperio\n600x400 [9,9 240x160] (9x9) -> 60x40|MPP = 0.25|"), 1.0, "Aperio MPP"),
        (aperio("Aperio\n600x400 [9,9 240x160] (9x9) -> 30x20|MPP = 0.25|"), 0.25, "Aperio MPP"),
        (aperio("Aperio\n600x400 -> 0x0|MPP = 0.25|a"), 0.25, "Aperio MPP"),
    ],
)
def test_a_file_states_its_mpp(content: bytes, mpp: float, source: str) -> None:
    picture = decode_picture(content)
    assert (picture.mpp, picture.mpp_source) == (pytest.approx(mpp), source)


@pytest.mark.parametrize("dpi", [72, 96, 100, 150, 200, 300, 600, 1200, 2400, 4800, 7200, 9600])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_resolution_of_screens_and_printers_is_not_believed(dpi: int, kind: str) -> None:
    picture = decode_picture(encoded(IMAGE, kind, dpi=(dpi, dpi)))
    assert (picture.mpp, picture.mpp_source) == (None, UNKNOWN)
    assert f"{dpi} dpi" in picture.mpp_note


def exif_of(x: float, y: float, unit: int | None, orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif.update({X_RESOLUTION: x, Y_RESOLUTION: y, ORIENTATION: orientation})
    if unit is not None:
        exif[RESOLUTION_UNIT] = unit
    return exif


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [(40_000.0, CENTIMETRE, 0.25), (50_800.0, INCH, 0.5), (50_800.0, None, 0.5),
     (40_000.0, NO_UNIT, None), (72.0, INCH, None), (0.0, INCH, None)],
)  # fmt: skip
def test_a_file_states_its_mpp_by_exif(
    kind: str, resolution: float, unit: int | None, mpp: float | None
) -> None:
    picture = decode_picture(encoded(IMAGE, kind, exif=exif_of(resolution, resolution, unit)))
    assert picture.mpp == (mpp and pytest.approx(mpp))
    assert picture.mpp_source == (UNKNOWN if mpp is None else "EXIF resolution")


def test_a_resolution_in_exif_counts_where_the_jpegs_density_is_not_believed() -> None:
    exif = exif_of(40_000.0, 20_000.0, CENTIMETRE, orientation=6)
    picture = decode_picture(encoded(IMAGE, "JPEG", dpi=(72, 72), exif=exif))
    assert picture.pixel_size == pytest.approx((0.5, 0.25))  # turned with the image
    other = decode_picture(encoded(IMAGE, "JPEG", dpi=(50_800, 50_800), exif=exif))
    assert (other.mpp, other.mpp_source) == (pytest.approx(0.5), "JPEG density")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\0\0\0", b"x"])
def test_damaged_exif_says_nothing(exif: bytes) -> None:
    picture = decode_picture(encoded(IMAGE, "JPEG", exif=exif))
    assert (picture.mpp, picture.pixels.shape) == (None, IMAGE.shape)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        *((imagej(unit), "") for unit in ("pixel", "pixels", "", "furlong")),
        # ImageJ took over a printer's resolution.
        (imagej("inch", 72.0), "ImageJ unit"),
        (imagej("inch", 300.0), "ImageJ unit"),
        (imagej("cm", 118.11), "ImageJ unit"),
        (tiff(204.0, 98.0, INCH), "204 x 98 dpi"),  # of a fax
        (tiff(4.0, 4.0, NO_UNIT), ""),
        (tiff(1e6, 1e6, CENTIMETRE), "TIFF resolution"),
        (tiff(0.0, 0.0, CENTIMETRE), ""),
        (tiff(40_000.0, 40_000.0, 77), ""),
        (ome('SizeX="600" SizeY="400" PhysicalSizeX="0.25"'), "600 x 400"),
        (ome('PhysicalSizeX="1e9"'), "OME-XML"),
        (ome('PhysicalSizeX="0.001"'), "OME-XML"),
        (ome('PhysicalSizeX="-0.5"'), "TIFF resolution"),
        (ome('PhysicalSizeX="nan"'), "TIFF resolution"),
        (ome('PhysicalSizeX="half"'), "TIFF resolution"),
        (ome('PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel"'), "TIFF resolution"),
        (ome('PhysicalSizeX="&size;"'), "TIFF resolution"),
        (
            ome(
                'PhysicalSizeX="&size;"',
                '<!DOCTYPE x [<!ENTITY size "0.5"><!ENTITY f SYSTEM "file:///etc/hostname">]>',
            ),
            "TIFF resolution",
        ),
        (aperio("Aperio Image Library|AppMag = 20|MPP = 500|Left = 1"), "Aperio MPP"),
        (aperio("Aperio Image Library|AppMag = 20|MPP = 0.2.5|Left = 1"), "72 dpi"),
        (aperio("Another Library|MPP = 0.25|"), "72 dpi"),
        # Made to be searched for hours.
        (aperio("<Pixels " * 100_000), "72 dpi"),
        (aperio("<Pixels " + "a" * 10**6), "72 dpi"),
        (aperio("Aperio" + "|MPP=" * 200_000), "72 dpi"),
        *((encoded(IMAGE, kind), "") for kind in ("PNG", "JPEG", "WEBP")),
    ],
)
def test_what_no_microscope_gives_is_not_believed_and_told(content: bytes, note: str) -> None:
    picture = decode_picture(content)
    assert (picture.mpp, picture.mpp_source) == (None, UNKNOWN)
    assert note in picture.mpp_note
    assert bool(note) == bool(picture.mpp_note)


@pytest.mark.parametrize(
    ("content", "sides"),
    [
        (tiff(40_000.0, 20_000.0, CENTIMETRE), (0.25, 0.5)),
        (ome('PhysicalSizeX="0.5" PhysicalSizeY="250" PhysicalSizeYUnit="nm"'), (0.5, 0.25)),
        (encoded(IMAGE, "TIFF", tiffinfo={282: 4e4, 283: 2e4, 296: 3, 274: 6}), (0.5, 0.25)),
    ],
    ids=["resolution", "OME", "turned with the image"],
)
def test_pixels_that_are_not_square_have_a_um_per_pixel_along_each_axis(
    content: bytes, sides: tuple[float, float]
) -> None:
    picture = decode_picture(content)
    assert picture.pixel_size == pytest.approx(sides)
    assert (picture.mpp, picture.mpp_note) == (pytest.approx(0.125**0.5), "")


def test_sides_that_differ_by_rounding_are_those_of_a_square() -> None:
    size = decode_picture(tiff(40_000.0, 40_100.0, CENTIMETRE)).pixel_size
    assert size is not None
    assert size.x == size.y


@pytest.mark.parametrize("y", [2.5, 25.0, 0.025])
def test_sides_of_a_microscopes_pixel_that_differ_absurdly_are_refused_by_name(y: float) -> None:
    picture = decode_picture(ome(f'PhysicalSizeX="0.25" PhysicalSizeY="{y}"'))
    assert picture.pixel_size is not None
    with raises(ImageError, "OME-XML", "10", f"{y:g}", code="pixel_aspect"):
        check_aspect(picture.pixel_size, picture.mpp_source)


@pytest.mark.parametrize(
    ("name", "um"),
    [("\u00b5m", 1.0), ("MM", 1000.0), ("Angstrom", 1e-4), ("inches", 25_400.0), ("px", None)],
)
def test_units_are_known_by_many_names(name: str, um: float | None) -> None:
    assert um_per_unit(name) == um


@pytest.mark.parametrize("mpp", [0.0, -1.0, 0.049, 20.1, float("nan"), float("inf")])
def test_an_absurd_mpp_is_refused(mpp: float) -> None:
    with raises(OptionError, f"{mpp:g}"):
        check_mpp(mpp)
