import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.published_data import SIDE, folds
from train.data.convert.bdsa import BdsaSettings, prepare_bdsa
from train.data.convert.layout import TileSettings
from train.data.convert.shapes import fill_shape
from train.data.masks import read_mask
from train.errors import (
    AnnotationError,
    FocalPathError,
    ImageFileError,
    SettingsError,
    SourceError,
)


def polygon(label: str, *corners: tuple[float, float], **more: object) -> dict[str, object]:
    points = [[x, y, 0] for x, y in corners]
    return {"type": "polyline", "closed": True, "points": points, "group": label, **more}


def square(label: str, low: float, high: float, **more: object) -> dict[str, object]:
    return polygon(label, (low, low), (high, low), (high, high), (low, high), **more)


def write_bdsa(
    source: Path, elements: list[dict[str, object]], names: tuple[str, ...] = ("a", "b")
) -> None:
    """Regions of `SIDE` pixels that all have the same annotations."""
    for folder in ("images", "annotations"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        image = Image.fromarray(np.full((SIDE, SIDE, 3), 220, np.uint8))
        image.save(source / "images" / f"{name}.png")
        document = {"annotation": {"name": "tissue", "elements": elements}}
        (source / "annotations" / f"{name}.json").write_text(json.dumps(document))


def bdsa_settings(**changes: object) -> BdsaSettings:
    values = {"tiles": TileSettings(tile_size_px=SIDE, mpp=0.5), "source_mpp": 0.5}
    return BdsaSettings(**{**values, "test_share": 0, **changes})  # type: ignore[arg-type]


def bdsa_labels(source: Path, out: Path, **changes: object) -> np.ndarray:
    prepare_bdsa(source, out, bdsa_settings(**changes))
    return read_mask(out / "mask" / "a.png", 5)


def refuse_to_draw(
    source: Path, out: Path, kind: type[FocalPathError], *values: object, **changes: object
) -> None:
    with raises(kind, *values):
        prepare_bdsa(source, out, bdsa_settings(**changes))
    assert not out.exists()


def test_a_polygon_covers_the_pixels_whose_centre_is_inside(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 2.4, 10.4)])
    expected = np.zeros((SIDE, SIDE), np.uint8)
    expected[2:10, 2:10] = 2
    np.testing.assert_array_equal(bdsa_labels(tmp_path / "in", tmp_path / "out"), expected)


def test_neighbouring_polygons_neither_overlap_nor_leave_a_gap() -> None:
    labels = np.zeros((20, 20), np.uint8)
    edge = [(11.3, 20.0), (4.7, 0.0)]
    fill_shape(labels, (np.array([(0.0, 0.0), (0.0, 20.0), *edge]),), 1)
    right = np.zeros((20, 20), np.uint8)
    fill_shape(right, (np.array([(20.0, 0.0), (20.0, 20.0), *edge]),), 2)
    assert (labels + right > 0).all()
    assert not (labels * right).any()


def test_by_area_the_smaller_element_covers_the_larger_in_any_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elements = [square("Superficial Cortex", 5, 10), square("Gray Matter", 0, 20)]
    write_bdsa(tmp_path / "in", elements)
    assert bdsa_labels(tmp_path / "in", tmp_path / "file")[7, 7] == 2
    warning = " ".join(capsys.readouterr().out.split())
    assert "2 elements, such as Superficial Cortex in a," in warning
    assert "--overlap area" in warning
    assert bdsa_labels(tmp_path / "in", tmp_path / "area", overlap="area")[7, 7] == 5
    assert "covered" not in capsys.readouterr().out


def test_rectangles_turn_as_in_the_archives_viewer(tmp_path: Path) -> None:
    # 30 degrees from x towards y of the image: down and to the right.
    rectangle = {"type": "rectangle", "center": [16, 16, 0], "width": 24, "height": 4}
    write_bdsa(tmp_path / "in", [{**rectangle, "rotation": math.pi / 6, "group": "Leptomeninges"}])
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert (labels[20, 23], labels[11, 23]) == (4, 0)
    assert np.count_nonzero(labels) == pytest.approx(24 * 4, rel=0.05)


def test_circles_and_ellipses_have_their_area(tmp_path: Path) -> None:
    circle = {"type": "circle", "center": [8, 8, 0], "radius": 6, "group": "Gray Matter"}
    ellipse = {"type": "ellipse", "center": [20, 24, 0], "width": 20, "height": 10, "rotation": 0}
    write_bdsa(tmp_path / "in", [circle, {**ellipse, "group": "White Matter"}])
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert np.count_nonzero(labels == 2) == pytest.approx(math.pi * 36, rel=0.05)
    assert np.count_nonzero(labels == 3) == pytest.approx(math.pi * 50, rel=0.05)


def test_annotations_are_drawn_at_the_tiles_resolution_and_the_regions_place(
    tmp_path: Path,
) -> None:
    # The image is at 0.5 um of a slide at 0.25 um, so 8 of the slide's pixels are 2 at 1 um.
    write_bdsa(tmp_path / "in", [square("Gray Matter", 1000, 1008)])
    header = "image,mpp,x,y,base_mpp,group\n"
    rows = "a,0.5,996,1000,0.25,one\nb,0.5,1000,1000,0.25,two\n"
    (tmp_path / "in" / "regions.csv").write_text(header + rows)
    tiles = TileSettings(tile_size_px=16, mpp=1.0)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out", tiles=tiles, source_mpp=None)
    expected = np.zeros((16, 16), np.uint8)
    expected[0:2, 1:3] = 2
    np.testing.assert_array_equal(labels, expected)


def test_regions_of_a_slide_share_its_annotations_and_its_fold(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 20)], names=("a", "b", "c"))
    for name in ("b", "c"):
        (tmp_path / "in" / "annotations" / f"{name}.json").unlink()
    rows = "image,group,annotation\na.png,slide 1,a\nb.png,slide 1,a.json\nc,slide 2,a\n"
    (tmp_path / "in" / "regions.csv").write_text(rows)
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings())
    found = {row["img_id"]: row["fold"] for row in folds(tmp_path / "out")}
    assert found["a"] == found["b"] != found["c"]


def test_folds_of_regions_csv_are_kept(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 20)], names=("a", "b", "c"))
    (tmp_path / "in" / "regions.csv").write_text("image,fold\na,1\nb,0\nc,-1\n")
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings())
    assert [row["fold"] for row in folds(tmp_path / "out")] == ["1", "0", "-1"]


def test_a_share_of_the_slides_is_drawn_for_testing(tmp_path: Path) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 20)], names=tuple("abcde"))
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings(test_share=0.4))
    assert [row["fold"] for row in folds(tmp_path / "out")].count("-1") == 2


@pytest.mark.parametrize(
    "document",
    [
        {"name": "x", "elements": [square("Gray Matter", 0, 8)]},
        {"annotation": {"elements": [square("Gray Matter", 0, 8)]}},
        [{"annotation": {"elements": [square("Gray Matter", 0, 8)]}}],
        {"elements": [{**square("", 0, 8), "label": {"value": "grey_matter"}}]},
        {"annotation": {"name": "Gray Matter", "elements": [square("", 0, 8)]}},
    ],
    ids=["bare", "document", "list", "label", "name of the document"],
)
def test_every_form_of_an_export_is_read(tmp_path: Path, document: object) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 8)])
    (tmp_path / "in" / "annotations" / "a.json").write_text(json.dumps(document))
    assert (bdsa_labels(tmp_path / "in", tmp_path / "out")[:8, :8] == 2).all()


@pytest.mark.parametrize(("uncovered", "outside"), [("unlabelled", 0), ("background", 1)])
def test_renamed_labels_are_drawn_unlabelled_or_not_at_all(
    tmp_path: Path, uncovered: str, outside: int
) -> None:
    elements = [square("GM", 0, 20), square("Artefact", 3, 6), square("ROI", 0, 30)]
    write_bdsa(tmp_path / "in", elements)
    rename = ("GM=Gray Matter", "artefact=unlabelled", "ROI=ignore")
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out", rename=rename, uncovered=uncovered)
    assert (labels[1, 1], labels[4, 4], labels[25, 25]) == (2, 0, outside)


@pytest.mark.parametrize(
    ("label", "kind", "value", "changes"),
    [
        ("Artefact", AnnotationError, "'Artefact' (2)", {}),
        ("Gray Matter", SettingsError, "OLD=NEW", {"rename": ("GM=Grey Stuff",)}),
        ("GM", SettingsError, "'gm'", {"rename": ("GM=Gray Matter", "gm=White Matter")}),
        ("Gray Matter", SourceError, "--source-mpp", {"source_mpp": None}),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, label: str, kind: type[FocalPathError], value: str, changes: dict[str, object]
) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9), square(label, 3, 6)])
    refuse_to_draw(tmp_path / "in", tmp_path / "out", kind, value, **changes)


def test_elements_without_area_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"type": "polyline", "points": [[0, 0, 0], [9, 9, 0]], "group": "Gray Matter"}
    point = {"type": "point", "center": [3, 3, 0]}
    mistake = {**square("White Matter", 0, 9), "points": [[0, 0, 0], [9, 9, 0]]}
    hole = [[4, 4, 0], [5, 5, 0]]
    elements = [square("Gray Matter", 0, 9, holes=[hole]), line, point, mistake]
    write_bdsa(tmp_path / "in", elements)
    labels = bdsa_labels(tmp_path / "in", tmp_path / "out")
    assert (labels[:9, :9] == 2).all()
    told = "".join(capsys.readouterr().out.split())
    assert "openpolyline(2),point(2)" in told
    assert "closedpolylinewith2points,'WhiteMatter',element4ofa.json(1)" in told


def test_regions_that_no_element_reaches_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)], names=("a", "b", "c"))
    (tmp_path / "in" / "regions.csv").write_text("image,x\na,0\nb,0\nc,500\n")
    prepare_bdsa(tmp_path / "in", tmp_path / "out", bdsa_settings())
    assert "1 regions, such as c," in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", '{"elements": 3}', '{"type": "FeatureCollection"}'])
def test_other_json_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)])
    (tmp_path / "in" / "annotations" / "a.json").write_text(text)
    refuse_to_draw(tmp_path / "in", tmp_path / "out", AnnotationError, "a.json")


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("name\na\nb\n", ("image",)),
        ("image\na\n", ("1 names", "'b'")),
        ("image,mpp\na,half\nb,1\n", ("mpp", "'half'")),
        ("image,mpp\na,-1\nb,1\n", (-1.0, "--source-mpp")),
        ("image,mpp\na,40\nb,1\n", (40.0, 20)),
        ("image,fold\na,1\na,-1\nb,0\n", ("line 3", "a")),
        ("image,fold\na,1\nb,0.5\n", ("fold", 0.5)),
        ("image,annotation\na,other\nb,b\n", ("other.json",)),
    ],
)
def test_mistakes_in_regions_csv_are_named(
    tmp_path: Path, table: str, values: tuple[object, ...]
) -> None:
    write_bdsa(tmp_path / "in", [square("Gray Matter", 0, 9)])
    (tmp_path / "in" / "regions.csv").write_text(table)
    refuse_to_draw(tmp_path / "in", tmp_path / "out", SourceError, *values)


def test_regions_are_read_as_images_are_served(tmp_path: Path) -> None:
    write_bdsa(tmp_path, [square("Gray Matter", 0, SIDE)])
    ink = np.zeros((SIDE, SIDE, 4), np.uint8)
    ink[: SIDE // 2] = 90, 60, 120, 255  # below it, black and transparent
    Image.fromarray(ink).save(tmp_path / "images" / "a.png")
    prepare_bdsa(tmp_path, tmp_path / "out", bdsa_settings())
    with Image.open(tmp_path / "out" / "img" / "a.png") as image:
        assert image.getpixel((0, 0)) == (90, 60, 120)
        assert image.getpixel((0, SIDE - 1)) == (255, 255, 255)
    Image.fromarray(np.full((SIDE, SIDE), 3000, np.uint16)).save(tmp_path / "images" / "b.png")
    with raises(ImageFileError, "b.png", "8 bits"):
        prepare_bdsa(tmp_path, tmp_path / "out2", bdsa_settings())
