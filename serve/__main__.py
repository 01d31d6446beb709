"""`python -m serve`: the commands of `serve/cli.py`."""

import signal
import sys

from serve.contract.quick_imports import no_garbage_collection

if __name__ == "__main__":
    heeds_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds_interrupts:  # one inside the imports would end in their traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with no_garbage_collection():
        from serve.cli import main
    if heeds_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Ends through every `finally`, as an interrupt does. Without a handler the first process of a
    # container would not end at all.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
