"""Something happens just as a function is called: the worst moment, chosen."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest


def before_call(
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    work: Callable[[], object],
    *,
    at: int = 0,
) -> None:
    """Have a function do `work` before the call of this number."""
    real, numbers = getattr(place, name), count()

    def call(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == at:
            work()
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, call)
