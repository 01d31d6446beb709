import errno
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import zarr
from PIL import Image

from serve.contract import unchanged
from serve.contract.errors import BackendUnavailableError
from serve.images.readers.reader import RegionReader
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings
from serve.slides import finish, planning, status
from serve.slides.cohort import Outcome, SlideTask
from serve.slides.engine import Watcher
from serve.slides.errors import MaskError, ResultDamagedError, ResultError
from serve.slides.finish import read_passport, read_summary
from serve.slides.job import SlideJob
from serve.slides.local import LocalEngine, model_of, ran_on
from serve.slides.lock import SlideBusyError, slide_lock
from serve.slides.options import OutputOptions
from serve.slides.outputs.registry import FORMATS
from serve.slides.plan import Plan
from serve.slides.planning import plan_slide
from serve.slides.run import run_cohort
from serve.slides.status import read_status, verify
from serve.slides.store import LABELS, WorkFolder
from serve.slides.summary_csv import verify_csv, write_cohort_csv
from serve.slides.tissue import Mask
from tests.support.errors import raises
from tests.support.locks import break_locks
from tests.support.meanwhile import before_call
from tests.support.slide_runs import (
    Stop,
    Stopping,
    cohort,
    engine_of,
    files_of,
    run_one,
)
from tests.support.slides import tissue_pixels, write_aperio, write_ome_zarr
from tests.support.toy_bundle import write_toy_bundle

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy", tile_size_px=64)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[LocalEngine]:
    opened = engine_of(bundle)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of painted tissue in the middle of glass."""
    pixels = np.full((900, 1100, 3), 245, np.uint8)
    pixels[150:750, 200:900] = tissue_pixels(600, 700)
    pixels[300:500, 400:600] = (200, 30, 30)
    return write_aperio(tmp_path_factory.mktemp("slides") / "slide.svs", pixels)


class Runs:
    """Segments the slide, or another one, into one folder."""

    def __init__(self, out: Path, engine: LocalEngine, slide: Path) -> None:
        self.out = out
        self._engine = engine
        self._slide = slide

    def __call__(self, path: Path | None = None, name: str = "", **options: Any) -> Outcome:
        path = path or self._slide
        (outcome,) = self.all([SlideTask(path=path, name=name or path.stem)], **options)
        return outcome

    def all(self, tasks: list[SlideTask], **options: Any) -> list[Outcome]:
        return run_cohort(cohort(self.out, self._engine, **options), tasks)


@pytest.fixture
def run(tmp_path: Path, engine: LocalEngine, slide: Path) -> Runs:
    return Runs(tmp_path / "out", engine, slide)


@pytest.mark.slow
def test_a_slide_becomes_a_whole_result_with_every_format(tmp_path: Path, run: Runs) -> None:
    outcome = run(formats=list(FORMATS))
    assert outcome.status == "done", outcome.reason
    result = run.out / "slide"
    for entry in FORMATS.values():
        assert entry.path(result, "slide").exists(), entry.name
    assert verify(result) > 10
    passport = read_passport(result)
    assert passport.num_tiles == outcome.num_tiles > 0
    assert passport.num_tiles_once <= passport.num_tiles
    summary = read_summary(result)
    assert summary.has_tissue
    tumor = next(entry for entry in summary.classes if entry.name == "Tumor")
    assert tumor.area_mm2 == pytest.approx(200 * 200 * 0.25e-6, rel=0.1)
    assert sum(entry.tissue_share or 0 for entry in summary.classes) == pytest.approx(1, abs=1e-4)
    assert list((run.out / ".work").iterdir()) == []
    before = ran_on(run.out)
    assert before is not None
    assert (before.provider, before.precision) == ("cpu", "fp32")
    assert ran_on(tmp_path) is None
    write_cohort_csv(run.out)
    lines = (run.out / "summary.csv").read_text().splitlines()
    assert len(lines) == 1 + len(summary.classes)


@pytest.mark.slow
def test_a_slide_whose_scale_is_given_otherwise_says_so_in_its_summary(run: Runs) -> None:
    assert run(mpp=0.62).status == "done"
    (note,) = read_summary(run.out / "slide").notes
    assert note.endswith("says 0.5 um per pixel, 0.62 was given, and counts")


@pytest.mark.slow
def test_a_finished_slide_is_kept_and_other_settings_are_refused(run: Runs) -> None:
    assert run().status == "done"
    before = files_of(run.out / "slide")
    assert run().status == "kept"
    others: list[tuple[str, dict[str, Any]]] = [
        ("the settings", {"block_cells": 128}),
        ("its um per pixel", {"mpp": 0.6}),
        ("the formats", {"formats": ("overview",)}),
        ("the options of outputs", {"outputs": OutputOptions(simplify_cells=3)}),
    ]
    for named, options in others:
        other = run(**options)
        assert (other.status, other.code) == ("failed", ResultError.code)
        assert f"was made differently: {named} differ" in other.reason
    assert files_of(run.out / "slide") == before
    assert run(block_cells=128, overwrite=True).status == "done"


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, engine: LocalEngine, slide: Path
) -> None:
    formats = list(FORMATS)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_one(cohort(whole, engine, formats=formats), slide)
    ran = 0
    for after in (30, 60, 0):
        with pytest.raises(Stop):
            run_one(cohort(parts, engine, formats=formats, watcher=Stopping(after)), slide)
    (status,) = read_status(parts)
    assert status.state == "stopped"
    assert 1 < status.blocks_done < status.blocks
    next(parts.glob(".work/slide/done/*.json")).write_bytes(b"")  # as after a power failure
    outcome = run_one(cohort(parts, engine, formats=formats), slide)
    ran = outcome.num_tiles
    passport = read_passport(whole / "slide")
    assert 0 < ran < passport.num_tiles
    assert files_of(parts / "slide") == files_of(whole / "slide")


@pytest.mark.slow
def test_a_stopped_run_that_replaces_a_result_goes_on_with_its_own_blocks(run: Runs) -> None:
    run(block_cells=128)
    for _ in range(2):
        with pytest.raises(Stop):
            run(overwrite=True, watcher=Stopping(60))
    outcome = run(overwrite=True)
    passport = read_passport(run.out / "slide")
    assert passport.plan.settings.block_cells == 64
    assert 0 < outcome.num_tiles < passport.num_tiles
    assert verify(run.out / "slide")


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, engine: LocalEngine, slide: Path
) -> tuple[Path, dict[str, bytes]]:
    """A folder with a run that was stopped, and the files of one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    run_one(cohort(folder / "whole", engine), slide)
    with pytest.raises(Stop):
        run_one(cohort(folder / "begun", engine, watcher=Stopping(150)), slide)
    return folder / "begun", files_of(folder / "whole" / "slide")


def cut_off(work: Path) -> None:
    for path in (work / "result").rglob("c/*/*"):
        path.write_bytes(path.read_bytes()[:20])


def of_other_cells(work: Path) -> None:
    """A shard that can be read, of another block."""
    shards = [p for p in sorted((work / "result/slide.ome.zarr/0/c").rglob("*")) if p.is_file()]
    shutil.copyfile(shards[0], shards[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        of_other_cells,
        lambda work: (work / "result/slide.ome.zarr/zarr.json").write_bytes(b""),
        lambda work: (work / "result/slide.ome.zarr/0/zarr.json").write_bytes(b"{}"),
        lambda work: (work / "result/slide.ome.zarr/labels/zarr.json").write_bytes(b""),
        lambda work: (work / "result/slide.ome.zarr/labels/zarr.json").unlink(),
        lambda work: (work / "result/slide.ome.zarr/labels/classes/zarr.json").write_bytes(b"{}"),
        lambda work: (work / "result/slide.ome.zarr/zarr.json").write_bytes(b"null"),
        lambda work: shutil.rmtree(work / "result"),
        lambda work: (work / "tissue.png").write_bytes(b""),
    ],
)
def test_work_that_was_damaged_is_done_again(
    damage: Callable[[Path], None], stopped: tuple[Path, dict[str, bytes]], run: Runs
) -> None:
    begun, expected = stopped
    shutil.copytree(begun, run.out)
    assert len(list((run.out / ".work/slide/done").iterdir())) >= 2
    damage(run.out / ".work" / "slide")
    outcome = run()
    assert outcome.status == "done", outcome.reason
    assert files_of(run.out / "slide") == expected


@pytest.fixture(scope="module")
def stopped_at_the_end(
    tmp_path_factory: pytest.TempPathFactory, engine: LocalEngine, slide: Path
) -> tuple[Path, dict[str, bytes]]:
    """A folder with a run that was stopped when all outputs were written, and its files."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finish, "_passport", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_one(cohort(out, engine, formats=list(FORMATS)), slide)
    files = files_of(out / ".work/slide/result")
    assert "slide.ome.zarr/1/zarr.json" in files
    return out, files


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [emptied, Path.unlink])
@pytest.mark.parametrize(
    "file",
    [
        "slide.overview.png",
        "slide.geojson.gz",
        "slide.labels.ome.tif",
        "slide.seg.dcm",
        "slide.ome.zarr/zarr.json",
        "slide.ome.zarr/1/zarr.json",
        "slide.ome.zarr/labels/classes/1/c/0/0",
    ],
)
def test_an_output_that_was_damaged_since_is_written_again(
    file: str,
    damage: Callable[[Path], None],
    stopped_at_the_end: tuple[Path, dict[str, bytes]],
    run: Runs,
) -> None:
    begun, expected = stopped_at_the_end
    shutil.copytree(begun, run.out)
    damage(run.out / ".work/slide/result" / file)
    assert run(formats=list(FORMATS)).status == "done"
    found = files_of(run.out / "slide")
    assert {name: found[name] for name in expected} == expected


def test_a_run_says_once_that_there_are_no_locks(
    run: Runs, slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Watcher):
        told: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.told.append(text)

    tasks = [SlideTask(path=slide, name=name) for name in ("a", "b")]
    run.all(tasks, watcher=Notes())
    assert Notes.told == []
    break_locks(monkeypatch, errno.ENOLCK)
    assert [outcome.status for outcome in run.all(tasks, watcher=Notes())] == ["kept", "kept"]
    (told,) = Notes.told
    assert "--shard" in told


def test_a_result_whose_blocks_another_run_takes_away_is_not_published(run: Runs) -> None:
    """As without locks, where two runs work on one slide."""

    class Taking(Watcher):
        def step(self, name: str, step: str) -> None:
            shutil.rmtree(run.out / ".work" / name / "done", ignore_errors=True)

    outcome = run(watcher=Taking())
    assert (outcome.status, outcome.code) == ("failed", "result_differs")
    assert not (run.out / "slide").exists()
    assert run().status == "done"


@pytest.mark.slow
def test_a_result_is_done_while_its_work_is_removed_or_cannot_be(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill in the middle of it, or where a network share keeps open files."""
    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "remove", lambda self: None)
        assert run().status == "done"
    assert (run.out / ".work" / "slide" / "plan.json").is_file()
    (status,) = read_status(run.out)
    assert (status.state, status.blocks_done) == ("done", status.blocks)
    assert run(overwrite=True).status == "done"
    assert verify(run.out / "slide")
    assert list((run.out / ".work").iterdir()) == []


@pytest.mark.slow
def test_two_runs_on_one_folder_share_the_work(tmp_path: Path, slide: Path, run: Runs) -> None:
    paths = []
    for name in ("a", "b", "c"):
        paths.append(tmp_path / f"{name}.svs")
        shutil.copy(slide, paths[-1])
    tasks = [SlideTask(path=path, name=path.stem) for path in paths]
    found: list[list[Outcome]] = []
    threads = [threading.Thread(target=lambda: found.append(run.all(tasks))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [{outcome.name: outcome.status for outcome in outcomes} for outcomes in found]
    assert all(sorted((statuses[0][name], statuses[1][name])) == ["done", "kept"] for name in "abc")
    for name in "abc":
        assert verify(run.out / name)


def test_a_slide_that_another_run_works_on_comes_last_and_is_waited_for(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock_once_it_has_ended(handle: int, how: int) -> None:
        if not how & fcntl.LOCK_NB:  # this run waits
            other.close()
        flock(handle, how)

    class Order(Watcher):
        ended: ClassVar[list[str]] = []

        def end_slide(self, outcome: Outcome) -> None:
            self.ended.append(outcome.name)

    flock = fcntl.flock
    glass = write_aperio(tmp_path / "glass.svs", np.full((300, 300, 3), 245, np.uint8))
    with ExitStack() as other:
        other.enter_context(slide_lock(run.out / ".work" / "a.lock"))
        monkeypatch.setattr(fcntl, "flock", flock_once_it_has_ended)
        tasks = [SlideTask(path=glass, name=name) for name in ("a", "b")]
        outcomes = run.all(tasks, watcher=Order())
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        ("a", "done"),
        ("b", "done"),
    ]
    assert Order.ended == ["b", "a"]


def test_a_lock_goes_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "slide.lock"
    with slide_lock(lock), pytest.raises(SlideBusyError), slide_lock(lock):
        pass
    with slide_lock(lock):
        pass
    assert not lock.exists()


def test_a_group_may_take_a_lock_that_one_of_it_has_left_behind(tmp_path: Path) -> None:
    umask = os.umask(0o002)
    try:
        with slide_lock(tmp_path / "slide.lock"):
            assert stat.filemode((tmp_path / "slide.lock").stat().st_mode) == "-rw-rw-r--"
    finally:
        os.umask(umask)


def test_a_lock_whose_file_its_holder_has_just_deleted_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock_after_its_holder(*arguments: int) -> None:
        monkeypatch.undo()
        lock.unlink()
        fcntl.flock(*arguments)

    lock = tmp_path / "slide.lock"
    monkeypatch.setattr(fcntl, "flock", flock_after_its_holder)
    with slide_lock(lock), pytest.raises(SlideBusyError), slide_lock(lock):
        pass


@pytest.mark.slow
def test_a_slide_that_fails_fails_alone(tmp_path: Path, slide: Path, run: Runs) -> None:
    unscaled = write_aperio(tmp_path / "unscaled.svs", tissue_pixels(300, 300), mpp=None)
    tasks = [SlideTask(path=path, name=path.stem) for path in (unscaled, slide)]
    tasks.append(SlideTask(path=unscaled, name="coarse", mpp=20))  # 20x was meant
    outcomes = run.all(tasks)
    assert [outcome.code for outcome in outcomes] == ["slide_scale", "", "enlarged_too_far"]
    assert "--mpp" in outcomes[0].reason
    states = {status.name: status.state for status in read_status(run.out)}
    assert states == dict(unscaled="failed", slide="done", coarse="failed")
    fixed = run(unscaled, mpp=0.5)
    assert fixed.status == "done"
    states = {status.name: status.state for status in read_status(run.out)}
    assert states == dict(unscaled="done", slide="done", coarse="failed")


def test_a_slide_that_needs_too_much_memory_fails_alone(
    tmp_path: Path, slide: Path, run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(opened: RegionReader, *others: Any) -> tuple[Plan, Mask]:
        if opened.path == hungry:
            raise MemoryError("Unable to allocate 768 PiB")
        return plan_slide(opened, *others)

    hungry = write_aperio(tmp_path / "hungry.svs", tissue_pixels(300, 300))
    monkeypatch.setattr("serve.slides.job.plan_slide", plan)
    outcomes = run.all([SlideTask(path=path, name=path.stem) for path in (hungry, slide)])
    assert [outcome.status for outcome in outcomes] == ["failed", "done"]
    assert "768 PiB" in outcomes[0].reason


def test_a_slide_larger_than_any_glass_fails_before_its_memory_is_taken(
    tmp_path: Path, run: Runs
) -> None:
    path = write_ome_zarr(tmp_path / "huge.zarr", tissue_pixels(64, 64))
    metadata = json.loads((path / "0" / "zarr.json").read_bytes())
    metadata["shape"] = [3, 10**9, 10**9]
    (path / "0" / "zarr.json").write_text(json.dumps(metadata))
    for tissue in ("auto", "none"):
        assert run(path, tissue=tissue).code == "slide_too_large"


@pytest.mark.parametrize("step", ["prepare", "run", "finish"])
def test_what_nobody_expected_fails_its_slide_alone(
    step: str,
    slide: Path,
    run: Runs,
    engine: LocalEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = getattr(engine, step)

    def odd(about: SlideJob | WorkFolder, *arguments: Any, **options: Any) -> Any:
        if (about.task if isinstance(about, SlideJob) else about).name == "odd":
            raise ValueError("tags of\nanother kind")
        return whole(about, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(engine, step, odd)
        tasks = [SlideTask(path=slide, name=name) for name in ("odd", "other")]
        failed, other = run.all(tasks)
    assert (failed.status, failed.code, other.status) == ("failed", "unexpected", "done")
    assert "ValueError: tags of another kind" in failed.reason
    assert "Traceback" in caplog.text
    assert run(name="odd").status == "done"


def test_a_slide_without_tissue_has_a_result_that_says_so(tmp_path: Path, run: Runs) -> None:
    path = write_aperio(tmp_path / "glass.svs", np.full((500, 600, 3), 243, np.uint8))
    outcome = run(path, formats=list(FORMATS))
    assert (outcome.status, outcome.num_tiles) == ("done", 0)
    summary = read_summary(run.out / "glass")
    assert not summary.has_tissue
    assert summary.tissue_mm2 == 0
    assert verify(run.out / "glass")


def test_a_slide_that_is_replaced_while_it_runs_fails(
    tmp_path: Path, slide: Path, run: Runs
) -> None:
    path = tmp_path / "slide.svs"
    shutil.copy(slide, path)

    class Replacing(Watcher):
        def add_tiles(self, name: str, num_tiles: int) -> None:
            os.utime(path, (0, 0))

    outcome = run(path, watcher=Replacing())
    assert (outcome.status, outcome.code) == ("failed", "slide_unusable")
    assert "replaced" in outcome.reason


@pytest.mark.parametrize(
    ("place", "name"),
    [(planning, "find_tissue"), (planning, "make_plan"), (finish, "summarise")],
)
def test_a_slide_that_is_replaced_while_it_is_planned_or_drawn_fails(
    tmp_path: Path,
    slide: Path,
    run: Runs,
    monkeypatch: pytest.MonkeyPatch,
    place: ModuleType,
    name: str,
) -> None:
    path = tmp_path / "slide.svs"
    shutil.copy(slide, path)
    other = write_aperio(tmp_path / "other.svs", tissue_pixels(900, 1100))
    before_call(monkeypatch, place, name, lambda: other.replace(path))
    outcome = run(path)
    assert (outcome.status, outcome.code) == ("failed", "slide_unusable")
    assert "replaced" in outcome.reason
    assert not (run.out / "slide").exists()


def test_work_of_another_slide_under_the_same_name_is_refused(tmp_path: Path, run: Runs) -> None:
    with pytest.raises(Stop):
        run(watcher=Stopping(30))
    other = write_aperio(tmp_path / "slide.svs", tissue_pixels(400, 400))
    outcome = run(other)
    assert (outcome.status, outcome.code) == ("failed", ResultError.code)
    assert "slide.fingerprint" in outcome.reason
    assert run(other, overwrite=True).status == "done"


def test_a_folder_that_is_no_result_is_not_touched(run: Runs) -> None:
    mine = run.out / "slide" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    for overwrite in (False, True):
        outcome = run(overwrite=overwrite)
        assert (outcome.status, outcome.code) == ("failed", ResultError.code)
    assert mine.read_text() == "precious"


@pytest.mark.slow
def test_a_bundle_that_is_replaced_meanwhile_stops_the_slides_after(
    tmp_path: Path, bundle: Path, slide: Path, run: Runs
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)

    class Replacing(Watcher):
        def end_slide(self, outcome: Outcome) -> None:
            write_toy_bundle(copy, version="2.0.0")

    # The second may have begun before the first ended; the third has not.
    tasks = [SlideTask(path=slide, name=name) for name in ("first", "second", "third")]
    outcomes = run.all(tasks, watcher=Replacing(), bundle=copy)
    assert outcomes[0].status == "done"
    assert outcomes[2].status == "failed"
    assert "manifest.json" in outcomes[2].reason


@pytest.mark.slow
def test_the_next_slide_is_computed_while_outputs_are_written(slide: Path, run: Runs) -> None:
    computes = {name: threading.Event() for name in ("first", "second")}
    waited: list[bool] = []

    class Waiting(Watcher):
        def add_tiles(self, name: str, num_tiles: int) -> None:
            computes[name].set()

        def step(self, name: str, step: str) -> None:
            if not waited:  # the outputs of whichever slide was computed first
                other = {"first": "second", "second": "first"}[name]
                waited.append(computes[other].wait(60))

    tasks = [SlideTask(path=slide, name=name) for name in computes]
    outcomes = run.all(tasks, watcher=Waiting())
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert waited == [True]


def test_what_a_closed_engine_raises_is_not_the_slides_failure(
    bundle: Path, slide: Path, run: Runs
) -> None:
    at_work, closed = threading.Barrier(2), threading.Event()

    class Interrupted(LocalEngine):
        def run(self, work: WorkFolder, *_: Any, **__: Any) -> None:
            at_work.wait(60)
            if work.name == "first":
                raise KeyboardInterrupt
            assert closed.wait(60)
            raise BackendUnavailableError("The model is being closed. Try again.")

        def close(self) -> None:
            super().close()
            closed.set()

    segmenter = open_segmenter(InferenceSettings(bundle=bundle, threads=1))
    engine = Interrupted(segmenter.backend, model_of(segmenter), max_batch_size=8)
    tasks = [SlideTask(path=slide, name=name) for name in ("first", "second")]
    with pytest.raises(KeyboardInterrupt):
        run_cohort(cohort(run.out, engine), tasks)
    assert not list((run.out).rglob("*.failed"))


@pytest.mark.slow
def test_verify_notices_a_changed_byte_in_every_file(run: Runs) -> None:
    run(formats=("ome-zarr", "geojson", "overview"))
    write_cohort_csv(run.out)
    result = run.out / "slide"
    for path in [path for path in result.rglob("*") if path.is_file()]:
        stored = path.read_bytes()
        places = {len(stored) // 2}
        if path.name == "run.json":
            places |= {0, stored.index(b"Stroma"), stored.index(b"num_tiles") + 12}
        for place in places:
            path.write_bytes(stored[:place] + bytes([stored[place] ^ 1]) + stored[place + 1 :])
            with pytest.raises(ResultError, match=path.name):
                verify(result)
        path.write_bytes(stored)
    assert verify(result)
    table = run.out / "summary.csv"
    verify_csv(run.out)
    table.write_bytes(table.read_bytes().replace(b"Tumor", b"Tumos"))
    with raises(ResultDamagedError, "summary.csv", "1 rows"):
        verify_csv(run.out)


@pytest.mark.slow
def test_verify_notices_what_is_missing_and_what_was_added(run: Runs) -> None:
    run()
    result = run.out / "slide"
    (result / ".DS_Store").touch()
    (result / "notes.txt").touch()
    assert verify(result)
    shard = next((result / "slide.ome.zarr" / "0" / "c").rglob("*"))
    added = shard.parent / "77" / "0"
    added.parent.mkdir()
    added.touch()
    with raises(ResultDamagedError, added):
        verify(result)
    added.unlink()
    (result / "tissue.png").unlink()
    with raises(ResultDamagedError, "tissue.png"):
        verify(result)


@pytest.fixture
def two(run: Runs, tmp_path: Path) -> Callable[[], None]:
    """Makes a result and another one of it, which then takes its place, once."""
    assert run().status == "done"
    write_cohort_csv(run.out)
    other = Runs(tmp_path / "other", run._engine, run._slide)
    assert other(mpp=0.45).status == "done"

    def replace() -> None:
        if other.out.exists():
            (run.out / "slide").rename(other.out / "old")
            (other.out / "slide").rename(run.out / "slide")
            other.out.rename(tmp_path / "used")

    return replace


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_result_that_is_replaced_while_it_is_verified_is_not_damaged(
    run: Runs, two: Callable[[], None], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before_call(monkeypatch, status, "sha256_of", two, at=at)
    assert verify(run.out / "slide")


@pytest.mark.parametrize("place", ["read_passport", "read_summary"])
def test_the_status_of_a_result_is_of_one_also_while_it_is_replaced(
    run: Runs, two: Callable[[], None], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before_call(monkeypatch, status, place, two)
    (found,) = read_status(run.out)
    assert found.state == "done"
    assert found.blocks == read_passport(run.out / "slide").num_blocks
    assert found.notes == read_summary(run.out / "slide").notes != ()


def test_a_result_that_is_away_for_a_moment_has_not_failed(
    run: Runs, two: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run.out / "slide"

    def away() -> None:
        result.rename(run.out / "away")

    before_call(monkeypatch, status, "read_passport", away)
    monkeypatch.setattr(unchanged.time, "sleep", lambda _: (run.out / "away").rename(result))
    (found,) = read_status(run.out)
    assert found.state == "done"


@pytest.mark.parametrize("place", ["plan", "mask"])
def test_a_slide_that_ends_while_its_status_is_read_is_done(
    run: Runs, two: Callable[[], None], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with pytest.raises(Stop):
        run(overwrite=True, mpp=0.4, watcher=Stopping(30))
    before_call(monkeypatch, WorkFolder, place, lambda: shutil.rmtree(run.out / ".work" / "slide"))
    (found,) = read_status(run.out)
    assert (found.state, found.reason) == ("done", "")


def test_a_slide_that_ends_between_two_looks_is_in_the_status(
    run: Runs, two: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, work = run.out / "slide", run.out / ".work" / "slide"
    result.rename(run.out / ".result")
    work.mkdir(parents=True)

    def end() -> None:
        (run.out / ".result").rename(result)
        work.rmdir()

    before_call(monkeypatch, status, "_at_work", end)
    assert [found.name for found in read_status(run.out)] == ["slide"]


def test_work_that_its_run_begins_anew_has_not_failed(run: Runs) -> None:
    with pytest.raises(Stop):
        run(watcher=Stopping(30))
    (run.out / ".work" / "slide" / "tissue.png").unlink()
    assert [found.state for found in read_status(run.out)] == ["failed"]
    with slide_lock(run.out / ".work" / "slide.lock"):
        assert [found.state for found in read_status(run.out)] == ["running"]


@pytest.mark.slow
def test_a_damaged_result_keeps_no_other_from_the_cohorts_numbers(run: Runs) -> None:
    for name in ("good", "bad"):
        run(name=name)
    (run.out / "bad" / "summary.json").write_text("{}")
    outcome = run(name="bad")
    assert (outcome.status, outcome.code) == ("failed", ResultError.code)
    assert "--overwrite" in outcome.reason
    write_cohort_csv(run.out)
    rows = (run.out / "summary.csv").read_text().splitlines()[1:]
    assert {row.partition(",")[0] for row in rows} == {"good"}
    states = {status.name: status.state for status in read_status(run.out)}
    assert states == {"good": "done", "bad": "failed"}
    (run.out / "bad" / "run.json").write_text("{}")
    assert run(name="bad", overwrite=True).status == "done"


def test_a_mask_says_where_to_look(tmp_path: Path, run: Runs) -> None:
    mask = np.zeros((90, 110), np.uint8)
    mask[20:40, 30:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    outcome = run(tissue=str(tmp_path / "mask.png"))
    assert outcome.status == "done", outcome.reason
    area = read_summary(run.out / "slide").tissue_mm2
    assert area == pytest.approx(200 * 300 * 0.25e-6, rel=0.15)
    labels = np.asarray(zarr.open_group(tmp_path / "out/slide/slide.ome.zarr", mode="r")[LABELS])
    assert not labels[:45].any()
    assert labels[55:95, 80:145].all()


def test_a_mask_that_is_replaced_between_its_checksum_and_its_pixels_is_refused(
    tmp_path: Path, run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((90, 110), 255, np.uint8)).save(mask)
    other = Image.fromarray(np.eye(90, 110, dtype=np.uint8))
    before_call(monkeypatch, planning, "read_mask", lambda: other.save(mask))
    outcome = run(tissue=str(mask))
    assert (outcome.status, outcome.code) == ("failed", MaskError.code)
    assert "was replaced" in outcome.reason
    assert run(tissue=str(mask)).status == "done"
