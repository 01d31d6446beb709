"""`python -m serve`: the commands of `serve/cli.py`."""

import signal
import sys
from typing import NoReturn

from serve.contract.quick_imports import no_garbage_collection

if __name__ == "__main__":
    heeds_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds_interrupts:  # one inside the imports would end in their traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with no_garbage_collection():
        from serve.cli import main
    if heeds_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    is_told_to_end = False

    def _end(*_: object) -> NoReturn:
        global is_told_to_end
        is_told_to_end = True
        sys.exit(143)

    # Ends through every `finally`, as an interrupt does. Without a handler the first process of a
    # container would not end at all.
    signal.signal(signal.SIGTERM, _end)
    status: object = 1
    try:
        status = main()
    except SystemExit as error:  # Ray's waits make a SystemExit with status 1 of any other
        status = error.code
    sys.exit(143 if is_told_to_end and status else status)
