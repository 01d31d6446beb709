"""Files of annotations as programs and file managers leave them."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.errors import raises
from train.data.convert.annotation_files import read_annotation_file
from train.data.convert.class_mapping import read_mapping, write_template
from train.data.convert.source_files import find_images
from train.errors import AnnotationError

SQUARE = [[0, 0], [8, 0], [8, 8], [0, 8]]
XML = (
    "<ASAP_Annotations><Annotations>"
    '<Annotation Name="a" Type="Polygon" PartOfGroup="Drüse"><Coordinates>'
    + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(SQUARE))
    + "</Coordinates></Annotation></Annotations></ASAP_Annotations>"
)


def feature(**properties: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": [SQUARE]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


GEOJSON = json.dumps(
    [feature(objectType="annotation", classification={"name": "Drüse"})], ensure_ascii=False
)


def declared(encoding: str) -> str:
    return f'<?xml version="1.0" encoding="{encoding}"?>\r\n{XML}'


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("a.geojson", GEOJSON.encode("utf-8-sig")),
        ("a.geojson", GEOJSON.encode("utf-16")),
        ("a.geojson", b"\r\n" + GEOJSON.encode()),
        ("a.geojson", gzip.compress(GEOJSON.encode())),  # unpacked by name only
        ("a.xml", declared("utf-8").encode("utf-8-sig")),
        ("a.xml", declared("utf-16").encode("utf-16")),
        ("a.xml", declared("utf-16").encode()),
        ("a.xml", declared("ISO-8859-1").encode("latin-1")),
        ("a.xml", declared("windows-1252").encode("cp1252")),
        ("a.xml", b"\n" + declared("utf-8").encode()),
    ],
)
def test_a_file_is_read_in_its_own_encoding(tmp_path: Path, name: str, stored: bytes):
    path = tmp_path / name
    path.write_bytes(stored)
    (found,), _ = read_annotation_file(path)
    assert found.label == "Drüse"
    np.testing.assert_array_equal(found.rings[0], SQUARE)


def dsa(**element: Any) -> str:
    return json.dumps({"elements": [{"type": "rectangle", "width": 2, "height": 2, **element}]})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xml", XML.replace(' X="8"', "", 1)),
        ("a.xml", XML.replace('Y="8"', 'Y="nan"', 1)),
        ("a.geojson", json.dumps([feature(classification={"color": [float("inf")] * 3})])),
        ("a.geojson", json.dumps([feature() | {"geometry": {"type": "Polygon"}}])),
        ("a.json", dsa()),
        ("a.json", dsa(center=[1])),
        ("a.json", "[" * 100_000),
        ("a.xml", declared("klingon")),
        ("a.json", dsa(center=[float("nan"), 1, 0])),
        ("a.json", dsa(center=[1, 1, 0], rotation=float("inf"))),
        ("a.json", dsa(center=[1, 1, 0], width=10**400)),
        ("a.json", dsa(center=[1, 1, 0], width=1e308)),
        ("a.xml", XML.replace('Y="8"', 'Y="-1e308"', 1)),
    ],
)
def test_what_is_missing_or_no_number_is_one_error(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content, "utf-8")
    with raises(AnnotationError, name):
        read_annotation_file(tmp_path / name)


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, GEOJSON)
    return path


def test_qupaths_zip_is_read(tmp_path: Path):
    (found,), entry = read_annotation_file(zipped(tmp_path / "a.zip", "a.geojson"))
    assert (found.label, entry.name) == ("Drüse", "QuPath GeoJSON")


def test_what_macos_adds_to_a_zip_is_passed_over(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", ".DS_Store", "x/a.geojson", "__MACOSX/x/._a.geojson")
    (found,), _ = read_annotation_file(path)
    assert found.label == "Drüse"


@pytest.mark.parametrize(("place", "value"), [(6, 1), (8, 99)])
def test_a_zip_with_a_password_or_an_unknown_compression_is_one_error(
    tmp_path: Path, place: int, value: int
):
    """Bytes 6 and 8 of an entry are its flags and its compression; 2 more in the directory."""
    path = zipped(tmp_path / "a.zip", "a.geojson")
    stored = bytearray(path.read_bytes())
    for at in (place, stored.index(b"PK\1\2") + place + 2):
        stored[at] = value
    path.write_bytes(stored)
    with raises(AnnotationError, "a.zip"):
        read_annotation_file(path)


@pytest.mark.parametrize("label", ["Dru\u0308se", " Drüse ", "Drüse\n"])
def test_labels_that_look_the_same_are_the_same(tmp_path: Path, label: str):
    document = [feature(classification={"name": label}), feature(classification=label)]
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(document), "utf-8")
    found, _ = read_annotation_file(path)
    assert [annotation.label for annotation in found] == ["Drüse", "Drüse"]
    classes = [{"name": name, "color": "#112233"} for name in ("Gland", "Other")]
    mapping = {"classes": classes, "labels": {label: "Gland"}}
    path.write_text(json.dumps(mapping), "utf-8")
    assert read_mapping(path, ["Drüse"]).value("Drüse") == 1


def test_a_zip_of_several_files_is_refused(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", "a.geojson", "b.geojson")
    with raises(AnnotationError, "a.zip", "2 files"):
        read_annotation_file(path)


def test_a_derived_class_of_qupath_has_the_name_that_qupath_shows(tmp_path: Path):
    path = tmp_path / "a.geojson"
    inner = feature(classification={"name": "Stroma"})
    outer = feature(classification={"names": ["Tumor", "Positive"]}, childObjects=[inner])
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [outer, feature()]}))
    found, _ = read_annotation_file(path)
    assert [a.label for a in found] == ["Tumor: Positive", "Stroma", "unclassified"]


def test_an_object_without_a_geometry_has_no_area(tmp_path: Path):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature() | {"geometry": None}]))
    (found,), _ = read_annotation_file(path)
    assert found.rings == ()
    assert "without" in found.kind


def test_qupaths_class_for_what_is_ignored_is_unlabelled_in_the_template(tmp_path: Path):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature(classification={"name": n}) for n in ("Ignore*", "Gland")]))
    found, _ = read_annotation_file(path)
    write_template(tmp_path / "mapping.json", found)
    content = json.loads((tmp_path / "mapping.json").read_text())
    assert content["labels"] == {"Ignore*": "unlabelled", "Gland": "Gland"}
    assert [entry["name"] for entry in content["classes"]] == ["Gland"]


def test_a_template_can_be_used_whatever_labels_look_like(tmp_path: Path):
    names = ["Gland", " Gland", "Tumor\ncells", "  ", "ignore", "unlabelled"]
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature(classification={"name": name}) for name in names]))
    found, _ = read_annotation_file(path)
    write_template(tmp_path / "mapping.json", found)
    mapping = read_mapping(tmp_path / "mapping.json", [one.label for one in found])
    assert [entry.name for entry in mapping.classes] == ["Gland", "Tumor cells", "unclassified"]
    assert [mapping.value(one.label) for one in found] == [1, 1, 2, 3, None, 0]


def region(number: int, points: list[list[int]], kind: int = 0, parent: int | None = None) -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    negative = "" if parent is None else f' NegativeROA="1" InputRegionId="{parent}"'
    return f'<Region Id="{number}" Type="{kind}"{negative}><Vertices>{vertices}</Vertices></Region>'


def imagescope(path: Path, *regions: str) -> list[Any]:
    layer = f'<Annotation Id="1" Name="Gland"><Regions>{"".join(regions)}</Regions></Annotation>'
    path.write_text(f"<Annotations>{layer}</Annotations>")
    return read_annotation_file(path)[0]


def test_imagescopes_rectangles_may_have_two_corners(tmp_path: Path):
    (found,) = imagescope(tmp_path / "a.xml", region(1, [[8, 0], [0, 4]], kind=1))
    np.testing.assert_array_equal(found.rings[0], [[8, 0], [0, 0], [0, 4], [8, 4]])


def test_a_negative_region_is_a_hole_of_each_region_that_it_reaches_into(tmp_path: Path):
    far = [[100, 0], [108, 0], [108, 8], [100, 8]]
    inside = [[2, 2], [4, 2], [4, 4], [2, 4]]
    found = imagescope(
        tmp_path / "a.xml",
        region(1, inside, parent=0),  # names none, and comes first
        region(2, SQUARE),
        region(3, far),
        region(4, inside, parent=2),
    )
    assert [len(a.rings) for a in found] == [3, 1]


def test_regions_of_one_number_are_all_read(tmp_path: Path):
    squares = [[[x, 0], [x + 4, 0], [x + 4, 4], [x, 4]] for x in (0, 10, 20)]
    hole = region(9, [[11, 1], [12, 1], [12, 2]], parent=1)
    found = imagescope(tmp_path / "a.xml", *(region(1, square) for square in squares), hole)
    assert [one.rings[0].tolist() for one in found] == squares
    assert [len(one.rings) for one in found] == [1, 2, 1]


@pytest.mark.parametrize("order", ["", 'Order="0"', 'Order="{}"'])
def test_asaps_points_keep_their_order_where_none_is_stated(tmp_path: Path, order: str):
    ring = [[50.0, 10.0], [10.0, 10.0], [10.0, 50.0], [30.0, 20.0]]
    points = "".join(
        f'<Coordinate {order.format(i)} X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(ring)
    )
    (tmp_path / "a.xml").write_text(
        '<ASAP_Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="T">'
        f"<Coordinates>{points}</Coordinates></Annotation></ASAP_Annotations>"
    )
    (found,), _ = read_annotation_file(tmp_path / "a.xml")
    assert found.rings[0].tolist() == ring


def test_slides_and_annotations_find_each_other_by_name(tmp_path: Path):
    for name in ("Dru\u0308se.ome.tif", "b.TIF", "._b.tif"):
        (tmp_path / name).touch()
    assert list(find_images(tmp_path, (".tif",))) == ["Dr\u00fcse", "b"]


_LAYER = '<Annotations><Annotation Id="1" LineColor="{}"><Regions><Region/></Regions></Annotation>'


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(feature(classification={"name": "a", "color": [255, 128, 0]})),
        json.dumps(feature(classification={"name": "a", "colorRGB": 0xFF8000 - 2**24})),
        _LAYER.format(255 + 128 * 256) + "</Annotations>",
        XML.replace('Name="a"', 'Name="a" Color="#ff8000"'),
    ],
    ids=["QuPath", "QuPath 0.2", "ImageScope", "ASAP"],
)
def test_an_areas_colour_is_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    ((annotation,), _) = read_annotation_file(tmp_path / "a.json")
    assert annotation.color == "#ff8000"
