"""Errors by what others rely on: class, code, and the values that the message names."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from serve.contract.errors import FocalPathError


@contextmanager
def refused(kind: type[FocalPathError], *values: object, code: str | None = None) -> Iterator[None]:
    """What is inside raises an error of the kind, with its code, that names the values."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.code == (code or kind.code)
    for value in values:
        assert str(value) in str(caught.value)


def refusal_of(answer: httpx.Response, *values: object) -> tuple[int, str]:
    """Status and code of an answer that is an error and names the values."""
    assert answer.headers["content-type"] == "application/json"
    fields = answer.json()
    assert set(fields) == {"error", "code"}
    for value in values:
        assert str(value) in fields["error"]
    return answer.status_code, fields["code"]
