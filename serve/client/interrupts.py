"""Ctrl-C for commands that have work under way: the first one stops gently, the second at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from serve.client.whole_files import abandon_writing
from serve.contract.interrupts import outside_locks

EXIT_STATUS = 130
"""Of a command that was ended by Ctrl-C."""


@contextmanager
def second_interrupt_ends() -> Iterator[None]:
    """Within the block, the first Ctrl-C raises KeyboardInterrupt, the second ends the process.

    The second one leaves no half-written file of `serve.client.whole_files`. Does nothing outside
    the main thread, or where Ctrl-C is ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not (is_main and callable(before)):
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

    signal.signal(signal.SIGINT, outside_locks(handle))
    try:
        yield
    finally:
        if not was_interrupted:  # else the process is about to end, and Ctrl-C may come once more
            signal.signal(signal.SIGINT, before)


def _end_at_once() -> None:
    abandon_writing()
    print("ended at once", file=sys.stderr, flush=True)
    os._exit(EXIT_STATUS)
