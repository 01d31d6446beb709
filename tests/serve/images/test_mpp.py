"""Files that state their um per pixel, in the spellings that programs have for it."""

import pytest
from PIL import Image

from serve.contract.errors import ImageError, OptionError
from serve.images.decode import Picture, decode_picture
from serve.images.mpp import UNKNOWN, check_aspect, check_mpp
from serve.images.units import um_per_unit
from tests.support.errors import raises
from tests.support.pictures import blobs, encoded

IMAGE = blobs(40, 60)
ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, DESCRIPTION = 274, 282, 283, 296, 270
INCH, CENTIMETRE, NO_UNIT, MILLIMETRE, MICROMETRE = 2, 3, 1, 4, 5


def _tiff(x: float, y: float, unit: int | None, description: str | bytes = "") -> Picture:
    tags = {X_RESOLUTION: x, Y_RESOLUTION: y, DESCRIPTION: description}
    if unit is not None:
        tags[RESOLUTION_UNIT] = unit
    return decode_picture(encoded(IMAGE, "TIFF", tiffinfo=tags))


def _ome(attributes: str, before: str = "", resolution: float = 72.0) -> Picture:
    """An OME-TIFF whose other tags say 72 dpi, as its writers do."""
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?>{before}<OME xmlns="http://www.openmicroscopy.org">'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" {attributes}><Channel/></Pixels>'
    )
    return _tiff(resolution, resolution, CENTIMETRE, xml.encode())


@pytest.mark.parametrize(
    ("pixels_per_unit", "unit", "mpp"),
    [
        (4.0, r"\u00B5m", 0.25),
        (4.0, r"\u00b5m", 0.25),
        (4.0, r"\u03BCm", 0.25),
        (4.0, "\u00b5m", 0.25),
        (4.0, "\u03bcm", 0.25),
        (4.0, "um", 0.25),
        (4.0, "micron", 0.25),
        (4.0, "Microns", 0.25),
        (4.0, "micrometer", 0.25),
        (4.0, "micrometers", 0.25),
        (4.0, "micrometres", 0.25),
        (4000.0, "mm", 0.25),
        (0.004, "nm", 0.25),
        (40_000.0, "cm", 0.25),
        (101_600.0, "inch", 0.25),
        (4e6, "m", 0.25),
        (4.0, "\u00c2\u00b5m", 0.25),
        (4.0, "um/px", 0.25),
    ],
)
def test_an_imagej_tiff_states_its_mpp_in_its_own_unit(
    pixels_per_unit: float, unit: str, mpp: float
) -> None:
    description = f"ImageJ=1.54u\nunit={unit}\nname=a.png\n"
    picture = _tiff(pixels_per_unit, pixels_per_unit, NO_UNIT, description.encode())
    assert picture.mpp == pytest.approx(mpp)
    assert picture.mpp_source == "ImageJ unit"


def test_an_older_imagej_tiff_is_in_latin_1() -> None:
    description = "ImageJ=1.37c\nunit=\u00b5m\n".encode("latin-1")
    assert _tiff(4.0, 4.0, NO_UNIT, description).mpp == pytest.approx(0.25)


@pytest.mark.parametrize("unit", ["pixel", "pixels", "", "furlong"])
def test_an_imagej_tiff_in_pixels_states_nothing(unit: str) -> None:
    picture = _tiff(4.0, 4.0, NO_UNIT, f"ImageJ=1.54u\nunit={unit}\n")
    assert (picture.mpp, picture.mpp_source, picture.mpp_note) == (None, UNKNOWN, "")


@pytest.mark.parametrize(("dpi", "unit"), [(72.0, "inch"), (300.0, "inch"), (118.11, "cm")])
def test_imagej_took_over_a_printers_resolution(dpi: float, unit: str) -> None:
    picture = _tiff(dpi, dpi, NO_UNIT, f"ImageJ=1.54u\nunit={unit}\n")
    assert picture.mpp is None
    assert "ImageJ unit" in picture.mpp_note


def test_imagej_may_have_another_unit_along_y() -> None:
    picture = _tiff(4.0, 4000.0, NO_UNIT, "ImageJ=1.54u\nunit=um\nyunit=mm\n")
    assert picture.mpp == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        (40_000.0, CENTIMETRE, 0.25),
        (50_800.0, INCH, 0.5),
        (50_800.0, None, 0.5),
        (4_000.0, MILLIMETRE, 0.25),
        (4.0, MICROMETRE, 0.25),
    ],
)
def test_a_tiff_states_its_mpp_by_its_resolution(
    resolution: float, unit: int | None, mpp: float
) -> None:
    picture = _tiff(resolution, resolution, unit)
    assert picture.mpp == pytest.approx(mpp)
    assert picture.mpp_source == "TIFF resolution"


def test_a_png_states_its_mpp_by_pixels_per_metre() -> None:
    picture = decode_picture(encoded(IMAGE, dpi=(50_800, 50_800)))
    assert picture.mpp == pytest.approx(0.5)
    assert picture.mpp_source == "PNG density"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [(40_000.0, CENTIMETRE, 0.25), (50_800.0, INCH, 0.5), (50_800.0, None, 0.5),
     (40_000.0, NO_UNIT, None), (72.0, INCH, None), (0.0, INCH, None)],
)  # fmt: skip
def test_a_file_states_its_mpp_by_exif(
    kind: str, resolution: float, unit: int | None, mpp: float | None
) -> None:
    picture = decode_picture(encoded(IMAGE, kind, exif=_exif(resolution, resolution, unit)))
    assert picture.mpp == (None if mpp is None else pytest.approx(mpp))
    assert picture.mpp_source == (UNKNOWN if mpp is None else "EXIF resolution")


def _exif(x: float, y: float, unit: int | None, orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif.update({X_RESOLUTION: x, Y_RESOLUTION: y, ORIENTATION: orientation})
    if unit is not None:
        exif[RESOLUTION_UNIT] = unit
    return exif


def test_a_resolution_in_exif_counts_where_the_jpegs_density_is_not_believed() -> None:
    exif = _exif(40_000.0, 20_000.0, CENTIMETRE, orientation=6)
    picture = decode_picture(encoded(IMAGE, "JPEG", dpi=(72, 72), exif=exif))
    assert picture.pixel_size == pytest.approx((0.5, 0.25))  # turned with the image
    other = decode_picture(encoded(IMAGE, "JPEG", dpi=(50_800, 50_800), exif=exif))
    assert (other.mpp, other.mpp_source) == (pytest.approx(0.5), "JPEG density")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\0\0\0", b"x"])
def test_damaged_exif_says_nothing(exif: bytes) -> None:
    picture = decode_picture(encoded(IMAGE, "JPEG", exif=exif))
    assert (picture.mpp, picture.pixels.shape) == (None, IMAGE.shape)


def test_a_jpeg_states_its_mpp_by_its_density() -> None:
    picture = decode_picture(encoded(IMAGE, "JPEG", dpi=(50_800, 50_800)))
    assert picture.mpp == pytest.approx(0.5)
    assert picture.mpp_source == "JPEG density"


@pytest.mark.parametrize("dpi", [72, 96, 100, 150, 200, 300, 600, 1200, 2400, 4800, 7200, 9600])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_resolution_of_screens_and_printers_is_not_believed(dpi: int, kind: str) -> None:
    picture = decode_picture(encoded(IMAGE, kind, dpi=(dpi, dpi)))
    assert (picture.mpp, picture.mpp_source) == (None, UNKNOWN)
    assert f"{dpi} dpi" in picture.mpp_note


@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="0.25"', 0.25),
        ('PhysicalSizeX="0,25" PhysicalSizeY="0,25"', 0.25),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00b5m"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u03bcm"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="&#181;m"', 0.5),
        ("PhysicalSizeX='500' PhysicalSizeXUnit='nm'", 0.5),
        ("PhysicalSizeX='5000' PhysicalSizeXUnit='\u00c5'", 0.5),
        ('PhysicalSizeY="0.5"', 0.5),
        ('PhysicalSizeX="5e-10" PhysicalSizeXUnit="km"', 0.5),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="\u00c2\u00b5m"', 0.5),
        (
            'PhysicalSizeXUnit="mm" PhysicalSizeYUnit="nm" PhysicalSizeX="5e-4" '
            'PhysicalSizeY="500"',
            0.5,
        ),
    ],
)
def test_an_ome_tiff_states_its_mpp_in_its_description(attributes: str, mpp: float) -> None:
    picture = _ome(attributes)
    assert picture.mpp == pytest.approx(mpp)
    assert picture.mpp_source == "OME-XML"


def test_ome_xml_may_begin_with_an_empty_line() -> None:
    xml = b'\r\n <?xml version="1.0"?><OME><Image><Pixels PhysicalSizeX="0.5"/></Image></OME>\n'
    assert _tiff(72.0, 72.0, INCH, xml).mpp == 0.5


def test_ome_xml_of_an_image_of_another_size_is_not_believed() -> None:
    picture = _ome('SizeX="600" SizeY="400" PhysicalSizeX="0.25"')
    assert picture.mpp is None
    assert "600 x 400" in picture.mpp_note
    assert _ome('SizeX="600" SizeY="400" PhysicalSizeX="0.25"', resolution=4_000).mpp == 2.5


def test_an_ome_tiff_without_a_physical_size_states_its_mpp_by_its_resolution() -> None:
    picture = _ome('SizeX="60" SizeY="40"', resolution=40_000.0)
    assert picture.mpp == pytest.approx(0.25)
    assert picture.mpp_source == "TIFF resolution"


def test_the_ome_image_of_the_pages_size_counts() -> None:
    label = 'SizeX="9" SizeY="9" PhysicalSizeX="7.0"/><Pixels '
    assert _ome(label + 'SizeX="60" SizeY="40" PhysicalSizeX="0.5"').mpp == pytest.approx(0.5)


@pytest.mark.parametrize(
    "attributes",
    [
        'PhysicalSizeX="1e9"',
        'PhysicalSizeX="0.001"',
        'PhysicalSizeX="-0.5"',
        'PhysicalSizeX="nan"',
        'PhysicalSizeX="half"',
        'PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel"',
        'PhysicalSizeX="&size;"',
        'SizeY="40"',
    ],
)
def test_what_no_microscope_gives_is_not_believed_in_an_ome_tiff_too(attributes: str) -> None:
    assert _ome(attributes).mpp is None


def test_entities_of_an_ome_tiff_are_not_expanded() -> None:
    entity = '<!DOCTYPE x [<!ENTITY size "0.5"><!ENTITY f SYSTEM "file:///etc/hostname">]>'
    assert _ome('PhysicalSizeX="&size;"', entity).mpp is None


@pytest.mark.parametrize(
    "text", ["<Pixels " * 100_000, "<Pixels " + "a" * 10**6, "Aperio" + "|MPP=" * 200_000]
)
def test_a_description_made_to_be_searched_for_hours_is_done_with_at_once(text: str) -> None:
    assert _tiff(72.0, 72.0, INCH, text).mpp is None


@pytest.mark.parametrize(
    ("description", "mpp"),
    [
        (
            "Aperio Image Library v11.2.1\r\n46000x32914 -> |AppMag = 40|MPP = 0.2525|Left = 1",
            0.2525,
        ),
        ("Aperio Leica Biosystems GT450|AppMag = 20|MPP = 0.5", 0.5),
        ("Aperio Image Library\n600x400 -> 60x40 - |AppMag = 20|MPP = 0.25|Left = 1", 2.5),
        ("Aperio Image Library\n600x400 [9,9 240x160] (9x9) -> 60x40 JPEG|MPP = 0.25|a", 1.0),
        ("Aperio Image Library\n600x400 [9,9 240x160] (9x9) -> 30x20 JPEG|MPP = 0.25|a", 0.25),
        ("Aperio Image Library\n600x400 -> 0x0|MPP = 0.25|a", 0.25),
        ("Aperio Image Library|AppMag = 20|MPP = 500|Left = 1", None),
        ("Aperio Image Library|AppMag = 20|MPP = 0.2.5|Left = 1", None),
        ("Another Library|MPP = 0.25|", None),
    ],
)
def test_an_aperio_slide_states_its_mpp(description: str, mpp: float | None) -> None:
    picture = _tiff(72.0, 72.0, INCH, description)
    assert picture.mpp == (None if mpp is None else pytest.approx(mpp))


def test_pixels_that_are_not_square_have_a_um_per_pixel_along_each_axis() -> None:
    picture = _tiff(40_000.0, 20_000.0, CENTIMETRE)
    assert picture.pixel_size == pytest.approx((0.25, 0.5))
    assert (picture.mpp, picture.mpp_note) == (pytest.approx(0.125**0.5), "")
    ome = _ome('PhysicalSizeX="0.5" PhysicalSizeY="250" PhysicalSizeYUnit="nm"')
    assert ome.pixel_size == pytest.approx((0.5, 0.25))


def test_sides_that_differ_by_rounding_are_those_of_a_square() -> None:
    size = _tiff(40_000.0, 40_100.0, CENTIMETRE).pixel_size
    assert size is not None
    assert size.x == size.y


def test_the_sides_of_a_pixel_turn_with_the_image() -> None:
    tags = {X_RESOLUTION: 40_000.0, Y_RESOLUTION: 20_000.0, RESOLUTION_UNIT: CENTIMETRE, 274: 6}
    picture = decode_picture(encoded(IMAGE, "TIFF", tiffinfo=tags))
    assert picture.pixels.shape[:2] == (60, 40)
    assert picture.pixel_size == pytest.approx((0.5, 0.25))


@pytest.mark.parametrize("y", [2.5, 25.0, 0.025])
def test_sides_of_a_microscopes_pixel_that_differ_absurdly_are_refused_by_name(y: float) -> None:
    picture = _ome(f'PhysicalSizeX="0.25" PhysicalSizeY="{y}"')
    assert picture.pixel_size is not None
    with raises(ImageError, "OME-XML", "10", code="pixel_aspect") as raised:
        check_aspect(picture.pixel_size, picture.mpp_source)
    assert f"{y:g}" in str(raised.value)


def test_a_fax_resolution_is_not_believed_although_its_sides_differ() -> None:
    picture = _tiff(204.0, 98.0, INCH)
    assert picture.pixel_size is None
    assert "204 x 98 dpi" in picture.mpp_note


def test_the_first_believable_statement_counts() -> None:
    picture = _ome('PhysicalSizeX="1000"', resolution=40_000.0)
    assert (picture.mpp, picture.mpp_source) == (pytest.approx(0.25), "TIFF resolution")


@pytest.mark.parametrize(
    ("resolution", "unit"),
    [(4.0, NO_UNIT), (10.0**6, CENTIMETRE), (0.0, CENTIMETRE), (40_000.0, 77)],
    ids=["no unit", "too fine", "zero", "unknown unit"],
)
def test_a_resolution_that_no_microscope_gives_is_not_believed(
    resolution: float, unit: int
) -> None:
    assert _tiff(resolution, resolution, unit).mpp is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_may_say_nothing(kind: str) -> None:
    picture = decode_picture(encoded(IMAGE, kind))
    assert (picture.mpp, picture.mpp_source, picture.mpp_note) == (None, UNKNOWN, "")


@pytest.mark.parametrize(
    ("name", "um"),
    [("\u00b5m", 1.0), ("MM", 1000.0), ("Angstrom", 1e-4), ("inches", 25_400.0), ("px", None)],
)
def test_units_are_known_by_many_names(name: str, um: float | None) -> None:
    assert um_per_unit(name) == um


@pytest.mark.parametrize("mpp", [0.0, -1.0, 0.049, 20.1, float("nan"), float("inf")])
def test_an_absurd_mpp_is_refused(mpp: float) -> None:
    with pytest.raises(OptionError) as raised:
        check_mpp(mpp)
    assert raised.value.code == "option_invalid"
