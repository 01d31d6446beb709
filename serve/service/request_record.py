"""What the log tells about the request that is being answered."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """Facts about a request, for its line in the log."""

    request_id: str
    key_name: str | None = None
    stage_ms: dict[str, float] = field(default_factory=dict)
    tiles: int | None = None
    """That its images cost, where they were weighed."""


_current_request: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)


def current_request() -> RequestRecord | None:
    """The request that this thread or task works on."""
    return _current_request.get()


@contextmanager
def request_context(record: RequestRecord) -> Iterator[None]:
    """Make `record` the current request."""
    token = _current_request.set(record)
    try:
        yield
    finally:
        _current_request.reset(token)
