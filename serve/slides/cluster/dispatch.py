"""Hands blocks to Ray actors and collects the outcomes, in one thread."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from serve.slides.cluster.slide_run import MOST_TRIES, Call, SlideRun, choose
from serve.slides.cluster.worker import Opening, Problem, Ready
from serve.slides.errors import ClusterError, WorkerFailedError

_WAIT_S = 0.1
_POLL_S = 1.0
_JOIN_S = 30.0

Tell = Callable[[str], None]


@dataclass(eq=False)
class Worker:
    """An actor and its current call."""

    handle: Any
    node: str = ""
    host: str = ""
    state: Literal["opening", "free", "busy", "gone"] = "opening"
    polled: bool = False
    """Whether a question for its progress is pending."""


@dataclass(frozen=True, eq=False)
class _Expected:
    """What a pending Ray reference will return."""

    worker: Worker
    call: Call | None = None
    """None while it opens its model."""
    is_poll: bool = False


class Dispatcher:
    """Runs the blocks of many slides on a crew of workers.

    Args:
        workers: actors of `ClusterWorker`; they end when this is closed.
        opening: what each opens.
        tell: called with one line for the user.
        head: says why nothing can go on, once the head of the cluster is lost.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        opening: Opening,
        *,
        tell: Tell,
        head: Callable[[], ClusterError | None] = lambda: None,
    ) -> None:
        self._workers = list(workers)
        self._opening = opening
        self._tell = tell
        self._head = head
        self._new: queue.SimpleQueue[SlideRun] = queue.SimpleQueue()
        self._slides: list[SlideRun] = []
        self._expected: dict[Any, _Expected] = {}
        self._tickets = itertools.count(1)
        self._polled = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        self._thread.start()

    def run(self, slide: SlideRun) -> None:
        """Compute the blocks of a slide; returns when none is running any more."""
        self.check_open()
        self._new.put(slide)
        if self._closing.is_set():  # the thread may have looked for new slides for the last time
            self._thread.join()
            slide.stop(self._head() or CancelledError())
        slide.future.result()

    def check_open(self) -> None:
        """Raise ClusterError if the head is lost, or CancelledError if this is closed."""
        error = self._head()
        if error is not None:
            raise error
        if self._closing.is_set():
            raise CancelledError

    def homes(self) -> list[str]:
        """The machine of every worker that is alive."""
        return [worker.node for worker in self._workers if worker.state in ("free", "busy")]

    def close(self) -> None:
        """Abandon running calls, and end the workers."""
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)
        if self._head() is None:  # else it would be asked to
            for worker in self._workers:
                ray.kill(worker.handle)
        self._workers = []

    def _run(self) -> None:
        try:
            for worker in self._workers:
                if worker.state == "opening":
                    self._open(worker)
            while not self._closing.is_set() and self._head() is None:
                self._take_new()
                self._hand_out()
                self._poll()
                self._wait()
        finally:
            self._closing.set()
            self._take_new()
            for slide in self._slides:
                slide.stop(self._head() or CancelledError())

    def _take_new(self) -> None:
        while True:
            try:
                self._slides.append(self._new.get_nowait())
            except queue.Empty:
                return

    def _open(self, worker: Worker) -> None:
        """Tell a worker to open its model as soon as Ray has started or restarted it."""
        worker.state = "opening"
        options = worker.handle.open.options(max_task_retries=MOST_TRIES - 1)
        self._expected[options.remote(self._opening)] = _Expected(worker)

    def _hand_out(self) -> None:
        if not self._workers and self._slides:
            for slide in list(self._slides):
                slide.error = ClusterError(
                    "no worker of the cluster is left; see what was told. Give the same command "
                    "again once the cluster is up: finished blocks are kept."
                )
                self._settle(slide)
        for worker in self._workers:
            if worker.state != "free":
                continue
            beside = sum(other.node == worker.node for other in self._workers)
            chosen = choose(self._slides, worker.node, beside)
            if chosen is None:
                return
            slide, blocks = chosen
            call = slide.begin(blocks, next(self._tickets))
            worker.state = "busy"
            # Not retried by Ray, which would wait for this very worker: by `_lost`.
            options = worker.handle.run.options(max_task_retries=0)
            reference = options.remote(slide.work.path, blocks, call.ticket)
            self._expected[reference] = _Expected(worker, call)

    def _poll(self) -> None:
        """Ask the busy workers for their progress, once a second."""
        if time.monotonic() - self._polled < _POLL_S:
            return
        self._polled = time.monotonic()
        for expected in list(self._expected.values()):
            worker = expected.worker
            if expected.call is None or expected.is_poll or worker.polled:
                continue
            worker.polled = True
            options = worker.handle.progress.options(
                max_task_retries=0, concurrency_group="progress"
            )
            self._expected[options.remote()] = _Expected(worker, expected.call, is_poll=True)

    def _wait(self) -> None:
        if not self._expected:
            time.sleep(_WAIT_S / 5)
            return
        references = list(self._expected)
        ready, _ = ray.wait(references, num_returns=1, timeout=_WAIT_S)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            self._take(reference, self._expected.pop(reference))

    def _take(self, reference: Any, expected: _Expected) -> None:
        worker, call = expected.worker, expected.call
        if expected.is_poll:
            assert call is not None
            worker.polled = False
            with suppress(RayError):  # what became of the worker is told by its call
                ticket, tiles = ray.get(reference)
                if ticket == call.ticket:
                    call.tiles = tiles
                call.slide.tell_tiles()
            return
        try:
            answer = ray.get(reference)
        except RayTaskError as error:
            self._failed(expected, error)
        except RayError:
            self._lost(expected)
        else:
            if call is None:
                self._opened(worker, answer)
            elif answer is None:
                self._open(worker)
                call.slide.give_back(call)
                self._settle(call.slide)
            else:
                worker.state = "free"
                problem = answer.problem and answer.problem.error()
                call.slide.end(call, answer.records, problem)
                self._settle(call.slide)

    def _opened(self, worker: Worker, answer: Ready | Problem) -> None:
        if isinstance(answer, Problem):
            self._leave_out(worker, answer.reason)
            return
        worker.node, worker.host, worker.state = answer.node, answer.host, "free"

    def _leave_out(self, worker: Worker, reason: str) -> None:
        worker.state = "gone"
        self._workers.remove(worker)
        ray.kill(worker.handle)
        self._tell(f"a worker is left out, {len(self._workers)} go on: {reason}")

    def _failed(self, expected: _Expected, raised: RayTaskError) -> None:
        """A worker raised an unexpected error: the slide fails, and the worker continues."""
        cause = raised.cause
        reason = f"{type(cause).__name__}: {cause}" if cause else str(raised)
        reason = f"the worker failed: {' '.join(reason.split())}"
        if expected.call is None:
            self._leave_out(expected.worker, reason)
            return
        expected.worker.state = "free"
        slide = expected.call.slide
        error = WorkerFailedError(f"{reason} (on {expected.worker.host})")
        slide.end(expected.call, error=error)
        self._settle(slide)

    def _lost(self, expected: _Expected) -> None:
        """A worker or its machine died: its blocks go to others, at most three times."""
        worker, call = expected.worker, expected.call
        if call is None:
            self._leave_out(
                worker,
                f"it died {MOST_TRIES} times while it opened the model, or its machine or the "
                "cluster's head is gone",
            )
            return
        slide = call.slide
        if slide.home == worker.node:
            slide.home = None
        self._tell(f"a worker died on {worker.host}; its blocks of {slide.work.name} are run again")
        self._open(worker)
        slide.worker_died(call, worker.host)
        self._settle(slide)

    def _settle(self, slide: SlideRun) -> None:
        if slide.settle():
            self._slides.remove(slide)
