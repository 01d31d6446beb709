"""All answer formats, in the order in which they are offered.

A new format is a module with an `AnswerFormat`, and one entry here.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import create_model
from pydantic.fields import FieldInfo

from serve.answers.annotations import DSA, GEOJSON
from serve.answers.arrays import ARRAYS, NUMBERS, PROBABILITIES
from serve.answers.format import AnswerFormat, Options
from serve.answers.pictures import CONFIDENCE, LABELS, OVERLAY

Base = TypeVar("Base", bound=Options)

FORMATS: dict[str, AnswerFormat] = {
    entry.name: entry
    for entry in (NUMBERS, LABELS, CONFIDENCE, OVERLAY, GEOJSON, DSA, PROBABILITIES, ARRAYS)
}
"""By name."""


def batch_formats() -> list[AnswerFormat]:
    """What /batch offers."""
    return [entry for entry in FORMATS.values() if entry.in_batch]


def file_formats() -> list[AnswerFormat]:
    """What the page and the command line offer."""
    return [entry for entry in FORMATS.values() if entry.as_file]


def needs_probabilities(names: Iterable[str], values: Mapping[str, object]) -> bool:
    """Whether an image has to be segmented with the probabilities of all classes.

    Args:
        names: the formats that are wanted of it.
        values: of all options by name.

    Raises:
        OptionError: an option cannot be used.
    """
    entries = [FORMATS[name] for name in names]
    return any(entry.needs_probabilities(entry.options.of(values)) for entry in entries)


def merged_options(
    formats: Iterable[AnswerFormat], base: type[Base], *, name_users: bool = False
) -> type[Base]:
    """One model with the options of several formats.

    Args:
        formats: whose options.
        base: has further fields.
        name_users: begin the description of each option with the formats that have it.
    """
    users: dict[str, list[AnswerFormat]] = {}
    for entry in formats:
        for option in entry.options.model_fields:
            users.setdefault(option, []).append(entry)
    fields: dict[str, Any] = {}
    for option, entries in users.items():
        field = entries[0].options.model_fields[option]
        for other in entries[1:]:
            assert _is_same(other.options.model_fields[option], field), f"{option} has two meanings"
        if name_users:
            names = ", ".join(entry.name for entry in entries)
            field = field.merge_field_infos(field, description=f"{names}: {field.description}")
        fields[option] = (field.annotation, field)
    return create_model("MergedOptions", __base__=base, **fields)


def _is_same(one: FieldInfo, other: FieldInfo) -> bool:
    return repr(one) == repr(other)
