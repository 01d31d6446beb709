from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from serve.contract.errors import SettingsError
from serve.contract.refusal import first_problem
from serve.contract.strict import CommandOptions, Strict
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


class Part(Strict):
    side_px: int = Field(gt=0, multiple_of=4)


class File(Strict):
    name: str = Field("a", pattern="^[a-z]+$", max_length=8)
    share: float = Field(0.5, allow_inf_nan=False)
    is_whole: bool = True
    parts: tuple[Part, ...] = Field((), max_length=1)
    kind: Literal["red", "blue"] | None = None
    part: Part | None = None

    @field_validator("share")
    @classmethod
    def _is_small(cls, value: float) -> float:
        if value > 9:
            raise ValueError("a share above 9 is a mistake.")
        return value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "the file: not JSON: EOF while parsing an object at line 1 column 1"),
        ("3", "the file is 3; expected names with a value each"),
        ('{"nam": "a", "part": {}}', "nam is unknown; expected no such field"),
        ('{"part": {}}', "part.side_px is missing"),
        ('{"part": 3}', "part is 3; expected names with a value each"),
        ('{"parts": [{"side_px": "x"}]}', "parts.0.side_px is 'x'; expected a whole number"),
        ('{"parts": [{"side_px": 1.5}]}', "parts.0.side_px is 1.5; expected a whole number"),
        ('{"parts": [{"side_px": 0}]}', "parts.0.side_px is 0; expected more than 0"),
        ('{"parts": [{"side_px": 6}]}', "parts.0.side_px is 6; expected a multiple of 4"),
        ('{"parts": 1}', "parts is 1; expected a list"),
        ('{"name": 1}', "name is 1; expected text"),
        ('{"name": "A"}', "name is 'A'; expected text that matches ^[a-z]+$"),
        ('{"name": "abcdefghi"}', "name is 'abcdefghi'; expected at most 8 characters"),
        ('{"share": "x"}', "share is 'x'; expected a number"),
        ('{"share": NaN}', "share is nan; expected a finite number"),
        ('{"share": 10}', "share: a share above 9 is a mistake"),
        ('{"is_whole": "x"}', "is_whole is 'x'; expected true or false"),
        ('{"kind": "green"}', "kind is 'green'; expected 'red' or 'blue'"),
        ('{"kind": "' + "x" * 200 + '"}', "kind is '" + "x" * 79 + "...; expected 'red' or 'blue'"),
    ],
)
def test_a_refused_file_is_one_line_with_the_place_what_is_there_and_what_was_expected(
    content: str, problem: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        File.model_validate_json(content)
    assert first_problem(refused.value, "the file") == problem
