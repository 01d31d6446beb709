"""A thousand uploads that are none, against the real service."""

from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.serve.service.test_protocol import NO_HTTP
from tests.support.malformed import GOOD, SMALL, Upload, malformed_uploads, readable_uploads

MIN_UPLOADS = 1_000


def post(client: httpx.Client, url: str, upload: Upload) -> httpx.Response:
    return client.post(f"{url}{upload.path}", **upload.request())


def is_refused(response: httpx.Response) -> bool:
    """Whether it is a 4xx with an error in JSON, as every refusal is."""
    if not 400 <= response.status_code < 500:
        return False
    try:
        answer = response.json()
    except ValueError:
        return False
    return set(answer) == {"error", "code"} and all(isinstance(one, str) for one in answer.values())


def answers_rightly(client: httpx.Client, url: str) -> bool:
    response = client.post(f"{url}/segment", files={"image": ("a.png", GOOD)})
    if response.status_code != 200:
        return False
    image = response.json()["image"]
    return [image["height_px"], image["width_px"]] == [*SMALL.shape[:2]]


@pytest.mark.slow
def test_every_malformed_upload_is_a_4xx_and_the_next_good_one_is_answered(
    service_url: str, tmp_path: Path
) -> None:
    uploads = malformed_uploads()
    assert len(uploads) + len(NO_HTTP) >= MIN_UPLOADS
    failed: list[tuple[str, int, str]] = []
    with httpx.Client(timeout=10) as client:
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
    with httpx.Client(timeout=10) as client:
        for upload in readable_uploads():
            response = post(client, service_url, upload)
            assert response.status_code == 200 or is_refused(response), response.text
