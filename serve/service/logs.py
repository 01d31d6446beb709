"""The log: one JSON object per line, with the id of the request, if any."""

import json
import logging
import logging.config
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from opentelemetry import trace

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


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


class JsonFormatter(logging.Formatter):
    """Formats a record, and the `fields` of its `extra`, as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request := current_request()) is not None:
            entry["request_id"] = request.request_id
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            entry["trace_id"] = trace.format_trace_id(span.trace_id)
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record, and the `fields` of its `extra`, as a line of text."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        fields: dict[str, object] = getattr(record, "fields", {})
        return " ".join([super().format(record), *(f"{k}={v}" for k, v in fields.items())])


def configure_logging(log_format: Literal["json", "text"]) -> None:
    """Write this process's log to standard output, in place of what BentoML set up."""
    formatter = (
        {"()": JsonFormatter} if log_format == "json" else {"()": TextFormatter, "fmt": _TEXT}
    )
    logging.captureWarnings(True)
    # Python keeps the text of every warning for ever, and broken TIFFs cause any number of texts.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"own": formatter},
            "handlers": {
                "stdout": {
                    "class": "logging.StreamHandler",
                    "stream": "ext://sys.stdout",
                    "formatter": "own",
                }
            },
            "loggers": {
                "serve": {"level": "INFO"},
                **{
                    name: {"level": level, "handlers": [], "propagate": True}
                    for name, level in (
                        ("bentoml", "INFO"),
                        ("circus", "WARNING"),
                        ("uvicorn", "WARNING"),
                        ("uvicorn.error", "WARNING"),
                    )
                },
            },
            "root": {"level": "WARNING", "handlers": ["stdout"]},
        }
    )
