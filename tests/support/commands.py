"""Runs commands of `python -m train` and `python -m export` in this process."""

import signal
import sys

import pytest

from export.__main__ import main as main_of_export
from train.cli import main


def run_train(*arguments: object) -> None:
    """Run it; the handlers of signals are put back afterwards."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in ending}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, arguments)])
        try:
            main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def failed_export(*arguments: object) -> int:
    """Run a command of `python -m export` that does not end well; returns its exit status."""
    with pytest.raises(SystemExit) as caught:
        main_of_export([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code
