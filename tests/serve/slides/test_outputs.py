import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pydicom
import pytest
import shapely
import tifffile
import zarr
from numpy.typing import NDArray
from ome_zarr_models.v05 import Image as OmeImage
from ome_zarr_models.v05 import ImageLabel
from PIL import Image, ImageDraw, ImageFont

from serve.answers.polygons import Regions, join_parts, trace_regions
from serve.images.mpp import PixelSize
from serve.images.readers.reader import Bounds, RegionReader
from serve.slides.block_record import BlockRecord
from serve.slides.options import OutputOptions
from serve.slides.outputs import dicom_seg, regions
from serve.slides.outputs.format import SlideResult
from serve.slides.outputs.ome_zarr import write_ome_zarr
from serve.slides.outputs.regions import Budget, trace
from serve.slides.outputs.registry import FORMATS
from serve.slides.plan import open_view
from serve.slides.summary import summarise
from serve.slides.tiling import Tiling
from serve.slides.tissue import read_mask
from tests.support.slide_models import CLASSES, model_info
from tests.support.slide_runs import begin
from tests.support.slides import VirtualSlide

ROWS, COLUMNS = 375, 501


def make_result(
    folder: Path,
    labels: NDArray[np.uint8],
    *,
    block: int = 128,
    bounds: Bounds | None = None,
    **options: Any,
) -> SlideResult:
    """A result with these labels, as if the blocks had been computed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slide").touch()
    rows, columns = labels.shape
    size = (rows * 4, columns * 4)
    if bounds is not None:
        size = (size[0] + bounds.y, size[1] + bounds.x)
        bounds = Bounds(bounds.x, bounds.y, columns * 4, rows * 4)
    reader: RegionReader = VirtualSlide(folder / "slide", size, bounds=bounds)
    work, plan = begin(folder / "work" / "slide", reader, block_cells=block)
    assert plan.shape == labels.shape
    for one in Tiling(plan, work.mask()).blocks:
        part = labels[plan.rectangle(one).slices]
        cells = tuple(np.bincount(part.ravel(), minlength=4).tolist())
        record = BlockRecord(
            row=one.row,
            column=one.column,
            num_tiles=1,
            seconds={},
            cells=cells,
            confidence_sums=tuple(200 * count for count in cells),
            low_confidence_cells=(0,) * 4,
        )
        work.write_block(plan, record, part, np.full_like(part, 200) * (part > 0))
    summary = summarise("slide", plan, work.records().values())
    result = SlideResult("slide", work.store, plan, summary, reader, OutputOptions(**options))
    write_ome_zarr(result, work.store)
    return result


@pytest.fixture(scope="module")
def labels() -> NDArray[np.uint8]:
    return blob_labels(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, labels: NDArray[np.uint8]) -> SlideResult:
    return make_result(tmp_path_factory.mktemp("result"), labels, bounds=Bounds(400, 84, 0, 0))


def blob_labels(rows: int, columns: int) -> NDArray[np.uint8]:
    """Regions of all sizes, with holes, islands and corners that touch; 0 to 3."""
    rng = np.random.default_rng(3)
    fields = []
    for _ in range(4):
        coarse, fine = (
            Image.fromarray(rng.normal(0, 1, (rows // step, columns // step)).astype(np.float32))
            for step in (25, 5)
        )
        smooth = [
            np.asarray(f.resize((columns, rows), Image.Resampling.BICUBIC)) for f in (coarse, fine)
        ]
        fields.append(smooth[0] + 0.5 * smooth[1])
    return np.argmax(fields, axis=0).astype(np.uint8)


def speckled_labels(rows: int, columns: int) -> NDArray[np.uint8]:
    """The same with specks of few cells, which lie on edges of blocks, too."""
    rng = np.random.default_rng(5)
    labels = np.maximum(blob_labels(rows, columns), 1)
    for _ in range(1500):
        y, x = rng.integers(0, rows), rng.integers(0, columns)
        height, width = rng.integers(1, 7, 2)
        labels[y : y + height, x : x + width] = rng.integers(1, 4)
    return labels


def traced(result: SlideResult, simplify_cells: float, min_cells: int) -> Regions:
    return join_parts(trace(result, Budget(simplify_cells, min_cells)))


def write(result: SlideResult, name: str, folder: Path) -> Path:
    path = FORMATS[name].path(folder, result.name)
    FORMATS[name].write(result, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("block", [96, 1024])
def test_regions_across_blocks_are_those_of_the_whole_map(
    block: int, tmp_path: Path, labels: NDArray[np.uint8]
) -> None:
    whole = make_result(tmp_path / "whole", labels, block=2048)
    parts = make_result(tmp_path / "parts", labels, block=block)
    one, other = (
        {wkb(r[0]): r for r in zip(*traced(made, 0, 1), strict=True)} for made in (whole, parts)
    )
    assert len(one) > 20
    assert set(one) == set(other)
    for key, (polygon, *measured) in one.items():
        assert measured == pytest.approx(other[key][1:])  # label, cells and confidence
        assert polygon.area == pytest.approx(measured[1] * 16)


def wkb(polygon: Any) -> bytes:
    return bytes(shapely.to_wkb(shapely.normalize(shapely.simplify(polygon, 0))))


@pytest.mark.slow
def test_simplified_regions_cover_the_map_without_gaps_or_overlaps(
    tmp_path: Path, labels: NDArray[np.uint8]
) -> None:
    filled = np.maximum(labels, 1)
    result = make_result(tmp_path, filled)
    polygons = traced(result, simplify_cells=2, min_cells=1).polygons
    assert shapely.is_valid(polygons).all()
    assert shapely.get_type_id(polygons).tolist() == [3] * len(polygons)
    assert shapely.area(polygons).sum() == pytest.approx(filled.size * 16)
    assert shapely.union_all(polygons).area == pytest.approx(filled.size * 16)


@pytest.mark.parametrize("simplify_cells", [0, 2])
@pytest.mark.parametrize("block", [32, 2048])
def test_outer_rings_run_counterclockwise_by_their_numbers_and_holes_clockwise(
    block: int, simplify_cells: float, tmp_path: Path
) -> None:
    result = make_result(tmp_path, blob_labels(100, 120), block=block)
    polygons = traced(result, simplify_cells, 16).polygons
    holes = [hole for polygon in polygons for hole in polygon.interiors]
    assert len(polygons) > len(holes) > 0
    assert all(polygon.exterior.is_ccw for polygon in polygons)
    assert not any(hole.is_ccw for hole in holes)


def test_small_regions_are_left_out_after_they_were_joined(tmp_path: Path) -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[28:36, 28:36] = 1  # four pieces of 16 cells, in four blocks
    labels[2:5, 2:5] = 2
    result = make_result(tmp_path, labels, block=32)
    found = traced(result, simplify_cells=0, min_cells=60)
    assert (found.labels.tolist(), found.area_px.tolist()) == ([1], [64])
    assert found.polygons[0].bounds == (112, 112, 144, 144)


@pytest.mark.slow
@pytest.mark.parametrize("block", [64, 2048])
def test_what_is_left_out_is_filled_inside_of_a_region_and_changes_no_other_outline(
    block: int, tmp_path: Path
) -> None:
    result = make_result(tmp_path, speckled_labels(ROWS, COLUMNS), block=block)
    y, x = result.plan.level0_px_per_cell
    everything = traced(result, simplify_cells=0, min_cells=1)
    expected = set()
    for polygon in everything.polygons[everything.area_px >= 30]:
        holes = [hole for hole in polygon.interiors if shapely.Polygon(hole).area >= 30 * x * y]
        expected.add(wkb(shapely.Polygon(polygon.exterior, holes)))
    assert len(everything.labels) - 100 > len(expected) > 20
    found = [wkb(polygon) for polygon in traced(result, 0, 30).polygons]
    assert len(found) == len(expected)
    assert set(found) == expected


def test_a_hole_is_not_filled_where_a_region_that_stays_lies_in_it(tmp_path: Path) -> None:
    labels = np.ones((64, 64), np.uint8)
    labels[20:28, 26] = labels[23, 22:31] = 2  # 16 cells, of which its simplified outline has less
    labels[40:43, 31:33] = 3
    result = make_result(tmp_path, labels, block=32)
    found = traced(result, simplify_cells=3, min_cells=16)
    around, cross = found.polygons[np.argsort(found.labels)]
    assert sorted(found.labels) == [1, 2]
    assert cross.area < 16 * 16
    assert len(around.interiors) == 1
    assert around.intersection(cross).area == 0
    assert around.area + cross.area == pytest.approx(64 * 64 * 16)


def test_outlines_are_traced_once_for_all_files(
    tmp_path: Path, labels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    monkeypatch.setattr(regions, "trace", lambda *args: traced.append(args) or trace(*args))
    result = make_result(tmp_path, labels)
    for name in ("geojson", "dsa"):
        assert write(result, name, tmp_path).stat().st_size > 1000
    assert len(traced) == 1


def test_a_map_of_noise_is_traced_in_parts_and_simplified_to_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.answers.edges.MAX_EDGES", 20_000)
    noise = np.random.default_rng(0).integers(1, 4, (160, 160)).astype(np.uint8)
    result = make_result(tmp_path, noise, block=2048, max_vertices=5000, min_area_um2=4)
    document = json.loads(gzip.decompress(write(result, "geojson", tmp_path).read_bytes()))
    rings = [ring for f in document["features"] for ring in f["geometry"]["coordinates"]]
    assert 0 < sum(map(len, rings)) <= 5000
    assert document["focalpath"]["simplified_by_cells"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geojson", "dsa"])
def test_annotations_are_in_the_frame_of_level_0(
    name: str, tmp_path: Path, result: SlideResult, labels: NDArray[np.uint8]
) -> None:
    document = json.loads(gzip.decompress(write(result, name, tmp_path).read_bytes()))
    if name == "geojson":
        assert document["type"] == "FeatureCollection"
        shapes = [shapely.geometry.shape(f["geometry"]) for f in document["features"]]
        names = [f["properties"]["classification"]["name"] for f in document["features"]]
        measured = [f["properties"]["measurements"] for f in document["features"]]
    else:
        points = [(e["points"], e["holes"]) for e in document["elements"]]
        shapes = [
            shapely.Polygon([p[:2] for p in shell], [[p[:2] for p in hole] for hole in holes])
            for shell, holes in points
        ]
        names = [element["label"]["value"] for element in document["elements"]]
        measured = [element["user"] for element in document["elements"]]
    assert "level 0" in (document.get("focalpath") or document["attributes"]["focalpath"])["frame"]
    bounds = shapely.total_bounds(np.array(shapes))
    assert bounds[0] >= 400
    assert bounds[1] >= 84
    for shape, found in zip(shapes, measured, strict=True):
        assert found["Area px^2"] == pytest.approx(shape.area, rel=0.2)
        assert found["Area um^2"] == pytest.approx(found["Area px^2"] * 0.5**2)
        assert found["Mean confidence"] == pytest.approx(200 / 255, abs=1e-4)
    tree = shapely.STRtree(shapes)
    rng = np.random.default_rng(0)
    right = 0
    for y, x in zip(rng.integers(0, ROWS, 300), rng.integers(0, COLUMNS, 300), strict=True):
        place = shapely.Point(400 + 4 * (x + 0.5), 84 + 4 * (y + 0.5))
        found = {names[index] for index in tree.query(place, predicate="intersects")}
        expected = {CLASSES[labels[y, x] - 1].name} if labels[y, x] else set()
        right += found == expected
    assert right > 250  # outlines are simplified


def test_outlines_for_qupath_count_from_the_scanned_part_there_and_back(
    tmp_path: Path, result: SlideResult
) -> None:
    level0, qupath = (
        json.loads(gzip.decompress(write(result, name, tmp_path).read_bytes()))
        for name in ("geojson", "qupath")
    )
    for ours, theirs in zip(level0["features"], qupath["features"], strict=True):
        for ring, moved in zip(
            *(f["geometry"]["coordinates"] for f in (ours, theirs)), strict=True
        ):
            np.testing.assert_allclose(np.array(moved) + [400, 84], ring)
    drawn_in_qupath = {"type": "FeatureCollection", "features": qupath["features"]}
    regions = tmp_path / "regions.geojson"
    view, masks = open_view(result.reader, model_info()), []
    for document in (level0, qupath, drawn_in_qupath):
        regions.write_text(json.dumps(document))
        masks.append(read_mask(regions, view))
    assert 0 < masks[0].mean() < 1
    assert all((mask == masks[0]).all() for mask in masks)


@pytest.mark.slow
def test_outputs_are_the_same_at_each_writing(tmp_path: Path, result: SlideResult) -> None:
    for name in ("geojson", "dsa", "ome-tiff", "overview", "dicom-seg"):
        (tmp_path / "b").mkdir(exist_ok=True)
        one, other = write(result, name, tmp_path), write(result, name, tmp_path / "b")
        assert one.read_bytes() == other.read_bytes(), name


def test_ome_zarr_follows_the_specification(result: SlideResult, labels: NDArray[np.uint8]) -> None:
    group = zarr.open_group(result.store, mode="r")
    image = OmeImage.from_zarr(group)
    label_image = ImageLabel.from_zarr(group["labels/classes"])
    assert len(image.attributes.ome.multiscales[0].datasets) == result.num_levels > 1
    assert label_image.attributes.ome.image_label is not None
    assert np.array_equal(group["labels/classes/0"][:], labels)
    for level in range(1, result.num_levels):
        step = 2**level
        assert np.array_equal(group[f"labels/classes/{level}"][:], labels[::step, ::step])
    first = image.attributes.ome.multiscales[0].datasets[0].coordinateTransformations
    assert first[0].scale == [2.0, 2.0]
    assert first[1].translation == [84 / 2 + 1, 400 / 2 + 1]


def oblong(result: SlideResult) -> SlideResult:
    """The result as if the slide's pixels were 0.5 um wide and 0.6 um high."""
    slide = result.plan.slide.model_copy(update={"mpp_xy": PixelSize(x=0.5, y=0.6)})
    plan = result.plan.model_copy(update={"slide": slide})
    return dataclasses.replace(result, plan=plan)


def test_ome_tiff_has_the_levels_the_colours_and_the_scale_along_each_axis(
    tmp_path: Path, result: SlideResult, labels: NDArray[np.uint8]
) -> None:
    path = write(oblong(result), "ome-tiff", tmp_path)
    with tifffile.TiffFile(path) as tiff:
        levels = tiff.series[0].levels
        assert len(levels) == result.num_levels
        for index, level in enumerate(levels):
            step = 2**index
            assert np.array_equal(level.asarray(), labels[::step, ::step])
        page = tiff.pages[0]
        assert page.colormap[:, 1].tolist() == [0xD6 * 257, 0x27 * 257, 0x28 * 257]
        assert 'PhysicalSizeX="2.0"' in page.description
        assert 'PhysicalSizeY="2.4"' in page.description
        assert "partial" not in page.description
        (x, per_x), (y, per_y) = (page.tags[f"{axis}Resolution"].value for axis in "XY")
    assert (x / per_x, y / per_y) == pytest.approx((1e4 / 2.0, 1e4 / 2.4), rel=1e-6)


def test_ome_zarr_has_the_scale_and_the_corner_along_each_axis(tmp_path: Path) -> None:
    made = make_result(tmp_path, blob_labels(ROWS, COLUMNS), bounds=Bounds(400, 84, 0, 0))
    write_ome_zarr(oblong(made), made.store)
    group = zarr.open_group(made.store, mode="r")
    for one in (OmeImage.from_zarr(group), ImageLabel.from_zarr(group["labels/classes"])):
        (multiscale,) = one.attributes.ome.multiscales
        assert [axis.name for axis in multiscale.axes] == ["y", "x"]
        assert len(multiscale.datasets) == made.num_levels > 1
        for level, dataset in enumerate(multiscale.datasets):
            scale, translation = dataset.coordinateTransformations
            assert scale.scale == pytest.approx([2.4 * 2**level, 2.0 * 2**level])
            assert translation.translation == pytest.approx([84 * 0.6 + 1.2, 400 * 0.5 + 1.0])


def test_dicom_seg_has_the_scale_and_the_corner_along_each_axis(
    tmp_path: Path, result: SlideResult
) -> None:
    segmentation = pydicom.dcmread(write(oblong(result), "dicom-seg", tmp_path))
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert [float(value) for value in measures.PixelSpacing] == [0.0024, 0.002]  # rows first
    origin = segmentation.TotalPixelMatrixOriginSequence[0]
    place = (origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem)
    assert [float(value) for value in place] == pytest.approx([84 * 0.6e-3, 400 * 0.5e-3])


def test_ome_tiff_is_valid_xml_whatever_a_class_is_called(
    tmp_path: Path, result: SlideResult
) -> None:
    path = write(named(result, "A\x01B\uffff", "New\nline", "<&>\"' 腺"), "ome-tiff", tmp_path)
    with tifffile.TiffFile(path) as tiff:
        document = ElementTree.fromstring(tiff.ome_metadata or "")
    described = document.findtext(".//{*}Description")
    assert (described or "").startswith("1 A B ; 2 New line; 3 <&>\"' 腺; origin x 400")


def test_dicom_seg_has_the_labels_and_their_place(
    tmp_path: Path, result: SlideResult, labels: NDArray[np.uint8]
) -> None:
    import highdicom

    path = write(result, "dicom-seg", tmp_path)
    segmentation = highdicom.seg.segread(path)
    assert segmentation.SegmentationType == "LABELMAP"
    whole = segmentation.get_total_pixel_matrix(combine_segments=True)
    assert np.array_equal(whole, labels)
    names = [s.SegmentLabel for s in segmentation.SegmentSequence if s.SegmentNumber > 0]
    assert names == [entry.name for entry in CLASSES]
    origin = segmentation.TotalPixelMatrixOriginSequence[0]
    place = (origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem)
    assert [float(value) for value in place] == pytest.approx([84 * 0.5e-3, 400 * 0.5e-3])
    shared = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert [float(value) for value in shared.PixelSpacing] == [0.002, 0.002]


def test_dicom_seg_of_a_map_too_large_for_memory_is_of_a_coarser_level(
    tmp_path: Path, result: SlideResult, labels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_seg, "_MOST_CELLS", labels.size - 1)
    found = pydicom.dcmread(write(result, "dicom-seg", tmp_path))
    sides = found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns
    assert sides == labels[::2, ::2].shape
    measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert [float(value) for value in measures.PixelSpacing] == [0.004, 0.004]


def named(result: SlideResult, *names: str) -> SlideResult:
    """The result of a model whose classes have these names."""
    classes = tuple(
        entry.model_copy(update={"name": name})
        for entry, name in zip(result.plan.model.classes, names, strict=True)
    )
    model = result.plan.model.model_copy(update={"classes": classes})
    plan = result.plan.model_copy(update={"model": model})
    summary = result.summary.model_copy(
        update={
            "classes": tuple(
                entry.model_copy(update={"name": name})
                for entry, name in zip(result.summary.classes, names, strict=True)
            )
        }
    )
    return dataclasses.replace(result, plan=plan, summary=summary)


def test_segmentations_of_a_slide_by_two_models_lie_over_each_other(
    tmp_path: Path, result: SlideResult
) -> None:
    (tmp_path / "other").mkdir()
    one = pydicom.dcmread(write(result, "dicom-seg", tmp_path))
    other = pydicom.dcmread(write(named(result, "A", "B", "C"), "dicom-seg", tmp_path / "other"))
    for shared in ("FrameOfReferenceUID", "StudyInstanceUID", "ReferencedSeriesSequence"):
        assert one[shared] == other[shared], shared
    for own in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert one[own] != other[own], own


def test_dicom_seg_has_names_in_any_letters(tmp_path: Path, result: SlideResult) -> None:
    named_so = named(result, "Drüse 腺", "Tumor\\Rand", "N" * 70)
    found = pydicom.dcmread(write(named_so, "dicom-seg", tmp_path))
    assert found.SpecificCharacterSet == "ISO_IR 192"
    segments = found.SegmentSequence[-3:]
    assert [one.SegmentLabel for one in segments] == ["Drüse 腺", "Tumor/Rand", "N" * 64]
    meaning = segments[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning
    assert meaning == "Drüse 腺"


def test_the_overview_shows_the_classes_over_the_slide(tmp_path: Path, result: SlideResult) -> None:
    with Image.open(write(result, "overview", tmp_path)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert max(pixels.shape) < 4000
    for entry in CLASSES:
        color = tuple(int(entry.color[index : index + 2], 16) for index in (1, 3, 5))
        assert (pixels == color).all(axis=-1).sum() >= 200, entry.name


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that pictures get from here on; collected, not drawn."""
    texts: list[str] = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda _, xy, text, *a, **k: texts.append(text)
    )
    return texts


def test_the_overview_writes_names_in_letters_that_its_font_has(
    tmp_path: Path, result: SlideResult, drawn: list[str]
) -> None:
    written = named(result, "Drüse é", "🧬 DNA", "腫瘍")
    summary = written.summary.model_copy(update={"name": "Präparat Ж 7"})
    write(dataclasses.replace(written, summary=summary), "overview", tmp_path)
    assert {"Praparat ? 7", "Druse e", "? DNA", "label 3"} <= set(drawn)
    missing = bytes(ImageFont.load_default(16).getmask("\uffff"))
    letters = {letter for text in drawn for letter in text}
    assert not [one for one in letters if bytes(ImageFont.load_default(16).getmask(one)) == missing]


@pytest.mark.parametrize("shape", [(8, 8), (8, 900), (900, 8)])
def test_the_scale_bar_covers_nothing_of_a_small_or_narrow_slide(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    result = make_result(tmp_path, np.zeros(shape, np.uint8), block=1024)
    with Image.open(write(result, "overview", tmp_path)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    longest = max(shape)
    height, width = (round(side * min(1200 / longest, 4)) for side in shape)
    slide = pixels[24 : 24 + height - 1, 24 : 24 + width - 1]
    assert (slide[..., 2] == 40).all()  # as the virtual slide's pixels
    bar = (pixels == (0x1F, 0x23, 0x28)).all(axis=-1)
    assert max(np.flatnonzero(row).size for row in bar) >= 90


def test_small_areas_are_not_zero_in_the_overview(
    tmp_path: Path, result: SlideResult, drawn: list[str]
) -> None:
    sizes = (12.346, 0.0042, 0.00002)
    classes = tuple(
        entry.model_copy(update={"area_mm2": size})
        for entry, size in zip(result.summary.classes, sizes, strict=True)
    )
    summary = result.summary.model_copy(update={"classes": classes})
    write(dataclasses.replace(result, summary=summary), "overview", tmp_path)
    assert {"12.35 mm2", "0.0042 mm2", "<0.0001 mm2"} <= set(drawn)


def test_glass_around_the_tissue_changes_no_outline(
    tmp_path: Path, labels: NDArray[np.uint8]
) -> None:
    """A block is traced around its tissue only; simplified, edges on glass still are shared."""
    on_glass = np.zeros((512, 640), np.uint8)
    on_glass[40 : 40 + ROWS, 70 : 70 + COLUMNS] = labels
    result = make_result(tmp_path, on_glass, block=1024)
    whole = join_parts(trace_regions(on_glass, result.cut(result.blocks()[0])[1], simplify_px=2))
    expected = whole.polygons[whole.labels > 0]
    found = traced(result, 2, 1).polygons
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected, strict=True):
        placed = shapely.transform(other, lambda places: np.round(result.to_level0(places), 2))
        assert shapely.equals_exact(one, placed)
