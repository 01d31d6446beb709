"""Signals that end a command: they end each wait of its main thread, and leave no lock taken.

Python runs signal handlers in the main thread, and two things go wrong there where that thread
works with others:

- A signal that comes just before the thread begins to wait for a lock, or that another thread
  receives, does not end the wait: the handler would run only when the lock is free. That holds for
  every wait on threads: futures, queues, events, joins.
- A handler that raises just when the thread has taken a lock, or is about to free it, leaves the
  lock taken, and what needs it waits for ever. `with` excludes that for locks written in C, but not
  for those of `threading.Condition`, which queues, futures and events are made of.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_STOP = b"\0"
"""Ends the thread that wakes the main thread; no signal has this number."""
_WAIT = threading.Condition.wait.__code__
_TAKES_BACK = threading.Condition._acquire_restore.__code__  # type: ignore[attr-defined]
"""Takes the lock of a condition again after a wait; who called expects to have it."""
_TAKE_OR_FREE = frozenset(
    (
        threading.Condition.__enter__.__code__,
        threading.Condition.__exit__.__code__,
        threading.Condition._release_save.__code__,  # type: ignore[attr-defined]
        _TAKES_BACK,
        threading.Semaphore.acquire.__code__,
        threading.Semaphore.release.__code__,
    )
)
"""Functions that take a lock and return, or free one that their caller has taken."""
_WITH_SUCH_FUNCTIONS = frozenset({"logging", "importlib._bootstrap"})
"""Modules that have several such functions."""

Handler = Callable[[int, FrameType | None], object]


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that tell a command to end and that Python does not handle by itself.

    SIGTERM and, of a terminal that is closed, SIGHUP: not where the command is to outlive its
    terminal (`nohup` has it ignored), nor on Windows, which has none.
    """
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, hang_up)


def _takes_or_frees_lock(frame: FrameType) -> bool:
    """Whether what is raised here could leave a lock taken, or free one that is not."""
    if frame.f_code is _WAIT:  # it sets `gotit` when it has freed its lock and is sure to take it
        return "gotit" not in frame.f_locals
    is_one = frame.f_code in _TAKE_OR_FREE
    return is_one or frame.f_globals.get("__name__") in _WITH_SUCH_FUNCTIONS


class _Waker:
    """Wakes the main thread for signals, again and again until it has run their handlers.

    Python's C handler writes the signal's number to a pipe. A thread reads it, and sends SIGURG to
    the main thread.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._main_thread = threading.get_ident()
        self._process = os.getpid()
        self._is_awake = True
        self._is_open = True
        self._postponed: list[int] = []
        self._place: tuple[FrameType, int] | None = None
        """Frame and instruction of the main thread when a signal was postponed."""
        self._since = 0.0
        """When it was there first."""
        self._urgent_before = signal.signal(signal.SIGURG, self._note_awake)
        self._pipe_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wake, name="signals", daemon=True)
        self._thread.start()

    def postpones(self, number: int, frame: FrameType | None) -> bool:
        """Whether the handler of a signal would raise at a bad place, and is called again soon."""
        is_own = os.getpid() == self._process  # a fork has no thread to wake it
        if not is_own or frame is None or self._may_raise(frame):
            self._place = None
            return False
        self._postponed.append(number)
        return True

    def _may_raise(self, frame: FrameType) -> bool:
        if not _takes_or_frees_lock(frame):
            return True
        place = frame, frame.f_lasti
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        # Who does not get on waits for another thread to free the lock, and does not have it.
        is_waiting = time.monotonic() - self._since >= _FIRST_PAUSE_S / 2
        return is_waiting and frame.f_code is not _TAKES_BACK

    def _wake(self) -> None:
        while (number := os.read(self._reader, 1)) != _STOP:
            if number[0] == signal.SIGURG:
                continue
            self._is_awake, pause_s = False, _FIRST_PAUSE_S
            while not self._is_awake:  # SIGURG, too, may come just before the wait
                signal.pthread_kill(self._main_thread, signal.SIGURG)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _note_awake(self, _: int, frame: FrameType | None) -> None:
        # SIGURG has a higher number than those that end a command, whose handlers have run by now.
        self._is_awake = True
        if not self._is_open:
            return
        postponed, self._postponed = self._postponed, []
        for number in postponed:
            handler = signal.getsignal(number)
            if callable(handler):
                handler(number, frame)
        self._is_awake = not self._postponed

    def close(self) -> None:
        """Stop, and run the handler of what was postponed."""
        self._is_open = False
        signal.set_wakeup_fd(self._pipe_before)
        os.write(self._writer, _STOP)
        self._thread.join()
        signal.signal(signal.SIGURG, self._urgent_before)
        os.close(self._reader)
        os.close(self._writer)
        self._place = None
        if self._postponed:
            signal.raise_signal(self._postponed[0])


_waker: _Waker | None = None
"""Of the block that runs."""


def outside_locks(handler: Handler) -> Handler:
    """A handler for a signal of which `safe_interrupts` takes care; `handler` may raise."""

    def handle(number: int, frame: FrameType | None) -> None:
        if _waker is None or not _waker.postpones(number, frame):
            handler(number, frame)

    return handle


@contextmanager
def safe_interrupts() -> Iterator[None]:
    """Within the block, signals end the main thread's waits, and leave no lock taken.

    Every signal that has a Python handler ends a wait. The handlers of SIGINT and of
    `ending_signals` that are there at the beginning of the block run where the main thread neither
    takes nor frees a lock, some milliseconds later where need be; for others see `outside_locks`.

    Commands wrap all that they do in it, so that none of their waits needs a timeout for Ctrl-C.
    Does nothing outside of the main thread, or where there is no SIGURG (Windows).
    """
    global _waker
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and hasattr(signal, "SIGURG")):
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}
    wrapped = {
        number: outside_locks(handler) for number, handler in before.items() if callable(handler)
    }
    outer, _waker = _waker, _Waker()
    for number, handler in wrapped.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in wrapped.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, before[number])
        waker, _waker = _waker, outer
        waker.close()


@contextmanager
def ctrl_c_handler(handler: Handler | signal.Handlers) -> Iterator[None]:
    """Within the block, Ctrl-C has another handler.

    Does nothing outside of the main thread, or where Ctrl-C is ignored, as in what a shell starts
    in the background.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not (is_main and callable(before)):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
