"""Processes that open slides. A slide that crashes one of them is refused for a while."""

import asyncio
import contextvars
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Any

from serve.contract.errors import (
    BackendUnavailableError,
    BusyError,
    ImageTooLargeError,
    NotFoundError,
)
from serve.images.readers.errors import SlideError, SlideScaleError

ANSWER_TIMEOUT_S = 60.0
"""Longest time for one answer. A slide that takes longer counts as crashed."""
_MAX_ANSWER_BYTES = 2**30
_MAX_WAITING = 512
_REFUSED_FOR_S = 60.0
"""How long a slide is refused after it has crashed a process."""
_KINDS = (NotFoundError, ImageTooLargeError, BackendUnavailableError, SlideScaleError, SlideError)
"""Errors that are passed on from the processes; a subclass becomes the first class that fits."""
_FEW_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Threads take address space, which is limited: on many cores nothing would be left for slides."""
_STOPPED = "the service is being stopped"
_log = logging.getLogger(__name__)


class SlideCrashError(SlideError):
    """Reading the slide crashed its process, or took too long."""

    code = "slide_crashed"


class _Process:
    """One process, which is restarted after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._said: Any = None

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer.

        Raises:
            EOFError: the process has ended; the message says how.
            TimeoutError: it took too long, and was ended.
        """
        self.start()
        connection = self._connection
        if connection is None:  # `close` came in between
            raise EOFError(_STOPPED)
        try:
            connection.send_bytes(json.dumps(request).encode())
            if not connection.poll(ANSWER_TIMEOUT_S):
                raise TimeoutError
            fields = json.loads(connection.recv_bytes(_MAX_ANSWER_BYTES))
            return fields, connection.recv_bytes(_MAX_ANSWER_BYTES)
        except TimeoutError:
            self.close()
            raise
        except (EOFError, OSError, ValueError) as error:
            said = self._end()
            raise EOFError(said) from error

    def start(self) -> None:
        """Start the process unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        command = [sys.executable, "-m", "serve.service.slides.reading", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_FEW_THREADS},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
            )
        self._connection = Connection(ours.detach())

    def _end(self) -> str:
        """End the process. Returns how it ended, and the end of its output."""
        process, said = self._process, self._said
        if process is None or said is None:
            return _STOPPED
        try:
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        try:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines()
        except ValueError:  # it was closed meanwhile
            return _STOPPED
        self.close()
        return f"status {status}: {words[-1] if words else 'without a word'}"

    def close(self) -> None:
        """End the process; the thread that waits for its answer may do so at the same time."""
        process, connection, said = self._process, self._connection, self._said
        self._process = self._connection = self._said = None
        if process is not None:
            process.kill()
            process.wait()
            said.close()
        if connection is not None:
            connection.close()


class SlideReaders:
    """A pool of processes, each of which answers one request at a time.

    A slide that crashes its process is refused for a while. Otherwise a viewer that asks for a
    hundred of its tiles would crash a hundred processes.

    Args:
        num_processes: how many.
        on_crash: called after a slide has crashed a process.
    """

    def __init__(self, num_processes: int, *, on_crash: Callable[[], None]) -> None:
        self._on_crash = on_crash
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="slide-reader")
        self._free: LifoQueue[_Process] = LifoQueue()
        self._processes = [_Process() for _ in range(num_processes)]
        for process in self._processes:
            self._free.put(process)
        self._refused: dict[tuple[Any, ...], tuple[float, str]] = {}
        self._waiting = 0
        self._guard = threading.Lock()

    def start(self) -> None:
        """Start all processes, so that the first request need not wait."""
        for process in self._processes:
            process.start()

    async def ask(self, operation: str, **fields: Any) -> tuple[dict[str, Any], bytes]:
        """Run an operation of `serve.service.slides.reading` in a process.

        Raises:
            SlideError: the slide cannot be read, or crashed its process.
            BusyError: too many requests wait.
        """
        if self._waiting >= _MAX_WAITING:
            raise BusyError(f"{self._waiting} tiles are waited for already. Try again later.")
        self._waiting += 1
        try:
            context = contextvars.copy_context()
            work = {"operation": operation, **fields}
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, context.run, self.ask_now, work)
        finally:
            self._waiting -= 1

    def ask_now(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Like `ask`, but in this thread."""
        key = tuple(request.get(name) for name in ("path", "version", "store"))
        self._refuse_what_crashed(key)
        process = self._free.get()
        try:
            fields, content = process.ask(request)
        except TimeoutError as error:
            reason = f"reading it took more than {ANSWER_TIMEOUT_S:g} s"
            raise self._crashed(key, request, reason) from error
        except EOFError as error:
            _log.warning("a process that reads slides has ended: %s", error)
            raise self._crashed(key, request, "it ended the process that reads it") from error
        finally:
            self._free.put(process)
        if "error" in fields:
            raise _error(fields)
        return fields, content

    def _refuse_what_crashed(self, key: tuple[Any, ...]) -> None:
        with self._guard:
            until_s, reason = self._refused.get(key, (0.0, ""))
        if time.monotonic() < until_s:
            raise SlideCrashError(reason)

    def _crashed(
        self, key: tuple[Any, ...], request: dict[str, Any], reason: str
    ) -> SlideCrashError:
        name = str(request.get("path") or request.get("store")).rpartition("/")[2]
        message = (
            f"{name} cannot be read: {reason}. It is damaged, or needs too much memory. Copy it "
            "again, or convert it to a pyramidal TIFF."
        )
        self._on_crash()
        with self._guard:
            now = time.monotonic()
            self._refused = {k: v for k, v in self._refused.items() if v[0] > now}
            self._refused[key] = (now + _REFUSED_FOR_S, message)
        return SlideCrashError(message)

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()


def _error(fields: dict[str, Any]) -> Exception:
    """The error that a process answered with."""
    kind = next((kind for kind in _KINDS if kind.__name__ in fields["kinds"]), SlideError)
    return kind(fields["error"], code=fields["code"])
