"""How tests look at an error: its class, its code, and the values that its message names."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(kind: type[Exception], *values: object) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error of exactly this class, whose message names all of these values."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.type is kind
    missing = [value for value in values if str(value) not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
