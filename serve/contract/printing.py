"""What commands print must not end them: not every terminal has every letter."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_READER_LEFT = 128 + 13
"""The exit status of a program that SIGPIPE ends."""


@contextmanager
def printing() -> Iterator[None]:
    """Print in every locale, and end without a word where nobody reads on, such as `| head`.

    A question mark stands for what a terminal's encoding lacks: names of classes and files may have
    any letters, and our tables have frames.

    Raises:
        SystemExit: the reader of standard output has left.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except BaseException as error:
        if not _is_of_reader(error):
            raise
    else:
        if _is_read():
            return
    sys.exit(_READER_LEFT)


def _is_of_reader(error: BaseException) -> bool:
    """Whether an error comes from a reader that has left, and hides no other."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        return True  # how rich's console ends
    is_usual_end = isinstance(error, SystemExit) and not error.code  # such as that of --help
    return not _is_read() and (is_usual_end or isinstance(error, BrokenPipeError))


def _is_read() -> bool:
    """Whether standard output still has a reader; if not, the rest of it is thrown away."""
    if not isinstance(sys.stdout, io.TextIOWrapper) or sys.stdout.closed:
        return True
    try:
        sys.stdout.flush()
        output = sys.stdout.fileno()
    except BrokenPipeError:
        output = sys.stdout.fileno()
    except io.UnsupportedOperation:  # no file of the operating system, as in tests
        return True
    else:
        if not _has_lost_its_reader(output):
            return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return False


def _has_lost_its_reader(pipe: int) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
