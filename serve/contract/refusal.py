"""Says in one line what pydantic refused: the name, the value that was found, what was expected."""

from collections.abc import Callable, Mapping, Sequence
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
_SENTENCES = {"value_error", "assertion_error", "json_invalid"}
"""Kinds of problems whose message is a sentence of our own, or says where JSON ends to be it."""
_TEXT, _LIST, _NAMED = "text", "a list", "names with a value each"
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "bytes_type": _TEXT,
    "dataclass_type": _NAMED,
    "dict_type": _NAMED,
    "enum": "{expected}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": _LIST,
    "literal_error": "{expected}",
    "mapping_type": _NAMED,
    "model_attributes_type": _NAMED,
    "model_type": _NAMED,
    "multiple_of": "a multiple of {multiple_of}",
    "none_required": "nothing",
    "path_type": "a path",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": _TEXT,
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "tuple_type": _LIST,
}
"""What was expected, by pydantic's kind of problem and with its values."""
_MOST_SHOWN = 80


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


def first_problem(error: ValidationError, whole: str = "") -> str:
    """The first problem that pydantic found with a file or a row, without a full stop.

    Args:
        error: what pydantic raised.
        whole: what to call the whole value, if no single field is wrong.

    Returns:
        Such as `classes.0.color is 'red'; expected text that matches ^#[0-9a-f]{6}$`.
    """
    problem = most_telling(error.errors(include_url=False))
    place = ".".join(str(part) for part in problem["loc"] if not _is_branch(part)) or whole
    return problem_line(problem, place)


def most_telling(problems: Sequence[ErrorDetails]) -> ErrorDetails:
    """The problem to tell: a misspelt name, as it explains the one that is then missing."""
    return min(problems, key=lambda problem: problem["type"] != "extra_forbidden")


def problem_line(problem: ErrorDetails, place: str) -> str:
    """One problem in words, without a full stop; `place` is what the user calls the value."""
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{place} is missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place} is unknown; expected no such field"
    if problem["type"] in _SENTENCES or not place:
        return f"{place}: {reason_of(problem)}" if place else reason_of(problem)
    return f"{place} is {shown(problem['input'])}; {reason_of(problem)}"


def shown(value: object) -> str:
    """A value that was refused, shortened to one line."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def reason_of(problem: ErrorDetails) -> str:
    """Why a value was refused, such as `expected more than 0`."""
    if problem["type"] in _SENTENCES:
        reason = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return reason.replace("Invalid JSON: ", "not JSON: ", 1).removesuffix(".")
    if (expected := _EXPECTED.get(problem["type"])) is not None:
        return "expected " + expected.format(**problem.get("ctx", {}))
    # Kinds of values that no field has today.
    return problem["msg"].replace("Input should be", "expected", 1)


def _is_branch(part: object) -> bool:
    """Whether a part of a place is pydantic's name of a validator or of a union's member."""
    return isinstance(part, str) and not part.isidentifier() and "[" in part


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
