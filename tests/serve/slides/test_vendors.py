"""Slides of vendors whose files have offsets, all the way to outlines in pixels of level 0."""

import gzip
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pydicom
import pytest
import shapely
import zarr
from numpy.typing import NDArray

from serve.slides.cohort import Outcome, find_slides
from serve.slides.errors import ResultError
from serve.slides.finish import read_passport, read_summary
from serve.slides.local import LocalEngine
from serve.slides.options import TissueRule
from tests.support.dicom_slides import write_dicom_slide
from tests.support.hamamatsu import write_vms
from tests.support.slide_models import PositionModel, model_info
from tests.support.slide_runs import cohort, run_one
from tests.support.vendors import VENDORS, Vendor

PINK, BLUE = (210, 90, 150), (60, 60, 220)
CELL_PX = 8
"""A cell of the model, 0.5 um per pixel, in pixels of slides with 0.25."""


def painted(x: int, y: int, side: int) -> NDArray[np.uint8]:
    """A pink slide with a blue square."""
    pixels = np.full((640, 768, 3), PINK, np.uint8)
    pixels[y : y + side, x : x + side] = BLUE
    return pixels


def run(path: Path, out: Path, *formats: str, mpp: float | None = None) -> Outcome:
    engine = LocalEngine(PositionModel(), model_info(), max_batch_size=4)
    rule = TissueRule(grow_um=0, close_px=1, median_px=1)
    with closing(engine):
        chosen = ("ome-zarr", *(formats or ("geojson",)))
        return run_one(cohort(out, engine, formats=chosen, rule=rule, mpp=mpp), path)


@pytest.mark.parametrize(
    ("name", "square"),
    [("mirax", (260, 130, 80)), ("ventana", (312, 280, 160)), ("leica", (460, 320, 160))],
)
def test_a_region_is_outlined_where_it_lies_in_level_0(
    name: str, square: tuple[int, int, int], tmp_path: Path
) -> None:
    vendor = VENDORS[name]
    path = vendor.write(tmp_path / vendor.file, painted(*square))
    assert run(path, tmp_path / "out").status == "done"
    result = tmp_path / "out" / path.stem
    x, y, side = square
    features = json.loads(gzip.decompress((result / f"{path.stem}.geojson.gz").read_bytes()))
    found = {
        feature["properties"]["classification"]["name"]: shapely.geometry.shape(feature["geometry"])
        for feature in features["features"]
    }
    cell = CELL_PX * 0.25 / vendor.mpp
    assert found["Other"].bounds == pytest.approx((x, y, x + side, y + side), abs=cell)
    assert found["Other"].area == pytest.approx(side * side, rel=0.1)
    summary = read_summary(result)
    bounds = vendor.bounds
    assert summary.origin_px == pytest.approx((bounds.x, bounds.y), abs=2)
    assert read_passport(result).plan.slide.mpp_source == f"OpenSlide ({vendor.name})"
    labels = np.asarray(zarr.open_array(result / f"{path.stem}.ome.zarr/labels/classes/0"))
    assert not labels[is_far(vendor, labels.shape, summary.origin_px)].any()
    assert labels.any()


def is_far(
    vendor: Vendor, shape: tuple[int, ...], origin: tuple[float, float]
) -> NDArray[np.bool_]:
    """The cells that are far from what was scanned: two pixels of the search for tissue."""
    step = 4 * 0.5 / vendor.mpp
    near = vendor.is_scanned(grow_px=round(16 / vendor.mpp))
    rows, columns = (
        np.clip((start + (np.arange(count) + 0.5) * step).astype(int), 0, length - 1)
        for start, count, length in zip(origin[::-1], shape, near.shape, strict=True)
    )
    found = ~near[np.ix_(rows, columns)]
    assert found.any()
    return np.asarray(found)


@pytest.mark.parametrize("name", ["slide", "slide/2.dcm", "slide/IM2"])
def test_a_segmentation_of_a_dicom_slide_refers_to_the_file_of_its_level_0(
    name: str, tmp_path: Path
) -> None:
    import highdicom

    series = write_dicom_slide(tmp_path / "slide", painted(120, 200, 160)).parent
    for path in series.iterdir():
        file = pydicom.dcmread(path)
        file.SpecificCharacterSet, file.PatientName = "ISO_IR 100", "Müller^Jörg"
        file.save_as(path)
    if name.endswith("IM2"):
        (series / "2.dcm").rename(series / "IM2")
    slide = tmp_path / name
    assert run(slide, tmp_path / "out", "dicom-seg").status == "done"
    found = highdicom.seg.segread(tmp_path / "out" / slide.stem / f"{slide.stem}.seg.dcm")
    volume = pydicom.dcmread(series / "1.dcm", stop_before_pixels=True)
    assert found.SeriesInstanceUID != volume.SeriesInstanceUID
    assert found.StudyInstanceUID == volume.StudyInstanceUID
    assert found.PatientName == "Müller^Jörg"
    assert found.SpecificCharacterSet == "ISO_IR 192"
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == volume.SeriesInstanceUID
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == volume.SOPInstanceUID
    labels = found.get_total_pixel_matrix(combine_segments=True)
    rows, columns = np.nonzero(labels == 3)
    assert (rows.min(), rows.max() + 1) == pytest.approx((50, 90), abs=1)
    assert (columns.min(), columns.max() + 1) == pytest.approx((30, 70), abs=1)


@pytest.mark.parametrize(
    ("mpp", "given"),
    [((0.5, 0.508), None), ((0.5, 0.6), None), ((0.5, 0.5), 0.25), ((0.25, 0.5), 1.0)],
)
def test_a_segmentation_lies_over_its_dicom_slide_in_mm_whatever_um_per_pixel_are_used(
    mpp: tuple[float, float], given: float | None, tmp_path: Path
) -> None:
    slide = write_dicom_slide(tmp_path / "slide", painted(120, 200, 160), mpp=mpp).parent
    assert run(slide, tmp_path / "out", "dicom-seg", mpp=given).status == "done"
    found = pydicom.dcmread(tmp_path / "out" / "slide" / "slide.seg.dcm")
    volume = pydicom.dcmread(slide / "1.dcm", stop_before_pixels=True)
    assert found.FrameOfReferenceUID == volume.FrameOfReferenceUID
    cell = np.array(_pixel_mm(found)) / _pixel_mm(volume)
    cells = found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns
    # The last cell may reach beyond the slide.
    assert np.array(cells) * cell == pytest.approx((640, 768), abs=cell.max())
    corners = [one.TotalPixelMatrixOriginSequence[0] for one in (found, volume)]
    for axis in ("XOffsetInSlideCoordinateSystem", "YOffsetInSlideCoordinateSystem"):
        assert corners[0][axis].value == corners[1][axis].value


def _pixel_mm(dataset: pydicom.Dataset) -> list[float]:
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    return [float(side) for side in measures.PixelSpacing]


def test_a_folder_lists_each_slide_once_and_none_of_its_parts(tmp_path: Path) -> None:
    VENDORS["mirax"].make(tmp_path)
    (tmp_path / "m" / "preview.png").touch()
    write_vms(tmp_path / "h.vms", painted(0, 0, 10)[:256, :256])
    (tmp_path / "photo.jpg").touch()
    tasks, problems = find_slides([tmp_path])
    assert problems == []
    assert [task.path.name for task in tasks] == ["h.vms", "m.mrxs", "photo.jpg"]


def test_a_result_is_not_kept_for_other_pixels_under_the_same_text(tmp_path: Path) -> None:
    path = write_vms(tmp_path / "h.vms", painted(0, 0, 100)[:256, :256], grid=(1, 1))
    text = path.read_bytes()
    assert run(path, tmp_path / "out").status == "done"
    assert run(path, tmp_path / "out").status == "kept"
    write_vms(path, painted(100, 100, 100)[:256, :256], grid=(1, 1))
    assert path.read_bytes() == text
    outcome = run(path, tmp_path / "out")
    assert (outcome.status, outcome.code) == ("failed", ResultError.code)
