"""`python -m serve`: the commands of `serve/cli.py`."""

import signal
import sys
from typing import NoReturn

from serve.contract.interrupts import ending_signals
from serve.contract.quick_imports import no_garbage_collection

if __name__ == "__main__":
    heeds_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds_interrupts:  # one inside the imports would end in their traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with no_garbage_collection():
        from serve.cli import main
    if heeds_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
