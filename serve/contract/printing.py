"""What commands print must not end them: not every terminal has every letter."""

import io
import sys


def print_in_any_locale() -> None:
    """Print a question mark for what a terminal's encoding lacks, instead of failing.

    Names of classes and files may have any letters, and our tables have frames.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
