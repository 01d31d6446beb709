"""The line of each request in the log."""

import logging

import pytest

from serve.service.logs import RequestRecord
from serve.service.request_log import CLIENT_CLOSED_REQUEST, _write_line


def test_a_line_is_written_while_a_thread_still_works_on_the_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Slow(float):
        def __round__(self, digits: object = None) -> float:  # type: ignore[override]
            record.stage_ms["segment"] = 2.0  # in another thread
            return 1.0

    record = RequestRecord("1", stage_ms={"decode": Slow(1.0)})
    with caplog.at_level(logging.INFO, "serve.access_log"):
        _write_line({"method": "POST", "path": "/labels"}, CLIENT_CLOSED_REQUEST, 1.0, record)
    assert caplog.records[0].fields["decode_ms"] == 1.0  # type: ignore[attr-defined]
