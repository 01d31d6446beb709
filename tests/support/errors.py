"""How tests look at an error: its class, its code, and the values that its message names."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
import pytest

E = TypeVar("E", bound=Exception)


@contextmanager
def raises(
    kind: type[E], *values: object, code: str | None = None
) -> Iterator[pytest.ExceptionInfo[E]]:
    """Expect an error of exactly this class whose message names all of these values.

    Args:
        kind: of the error.
        values: any number of them; their text is looked for.
        code: of the error, where it is more precise than its class's own.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.type is kind
    assert getattr(caught.value, "code", None) == (code or getattr(kind, "code", None))
    _assert_named(values, str(caught.value))


def refusal_of(answer: httpx.Response, *values: object) -> tuple[int, str]:
    """Status and code of an answer that is an error and names the values."""
    assert answer.headers["content-type"] == "application/json"
    fields = answer.json()
    assert set(fields) == {"error", "code"}
    _assert_named(values, fields["error"])
    return answer.status_code, fields["code"]


def _assert_named(values: tuple[object, ...], message: str) -> None:
    missing = [value for value in values if str(value) not in message]
    assert not missing, f"{missing} not in {message}"
