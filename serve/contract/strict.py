"""The base of every pydantic model in this package, and how its refusals are told to people."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """Takes the fields that it names and no others, and does not change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def first_problem(error: ValidationError, whole: str = "") -> str:
    """The first thing that pydantic refused, as `field: reason`.

    Args:
        error: what pydantic raised.
        whole: what to call the value where no single field of it is wrong.
    """
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or whole
    reason = first["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
