"""Batches the tiles of all requests in this process, or sends them to Triton concurrently.

BentoML has adaptive batching too, but only for its own `@bentoml.api` routes. The endpoints here
are a mounted application, which its dispatcher never sees. Triton itself batches the requests that
arrive together.
"""

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import Manifest
from serve.inference.backend import Backend

TileAnswer = dict[str, NDArray[Any]]
"""The outputs of one tile, without the batch axis."""
ObserveWait = Callable[[float], None]
"""Called with the seconds that a tile waited for its batch, in the context of its request."""
_CLOSED = "The model is being closed. Try again."


class TileRunner(Protocol):
    """Runs the model on the tiles of many threads, several at the same time."""

    def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[TileAnswer]:
        """Queue a (T, T, 3) uint8 RGB tile; the future gets the outputs without the batch axis."""
        ...

    def ask(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> TileAnswer:
        """The answer for the only tile of an image, of the same shape."""
        return self.submit(tile, outputs).result()

    def is_ready(self) -> bool:
        """Whether the backend can answer now."""
        ...

    def close(self) -> None:
        """Finish the submitted tiles, then close the backend."""
        ...


@dataclass
class _Waiting:
    tile: NDArray[np.uint8]
    outputs: Sequence[str]
    future: Future[TileAnswer] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class TileBatcher(TileRunner):
    """Runs a backend on the tiles of all requests, by default one batch at a time.

    Tiles that arrive while a batch runs form the next one, so batches grow under load. A batch that
    is not full waits for more tiles, at most `max_delay_s`, but only if the batch before it had
    more than one tile: a single caller never waits.

    Args:
        backend: runs the batches; closed with this object.
        max_batch_size: most tiles in a batch.
        max_delay_s: longest time that a batch waits for more tiles.
        parallel: batches that run at the same time.
        observe_wait: called with the seconds that each tile waited.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_batch_size: int,
        max_delay_s: float = 0.002,
        parallel: int = 1,
        observe_wait: ObserveWait | None = None,
    ) -> None:
        self._backend = backend
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._observe_wait = observe_wait
        # Not a SimpleQueue: a thread in its get() with a timeout that is woken for a tile which
        # another thread takes may wait for ever (CPython 3.11 and 3.12: the rest is negative).
        self._queue: queue.Queue[_Waiting | None] = queue.Queue()
        self._last_size = 1
        self._closing = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name="batches", daemon=True) for _ in range(parallel)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[TileAnswer]:
        """See `TileRunner.submit`.

        Raises:
            BackendUnavailableError: this was closed.
        """
        waiting = _Waiting(tile, outputs)
        with self._closing:
            if self._closed:
                raise BackendUnavailableError(_CLOSED)
            self._queue.put(waiting)
        return waiting.future

    def is_ready(self) -> bool:
        """See `TileRunner.is_ready`."""
        return not self._closed and self._backend.is_ready()

    def close(self) -> None:
        """See `TileRunner.close`."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)  # each thread takes one, and ends
        for thread in self._threads:
            thread.join()
        self._backend.close()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, ended = self._gather(first)
            self._last_size = len(batch)
            started = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if started:
                self._answer(started)
            if ended:
                return

    def _gather(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        """Collect queued tiles up to a full batch, and whether the queue has ended."""
        batch = [first]
        deadline = time.perf_counter() + (self._max_delay_s if self._last_size > 1 else 0.0)
        while len(batch) < self._max_batch_size:
            try:
                rest = deadline - time.perf_counter()
                waiting = self._queue.get(timeout=rest) if rest > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                return batch, True
            batch.append(waiting)
        return batch, False

    def _answer(self, batch: list[_Waiting]) -> None:
        now = time.perf_counter()
        outputs = tuple(dict.fromkeys(name for waiting in batch for name in waiting.outputs))
        try:
            if self._observe_wait is not None:
                for waiting in batch:
                    waiting.context.run(self._observe_wait, now - waiting.since)
            found = self._backend.infer(np.stack([waiting.tile for waiting in batch]), outputs)
            answers = [
                {name: found[name][index] for name in waiting.outputs}
                for index, waiting in enumerate(batch)
            ]
        except Exception as error:  # the callers get it through their futures
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.future.set_result(answer)


class TilePool(TileRunner):
    """Sends single tiles to a backend concurrently: to Triton, which batches them itself.

    Args:
        backend: called for each tile, from several threads at once; closed with this object.
        max_tiles: most tiles that the backend works on at the same time.
    """

    def __init__(self, backend: Backend, *, max_tiles: int) -> None:
        self._backend = backend
        self._pool = ThreadPoolExecutor(max_tiles, thread_name_prefix="tiles")
        self._changed = threading.Condition()
        self._asking: set[int] = set()
        """Threads in `ask`."""
        self._closed = False

    def submit(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> Future[TileAnswer]:
        """See `TileRunner.submit`.

        Raises:
            BackendUnavailableError: this was closed.
        """
        context = contextvars.copy_context()  # for the trace
        with self._changed:
            self._refuse_if_closed()
            return self._pool.submit(context.run, self._infer, tile, outputs)

    def ask(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> TileAnswer:
        """See `TileRunner.ask`; waits for no tile of larger images that is queued here.

        Raises:
            BackendUnavailableError: this was closed.
        """
        try:
            with self._changed:
                self._refuse_if_closed()
                self._asking.add(threading.get_ident())
            return self._infer(tile, outputs)
        finally:
            with self._changed:
                self._asking.discard(threading.get_ident())
                self._changed.notify_all()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BackendUnavailableError(_CLOSED)

    def _infer(self, tile: NDArray[np.uint8], outputs: Sequence[str]) -> TileAnswer:
        answers = self._backend.infer(tile[None], outputs)
        return {name: answers[name][0] for name in outputs}

    def is_ready(self) -> bool:
        """See `TileRunner.is_ready`."""
        return self._backend.is_ready()

    def close(self) -> None:
        """See `TileRunner.close`."""
        with self._changed:
            self._closed = True
            # This thread asks no more; Ctrl-C may have left it in the list.
            self._changed.wait_for(lambda: self._asking <= {threading.get_ident()})
        self._pool.shutdown()
        self._backend.close()


def pool_of(backend: Backend, manifest: Manifest) -> TilePool:
    """A pool that keeps two full batches of the model at the backend."""
    return TilePool(backend, max_tiles=2 * manifest.max_batch_size)
