"""A thousand malformed uploads, sent to the real service."""

from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.support.malformed import (
    answers_rightly,
    is_refused,
    malformed_uploads,
    post,
    readable_uploads,
)
from tests.support.raw_http import INVALID_HTTP

MIN_UPLOADS = 1_000


@pytest.mark.slow
def test_every_malformed_upload_is_a_4xx_and_the_next_good_one_is_answered(
    service_url: str, tmp_path: Path
) -> None:
    uploads = malformed_uploads()
    assert len(uploads) + len(INVALID_HTTP) >= MIN_UPLOADS
    failed: list[tuple[str, int, str]] = []
    with httpx.Client(timeout=60) as client:
        for index, upload in enumerate(uploads):
            response = post(client, service_url, upload)
            if not is_refused(response):
                failed.append((upload.kind, response.status_code, response.text[:200]))
            if index % 50 == 0:
                assert answers_rightly(client, service_url), upload.kind
        assert answers_rightly(client, service_url)
    assert not failed, (Counter(kind for kind, _, _ in failed), failed[:5])


@pytest.mark.slow
def test_a_damaged_file_that_is_still_an_image_is_answered_or_refused(service_url: str) -> None:
    with httpx.Client(timeout=60) as client:
        for upload in readable_uploads():
            response = post(client, service_url, upload)
            assert response.status_code == 200 or is_refused(response), response.text
