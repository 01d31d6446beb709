"""The base of the settings of an export, whose ranges pydantic checks."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from export.errors import SettingsError
from train import checked

Share = checked.Share
NotNegative = checked.NotNegative
Count = checked.Count
NumberOf = checked.NumberOf
PositiveShare = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class CheckedSettings(checked.CheckedSettings):
    """A group of settings; a value out of its range is an error of this package."""

    error_class: ClassVar[type[Exception]] = SettingsError
