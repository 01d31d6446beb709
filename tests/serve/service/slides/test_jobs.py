import contextlib
import errno
import io
import json
import os
import shutil
import signal
import sqlite3
import stat
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import zarr
from PIL import Image
from starlette.testclient import TestClient

from serve.contract.errors import FocalPathError
from serve.service.slides import jobs, jobs_file, scheduler
from serve.service.slides.documents import JobRequest
from serve.service.slides.job_process import JobProgress
from serve.service.slides.jobs import MAX_ATTEMPTS, JobStore
from serve.service.slides.jobs_file import JobsError
from serve.service.slides.state import check_slides
from serve.settings import ServeSettings
from serve.slides.finish import read_passport
from serve.slides.status import verify
from tests.support.errors import raises, refusal_of
from tests.support.http_service import service_process
from tests.support.locks import break_locks
from tests.support.meanwhile import before_call
from tests.support.slide_service import (
    copy_of,
    painted_slide,
    run_at_start,
    slide_client,
    slow_jobs,
)

TIMEOUT_S = 120.0

Done = tuple[TestClient, dict[str, Any], Path]
"""A client, a slide's description once its job is done, and the folder of results."""


def wait_for(found: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """What a function returns once that is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
    return value


def job_when(client: Any, job_id: str, *statuses: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
        return job if job["status"] in statuses else None

    return wait_for(look)  # type: ignore[no-any-return]


def start(client: Any, file: str = "case.svs", **request: Any) -> dict[str, Any]:
    ids = {entry["file"]: entry["id"] for entry in client.get("/slides").json()["slides"]}
    answer = client.post("/jobs", json={"slide": ids[file], **request})
    assert answer.status_code in (200, 201), answer.text
    job: dict[str, Any] = answer.json()
    return job


def job_processes() -> list[psutil.Process]:
    """The processes of jobs, of this test's service alone."""
    children = psutil.Process().children(recursive=True)
    return [
        child
        for child in children
        if "serve.service.slides.job_process" in " ".join(cmdline(child))
    ]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()  # type: ignore[no-any-return]
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return painted_slide(tmp_path_factory.mktemp("slide") / "case.svs")


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_jobs(tmp_path, monkeypatch, seconds=60)


@pytest.fixture(scope="module")
def done(toy_bundle: Path, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    root = tmp_path_factory.mktemp("done")
    copy_of(slide, root / "slides", "case.svs")
    (root / "slides" / "broken.svs").write_bytes(slide.read_bytes()[:5000])
    with slide_client(toy_bundle, root / "slides") as client:
        broken = start(client, "broken.svs")
        good = start(client)
        assert job_when(client, broken["id"], "done", "failed")["status"] == "failed"
        job = job_when(client, good["id"], "done", "failed")
        assert job["status"] == "done", job["error"]
        yield client, client.get(f"/slides/{job['slide']}").json(), root / "slides-results"


def test_a_job_leaves_what_the_command_line_leaves(done: Done) -> None:
    client, slide, out = done
    assert verify(out / "case") > 5
    assert (out / "summary.csv").read_text().startswith("slide,model")
    job = slide["job"]
    assert job["tiles"] == job["tiles_done"] > 0
    assert slide["state"] == "done"
    assert slide["result"]["is_of_this_file"]
    classes = {entry["name"]: entry for entry in slide["result"]["summary"]["classes"]}
    assert classes["Tumor"]["area_mm2"] == pytest.approx(0.01, rel=0.1)


@pytest.mark.slow
def test_a_job_takes_a_slide_by_any_name_that_its_file_has(
    toy_bundle: Path, slide: Path, tmp_path: Path
) -> None:
    names = ["case: 7 <b>.svs", "\u00fcn\u00ef \U0001f600 %41.svs"]
    for name in names:
        copy_of(slide, tmp_path / "slides", name)
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        for name in names:
            job = job_when(client, start(client, name)["id"], "done", "failed")
            assert (job["status"], job["attempts"]) == ("done", 1), job["error"]


@pytest.mark.slow
def test_what_ends_a_job_unforeseen_is_in_its_error(
    toy_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_ATTEMPTS", 1)
    hook = "import os\nos.nice = lambda _: {}['the true reason']\n"
    run_at_start(hook, tmp_path, monkeypatch)
    copy_of(slide, tmp_path / "slides", "case.svs")
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        job = job_when(client, start(client)["id"], "failed")
    assert (job["code"], job["attempts"]) == ("job_crashed", 1)
    assert "status 1" in job["error"]
    assert "the true reason" in job["error"]


def test_a_slide_that_fails_fails_alone_and_says_why(done: Done) -> None:
    client, _, _ = done
    failed = next(job for job in client.get("/jobs").json()["jobs"] if job["status"] == "failed")
    assert failed["name"] == "broken"
    assert "broken.svs" in failed["error"]
    assert failed["code"].startswith("slide_")
    for status in ("done", "failed"):
        counted = f'focalpath_slide_jobs_ended_total{{status="{status}"}} 1.0'
        wait_for(lambda line=counted: line in client.get("/metrics").text)


def test_the_tiles_of_a_result_are_its_pyramid(done: Done) -> None:
    client, slide, out = done
    group = zarr.open_group(out / "case" / "case.ome.zarr", mode="r")
    base = f"/slides/{slide['id']}/result/tiles"
    for level in range(slide["result"]["num_levels"]):
        labels = np.asarray(group[f"labels/classes/{level}"])[:256, :256]
        arrays = np.load(io.BytesIO(client.get(f"{base}/{level}/0_0.npz").content))
        assert np.array_equal(arrays["labels"], labels)
        assert np.array_equal(arrays["confidence"], np.asarray(group[f"{level}"])[:256, :256])
        picture = Image.open(io.BytesIO(client.get(f"{base}/{level}/0_0.png").content))
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), labels)
    only = client.get(f"{base}/0/0_0.png", params={"classes": ["Tumor"]})
    rgba = np.asarray(Image.open(io.BytesIO(only.content)).convert("RGBA"))
    assert np.array_equal(
        rgba[..., 3] == 255, np.asarray(group["labels/classes/0"])[:256, :256] == 1
    )
    assert only.headers["etag"] != client.get(f"{base}/0/0_0.png").headers["etag"]
    unknown = client.get(f"{base}/0/0_0.png", params={"classes": ["Bone"]})
    assert refusal_of(unknown, "Bone") == (400, "option_invalid")


def test_every_output_can_be_downloaded(done: Done) -> None:
    client, slide, out = done
    files = {entry["file"]: entry for entry in slide["result"]["files"]}
    assert {"case.ome.zarr", "case.overview.png", "case.geojson.gz", "summary.json"} <= files.keys()
    for file, entry in files.items():
        answer = client.get(f"/slides/{slide['id']}/result/files/{file}")
        assert answer.headers["content-type"] == entry["media_type"]
        if entry["num_bytes"] is not None:
            assert answer.content == (out / "case" / file).read_bytes()
    archive = client.get(f"/slides/{slide['id']}/result/files/case.ome.zarr").content
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        assert zipped.testzip() is None
        root = zipped.read("case.ome.zarr/zarr.json")
    assert root == (out / "case" / "case.ome.zarr" / "zarr.json").read_bytes()


def test_a_download_goes_on_and_is_not_sent_twice(done: Done) -> None:
    client, slide, out = done
    path = f"/slides/{slide['id']}/result/files/summary.json"
    whole = (out / "case" / "summary.json").read_bytes()
    first = client.get(path)
    for known in (first.headers["etag"], f'"x", W/{first.headers["etag"]}', "*"):
        assert client.get(path, headers={"If-None-Match": known}).status_code == 304
    assert client.get(path, headers={"If-None-Match": '"x"'}).content == whole
    part = client.get(path, headers={"Range": "bytes=10-"})
    assert (part.status_code, part.content) == (206, whole[10:])
    for invalid in ("bytes=9-2", "bytes=a-b", "lines=0-1", "bytes=", "bytes=1-2,9-2"):
        assert client.get(path, headers={"Range": invalid}).content == whole
    assert client.get(path, headers={"Range": "bytes=99999999-"}).status_code == 416
    for file in ("summary.json", "case.ome.zarr"):
        head = client.head(f"/slides/{slide['id']}/result/files/{file}")
        assert head.status_code == 200
        assert file == "summary.json" or not head.content  # a zip is not even made
        assert "attachment" in head.headers["content-disposition"]


@pytest.mark.slow
def test_a_result_of_other_settings_is_kept_until_it_is_to_be_replaced(done: Done) -> None:
    client, _, out = done
    job = job_when(client, start(client, tissue="none", mpp=0.6)["id"], "done", "failed")
    assert (job["status"], job["code"]) == ("failed", "result_differs")
    assert str(out) not in job["error"]
    assert "its um per pixel, the settings differ" in job["error"]
    again = start(client, overwrite=True, formats=["overview"])
    assert job_when(client, again["id"], "done", "failed")["status"] == "done"
    assert read_passport(out / "case").formats == ("ome-zarr", "overview")


@pytest.mark.slow
def test_a_slide_whose_result_is_damaged_is_shown_without_it(
    toy_bundle: Path, slide: Path, tmp_path: Path
) -> None:
    copy_of(slide, tmp_path / "slides", "case.svs")
    (tmp_path / "slides-results" / "case").mkdir(parents=True)
    (tmp_path / "slides-results" / "case" / "run.json").write_text("{}")
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        slide_id = client.get("/slides").json()["slides"][0]["id"]
        found = client.get(f"/slides/{slide_id}").json()
        assert found["result"] is None
        assert found["result_problem"].startswith("case/run.json")
        for path in ("tiles/0/0_0.png", "files/run.json"):
            answer = client.get(f"/slides/{slide_id}/result/{path}")
            assert refusal_of(answer) == (404, "result_differs")


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_a_cancelled_job_goes_on_with_the_next_and_the_queue_has_an_end(
    toy_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "GRACE_S", 0.5)  # the rest is for SIGKILL
    for name in ("case.svs", "second.svs", "third.svs"):
        copy_of(slide, tmp_path / "slides", name)
    with slide_client(toy_bundle, tmp_path / "slides", max_slide_jobs=1) as client:
        first = start(client)
        wait_for(lambda: client.get(f"/jobs/{first['id']}").json()["tiles_done"] > 0)
        assert start(client)["id"] == first["id"]  # one job per slide
        other = {"slide": first["slide"], "mpp": 0.25}
        assert refusal_of(client.post("/jobs", json=other), first["id"]) == (429, "job_differs")
        second = start(client, "second.svs")
        assert second["status"] == "waiting"  # one at a time
        third = next(e for e in client.get("/slides").json()["slides"] if e["name"] == "third")
        refused = client.post("/jobs", json={"slide": third["id"]})
        assert refusal_of(refused) == (429, "busy")
        assert refused.headers["retry-after"] == "60"
        assert client.delete(f"/jobs/{second['id']}").json()["status"] == "cancelled"
        client.delete(f"/jobs/{first['id']}")
        job_when(client, first["id"], "cancelled")
        assert job_processes() == []
        assert client.get(f"/slides/{first['slide']}").json()["state"] == "stopped"
        monkeypatch.setenv("TEST_SLOW_S", "0")
        assert job_when(client, start(client)["id"], "done", "failed")["status"] == "done"


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_a_job_whose_process_is_killed_starts_again_and_fails_after_three_times(
    toy_bundle: Path, slide: Path, tmp_path: Path
) -> None:
    copy_of(slide, tmp_path / "slides", "case.svs")
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        job = start(client)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            wait_for(lambda n=attempt: client.get(f"/jobs/{job['id']}").json()["attempts"] == n)
            (process,) = wait_for(job_processes)
            os.kill(process.pid, signal.SIGKILL)
        failed = job_when(client, job["id"], "failed")
    assert failed["code"] == "job_crashed"
    assert "signal 9" in failed["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_a_job_survives_the_death_of_the_service(
    toy_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(slide, tmp_path / "slides", "case.svs")
    monkeypatch.setenv("TEST_SLOW_S", "1.5")
    settings = {"slides": str(tmp_path / "slides"), "threads": "1"}
    with service_process(toy_bundle, tmp_path / "log.txt", **settings) as (url, service):
        with httpx.Client(base_url=url) as client:
            job = start(client)
            wait_for(lambda: client.get(f"/jobs/{job['id']}").json()["tiles_done"] > 0)
        family = psutil.Process(service.pid).children(recursive=True)
        for process in (psutil.Process(service.pid), *family):
            if "job_process" not in " ".join(cmdline(process)):
                process.kill()
        psutil.wait_procs(family, timeout=TIMEOUT_S)  # the job's process ends by itself
        assert not any(process.is_running() for process in family)
    monkeypatch.setenv("TEST_SLOW_S", "0")
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        assert job_when(client, job["id"], "done", "failed")["status"] == "done"
        assert client.get(f"/slides/{job['slide']}").json()["state"] == "done"
        assert "GET /slides" in client.get("/").json()["endpoints"]


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_of_two_processes_of_the_service_one_runs_the_jobs(
    toy_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "GRACE_S", 0.5)
    for name in ("case.svs", "second.svs"):
        copy_of(slide, tmp_path / "slides", name)
    with (
        slide_client(toy_bundle, tmp_path / "slides") as one,
        slide_client(toy_bundle, tmp_path / "slides") as other,
    ):
        first, second = start(one), start(other, "second.svs")
        job_when(other, first["id"], "running")
        time.sleep(4 * scheduler.LOOK_EVERY_S)
        assert one.get(f"/jobs/{second['id']}").json()["status"] == "waiting"
        other.delete(f"/jobs/{first['id']}")
        job_when(one, second["id"], "running")


@pytest.mark.slow
def test_where_the_file_system_has_no_locks_jobs_run_also_after_a_service_that_was_killed(
    toy_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(slide, tmp_path / "slides", "case.svs")
    left = tmp_path / "slides-results" / scheduler.LOCK_FILE
    left.parent.mkdir()
    left.write_text("7\nof-another-machine\n")  # as a lock that is but a file looks
    break_locks(monkeypatch, errno.ENOSYS)
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        job = start(client, formats=["overview"])
        assert job_when(client, job["id"], "done", "failed")["status"] == "done"


@pytest.mark.slow
def test_a_job_whose_process_cannot_be_started_fails_and_the_next_one_starts(
    toy_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, "No space left on device")

    copy_of(slide, tmp_path / "slides", "case.svs")
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        monkeypatch.setattr(scheduler.tempfile, "TemporaryFile", full)
        failed = job_when(client, start(client)["id"], "failed")
        assert failed["code"] == "job_crashed"
        assert "No space left" in failed["error"]
        assert job_when(client, start(client)["id"], "done", "failed")["status"] == "done"


def test_jobs_run_in_their_order_and_one_that_is_cancelled_is_not_taken_for_the_next(
    tmp_path: Path,
) -> None:
    store = JobStore(tmp_path, 3)
    first, second = (store.add(JobRequest(slide=s), s, tmp_path)[0] for s in ("one", "two"))
    running = store.next_waiting()
    assert running is not None
    assert running.id == first.id
    store.cancel(first.id)
    again, is_new = store.add(JobRequest(slide="one"), "one", tmp_path)
    assert is_new
    assert [job.id for job in store.list()] == [again.id, second.id, first.id]
    assert store.last_by_slide()["one"].id == again.id
    store.resume_interrupted()
    assert store.get(first.id).status == "cancelled"


def test_the_end_of_the_service_is_no_attempt_of_a_job(tmp_path: Path) -> None:
    store = JobStore(tmp_path, 3)
    store.add(JobRequest(slide="one"), "one", tmp_path)
    for _ in range(2):
        job = store.next_waiting()
        assert job is not None
        assert job.attempts == 1
        store.resume_interrupted()


def test_the_rate_of_a_job_is_of_the_tiles_of_this_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(jobs, "time", SimpleNamespace(time=lambda: now_s))
    store = JobStore(tmp_path, 3)
    added, _ = store.add(JobRequest(slide="one"), "one", tmp_path)
    store.next_waiting()
    store.begin_tiles(added.id, 100, 60)
    store.progress(added.id, 80, "")
    now_s += 10
    job = store.get(added.id)
    assert (job.tiles_per_second, job.seconds_left) == (2, 10)
    store.resume_interrupted()
    store.next_waiting()
    now_s += 10
    job = store.get(added.id)
    assert (job.tiles_done, job.tiles_per_second, job.seconds_left) == (80, None, None)


def test_jobs_go_on_where_their_file_is_removed_or_replaced(tmp_path: Path) -> None:
    store, others = JobStore(tmp_path, 3), JobStore(tmp_path, 3)
    store.add(JobRequest(slide="one"), "one", tmp_path)
    store.path.unlink()
    assert store.list() == []
    job, _ = others.add(JobRequest(slide="two"), "two", tmp_path)
    assert store.get(job.id).name == "two"
    shutil.rmtree(tmp_path)
    with raises(JobsError, ".jobs.sqlite"):
        store.list()
    tmp_path.mkdir()
    assert store.list() == others.list() == []


def test_the_file_of_jobs_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    umask = os.umask(0o002)
    try:
        store = JobStore(tmp_path, 3)
    finally:
        os.umask(umask)
    assert stat.filemode(store.path.stat().st_mode) == "-rw-rw-r--"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write every file")
def test_a_file_of_jobs_that_may_not_be_written_ends_the_start(tmp_path: Path) -> None:
    settings = ServeSettings(slides=tmp_path, slides_out=tmp_path / "out")
    check_slides(settings)
    (tmp_path / "out" / ".jobs.sqlite").chmod(0o444)
    with raises(FocalPathError, tmp_path / "out" / ".jobs.sqlite"):
        check_slides(settings)


def test_a_slide_goes_on_while_the_file_of_jobs_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_file, "_WAIT_FOR_LOCK_S", 0.05)
    store = JobStore(tmp_path, 3)
    store.add(JobRequest(slide="one"), "one", tmp_path)
    job = store.next_waiting()
    assert job is not None
    progress = JobProgress(store, job.id)
    with contextlib.closing(sqlite3.connect(store.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        progress.begin_slide("one", 10, 2)
        progress.step("one", "Overview")
    progress.step("one", "GeoJSON")
    found = store.get(job.id)
    assert (found.tiles, found.tiles_done, found.step) == (10, 2, "GeoJSON")


@pytest.mark.parametrize("moment", ["just after", "within"])
def test_a_job_that_is_cancelled_as_its_process_dies_does_not_start_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path, 3)
    store.add(JobRequest(slide="one"), "one", tmp_path)
    job = store.next_waiting()
    assert job is not None
    if moment == "within":  # between its second and third transaction, if it has a third
        before_call(monkeypatch, store, "_write", lambda: store.try_again(job.id), at=1)
    store.cancel(job.id)
    store.try_again(job.id)
    assert store.next_waiting() is None
    found = store.get(job.id)
    assert found.status == "cancelled"
    assert found.ended is not None


def test_a_job_that_waits_is_cancelled_at_once_and_one_that_runs_soon(tmp_path: Path) -> None:
    store = JobStore(tmp_path, 3)
    jobs = [store.add(JobRequest(slide=name), name, tmp_path)[0] for name in ("one", "two")]
    assert store.next_waiting() is not None
    running, waiting = (store.cancel(job.id) for job in jobs)
    assert (running.status, running.ended) == ("running", None)
    assert store.to_cancel() == {running.id}
    assert waiting.status == "cancelled"
    assert waiting.ended is not None
    assert store.cancel(waiting.id) == waiting


@pytest.mark.slow
@pytest.mark.usefixtures("slow")
def test_jobs_go_on_where_their_file_is_removed_while_one_runs(
    toy_bundle: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(slide, tmp_path / "slides", "case.svs")
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        job_when(client, start(client)["id"], "running")
        (process,) = wait_for(job_processes)
        (tmp_path / "slides-results" / ".jobs.sqlite").unlink()
        process.kill()
        monkeypatch.setenv("TEST_SLOW_S", "0")
        assert job_when(client, start(client)["id"], "done", "failed")["status"] == "done"


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE jobs SET status = 'odd'",
        "UPDATE jobs SET tiles_done = 'many'",
        "UPDATE jobs SET name = CAST(x'ff' AS TEXT)",
        "UPDATE jobs SET request = x'00'",
        "ALTER TABLE jobs RENAME COLUMN step TO stage",
        "ALTER TABLE jobs RENAME TO other",
        "PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = replace(sql, 'step', x'a0')",
    ],
)
def test_a_file_of_jobs_that_is_damaged_inside_is_an_error_everywhere(
    damage: str, tmp_path: Path
) -> None:
    store = JobStore(tmp_path, 3)
    job, _ = store.add(JobRequest(slide="one"), "one", tmp_path)
    with contextlib.closing(sqlite3.connect(store.path)) as database:
        database.executescript(damage)
    other = JobStore(tmp_path, 3)
    for look in (lambda: other.get(job.id), other.list, other.last_by_slide):
        with raises(JobsError, ".jobs.sqlite") as caught:
            look()
        assert str(tmp_path) not in str(caught.value)


def test_a_job_of_another_version_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    store = JobStore(tmp_path, 3)
    store.add(JobRequest(slide="one"), "one", tmp_path)
    with store._transaction() as database:
        database.execute("UPDATE jobs SET request = ?", ('{"slide": "one", "formats": ["gone"]}',))
    for look in (store.list, store.next_waiting, store.last_by_slide):
        with raises(JobsError, ".jobs.sqlite") as caught:
            look()
        assert str(tmp_path) not in str(caught.value)


def test_a_file_of_jobs_that_is_damaged_or_of_another_version_is_an_error(tmp_path: Path) -> None:
    store = JobStore(tmp_path, 3)
    with store._transaction() as database:
        database.execute("PRAGMA user_version = 99")
    with raises(JobsError, store.path):
        JobStore(tmp_path, 3)
    store.path.write_bytes(json.dumps({"not": "a database"}).encode() * 99)
    with raises(JobsError, ".jobs.sqlite") as caught:
        JobStore(tmp_path, 3)
    assert str(tmp_path) not in str(caught.value)  # callers of the service read it
