"""The base of every pydantic model in this package."""

from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from serve.contract.errors import SettingsError
from serve.contract.refusal import as_flag, refusal


class Strict(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CommandOptions(Strict):
    """What a user sets on a command line. A docstring under a field is its help text.

    Raises:
        SettingsError: a value is out of its range or of another type, or a field is unknown. tyro
            would report pydantic's own error in its words. Files that are read as JSON keep it.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    flag_prefix: ClassVar[str] = ""
    """What the options are called before a field's name."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(
        cls, given: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        try:
            return handler(given)
        except ValidationError as error:
            if info.mode == "json":
                raise
            values = given if isinstance(given, dict) else vars(given)
            name_of = (info.context or {}).get("name_of", cls._flag)
            raise SettingsError(refusal(error, cls.model_fields, values, name_of)) from None

    @classmethod
    def _flag(cls, name: str) -> str:
        return as_flag(cls.flag_prefix + name)
