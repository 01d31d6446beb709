"""Command lines: tyro reads them, and what pydantic refuses is told as one line."""

import sys
from collections.abc import Sequence
from typing import Any

import tyro
from pydantic import ValidationError

_USAGE_STATUS = 2
"""Exit status of a command line that cannot be used, as tyro has it."""


def read_arguments(
    command: Any, *, prog: str, description: str | None = None, arguments: Sequence[str] | None
) -> Any:
    """Read a command line.

    Args:
        command: the type to make of it; a dataclass, or a union of subcommands.
        prog: how the program is called.
        description: what it does; by default what the type's docstring says.
        arguments: by default those of this process.

    Raises:
        SystemExit: the command line cannot be used, or asks for help.
    """
    try:
        return tyro.cli(command, prog=prog, description=description, args=arguments)
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + ".".join(map(str, problem["loc"])).replace("_", "-")
            reason = problem["msg"].removeprefix("Value error, ")
            print(f"error: {flag} is {problem['input']!r}: {reason}.", file=sys.stderr)
        raise SystemExit(_USAGE_STATUS) from None
