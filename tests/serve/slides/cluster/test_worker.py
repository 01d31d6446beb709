"""What an actor does, without a cluster."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from serve.settings import InferenceSettings
from serve.slides.cluster import worker as module
from serve.slides.cluster.worker import (
    ClusterWorker,
    Opening,
    Problem,
    Ready,
    told,
)
from serve.slides.cohort import SlideTask
from serve.slides.errors import ResultError
from serve.slides.job import SlideJob, conclude, prepare
from serve.slides.options import RunOptions
from serve.slides.tiling import Tiling
from tests.support.errors import raises
from tests.support.slides import tissue_pixels, write_aperio


@pytest.fixture(autouse=True)
def _node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_node_id", lambda: "this node")


@pytest.fixture
def worker() -> Iterator[ClusterWorker]:
    opened = ClusterWorker()
    yield opened
    opened.close()


def opening(bundle: Path, **changes: object) -> Opening:
    settings = InferenceSettings(bundle=bundle, threads=1)
    return Opening(settings=settings, versions={"numpy": np.__version__}).model_copy(update=changes)


def opened(worker: ClusterWorker, bundle: Path) -> Ready:
    ready = worker.open(opening(bundle))
    assert isinstance(ready, Ready), ready
    return ready


def job(folder: Path, ready: Ready) -> SlideJob:
    slide = write_aperio(folder / "slide.svs", tissue_pixels(300, 400))
    return SlideJob(
        out=folder / "out",
        task=SlideTask(path=slide, name="slide"),
        options=RunOptions(block_cells=32),
        formats=("ome-zarr",),
        model=ready.model,
    )


def test_a_slide_is_planned_computed_and_finished(
    worker: ClusterWorker, tmp_path: Path, toy_bundle: Path
) -> None:
    work = job(tmp_path, opened(worker, toy_bundle))
    assert told(prepare, work) is True
    blocks = Tiling(work.work.plan(), work.work.mask()).blocks
    report = worker.run(work.work.path, blocks[:3], 7)
    assert report is not None
    assert report.problem is None
    assert [record.block for record in report.records] == list(blocks[:3])
    assert worker.progress() == (7, sum(record.num_tiles for record in report.records))
    report = worker.run(work.work.path, blocks[3:], 8)
    assert report is not None
    assert report.problem is None
    assert told(conclude, work) is None
    assert (work.work.result / "run.json").is_file()


@pytest.mark.parametrize("title", ["OME-Zarr", "Overview"])
def test_outputs_of_a_run_that_was_killed_are_not_taken_for_those_of_the_next(
    title: str, worker: ClusterWorker, tmp_path: Path, toy_bundle: Path
) -> None:
    first = job(tmp_path, opened(worker, toy_bundle))
    first = first.model_copy(update={"formats": ("ome-zarr", "overview")})
    work = first.work
    assert prepare(first)
    plan, mask = work.plan(), work.mask()
    worker.run(work.path, tuple(Tiling(plan, mask).blocks), 1)

    def begin_anew(step: str) -> None:
        if title in step:
            newer = plan.model.model_copy(update={"version": "newer"})
            work.remove()
            work.begin(plan.model_copy(update={"model": newer}), mask)

    with raises(ResultError, work.path, "begun anew"):
        conclude(first, begin_anew)
    written = {path.name for path in work.path.rglob("*") if path.is_file()}
    assert not [name for name in written if "overview" in name or "output" in name]


def test_a_users_mistake_is_a_value_that_names_the_machine(
    worker: ClusterWorker, tmp_path: Path, toy_bundle: Path
) -> None:
    missing = worker.open(opening(tmp_path / "gone"))
    assert isinstance(missing, Problem)
    assert missing.code == "bundle_missing"
    assert module.host_name() in missing.reason
    work = job(tmp_path, opened(worker, toy_bundle))
    (tmp_path / "slide.svs").write_bytes(b"no slide")
    problem = told(prepare, work)
    assert isinstance(problem, Problem)
    assert problem.error().code == "slide_format"


def test_a_worker_that_was_started_again_says_that_it_has_no_model(
    worker: ClusterWorker, tmp_path: Path
) -> None:
    assert worker.run(tmp_path, (), 1) is None


def test_an_output_folder_that_is_not_shared_is_told(
    worker: ClusterWorker, tmp_path: Path, toy_bundle: Path
) -> None:
    opened(worker, toy_bundle)
    report = worker.run(tmp_path / "elsewhere", (), 1)
    assert report is not None
    assert report.problem is not None
    assert report.problem.code == "cluster_unusable"
    assert "elsewhere" in report.problem.reason


@pytest.mark.parametrize("what", ["model", "version"])
def test_a_worker_that_would_answer_otherwise_is_refused(
    what: str, worker: ClusterWorker, toy_bundle: Path
) -> None:
    ready = opened(worker, toy_bundle)
    changes = {
        "model": {"model": ready.model.model_copy(update={"runs_on": "openvino"})},
        "version": {"versions": {"numpy": "1.0"}},
    }
    problem = ClusterWorker().open(opening(toy_bundle, **changes[what]))
    assert isinstance(problem, Problem)
    assert problem.code == "cluster_unusable"
