from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from serve.contract.errors import SettingsError
from serve.contract.strict import CommandOptions
from tests.support.errors import raises


class ToyOptions(CommandOptions):
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    side_px: int = Field(32, ge=16, multiple_of=16)
    scales: tuple[Annotated[float, Field(ge=0.25, le=4)], ...] = ()
    colour: Literal["red", "blue"] = "red"
    name: str = ""

    @field_validator("name")
    @classmethod
    def _is_lower(cls, value: str) -> str:
        if not value.islower():
            raise ValueError("expected lower case")
        return value


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"share": 1.0}, "--share is 1.0; expected more than 0, less than 1."),
        ({"side_px": 20}, "--side-px is 20; expected at least 16, a multiple of 16."),
        ({"scales": (1.0, 8.0)}, "--scales is (1.0, 8.0); expected 0.25 to 4."),
        ({"colour": "green"}, "--colour is 'green'; expected 'red' or 'blue'."),
        ({"name": "A"}, "--name is 'A'; expected lower case."),
        ({"shape": 1}, "there is no setting --shape."),
    ],
)
def test_a_refused_option_is_one_line_with_its_name_value_and_range(
    values: dict[str, object], line: str
) -> None:
    with raises(SettingsError, code="setting_invalid") as refused:
        ToyOptions(**values)  # type: ignore[arg-type]
    assert str(refused.value) == line
