"""A wait of the main thread that a signal does not end by itself."""

import linecache
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DEADLINE_S = 120.0


@contextmanager
def deaf_main_thread(number: int = signal.SIGINT) -> Iterator[None]:
    """The main thread does not receive the signal: another one must, and it ends no wait.

    The same happens by chance where a signal comes just before the main thread begins to wait.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


def send_from_here(number: int = signal.SIGINT) -> None:
    """Send the signal to this process, and receive it here, once the main thread waits."""
    deadline = time.monotonic() + DEADLINE_S
    while not _main_thread_waits():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)


def _main_thread_waits() -> bool:
    """Whether it is in the line of code that waits for a lock, and not only for a thread to start.

    Every wait on threads has such a line.
    """
    number = threading.main_thread().ident
    assert number is not None
    frame: FrameType | None = sys._current_frames()[number]
    assert frame is not None
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    while frame is not None and frame.f_code is not threading.Thread.start.__code__:
        frame = frame.f_back
    return frame is None and ".acquire()" in line


def wait_while_interrupted(number: int = signal.SIGINT) -> None:
    """Wait in the main thread for a lock while the signal comes; its handler has to raise.

    Raises:
        AssertionError: nothing woke the main thread.
    """
    lock, woken = threading.Lock(), threading.Event()
    was_woken: list[bool] = []

    def interrupt() -> None:
        send_from_here(number)
        was_woken.append(woken.wait(DEADLINE_S))
        lock.release()

    with deaf_main_thread(number):
        lock.acquire(blocking=False)
        sender = threading.Thread(target=interrupt)
        sender.start()
        try:
            lock.acquire()
        finally:
            woken.set()
            sender.join()
            assert was_woken == [True]
