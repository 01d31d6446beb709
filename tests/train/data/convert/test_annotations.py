"""Annotated images in every format, which must become the same labels."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.real_slide import SHARED_DATA
from tests.support.slides import tissue_pixels, write_aperio
from train.data.convert import annotations
from train.data.convert.annotation_files import read_annotation_file
from train.data.convert.annotations import AnnotationSettings, prepare_annotations
from train.data.convert.layout import TileSettings
from train.data.folder import read_tile_folder
from train.data.pixels import read_mask
from train.errors import (
    AnnotationError,
    FocalPathError,
    ImageFileError,
    ScaleError,
    SourceError,
)

SQUARE = [[10, 10], [50, 10], [50, 50], [10, 50]]
HOLE = [[20, 20], [30, 20], [30, 30], [20, 30]]
STROMA = [[40, 6], [60, 6], [60, 60], [40, 60]]
ROI = [[0, 0], [64, 0], [64, 48], [0, 48]]
AREAS = (("Tumor", [SQUARE, HOLE]), ("Stroma", [STROMA]), ("ROI", [ROI]))
Rings = list[list[list[int]]]


def expected() -> NDArray[np.uint8]:
    """Tumor with a hole, Stroma over it, nothing outside of the region of interest."""
    labels = np.zeros((64, 64), np.uint8)
    labels[10:50, 10:50] = 1
    labels[20:30, 20:30] = 0
    labels[6:60, 40:60] = 2
    labels[48:] = 0
    return labels


def geojson(path: Path, areas: Any = AREAS) -> None:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*r, r[0]] for r in rings]},
            "properties": {"classification": {"name": name, "color": [200, 0, len(name)]}},
        }
        for name, rings in areas
    ]
    content = {"type": "FeatureCollection", "features": features}
    path.with_suffix(".geojson").write_text(json.dumps(content))


def compressed(path: Path, areas: Any = AREAS) -> None:
    geojson(path, areas)
    plain = path.with_suffix(".geojson")
    path.with_suffix(".geojson.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


def asap(path: Path, areas: Any = AREAS) -> None:
    """ASAP has no holes: an area on top of another takes its place."""
    text = ""
    for name, rings in areas:
        for group, ring in zip((name, "Hole"), rings, strict=False):
            points = "".join(
                f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(ring)
            )
            text += (
                f'<Annotation Name="a" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58">'
                f"<Coordinates>{points}</Coordinates></Annotation>"
            )
    xml = f"<ASAP_Annotations><Annotations>{text}</Annotations></ASAP_Annotations>"
    path.with_suffix(".xml").write_text(xml)


def imagescope(path: Path, areas: Any = AREAS) -> None:
    text = ""
    for layer, (name, rings) in enumerate(areas, start=1):
        regions = ""
        for number, ring in enumerate(rings, start=1):
            points = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ring)
            negative = int(number > 1)
            regions += (
                f'<Region Id="{number}" Type="0" NegativeROA="{negative}" InputRegionId="0">'
                f"<Vertices>{points}</Vertices></Region>"
            )
        text += (
            f'<Annotation Id="{layer}" Name="{name}" LineColor="255">'
            f"<Regions>{regions}</Regions></Annotation>"
        )
    path.with_suffix(".xml").write_text(f'<Annotations MicronsPerPixel="0">{text}</Annotations>')


def dsa(path: Path, areas: Any = AREAS) -> None:
    elements = [
        {
            "type": "polyline",
            "closed": True,
            "group": name,
            "points": [[x, y, 0] for x, y in rings[0]],
            "holes": [[[x, y, 0] for x, y in hole] for hole in rings[1:]],
        }
        for name, rings in areas
    ]
    content = [{"annotation": {"name": "doc", "elements": elements}}]
    path.with_suffix(".json").write_text("\ufeff" + json.dumps(content))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two images of 64 pixels that do not tell their um per pixel."""
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


@pytest.fixture
def annotated(source: Path) -> Path:
    """The two images with annotations and a mapping."""
    for name in ("a", "b"):
        geojson(source / "annotations" / name)
    write_mapping(source / "mapping.json")
    return source


def write_mapping(path: Path, **changes: Any) -> Path:
    labels = {"Tumor": "Tumor", "Stroma": "Stroma", "ROI": "roi", "Hole": "unlabelled"}
    classes = [{"name": "Tumor", "color": "#d62728"}, {"name": "Stroma", "color": "#2ca02c"}]
    content = {"classes": classes, "labels": labels, **changes}
    path.write_text(json.dumps(content))
    return path


def prepare(source: Path, *, tile_size_px: int = 64, mpp: float = 0.5, **changes: Any) -> Path:
    settings = AnnotationSettings(
        tiles=TileSettings(tile_size_px=tile_size_px, mpp=mpp),
        **{"source_mpp": 0.5, "mapping": source / "mapping.json", **changes},
    )
    prepare_annotations(source / "images", source / "annotations", source / "out", settings)
    return source / "out"


def masks_of(data: Path) -> dict[str, NDArray[np.uint8]]:
    folder = read_tile_folder(data)
    return {t.tile_id: read_mask(t.mask, 2) for found in folder.tiles.values() for t in found}


@pytest.mark.parametrize("write", [geojson, compressed, asap, imagescope, dsa])
def test_the_same_areas_become_the_same_labels(source: Path, write: Callable[..., None]):
    for name in ("a", "b"):
        write(source / "annotations" / name)
    write_mapping(source / "mapping.json")
    masks = masks_of(prepare(source, test_share=0.0))
    np.testing.assert_array_equal(masks["a"], expected())
    np.testing.assert_array_equal(masks["b"], expected())


def test_areas_are_drawn_at_the_tiles_scale(annotated: Path):
    masks = masks_of(prepare(annotated, tile_size_px=32, mpp=1.0, test_share=0.0))
    np.testing.assert_array_equal(masks["a"], expected()[::2, ::2])


def test_the_first_call_writes_a_template_and_nothing_else(
    source: Path, capsys: pytest.CaptureFixture[str]
):
    geojson(source / "annotations" / "a")
    prepare(source)
    assert not (source / "out").exists()
    content = json.loads((source / "mapping.json").read_text())
    assert content["labels"] == {"Tumor": "Tumor", "Stroma": "Stroma", "ROI": "roi"}
    assert [entry["name"] for entry in content["classes"]] == ["Tumor", "Stroma"]
    assert content["classes"][0]["color"] == "#c80005"
    assert "mapping.json" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("name", ["mapping.json", "other.mapping.json"])
def test_a_mapping_may_lie_beside_the_annotations(name: str, annotated: Path):
    mapping = (annotated / "mapping.json").rename(annotated / "annotations" / name)
    write_mapping(annotated / "annotations" / "earlier.mapping.json")
    assert set(masks_of(prepare(annotated, mapping=mapping, test_share=0.0))) == {"a", "b"}


def a_point(source: Path) -> None:
    path = source / "annotations" / "a.geojson"
    content = json.loads(path.read_text())
    content["features"][1]["geometry"] = {"type": "Point", "coordinates": [3, 4]}
    path.write_text(json.dumps(content))


def also(name: str, ring: list[list[int]]) -> Callable[[Path], None]:
    return lambda source: geojson(source / "annotations" / "a", [*AREAS, (name, [ring])])


def mapping(**changes: Any) -> Callable[[Path], object]:
    return lambda source: write_mapping(source / "mapping.json", **changes)


def named(*classes: tuple[str, str]) -> Callable[[Path], object]:
    return mapping(classes=[{"name": name, "color": color} for name, color in classes])


def moved(old: str, new: str) -> Callable[[Path], object]:
    return lambda source: (source / old).rename(source / new)


def a_label_with_two_meanings(source: Path) -> None:
    path = write_mapping(source / "mapping.json")
    path.write_text(path.read_text().replace('"ROI": "roi"', '"Tumor": "Stroma", "ROI": "roi"'))


def a_name_with_a_space_at_its_end(source: Path) -> None:
    for folder, suffix in (("images", "png"), ("annotations", "geojson")):
        moved(f"{folder}/b.{suffix}", f"{folder}/b .{suffix}")(source)


def cut_off(source: Path) -> None:
    compressed(source / "annotations" / "a")
    whole = source / "annotations" / "a.geojson.gz"
    whole.write_bytes(whole.read_bytes()[:-20])


def no_annotations(source: Path) -> None:
    for path in (source / "annotations").iterdir():
        path.unlink()


def a_file_for_a_folder(source: Path) -> None:
    moved("images", "elsewhere")(source)
    (source / "images").touch()


NO_FORMAT, NOT_UTF_8 = '{"shapes": []}', os.fsdecode(b"images/\xff.png")
BESIDE = [[70, 5], [90, 5], [80, 9]]
MISSPELT = {"Tumor": "Tumour", "Stroma": "Stroma"}


@pytest.mark.parametrize(
    ("damage", "changes", "kind", "values"),
    [
        (a_point, {}, AnnotationError, ["a.geojson", "feature 2", "'Stroma'", "Point"]),
        (
            also("Tumor", BESIDE),
            {},
            AnnotationError,
            ["a.geojson", "feature 4", "70 to 90", "64 x 64"],
        ),
        (also("Necrosis", SQUARE), {}, AnnotationError, ["mapping.json", "'Necrosis'"]),
        (
            mapping(labels={"Tumor": "Tumor", "Tumor ": "Stroma"}),
            {},
            AnnotationError,
            ["mapping.json", "'Tumor'", "'Stroma'"],
        ),
        (
            mapping(labels=MISSPELT),
            {},
            AnnotationError,
            ["mapping.json", "'Tumour'", "Tumor, Stroma"],
        ),
        (
            named(("A", "red"), ("B", "red")),
            {},
            AnnotationError,
            ["mapping.json", "'red'", "#rrggbb"],
        ),
        (
            named(("mean", "#d62728"), ("B", "#d62728")),
            {},
            AnnotationError,
            ["mapping.json", "'mean'"],
        ),
        (a_label_with_two_meanings, {}, AnnotationError, ["mapping.json", "'Tumor' is there"]),
        (moved("images/b.png", "b.png"), {}, SourceError, ["b.geojson"]),
        (moved("images/b.png", NOT_UTF_8), {}, SourceError, ["udcff.png", "UTF-8"]),
        (a_name_with_a_space_at_its_end, {}, SourceError, ["b .png", "spaces"]),
        (
            lambda s: (s / "annotations/a.geojson").write_text(NO_FORMAT),
            {},
            AnnotationError,
            ["a.geojson", "ASAP XML"],
        ),
        (cut_off, {}, AnnotationError, ["a.geojson.gz"]),
        (no_annotations, {}, SourceError, ["no file of annotations", ".geojson.gz"]),
        (moved("annotations", "elsewhere"), {}, SourceError, ["annotations is not a folder"]),
        (a_file_for_a_folder, {}, SourceError, ["images is not a folder"]),
        (lambda _: None, {"source_mpp": None}, ScaleError, ["a.png", "--source-mpp"]),
        (lambda _: None, {"source_mpp": 20.0}, ScaleError, ["a.png", "40 times"]),
    ],
)
def test_what_cannot_be_drawn_rightly_is_refused_before_anything_is_written(
    annotated: Path,
    damage: Callable[[Path], object],
    changes: dict[str, Any],
    kind: type[FocalPathError],
    values: list[str],
):
    damage(annotated)
    with raises(kind, *values):
        prepare(annotated, **changes)
    assert not (annotated / "out").exists()


@pytest.mark.parametrize(("overlap", "warned"), [("file", True), ("area", False)])
def test_an_area_that_a_later_one_covers_is_warned_about(
    source: Path, overlap: str, warned: bool, capsys: pytest.CaptureFixture[str]
):
    around = [[0, 0], [64, 0], [64, 64], [0, 64]]
    for name in ("a", "b"):
        geojson(source / "annotations" / name, [("Tumor", [SQUARE]), ("Stroma", [around])])
    write_mapping(source / "mapping.json")
    masks = masks_of(prepare(source, overlap=overlap, test_share=0.0))
    assert ((masks["a"] == 1).sum() == 0) == warned
    assert ("--overlap area" in " ".join(capsys.readouterr().out.split())) == warned


FAR, DOT = [[60, 60], [90, 60], [90, 90]], [[5.1, 5.1], [5.3, 5.1], [5.3, 5.3]]
BELOW = [[8, 50], [30, 50], [30, 60], [8, 60]]
CORNER = [[0, 0], [8, 0], [8, 8], [0, 8]]


@pytest.mark.parametrize(
    ("areas", "warning"),
    [
        ([*AREAS, ("Tumor", [FAR])], "1 areas, such as 'Tumor', feature 4 of a.geojson, reach far"),
        ([*AREAS, ("Tumor", [DOT])], "1 areas, such as 'Tumor', feature 4 of a.geojson, are small"),
        ([*AREAS, ("Tumor", [BELOW])], "1 areas, such as 'Tumor', feature 4 of a.geojson, lie out"),
        ([("Tumor", [SQUARE]), ("ROI", [CORNER])], "1 areas, such as 'Tumor', feature 1 of a.geo"),
        ([*AREAS, ("Hole", [BELOW])], ""),
        ([("ROI", [ROI])], "1 slides, such as a, give no tile"),
        ([], "1 slides, such as a, give no tile"),
        (AREAS, ""),
    ],
)
def test_what_does_not_arrive_in_the_data_set_is_warned_about(
    source: Path, areas: Any, warning: str, capsys: pytest.CaptureFixture[str]
):
    Image.new("RGB", (64, 64)).save(source / "images" / "c.png")
    for name, drawn in (("a", areas), ("b", AREAS), ("c", AREAS)):
        geojson(source / "annotations" / name, drawn)
    write_mapping(source / "mapping.json")
    prepare(source, test_share=0.0)
    told = " ".join(capsys.readouterr().out.split())
    assert warning in told
    assert ("such as" in told) == bool(warning)


def test_areas_are_outside_where_a_large_slide_is_not_read_at_all(
    source: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("a", "b"):
        geojson(source / "annotations" / name, [("Tumor", [BELOW]), ("ROI", [CORNER])])
    write_mapping(source / "mapping.json", uncovered="Stroma")
    prepare(source, tile_size_px=8, test_share=0.0)
    assert (
        "2 areas, such as 'Tumor', feature 1 of a.geojson, lie outside of the regions"
        in " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.parametrize("orientation", [3, 6])
def test_annotations_of_an_image_that_exif_turns_are_taken_only_if_they_are_ours(
    annotated: Path, orientation: int
):
    """Viewers differ in whether they turn it; half a turn leaves every area within the image."""
    path = annotated / "images" / "a.png"
    with Image.open(path) as image:
        image.getexif()[0x0112] = orientation
        image.save(path, exif=image.getexif())
    with raises(ImageFileError, "a.png", f"orientation {orientation}"):
        prepare(annotated)
    assert not (annotated / "out").exists()
    file = annotated / "annotations" / "a.geojson"
    file.write_text(json.dumps({"focalpath": {}, **json.loads(file.read_text())}))
    masks = masks_of(prepare(annotated, test_share=0.0))
    np.testing.assert_array_equal(masks["a"], expected())


@pytest.mark.parametrize("content", ['{"type": "FeatureCollection", "features": []}', "[]"])
def test_an_image_without_any_area_is_what_is_uncovered(source: Path, content: str):
    geojson(source / "annotations" / "a", [("Tumor", [SQUARE]), ("Stroma", [STROMA])])
    (source / "annotations" / "b.geojson").write_text(content)
    write_mapping(source / "mapping.json", uncovered="Stroma")
    masks = masks_of(prepare(source, test_share=0.0))
    assert (masks["b"] == 2).all()
    assert (masks["a"] > 0).all()


@pytest.mark.parametrize("size", [(64, 64), (330, 70)])
def test_an_image_is_drawn_as_a_whole_where_what_is_uncovered_is_a_class(
    source: Path, size: tuple[int, int]
):
    for name in ("a", "b"):
        Image.new("RGB", size).save(source / "images" / f"{name}.png")
        geojson(source / "annotations" / name, [("Tumor", [SQUARE])])
    write_mapping(source / "mapping.json", uncovered="Stroma")
    prepare(source, test_share=0.0, tile_size_px=32)
    masks = masks_of(source / "out")
    assert sum((mask == 1).sum() for name, mask in masks.items() if name[0] == "a") >= 1600
    columns = (sum(map(int, name.split("_")[2::2])) for name in masks)  # of the part, in it
    assert max(columns) == size[0] - 32
    assert all((mask > 0).all() for mask in masks.values())


@pytest.mark.parametrize("pattern", ["P[0-9]+", "(P[0-9]+)_.*", "^(?:x_)?(P[0-9]+)_slide[0-9]"])
def test_a_pattern_names_the_patient_by_its_group_or_as_a_whole(source: Path, pattern: str):
    for index in range(6):
        name = f"P{index // 2}_slide{index}"
        Image.new("RGB", (64, 64)).save(source / "images" / f"{name}.png")
        geojson(source / "annotations" / name)
    write_mapping(source / "mapping.json")
    folder = read_tile_folder(prepare(source, test_share=0.4, patient_pattern=pattern))
    groups = {split: {tile.group for tile in tiles} for split, tiles in folder.tiles.items()}
    assert set().union(*groups.values()) == {"P0", "P1", "P2"}
    assert not groups["test"] & (groups["training"] | groups["validation"])


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["P1_a", "P1_b", "P2_a"], True),
        (["slide 1", "slide 2", "slide 3"], False),
        (["a", "b", "c"], False),
        (["TCGA-A1-A0SK-01", "TCGA-A1-A0SK-02", "TCGA-OL-A66P-01"], False),  # known
    ],
)
def test_slides_that_may_be_of_one_patient_are_named(
    names: list[str], warned: bool, source: Path, capsys: pytest.CaptureFixture[str]
):
    (source / "images" / "a.png").unlink()
    (source / "images" / "b.png").unlink()
    for index, name in enumerate(names):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(source / "images" / f"{name}.png")
        geojson(source / "annotations" / name)
    write_mapping(source / "mapping.json")
    prepare(source, test_share=0.0)
    told = " ".join(capsys.readouterr().out.split())
    assert (f"{names[0]} and {names[1]} count as two patients" in told) == warned


def test_slides_that_do_not_fit_the_pattern_are_warned_about(
    annotated: Path, capsys: pytest.CaptureFixture[str]
):
    prepare(annotated, test_share=0.0, patient_pattern="^P[0-9]+")
    assert "2 slides, such as a, do not fit" in " ".join(capsys.readouterr().out.split())


def test_what_a_slide_states_of_its_scale_counts_before_what_is_given_for_all(
    annotated: Path, capsys: pytest.CaptureFixture[str]
):
    (annotated / "images" / "a.png").unlink()  # the other states nothing
    write_aperio(annotated / "images" / "a.svs", tissue_pixels(64, 64), mpp=0.25, downsamples=())
    masks = masks_of(prepare(annotated, test_share=0.0, source_mpp=0.5, tile_size_px=16))
    areas = {
        name: sum((m > 0).sum() for key, m in masks.items() if key[0] == name) for name in "ab"
    }
    assert areas["b"] == pytest.approx(4 * areas["a"], rel=0.1)
    told = " ".join(capsys.readouterr().out.split())
    assert "1 slides, such as a.svs (0.25 by its Aperio MPP), state another" in told


@pytest.mark.parametrize("place", ["write_dataset", "drawing_of"])
def test_a_slide_that_is_replaced_after_it_was_checked_is_refused(
    annotated: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    slide = annotated / "images" / "a.png"
    with Image.open(slide) as image:
        other = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    before_call(monkeypatch, annotations, place, lambda: other.save(slide))
    with raises(ImageFileError, slide, "was replaced"):
        prepare(annotated, test_share=0.0)
    assert not (annotated / "out").exists()


def test_a_slide_that_is_damaged_in_the_middle_is_named(annotated: Path):
    (annotated / "images" / "a.png").unlink()
    path = write_aperio(annotated / "images" / "a.svs", tissue_pixels(600, 600), downsamples=())
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    around = [[0, 0], [600, 0], [600, 600], [0, 600]]
    geojson(annotated / "annotations" / "a", [("Tumor", [around])])
    with raises(ImageFileError, "a.svs"):
        prepare(annotated, test_share=0.0)
    assert not (annotated / "out").exists()


@pytest.mark.parametrize("side", [64, 65, 70, 129])
def test_no_tile_of_a_large_image_is_a_narrow_rest(side: int, source: Path):
    rng = np.random.default_rng(side)
    pixels = rng.integers(0, 250, (side, side, 3)).astype(np.uint8)
    whole = [[0, 0], [side, 0], [side, side], [0, side]]
    for name in ("a", "b"):
        Image.fromarray(pixels).save(source / "images" / f"{name}.png")
        geojson(source / "annotations" / name, [("Tumor", [whole]), ("Stroma", [STROMA])])
    write_mapping(source / "mapping.json")
    data = prepare(source, tile_size_px=16, test_share=0.0)
    seen = np.zeros((side, side), np.uint8)
    for name, mask in masks_of(data).items():
        first, *rest = map(int, name.split("_")[1:])
        y, x = (first + rest[1], rest[0] + rest[2]) if len(rest) > 1 else (first, rest[0])
        with Image.open(data / "img" / f"{name}.png") as image:
            np.testing.assert_array_equal(image, pixels[y : y + 16, x : x + 16])
        seen[y : y + 16, x : x + 16] = mask
    expected = np.ones((side, side), np.uint8)
    expected[6:60, 40:60] = 2
    np.testing.assert_array_equal(seen, expected)


def test_too_few_patients_are_refused_before_anything_is_cut(
    annotated: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(annotations, "write_dataset", pytest.fail)
    with raises(SourceError, "found 1 patients"):
        prepare(annotated, test_share=0.5)


def test_tiles_that_would_have_one_name_are_refused(annotated: Path):
    Image.new("RGB", (32, 32)).save(annotated / "images" / "a_0_0.png")
    geojson(annotated / "annotations" / "a_0_0", [("Tumor", [[[0, 0], [9, 0], [9, 9]]])])
    with raises(SourceError, "a_0_0"):
        prepare(annotated, tile_size_px=32, test_share=0.0)
    assert not (annotated / "out").exists()


@pytest.mark.parametrize(
    ("file", "num", "label"),
    [
        ("qupath/qupath05.geojson", 3, "UT"),
        ("qupath/qupath-brush.json", 1, "brush"),
        ("asap/tumor_085.xml", 50, "metastasis"),
        ("imagescope/test.xml", 7, "layer 1"),
        ("dsa/sample.anot", 2, "Sample"),
    ],
)
def test_real_files_of_each_format_are_read(file: str, num: int, label: str):
    path = SHARED_DATA / "annotations" / file
    if not path.exists():
        pytest.skip(f"{file} is not there: set FOCALPATH_SHARED_DATA")
    annotations, _ = read_annotation_file(path)
    assert len(annotations) == num
    assert annotations[0].label == label


@pytest.mark.parametrize(
    ("feature", "within_bounds"),
    [
        ({}, False),
        ({"properties": None}, False),
        ({"properties": {"classification": {"name": "Tumor"}}}, False),
        ({"properties": {"objectType": "annotation"}}, True),
        ({"properties": {"object_type": "annotation"}}, True),
        ({"properties": {"isLocked": False}}, True),
        ({"id": "PathAnnotationObject"}, True),
    ],
)
def test_only_qupaths_outlines_begin_where_the_scanned_part_does(
    tmp_path: Path, feature: dict[str, Any], within_bounds: bool
):
    path = tmp_path / "a.geojson"
    square = {"type": "Polygon", "coordinates": [[[0, 0], [8, 0], [8, 8], [0, 0]]]}
    document = {"type": "Feature", "geometry": square, **feature}
    for content in (document, [document], {"type": "FeatureCollection", "features": [document]}):
        path.write_text(json.dumps(content))
        assert read_annotation_file(path)[1].within_bounds is within_bounds


@pytest.mark.parametrize(("stated", "corner"), [({}, 0), ({"origin_px": [400, 84]}, (400, 84))])
def test_our_own_outlines_begin_where_they_say(tmp_path: Path, stated: dict[str, Any], corner: Any):
    geojson(tmp_path / "a")
    path = tmp_path / "a.geojson"
    plain, _ = read_annotation_file(path)
    path.write_text(json.dumps({"focalpath": stated, **json.loads(path.read_text())}))
    found, form = read_annotation_file(path)
    assert not form.within_bounds
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(one.rings[0], other.rings[0] + corner)


@pytest.mark.parametrize(
    "origin", [None, 3, ["a", "b"], [1, 2, 3], [10**400, 0], [0, float("nan")]]
)
def test_an_origin_that_is_no_place_is_refused(tmp_path: Path, origin: Any):
    path = tmp_path / "a.geojson"
    document = {"type": "FeatureCollection", "features": [], "focalpath": {"origin_px": origin}}
    path.write_text(json.dumps(document))
    with raises(AnnotationError, "origin_px"):
        read_annotation_file(path)
