"""The base of all settings, which pydantic checks, and the ranges that they share."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict

from serve.contract.refusal import refusal
from train.errors import SettingsError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]
"""Standard deviation of a colour in [0, 1]."""
HalfAtMost = Annotated[float, Field(ge=0, le=0.5)]
Count = Annotated[int, Field(ge=1)]
NumberOf = Annotated[int, Field(ge=0)]
Sixteens = Annotated[int, Field(gt=0, multiple_of=16)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Mpp = Annotated[float, Field(ge=0.05, le=20)]
"""um per pixel, in the range of `serve.images.mpp`."""
TissueMpp = Annotated[float, Field(ge=0.1, le=2)]
"""um per pixel at which synthetic nuclei are visible."""
TestShare = Annotated[float, Field(ge=0, lt=1)]
NumFolds = Annotated[int, Field(ge=2)]
"""Folds of the data that is not for testing: fold 0 for validation, the others for training."""


@dataclass(frozen=True, kw_only=True)
class CheckedSettings:
    """A group of settings whose types and ranges pydantic checks when it is made."""

    error_class: ClassVar[type[Exception]] = SettingsError
    """What a value that is refused raises."""

    def __post_init__(self) -> None:
        """Refuse the first value that is out of its range.

        Raises:
            SettingsError: a value is out of its range, or of another type.
        """
        try:
            _checker(type(self)).validate_python(vars(self))  # type: ignore[arg-type]
        except ValidationError as error:
            raise self.error_class(refusal(error, _fields(type(self)), vars(self))) from None


@cache
def _checker(group: type[CheckedSettings]) -> TypeAdapter[Any]:
    # By its fields alone: pydantic would make the group, and so check it, again.
    hints = get_type_hints(group, include_extras=True)
    fields_alone = {entry.name: hints[entry.name] for entry in fields(group)}
    return TypeAdapter(TypedDict(f"{group.__name__}Fields", fields_alone))  # type: ignore[operator]


def _fields(group: type[CheckedSettings]) -> dict[str, FieldInfo]:
    hints = get_type_hints(group, include_extras=True)
    return {entry.name: FieldInfo.from_annotation(hints[entry.name]) for entry in fields(group)}
