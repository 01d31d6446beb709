"""The SQLite file of jobs: its table, and transactions of any number of threads and processes."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve.contract.errors import FocalPathError

JOBS_FILE = ".jobs.sqlite"
_SCHEMA_VERSION = 1
_WAIT_FOR_LOCK_S = 30.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    slide TEXT NOT NULL,
    name TEXT NOT NULL,
    path TEXT NOT NULL,
    request TEXT NOT NULL,
    status TEXT NOT NULL,
    cancel INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    tiles INTEGER NOT NULL DEFAULT 0,
    tiles_before INTEGER NOT NULL DEFAULT 0,
    tiles_done INTEGER NOT NULL DEFAULT 0,
    step TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT '',
    code TEXT NOT NULL DEFAULT ''
)"""


class JobsError(FocalPathError):
    """The file of jobs cannot be read or written."""

    code = "jobs_unavailable"


class JobsFile:
    """The file; made where it is missing, also when it is removed while the service runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, in a transaction that keeps other writers out.

        Raises:
            JobsError: the file cannot be used, or is of another version.
        """
        try:
            database = self._database()
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.rollback()
                raise
        except (sqlite3.Error, UnicodeDecodeError) as error:
            # Callers read this: it does not say where the folder is.
            raise JobsError(
                f"{self._path.name}, the jobs in the folder of results (--slides-out), cannot be "
                f"used: {error}. Check the disk and who may write there."
            ) from error

    def _database(self) -> sqlite3.Connection:
        """This thread's connection; a new one where the file was removed or replaced."""
        local, file = self._local.__dict__, _identity(self._path)
        if file is not None and file == local.get("file"):
            kept: sqlite3.Connection = local["database"]
            return kept
        if "database" in local:
            local.pop("database").close()
        if file is None:
            with suppress(OSError):  # SQLite tells it
                self._path.touch()  # with the mode of the umask; SQLite makes it the owner's alone
        database = sqlite3.connect(self._path, timeout=_WAIT_FOR_LOCK_S, isolation_level=None)
        database.row_factory = sqlite3.Row
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _SCHEMA_VERSION):
            raise JobsError(
                f"{self._path} was written by another version of FocalPath. Move it away: the "
                "results beside it stay."
            )
        if version == 0:
            database.execute(_SCHEMA)
            database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        local.update(database=database, file=_identity(self._path))
        return database


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
