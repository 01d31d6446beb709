"""Ctrl-C for commands that have work under way: the first one stops gently, the second at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from serve.client.whole_files import abandon_writing

EXIT_STATUS = 130
"""Of a command that was ended by Ctrl-C."""
_WAKE_AFTER_S = 0.05
"""Seconds that the main thread has to handle a signal by itself."""
_STOP = b"\0"
"""Ends the thread that wakes the main thread; no signal has this number."""


@contextmanager
def second_interrupt_ends() -> Iterator[None]:
    """Within the block, the first Ctrl-C raises KeyboardInterrupt, the second ends the process.

    The second one leaves no half-written file of `serve.client.whole_files`. Does nothing outside
    the main thread, or where Ctrl-C is ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not is_main or before != signal.default_int_handler:
        yield
        return
    was_interrupted = False

    def handle(_: int, __: object) -> None:
        nonlocal was_interrupted
        if not was_interrupted:
            was_interrupted = True
            raise KeyboardInterrupt
        # In another thread, since this one may hold the lock that `abandon_writing` takes.
        threading.Thread(target=_end_at_once).start()

    signal.signal(signal.SIGINT, handle)
    try:
        with _signals_wake_this_thread():
            yield
    finally:
        if not was_interrupted:  # else the process is about to end, and Ctrl-C may come once more
            signal.signal(signal.SIGINT, before)


@contextmanager
def _signals_wake_this_thread() -> Iterator[None]:
    """Wake the main thread after each signal, so that it runs the signal's handler.

    Python runs handlers in the main thread. A signal that comes just before that thread begins to
    wait for a lock, or that another thread receives, does not end the wait: the handler would run
    only when the lock is free. Python's C handler writes the signal's number to a pipe, a thread
    reads it, and SIGURG ends the wait.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    this_thread = threading.get_ident()

    def wake() -> None:
        while (number := os.read(reader, 1)) != _STOP:
            if number[0] != signal.SIGURG:
                time.sleep(_WAKE_AFTER_S)
                signal.pthread_kill(this_thread, signal.SIGURG)

    urgent_before = signal.signal(signal.SIGURG, lambda *_: None)
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    waker = threading.Thread(target=wake, daemon=True)
    waker.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe_before)
        os.write(writer, _STOP)
        waker.join()
        signal.signal(signal.SIGURG, urgent_before)
        os.close(reader)
        os.close(writer)


def _end_at_once() -> None:
    abandon_writing()
    print("ended at once", file=sys.stderr, flush=True)
    os._exit(EXIT_STATUS)
