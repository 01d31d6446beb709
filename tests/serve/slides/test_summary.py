"""Numbers of a slide, added up by hand."""

from pathlib import Path

import pytest

from serve.images.mpp import PixelSize
from serve.slides.block_record import BlockRecord
from serve.slides.summary import summarise
from tests.support.certificate import certificate_that_warns
from tests.support.slide_runs import begin
from tests.support.slides import VirtualSlide


def _record(cells: tuple[int, ...], confidence: int, low: tuple[int, ...]) -> BlockRecord:
    return BlockRecord(
        row=0,
        column=0,
        num_tiles=1,
        seconds={},
        cells=cells,
        confidence_sums=tuple(confidence * count for count in cells),
        low_confidence_cells=low,
    )


@pytest.mark.parametrize("size", [PixelSize(0.25, 0.25), PixelSize(x=0.2, y=0.4)])
def test_areas_are_of_the_slides_own_pixels_and_shares_of_the_tissue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: PixelSize
) -> None:
    """A model at 0.5 um per pixel: a cell is 2 x 2 um, whatever the slide's pixels are."""
    (tmp_path / "slide").touch()
    reader = VirtualSlide(tmp_path / "slide", (800, 1600), mpp=size.mean)
    monkeypatch.setattr(VirtualSlide, "pixel_size", size)
    _, plan = begin(tmp_path / "work", reader)
    records = [_record((7, 100, 0, 300), 204, (7, 10, 0, 0)), _record((0, 100), 102, (0, 90))]
    found = summarise("slide", plan, records)
    first, second, third = found.classes
    assert (first.cells, second.cells, third.cells) == (200, 0, 300)
    assert first.area_mm2 == pytest.approx(200 * 4 / 1e6, rel=0.01)
    assert found.tissue_mm2 == pytest.approx(500 * 4 / 1e6, rel=0.01)
    assert first.tissue_share == pytest.approx(0.4)
    assert first.mean_confidence == pytest.approx((0.8 + 0.4) / 2)
    assert first.low_confidence_share == pytest.approx(0.5)
    assert (second.mean_confidence, second.low_confidence_share) == (None, None)
    assert found.mean_confidence == pytest.approx((400 * 0.8 + 100 * 0.4) / 500)
    assert found.low_confidence_share == pytest.approx(0.2)


@pytest.mark.parametrize(("mpp", "is_noted"), [(0.62, True), (0.5, False)])
def test_a_scale_that_costs_labels_is_noted(mpp: float, is_noted: bool, tmp_path: Path) -> None:
    (tmp_path / "slide").touch()
    _, plan = begin(tmp_path / "work", VirtualSlide(tmp_path / "slide", (80, 160), mpp=mpp))
    certificate = certificate_that_warns(len(plan.model.classes))
    model = plan.model.model_copy(update={"scale_certificate": certificate})
    found = summarise("slide", plan.model_copy(update={"model": model}), [], ["from the reader"])
    assert len(found.notes) == 1 + is_noted
