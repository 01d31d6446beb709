import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image

from serve.images.readers.reader import Bounds
from serve.images.readers.registry import open_reader
from serve.images.readers.scaled import ScaledView
from serve.slides.errors import MaskError
from serve.slides.options import TissueRule
from serve.slides.tissue import TISSUE_MPP, read_mask, tissue_of
from tests.support.errors import raises
from tests.support.pictures import encoded, png_chunk
from tests.support.real_slide import real_slide
from tests.support.slides import VirtualSlide

EXACT = TissueRule(grow_um=0)


def overview(**painted: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Glass of 100 x 120 pixels with noise, and a rectangle of a colour."""
    rng = np.random.default_rng(0)
    found = np.clip(rng.normal(243, 1, (100, 120, 1)).repeat(3, axis=2), 0, 255)
    for color in painted.values():
        found[30:70, 40:90] = color
    return found.astype(np.uint8)


@pytest.mark.parametrize(
    "color",
    [(200, 120, 180), (120, 60, 160), (236, 215, 228), (150, 100, 60), (230, 200, 215)],
    ids=["pink", "purple", "pale", "brown", "fat"],
)
def test_stained_tissue_is_found_and_glass_is_not(color: tuple[int, int, int]) -> None:
    mask = tissue_of(overview(tissue=color), EXACT)
    inside = mask[32:68, 42:88]
    assert inside.all()
    mask[28:72, 38:92] = False
    assert not mask.any()


def test_an_empty_slide_and_a_full_one_are_told_apart() -> None:
    assert not tissue_of(overview(), EXACT).any()
    full = np.full((60, 60, 3), (200, 120, 180), np.uint8)
    assert tissue_of(full, EXACT).all()


@pytest.mark.parametrize("color", [(20, 150, 60), (10, 120, 100), (15, 12, 14)])
def test_a_green_pen_and_black_are_left_out_unless_they_are_wanted(
    color: tuple[int, int, int],
) -> None:
    picture = overview(pen=color)
    assert not tissue_of(picture, EXACT).any()
    everything = TissueRule(grow_um=0, exclude_pen=False)
    assert tissue_of(picture, everything)[32:68, 42:88].all()


def test_dust_is_no_tissue_and_gaps_are_closed() -> None:
    picture = overview(tissue=(200, 120, 180))
    picture[10:12, 10:12] = (200, 40, 180)
    picture[50, 60:64] = 243
    mask = tissue_of(picture, EXACT)
    assert not mask[:25].any()
    assert mask[32:68, 42:88].all()


def test_the_tissue_is_grown_by_as_many_um_as_asked() -> None:
    picture = overview(tissue=(200, 120, 180))
    exact = tissue_of(picture, EXACT)
    grown = tissue_of(picture, TissueRule(grow_um=5 * TISSUE_MPP))
    rows, columns = (np.flatnonzero(exact.any(axis=axis)) for axis in (1, 0))
    wider, longer = (np.flatnonzero(grown.any(axis=axis)) for axis in (1, 0))
    assert (wider[0], wider[-1]) == (rows[0] - 5, rows[-1] + 5)
    assert (longer[0], longer[-1]) == (columns[0] - 5, columns[-1] + 5)


def test_the_tissue_of_a_real_slide_is_about_a_third_of_it() -> None:
    with open_reader(real_slide()) as slide:
        share = tissue_of(slide.thumbnail(TISSUE_MPP), TissueRule()).mean()
    assert 0.25 < share < 0.6


@pytest.fixture
def view(tmp_path: Path) -> ScaledView:
    (tmp_path / "slide").touch()
    return VirtualSlide(tmp_path / "slide", (896, 1088)).at_mpp(0.5)


def save(path: Path, content: object) -> Path:
    """Write bytes, a text, an image, or JSON."""
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(json.dumps(content), encoding="utf-8-sig")
    return path


RECTANGLE = np.zeros((56, 68), np.uint8)  # one pixel for 16 of the slide
RECTANGLE[20:40, 30:60] = 255
SQUARE = shapely.box(480, 320, 960, 640) - shapely.box(560, 400, 640, 480)
FEATURE = {"type": "Feature", "geometry": json.loads(shapely.to_geojson(SQUARE)), "properties": {}}
FEATURE["geometry"]["coordinates"].append([])
EMPTY = {"type": "Polygon", "coordinates": []}
FEATURES = [FEATURE, *({"type": "Feature", "geometry": nothing} for nothing in (None, EMPTY))]


COLLECTION = {"type": "GeometryCollection", "geometries": [FEATURE["geometry"]]}
NESTED = [{**FEATURE, "geometry": {"type": "GeometryCollection", "geometries": [COLLECTION]}}]


def bomb() -> bytes:
    """A PNG whose text unpacks to more than Pillow allows, which it says with a ValueError."""
    plain = encoded(RECTANGLE)
    return plain[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))) + plain[33:]


@pytest.mark.parametrize(
    ("name", "content", "has_hole"),
    [
        ("values.png", RECTANGLE, False),
        ("white.png", np.dstack([np.full_like(RECTANGLE, 255), RECTANGLE]), False),
        ("features.geojson", {"type": "FeatureCollection", "features": FEATURES}, True),
        ("list.geojson", FEATURES, True),
        ("any.name", FEATURES, True),
        ("regions.geojson.gz", gzip.compress(json.dumps(FEATURES).encode("utf-16")), True),
        ("nested.geojson", NESTED, True),
    ],
)
def test_a_mask_or_regions_say_where_tissue_is(
    name: str, content: object, has_hole: bool, view: ScaledView, tmp_path: Path
) -> None:
    expected = RECTANGLE > 0
    if has_hole:
        expected = expected.copy()
        expected[25:30, 35:40] = False
    found = read_mask(save(tmp_path / name, content), view)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "mark", [{"id": "PathAnnotationObject"}, {"properties": {"objectType": "annotation"}}]
)
def test_regions_of_qupath_begin_where_the_scanned_part_does(
    mark: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "slide").touch()
    slide = VirtualSlide(tmp_path / "slide", (1200, 1500), bounds=Bounds(320, 160, 1088, 896))
    regions = save(tmp_path / "regions.geojson", [{**FEATURE, **mark}])
    found = read_mask(regions, slide.at_mpp(0.5))
    assert np.argwhere(found).min(axis=0).tolist() == [20, 30]


def test_the_least_of_a_fine_mask_counts_whatever_its_value(
    view: ScaledView, tmp_path: Path
) -> None:
    """One pixel of the 1,024 that a pixel of the tissue mask covers, in the darkest blue."""
    fine = np.zeros((1792, 2176, 3), np.uint8)
    fine[900, 1000, 2] = 1
    for name, given in (("grey.png", fine[..., 2]), ("blue.png", fine)):
        found = read_mask(save(tmp_path / name, given), view)
        assert np.argwhere(found).tolist() == [[28, 31]]


def test_regions_that_reach_out_of_the_slide_are_cut_at_its_edges(
    view: ScaledView, tmp_path: Path
) -> None:
    regions = shapely.union(shapely.box(-900, -50, 160, 1e6), shapely.box(-9e5, 800, 9e6, 850))
    found = read_mask(save(tmp_path / "a.json", json.loads(shapely.to_geojson(regions))), view)
    expected = np.zeros((56, 68), bool)
    expected[:, :10] = expected[50:54] = True
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "regions",
    [
        shapely.box(480, 320, 960, 640),
        shapely.box(485, 329, 950, 637),
        shapely.box(100.5, 100.5, 101, 101),
        shapely.box(160, 160, 168, 400),
        shapely.box(100, 100, 900, 800) - shapely.box(300, 300, 700, 700),
        shapely.box(100, 100, 900, 800) - shapely.box(320, 336, 640, 640),
        shapely.box(0, 0, 1088, 896) - shapely.box(20, 20, 30, 30),
        shapely.box(-40, -40, -1, -1).union(shapely.box(32, 32, 48, 48)),
    ],
)
def test_a_pixel_of_the_mask_is_tissue_where_a_region_covers_any_of_it(
    regions: shapely.Geometry, view: ScaledView, tmp_path: Path
) -> None:
    found = read_mask(save(tmp_path / "a.json", json.loads(shapely.to_geojson(regions))), view)
    rows, columns = np.mgrid[:56, :68] * 16
    pixels = shapely.box(columns, rows, columns + 16, rows + 16)
    assert np.array_equal(found, shapely.area(shapely.intersection(pixels, regions)) > 0)


def test_regions_of_any_shape_are_not_moved(view: ScaledView, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    moved = []
    for _ in range(40):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
        radii = rng.uniform(150, 330, (12, 1))
        corners = (544, 448) + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        star = shapely.Polygon(corners)
        found = read_mask(save(tmp_path / "a.json", json.loads(shapely.to_geojson(star))), view)
        middle = (np.argwhere(found).mean(axis=0) + 0.5) * 16
        moved.append(middle - (star.centroid.y, star.centroid.x))
    assert np.abs(np.mean(moved, axis=0)).max() < 1.5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mask.png", b"no image"),
        ("square.png", np.full((100, 100), 255, np.uint8)),
        ("regions.geojson", b"{"),
        ("line.geojson", {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}),
        ("words.geojson", ["a"]),
        ("nan.geojson", b'{"type":"Polygon","coordinates":[[[0,0],[9,0],[NaN,9],[0,0]]]}'),
        ("inf.geojson", b'{"type":"Polygon","coordinates":[[[0,0],[900,0],[1e999,900],[0,0]]]}'),
        ("circle.geojson", {"type": "Circle", "coordinates": [5, 5]}),
        ("bare.geojson", {"type": "Polygon"}),
        ("text.geojson", b'{"type":"Polygon","coordinates":[[["x",0],[9,0],[9,9],["x",0]]]}'),
        ("null.geojson", b'{"type":"Polygon","coordinates":[[[0,0],[9,null],[9,9],[0,0]]]}'),
        ("far.geojson", json.loads(shapely.to_geojson(shapely.box(8e6, 0, 9e6, 9)))),
        ("gone.png", None),
        ("bomb.png", bomb()),
        ("cut.png", encoded(RECTANGLE)[:60]),
        ("178 megapixels.png", np.zeros((15_000, 18_000), bool)),
        ("cut.geojson.gz", gzip.compress(json.dumps(FEATURES).encode())[:-9]),
        ("deep.geojson", b"[" * 100_000),
        ("digits.geojson", {"type": "Polygon", "coordinates": [[[0, 0], [10**400, 0], [9, 9]]]}),
        ("far origin.geojson", {"focalpath": {"origin_px": [10**400, 0]}, "features": FEATURES}),
        ("origin.geojson", {"focalpath": {"origin_px": [float("nan"), 0]}, "features": FEATURES}),
        ("text origin.geojson", {"focalpath": {"origin_px": "12"}, "features": FEATURES}),
        ("true origin.geojson", {"focalpath": {"origin_px": [True, 0]}, "features": FEATURES}),
        ("long origin.geojson", {"focalpath": {"origin_px": [1, 2, 3]}, "features": FEATURES}),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(
    name: str, content: object, view: ScaledView, tmp_path: Path
) -> None:
    with raises(MaskError, name):
        read_mask(save(tmp_path / name, content), view)
