"""Signals that end a command, and how they end a wait of its main thread for other threads.

Python runs signal handlers in the main thread. A signal that comes just before that thread begins
to wait for a lock, or that another thread receives, does not end the wait: the handler would run
only when the lock is free. That holds for every wait on threads: futures, queues, events, joins.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_STOP = b"\0"
"""Ends the thread that wakes the main thread; no signal has this number."""


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that tell a command to end and that Python does not handle by itself.

    SIGTERM and, of a terminal that is closed, SIGHUP: not where the command is to outlive its
    terminal (`nohup` has it ignored), nor on Windows, which has none.
    """
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, hang_up)


@contextmanager
def signals_wake_main_thread() -> Iterator[None]:
    """Within the block, every signal that has a Python handler ends the main thread's wait.

    Commands wrap all that they do in it, so that none of their waits needs a timeout for Ctrl-C.
    Python's C handler writes the signal's number to a pipe. A thread reads it, and sends SIGURG to
    the main thread until that has run the handlers. Does nothing outside of the main thread, or
    where there is no SIGURG (Windows).
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and hasattr(signal, "SIGURG")):
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    main_thread = threading.get_ident()
    is_awake = True

    def wake() -> None:
        nonlocal is_awake
        while (number := os.read(reader, 1)) != _STOP:
            if number[0] == signal.SIGURG:
                continue
            is_awake, pause_s = False, _FIRST_PAUSE_S
            while not is_awake:  # SIGURG, too, may come just before the wait
                signal.pthread_kill(main_thread, signal.SIGURG)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def note_awake(*_: object) -> None:
        # SIGURG has a higher number than those that end a command, whose handlers have run by now.
        nonlocal is_awake
        is_awake = True

    urgent_before = signal.signal(signal.SIGURG, note_awake)
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    waker = threading.Thread(target=wake, name="signals", daemon=True)
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
