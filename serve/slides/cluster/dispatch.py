"""Hands blocks to Ray actors and collects the outcomes, in one thread."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from serve.slides.cluster.assign import Call, SlideRun, choose
from serve.slides.cluster.errors import ClusterError, WorkerDiedError, WorkerFailedError
from serve.slides.cluster.worker import Opening, Problem, Ready, Report
from serve.slides.store import BlockRecord

MOST_TRIES = 3
"""Number of workers that a block may kill before its slide fails."""
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
                if not slide.future.done():
                    slide.future.set_exception(self._head() or CancelledError())

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
                slide.waiting.clear()
                self._settle(slide)
        for worker in self._workers:
            if worker.state != "free":
                continue
            beside = sum(other.node == worker.node for other in self._workers)
            chosen = choose(self._slides, worker.node, beside)
            if chosen is None:
                return
            slide, blocks = chosen
            call = Call(slide, blocks, next(self._tickets))
            slide.at_work += 1
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
            worker.polled = False
        try:
            answer = ray.get(reference)
        except RayTaskError as error:
            self._failed(expected, error)
        except RayError as error:
            self._lost(expected, error)
        else:
            if expected.is_poll:
                assert call is not None
                ticket, call.tiles = answer if answer[0] == call.ticket else (0, call.tiles)
                self._tell_tiles(call.slide)
            elif call is not None and answer is None:
                self._open(worker)
                call.slide.waiting.extendleft(reversed(call.blocks))
                self._end(call)
            elif call is not None:
                worker.state = "free"
                self._returned(call, answer)
            else:
                self._opened(worker, answer)

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

    def _returned(self, call: Call, report: Report) -> None:
        slide = call.slide
        self._count(slide, report.records)
        if report.problem is not None:
            slide.error = slide.error or report.problem.error()
        self._end(call)

    def _failed(self, expected: _Expected, error: RayTaskError) -> None:
        """A worker raised an unexpected error: the slide fails, and the worker continues."""
        if expected.is_poll:
            return
        reason = f"{type(error.cause).__name__}: {error.cause}" if error.cause else str(error)
        reason = f"the worker failed: {' '.join(reason.split())}"
        if expected.call is None:
            self._leave_out(expected.worker, reason)
            return
        expected.worker.state = "free"
        slide = expected.call.slide
        slide.error = slide.error or WorkerFailedError(f"{reason} (on {expected.worker.host})")
        self._end(expected.call)

    def _lost(self, expected: _Expected, error: RayError) -> None:
        """A worker or its machine died: its blocks go to others, at most three times."""
        worker, call = expected.worker, expected.call
        if expected.is_poll:
            return
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
        done = slide.work.records()
        self._count(slide, [done[block] for block in call.blocks if block in done])
        left = [block for block in call.blocks if block not in done]
        if left and slide.error is None:
            slide.tries[left[0]] += 1
            if slide.tries[left[0]] >= MOST_TRIES:
                slide.error = WorkerDiedError(
                    f"{slide.work.name}: the worker died {MOST_TRIES} times of block "
                    f"{left[0].name}, the last time on {worker.host}. It ran out of memory, or a "
                    "library failed on this slide: see Ray's logs. Convert the slide again, or "
                    "leave it out."
                )
            else:
                slide.waiting.extendleft(reversed(left))
        self._end(call)

    def _count(self, slide: SlideRun, records: Sequence[BlockRecord]) -> None:
        slide.finished_tiles += sum(record.num_tiles for record in records)
        for record in records:
            self._call(slide, partial(slide.on_block, record))

    def _end(self, call: Call) -> None:
        slide = call.slide
        slide.at_work -= 1
        call.tiles = 0
        self._tell_tiles(slide)
        self._settle(slide)

    def _tell_tiles(self, slide: SlideRun) -> None:
        """Report new tiles. Tiles that are computed again after a death are reported once."""
        calls = (expected.call for expected in self._expected.values() if not expected.is_poll)
        at_work = sum(call.tiles for call in calls if call is not None and call.slide is slide)
        new = slide.finished_tiles + at_work - slide.told_tiles
        if new > 0:
            slide.told_tiles += new
            self._call(slide, partial(slide.on_tiles, new))

    def _call(self, slide: SlideRun, callback: Callable[[], None]) -> None:
        """Call a callback, which may raise to stop the run."""
        if slide.future.done():
            return
        try:
            callback()
        except BaseException as error:  # noqa: BLE001 - it belongs to who runs the slide
            slide.waiting.clear()
            slide.future.set_exception(error)

    def _settle(self, slide: SlideRun) -> None:
        """Resume the thread that runs the slide, once none of its calls is running."""
        if slide.error is not None:
            slide.waiting.clear()
        if slide.at_work or slide.waiting:
            return
        self._slides.remove(slide)
        if slide.future.done():
            return
        if slide.error is None:
            slide.future.set_result(None)
        else:
            slide.future.set_exception(slide.error)
