"""The steps of a slide before and after its blocks."""

from pathlib import Path
from typing import Any

import pytest

from serve.images.mpp import FROM_REQUEST
from serve.images.readers.errors import SlideError
from serve.images.readers.openslide import OpenSlideReader
from serve.images.readers.registry import open_reader
from serve.images.readers.tiff import TiffReader
from serve.slides.cohort import SlideTask
from serve.slides.job import SlideJob, prepare
from serve.slides.options import RunOptions
from serve.slides.planning import open_planned
from tests.support.slide_models import model_info
from tests.support.slides import tissue_pixels, write_aperio


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """Of 0.5 um per pixel, by its own account."""
    return write_aperio(tmp_path / "slide.svs", tissue_pixels(300, 400))


def _job(slide: Path, task: dict[str, Any], **options: Any) -> SlideJob:
    return SlideJob(
        out=slide.parent / "out",
        task=SlideTask(path=slide, name="slide", **task),
        options=RunOptions(**options),
        formats=("ome-zarr",),
        model=model_info(),
    )


def test_what_a_slide_says_of_itself_counts_before_what_is_said_of_all(slide: Path) -> None:
    own = {"mpp": 0.25, "reader": "openslide", "tissue": "none"}
    job = _job(slide, own, mpp=0.4, reader="tiff", tissue="auto")
    assert prepare(job)
    plan = job.work.plan()
    assert (plan.slide.mpp, plan.slide.mpp_source) == (0.25, FROM_REQUEST)
    assert plan.slide.reader == "openslide"
    assert plan.settings.tissue == "none"
    assert job.work.mask().all()


def test_what_is_said_of_all_counts_where_a_slide_says_nothing(slide: Path) -> None:
    job = _job(slide, {}, mpp=0.4, reader="openslide", tissue="none")
    assert prepare(job)
    plan = job.work.plan()
    assert (plan.slide.mpp, plan.slide.reader) == (0.4, "openslide")
    assert plan.settings.tissue == "none"


def test_a_planned_slide_is_opened_with_the_um_per_pixel_and_the_reader_of_its_plan(
    slide: Path,
) -> None:
    job = _job(slide, {}, mpp=0.4, reader="openslide", tissue="none")
    prepare(job)
    with open_planned(job.work.plan()) as opened:
        assert opened.require_pixel_size() == (0.4, 0.4)
        assert type(opened) is OpenSlideReader
    with open_reader(slide) as opened:
        assert opened.require_pixel_size() == (0.5, 0.5)
        assert type(opened) is TiffReader


def test_a_slide_that_was_replaced_after_it_was_planned_is_refused(slide: Path) -> None:
    job = _job(slide, {}, tissue="none")
    prepare(job)
    write_aperio(slide, tissue_pixels(300, 400, seed=1))
    with pytest.raises(SlideError, match=r"slide\.svs is not the file that the work began with"):
        open_planned(job.work.plan())
