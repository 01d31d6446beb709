"""Says in one line which setting pydantic refused: its name, the value found, what is expected."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_LIMITS = ("gt", "ge", "lt", "le", "multiple_of")
_OUT_OF_RANGE = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "multiple_of",
}


def as_flag(name: str) -> str:
    """The option of a command line that sets a field."""
    return "--" + name.replace("_", "-")


def refusal(
    error: ValidationError,
    fields: Mapping[str, FieldInfo],
    values: Mapping[str, object],
    name_of: Callable[[str], str] = as_flag,
) -> str:
    """The first problem that pydantic found with settings.

    Args:
        error: what pydantic raised.
        fields: of the settings, with their bounds.
        values: of the fields that were set.
        name_of: what the user calls a field.

    Returns:
        Such as `--port is 99999; expected 0 to 65535.`
    """
    problem = error.errors(include_url=False)[0]
    if not problem["loc"]:
        return f"{reason_of(problem)}."
    name = str(problem["loc"][0])
    if name not in fields:
        return f"there is no setting {name_of(name)}."
    found = f"{name_of(name)} is {values.get(name)!r}"
    if problem["type"] in _OUT_OF_RANGE:
        return f"{found}; expected {_range(_limits(fields[name]))}."
    return f"{found}; {reason_of(problem)}."


def reason_of(problem: ErrorDetails) -> str:
    """Why a value was refused, such as `expected greater than 0`."""
    reason = problem["msg"].removeprefix("Value error, ")
    return reason.replace("Input should be", "expected", 1).replace(
        "String should match pattern", "expected text that matches", 1
    )


def _limits(field: FieldInfo) -> dict[str, Any]:
    """The bounds of a field; those of the inner type of an optional value or a tuple."""
    found = {
        kind: limit
        for entry in field.metadata
        for kind in _LIMITS
        if (limit := getattr(entry, kind, None)) is not None
    }
    for inner in get_args(field.annotation):
        if inner is not Ellipsis:
            found |= _limits(FieldInfo.from_annotation(inner))
    return found


def _range(limits: Mapping[str, Any]) -> str:
    """Bounds in words, such as "more than 0, at most 1"."""
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    if {"ge", "le"} <= limits.keys():
        parts = [f"{limits['ge']} to {limits['le']}"]
    else:
        parts = [f"{word} {limits[kind]}" for kind, word in words.items() if kind in limits]
    if "multiple_of" in limits:
        parts.append(f"a multiple of {limits['multiple_of']}")
    return ", ".join(parts)
