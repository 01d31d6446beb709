"""What commands print must not end them: not every terminal has every letter."""

import io
import os
import select
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_READER_LEFT = 128 + 13
"""The exit status of a program that SIGPIPE ends."""
_MIN_WIDTH = 100
"""Characters of a line outside terminals; in 80, tables with many columns would cut numbers."""


@contextmanager
def printing() -> Iterator[None]:
    """Print in every locale, and end without a word where nobody reads on, such as `| head`.

    A question mark stands for what a terminal's encoding lacks: names of classes and files may have
    any letters, and our tables have frames. Streams that were closed swallow what is printed.

    Raises:
        SystemExit: the reader of standard output has left.
    """
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _wide_tables():
            yield
    except BaseException as error:
        if not _is_of_reader(error):
            raise
    else:
        if _is_read():
            return
    sys.exit(_READER_LEFT)


def _open_streams() -> None:
    """Open the standard streams that are closed, as they may be under a supervisor.

    Otherwise the next file that is opened gets their number, and what a library prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            null = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (it stays open)
            try:
                os.fstat(number)  # taken by a file already
            except OSError:
                os.dup2(null.fileno(), number)
            setattr(sys, name, null)


@contextmanager
def _wide_tables() -> Iterator[None]:
    """Cut no tables in files, logs and pipes, whatever COLUMNS and the terminal beside them say."""
    given = os.environ.get("COLUMNS")
    if given == "0":  # nobody knows
        del os.environ["COLUMNS"]
    if not sys.stdout.isatty():
        os.environ["COLUMNS"] = str(max(shutil.get_terminal_size().columns, _MIN_WIDTH))
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if given is not None:
            os.environ["COLUMNS"] = given


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
