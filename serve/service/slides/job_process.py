"""The process of one job: `python -m serve.service.slides.job_process JOB`, started by `scheduler`.

It does what `python -m serve slides run` does with one slide, with the settings of the environment.
SIGTERM ends it, and so does the end of the service, which it sees at its standard input. What was
done is kept, and the next job of the slide goes on with it.
"""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

from serve.contract.errors import FocalPathError
from serve.contract.interrupts import safe_interrupts
from serve.service.slides.documents import Job
from serve.service.slides.folder import without_folders
from serve.service.slides.jobs import JobStore
from serve.service.slides.jobs_file import JobsError
from serve.settings import ServeSettings
from serve.slides.cohort import Outcome, SlideTask
from serve.slides.engine import Watcher
from serve.slides.local import open_local_engine
from serve.slides.options import RunOptions
from serve.slides.outputs.ome_zarr import OME_ZARR
from serve.slides.outputs.registry import formats_of
from serve.slides.run import Cohort, run_cohort
from serve.slides.summary_csv import write_cohort_csv

NICENESS = 10
"""Lower priority than the service, so that interactive requests come first."""
GRACE_S = 10.0
"""Seconds that the process has to end after the service has ended."""
_WRITE_EVERY_S = 0.5
_log = logging.getLogger(__name__)


class JobProgress(Watcher):
    """Writes a job's progress to the store."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self._store = store
        self._id = job_id
        self._begun: tuple[int, int] | None = None
        """All tiles and those that were done before, until they are written."""
        self._done = 0
        self._step = ""
        self._written_s = 0.0
        self._lock = threading.Lock()

    def begin_slide(self, name: str, num_tiles: int, num_done: int) -> None:
        """See `Watcher`."""
        with self._lock:
            self._begun, self._done = (num_tiles, num_done), num_done
            self._write()
            self._written_s = 0.0  # so that the first tile is told at once

    def add_tiles(self, name: str, num_tiles: int) -> None:
        """See `Watcher`."""
        with self._lock:
            self._done += num_tiles
            if time.monotonic() - self._written_s >= _WRITE_EVERY_S:
                self._write()

    def step(self, name: str, step: str) -> None:
        """See `Watcher`."""
        with self._lock:
            self._step = step
            self._write()

    def end_slide(self, outcome: Outcome) -> None:
        """See `Watcher`."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        try:
            if self._begun is not None:
                self._store.begin_tiles(self._id, *self._begun)
                self._begun = None
            self._store.progress(self._id, self._done, self._step)
        except JobsError as error:  # the slide itself continues
            _log.warning("progress cannot be written: %s", error)
        self._written_s = time.monotonic()


def run_job(settings: ServeSettings, store: JobStore, job: Job) -> Outcome:
    """Segment a job's slide into the service's folder of results.

    Raises:
        FocalPathError: the model cannot be opened.
    """
    out = settings.slides_out_folder
    assert out is not None
    request = job.request
    engine = open_local_engine(settings, out=out)
    try:
        options = RunOptions(tissue=request.tissue, mpp=request.mpp, overwrite=request.overwrite)
        formats = formats_of((OME_ZARR.name, *request.formats))
        watcher = JobProgress(store, job.id)
        cohort = Cohort(out, engine, options, formats, watcher, settings.bundle)
        # The name is that of the file, which may have more characters than a name that is chosen.
        task = SlideTask(path=store.path_of(job.id)).model_copy(update={"name": job.name})
        (outcome,) = run_cohort(cohort, [task])
    finally:
        engine.close()
    write_cohort_csv(out)
    return outcome


def main() -> int:
    """Run the named job, and store how it ended."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service handles it, and ends this process
    with safe_interrupts():
        return _run_named_job()


def _run_named_job() -> int:
    threading.Thread(target=_end_with_the_service, daemon=True).start()
    os.nice(NICENESS)
    settings = ServeSettings.from_environment()
    out = settings.slides_out_folder
    assert out is not None
    store = JobStore(out, settings.max_slide_jobs)
    job = store.get(sys.argv[1])
    try:
        outcome = run_job(settings, store, job)
    except FocalPathError as error:
        store.end(job.id, "failed", without_folders(str(error), out, settings.slides), error.code)
        return 1
    if outcome.status == "failed":
        reason = without_folders(outcome.reason, out, settings.slides)
        store.end(job.id, "failed", reason, outcome.code)
        return 1
    store.end(job.id, "done")
    return 0


def _stop(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Leave through every `finally`, so that Triton frees what it keeps for this process."""
    sys.exit(128 + signal_number)


def _end_with_the_service() -> None:
    # Not through sys.stdin: this thread would hold its lock, and a normal exit would then abort.
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
