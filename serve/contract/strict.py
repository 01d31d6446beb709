"""The base of every pydantic model in this package, and how its errors are put into words."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def first_problem(error: ValidationError, whole: str = "") -> str:
    """The first problem that pydantic found, as `field: reason`.

    Args:
        error: what pydantic raised.
        whole: what to call the whole value, if no single field is wrong.
    """
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or whole
    reason = first["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
