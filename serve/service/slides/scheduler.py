"""Starts waiting jobs, each in its own process, and records how they end.

Several processes of the service may share the jobs: the one that holds the lock file starts them,
and another takes over when it ends.
"""

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import IO

from filelock import BaseFileLock, FileLock, Timeout

from serve.contract.errors import NotFoundError
from serve.service.slides.documents import Job
from serve.service.slides.jobs import MAX_ATTEMPTS, JobStore
from serve.service.slides.jobs_file import JobsError
from serve.service.telemetry import Telemetry
from serve.settings import ServeSettings

LOCK_FILE = ".jobs.lock"
LOOK_EVERY_S = 0.25
GRACE_S = 10.0
"""Seconds that the process of a job has to end after SIGTERM."""
_log = logging.getLogger(__name__)


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    kill_at_s: float | None = None

    def last_words(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class Scheduler:
    """Runs jobs in the background.

    Args:
        settings: of the service; the jobs' processes get them, too.
        store: the jobs.
        telemetry: counts them.
    """

    def __init__(self, settings: ServeSettings, store: JobStore, telemetry: Telemetry) -> None:
        self._settings = settings
        self._store = store
        self._telemetry = telemetry
        self._running: dict[str, _Running] = {}
        self._told = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="slide-jobs", daemon=True)

    def start(self) -> None:
        """Start to look for jobs, as soon as no other process does."""
        self._thread.start()

    def close(self) -> None:
        """End the jobs' processes. The jobs continue when the service starts again."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_S + 5)

    def _work(self) -> None:
        # Where there are no locks, a file would be taken for one, also after its holder was killed.
        lock = FileLock(self._store.path.with_name(LOCK_FILE), fallback_to_soft=False)
        try:
            while not self._take(lock):
                if self._stopping.wait(LOOK_EVERY_S):
                    return
            self._resume()
            while not self._stopping.wait(LOOK_EVERY_S):
                self._look()
            self._end_all()
        finally:
            lock.release()

    @staticmethod
    def _take(lock: BaseFileLock) -> bool:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except (NotImplementedError, OSError) as error:
            _log.warning("jobs cannot be locked, so only one service may use them: %s", error)
        return True

    def _resume(self) -> None:
        try:
            if found := self._store.resume_interrupted():
                _log.info("%d jobs that were interrupted go on", found)
        except JobsError as error:
            _log.error("%s", error)

    def _look(self) -> None:
        try:
            for running in [*self._running.values()]:
                try:
                    self._look_after(running)
                except NotFoundError:  # the file of jobs was removed or replaced meanwhile
                    self._forget(running)
            for job_id in self._store.to_cancel() & self._running.keys():
                self._end(self._running[job_id])
            while len(self._running) < self._settings.slide_jobs:
                job = self._store.next_waiting()
                if job is None:
                    break
                try:
                    self._begin(job)
                except OSError as error:  # no memory, or no room for what it says
                    reason = f"its process cannot be started: {error.strerror}"
                    self._store.end(job.id, "failed", reason, "job_crashed")
                    _log.error("job %s of slide %s: %s", job.id, job.name, reason)
            self._telemetry.slide_jobs(self._store.counts())
            self._told = ""
        except (JobsError, OSError) as error:
            if str(error) != self._told:  # not four times a second
                _log.error("%s", error)
            self._told = str(error)

    def _begin(self, job: Job) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115  closed when the process has ended
        command = [sys.executable, "-m", "serve.service.slides.job_process", job.id]
        environment = {**os.environ, **self._settings.to_environment()}
        process = subprocess.Popen(
            command,
            env={name: value for name, value in environment.items() if value},
            stdin=subprocess.PIPE,  # closed when this process ends
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        self._running[job.id] = _Running(job, process, said)
        _log.info("job %s of slide %s is started", job.id, job.name)

    def _look_after(self, running: _Running) -> None:
        """Check whether a job's process has ended, and store what it could not store itself."""
        if running.process.poll() is None:
            if running.kill_at_s is not None and time.monotonic() > running.kill_at_s:
                running.process.kill()
            return
        job, status = self._store.get(running.job.id), running.process.returncode
        if job.status == "running":
            if running.kill_at_s is not None:
                self._store.end(job.id, "cancelled")
            elif job.attempts < MAX_ATTEMPTS:
                words = running.last_words()
                _log.warning(
                    "job %s ended with status %d and starts again: %s", job.id, status, words
                )
                self._store.try_again(job.id)
            else:
                self._store.end(job.id, "failed", self._reason(running), "job_crashed")
        ended = self._store.get(job.id)
        if ended.status not in ("waiting", "running"):
            self._telemetry.slide_job_ended(ended.status, ended.tiles_done)
            _log.info("job %s of slide %s: %s %s", job.id, job.name, ended.status, ended.error)
        self._forget(running)

    @staticmethod
    def _reason(running: _Running) -> str:
        status = running.process.returncode
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return (
            f"its process ended {MAX_ATTEMPTS} times, the last time with {how}: "
            f"{running.last_words()}. Memory may be too short; blocks that were done are kept."
        )

    def _forget(self, running: _Running) -> None:
        del self._running[running.job.id]
        running.said.close()
        if running.process.stdin is not None:
            running.process.stdin.close()

    @staticmethod
    def _end(running: _Running) -> None:
        if running.kill_at_s is None:
            running.kill_at_s = time.monotonic() + GRACE_S
            running.process.terminate()

    def _end_all(self) -> None:
        """End all processes. Their jobs stay `running`, for `resume_interrupted` to requeue."""
        for running in self._running.values():
            running.process.terminate()
        until_s = time.monotonic() + GRACE_S
        for running in self._running.values():
            try:
                running.process.wait(max(until_s - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        for running in [*self._running.values()]:
            self._forget(running)
