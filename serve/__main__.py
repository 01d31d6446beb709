"""`python -m serve`: the commands of `serve/cli.py`; and `focalpath-segment`."""

import signal
import sys
from typing import NoReturn

from serve.contract.interrupts import ending_signals
from serve.contract.quick_imports import quick_imports


def segment_files() -> int:
    """`focalpath-segment`: run the command line and return its exit status."""
    with quick_imports():
        from serve.client.segment_files import main
    return main()


if __name__ == "__main__":
    with quick_imports():
        from serve.cli import main
    told_by: int | None = None

    def _end(number: int, _: object) -> NoReturn:
        global told_by
        told_by = number
        sys.exit(128 + number)

    # Ends through every `finally`, as an interrupt does. Without a handler the first process of a
    # container would not end at all.
    for ending in ending_signals():
        signal.signal(ending, _end)
    status: object = 1
    try:
        status = main()
    except SystemExit as error:  # Ray's waits make a SystemExit with status 1 of any other
        status = error.code
    sys.exit(128 + told_by if told_by and status else status)
