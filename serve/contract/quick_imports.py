"""The imports of a command: in less time, and ended by Ctrl-C without a traceback."""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from serve.contract.interrupts import ctrl_c_handler


@contextmanager
def quick_imports() -> Iterator[None]:
    """Collect no garbage within the block, and let Ctrl-C end the process at once.

    Imports make many objects that stay, and no garbage; looking for some takes an eighth to a
    quarter of their time. An interrupt inside them would end in their tracebacks. Where Ctrl-C is
    ignored, it stays so.
    """
    gc.disable()
    try:
        with ctrl_c_handler(signal.SIG_DFL):
            yield
    finally:
        gc.freeze()
        gc.enable()
