"""Runs a command of `python -m train` in this process."""

import signal
import sys

import pytest

from train.cli import main


def run_train(*arguments: object) -> None:
    """Run it; the handlers of signals are put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, arguments)])
        try:
            main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
