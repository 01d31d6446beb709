"""Jobs in an SQLite file. They survive restarts, and several processes may use the file.

    OUT/.jobs.sqlite    one row per job
    OUT/.jobs.lock      held by the process that starts jobs; see `scheduler`

A job is `waiting`, then `running`, and ends as `done`, `failed` or `cancelled`. Its process writes
its progress and how it ended; the scheduler writes what else becomes of it.
"""

import sqlite3
import time
import uuid
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve.contract.errors import BusyError, NotFoundError
from serve.service.slides.documents import Job, JobRequest, Status
from serve.service.slides.jobs_file import JOBS_FILE, JobsError, JobsFile

MAX_ATTEMPTS = 3
"""A job fails after its process has died this many times."""
_RETRY_AFTER_S = 60
_MOST_LISTED = 200
_OPEN = "('waiting', 'running')"
_WAITS_AGAIN = (
    "status = CASE cancel WHEN 1 THEN 'cancelled' ELSE 'waiting' END, "
    "ended = CASE cancel WHEN 1 THEN ? END"
)
"""Of a running job whose process has died."""


class JobStore:
    """The jobs of an output folder.

    Args:
        out: the folder; made if it is missing.
        max_waiting: how many jobs may wait.

    Raises:
        JobsError: the folder cannot be written to, or the file is of another version.
    """

    def __init__(self, out: Path, max_waiting: int) -> None:
        self.path = out / JOBS_FILE
        self._max_waiting = max_waiting
        self._transaction = JobsFile(self.path).transaction
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobsError(
                f"{out} cannot be made: {error.strerror}. Name another with --slides-out."
            ) from error
        with self._transaction():
            pass  # so that a file that cannot be used is told at once

    def add(self, request: JobRequest, name: str, path: Path) -> tuple[Job, bool]:
        """Add a job. A slide whose job waits or runs keeps that job, if it is the same.

        Returns:
            The job, and whether it is new.

        Raises:
            BusyError: too many wait, or the slide's job has other settings.
        """
        with self._transaction() as database:
            found = database.execute(
                f"SELECT * FROM jobs WHERE slide = ? AND status IN {_OPEN} AND cancel = 0",
                (request.slide,),
            ).fetchone()
            if found is not None:
                job = _job(found)
                if job.request != request:
                    raise BusyError(
                        f"{name} is being segmented with other settings. Wait for that job, or "
                        f"cancel it: DELETE /jobs/{job.id}.",
                        code="job_differs",
                        retry_after_s=_RETRY_AFTER_S,
                    )
                return job, False
            (waiting,) = database.execute(
                "SELECT COUNT(*) FROM jobs WHERE status = 'waiting'"
            ).fetchone()
            if waiting >= self._max_waiting:
                raise BusyError(
                    f"{waiting} slides wait to be segmented. Try again later.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            values = (uuid.uuid4().hex, request.slide, name, str(path), request.model_dump_json())
            row = database.execute(
                "INSERT INTO jobs (id, slide, name, path, request, status, created) "
                "VALUES (?, ?, ?, ?, ?, 'waiting', ?) RETURNING *",
                (*values, time.time()),
            ).fetchone()
            return _job(row), True

    def get(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            NotFoundError: there is none of this id.
        """
        return _job(self._row(job_id))

    def path_of(self, job_id: str) -> Path:
        """The file of a job's slide."""
        return Path(self._row(job_id)["path"])

    def list(self) -> list[Job]:
        """The last jobs, the newest first."""
        with self._transaction() as database:
            rows = database.execute(
                f"SELECT * FROM jobs ORDER BY number DESC LIMIT {_MOST_LISTED}"
            ).fetchall()
        return [_job(row) for row in rows]

    def last_by_slide(self) -> dict[str, Job]:
        """The last job of each slide."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT * FROM jobs WHERE number IN (SELECT MAX(number) FROM jobs GROUP BY slide)"
            ).fetchall()
        return {row["slide"]: _job(row) for row in rows}

    def cancel(self, job_id: str) -> Job:
        """Cancel a waiting job at once, or ask a running one to end.

        Raises:
            NotFoundError: there is none of this id.
        """
        self._row(job_id)
        self._write(  # at once: a job that runs may wait again meanwhile
            "UPDATE jobs SET cancel = status = 'running', "
            "ended = CASE status WHEN 'waiting' THEN ? ELSE ended END, "
            "status = CASE status WHEN 'waiting' THEN 'cancelled' ELSE status END "
            f"WHERE id = ? AND status IN {_OPEN}",
            (time.time(), job_id),
        )
        return self.get(job_id)

    def next_waiting(self) -> Job | None:
        """Mark the longest waiting job as running, and return it."""
        with self._transaction() as database:
            row = database.execute(
                "UPDATE jobs SET status = 'running', cancel = 0, attempts = attempts + 1, "
                "started = ?, ended = NULL, step = '', tiles_before = tiles_done WHERE number = "
                "(SELECT MIN(number) FROM jobs WHERE status = 'waiting') RETURNING *",
                (time.time(),),
            ).fetchone()
        return None if row is None else _job(row)

    def to_cancel(self) -> set[str]:
        """Ids of the running jobs that are to be cancelled."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT id FROM jobs WHERE status = 'running' AND cancel = 1"
            ).fetchall()
        return {row["id"] for row in rows}

    def counts(self) -> dict[str, int]:
        """Number of waiting and of running jobs."""
        with self._transaction() as database:
            rows = database.execute(
                f"SELECT status, COUNT(*) AS number FROM jobs WHERE status IN {_OPEN} "
                "GROUP BY status"
            ).fetchall()
        return {"waiting": 0, "running": 0} | {row["status"]: row["number"] for row in rows}

    def resume_interrupted(self) -> int:
        """Requeue the jobs that ran when the service ended. This does not count as an attempt."""
        return self._write(
            f"UPDATE jobs SET {_WAITS_AGAIN}, attempts = attempts - 1 WHERE status = 'running'",
            (time.time(),),
        )

    def end(self, job_id: str, status: Status, error: str = "", code: str = "") -> None:
        """Store how a running job ended."""
        self._write(
            "UPDATE jobs SET status = ?, ended = ?, error = ?, code = ?, step = '' "
            "WHERE id = ? AND status = 'running'",
            (status, time.time(), error, code, job_id),
        )

    def try_again(self, job_id: str) -> None:
        """Requeue a job whose process died, unless it was cancelled at that moment."""
        self._write(
            f"UPDATE jobs SET {_WAITS_AGAIN} WHERE id = ? AND status = 'running'",
            (time.time(), job_id),
        )

    def begin_tiles(self, job_id: str, tiles: int, done: int) -> None:
        """Store how many tiles a job has, and how many were done before."""
        self._write(
            "UPDATE jobs SET tiles = ?, tiles_before = ?, tiles_done = ?, started = ? WHERE id = ?",
            (tiles, done, done, time.time(), job_id),
        )

    def progress(self, job_id: str, tiles_done: int, step: str) -> None:
        """Store the progress of a job."""
        self._write(
            "UPDATE jobs SET tiles_done = ?, step = ? WHERE id = ?", (tiles_done, step, job_id)
        )

    def _row(self, job_id: str) -> sqlite3.Row:
        with self._transaction() as database:
            row = database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise NotFoundError(f"There is no job {job_id!r}. GET /jobs lists them.")
        found: sqlite3.Row = row
        return found

    def _write(self, sql: str, values: tuple[Any, ...] = ()) -> int:
        with self._transaction() as database:
            return database.execute(sql, values).rowcount


def _job(row: sqlite3.Row) -> Job:
    try:
        return _as_job(dict(row))
    except (ValidationError, TypeError, KeyError) as error:
        raise JobsError(
            f"{JOBS_FILE}, the jobs in the folder of results (--slides-out), has a job that is "
            "damaged or of another version of FocalPath. Move the file away: the results beside it "
            "stay."
        ) from error


def _as_job(row: dict[str, Any]) -> Job:
    done, began = row["tiles_done"] - row["tiles_before"], row["started"]
    rate = left = None
    if row["status"] == "running" and done > 0 and time.time() > began:
        rate = done / (time.time() - began)
        left = (row["tiles"] - row["tiles_done"]) / rate
    return Job(
        request=JobRequest.model_validate_json(row["request"]),
        tiles_per_second=None if rate is None else round(rate, 3),
        seconds_left=None if left is None else round(left, 1),
        **{
            name: row[name]
            for name in (
                *("id", "slide", "name", "status", "created", "started", "ended"),
                *("tiles", "tiles_done", "step", "attempts", "error", "code"),
            )
        },
    )
