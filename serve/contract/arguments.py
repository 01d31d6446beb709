"""Reads command lines with tyro, and reports values that pydantic refuses in one line each."""

import sys
from collections.abc import Sequence
from typing import Any

import tyro
from pydantic import ValidationError

_USAGE_STATUS = 2
"""Exit status of an invalid command line, as tyro has it."""


def read_arguments(
    command: Any, *, prog: str, description: str | None = None, arguments: Sequence[str] | None
) -> Any:
    """Read a command line.

    Args:
        command: the type to return; a dataclass, or a union of subcommands.
        prog: the name of the program.
        description: what the program does; by default the type's docstring.
        arguments: by default those of this process.

    Raises:
        SystemExit: the command line is invalid, or asks for help.
    """
    try:
        return tyro.cli(command, prog=prog, description=description, args=arguments)
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + ".".join(map(str, problem["loc"])).replace("_", "-")
            reason = problem["msg"].removeprefix("Value error, ")
            print(f"error: {flag} is {problem['input']!r}: {reason}.", file=sys.stderr)
        raise SystemExit(_USAGE_STATUS) from None
