import asyncio
import base64
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import Request

from serve.contract.errors import (
    FormError,
    ImageError,
    ImageTooLargeError,
    OptionError,
    UploadTooLargeError,
)
from serve.service.batch_files import batch_files
from serve.service.uploads import read_form
from serve.settings import ServeSettings
from tests.support.errors import raises, refusal_of
from tests.support.pictures import encoded, painted

MAX_BATCH_FILES = ServeSettings().max_batch_files
Files = Sequence[tuple[str, bytes]]


def _image(label: int) -> bytes:
    return encoded(painted(np.full((40, 50), label)))


def _zip(files: Files, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def _post(url: str, files: Files, **options: object) -> httpx.Response:
    uploads = [("images", (name, content)) for name, content in files]
    return httpx.post(f"{url}/batch", files=uploads, params=options, timeout=60)


def _lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def _largest_class(line: dict[str, Any]) -> str:
    rows = line["outputs"]["json"]["classes"]
    name: str = max(rows, key=lambda row: row["pixel_share"])["name"]
    return name


def _listed(*uploads: tuple[str, bytes], max_bytes: int = 10_000) -> list[Any]:
    files = [UploadFile(io.BytesIO(content), filename=name) for name, content in uploads]
    return batch_files(files, max_bytes=max_bytes, max_files=20, max_unpacked_bytes=100_000)


def test_each_file_gets_a_line_in_its_order(service_url: str) -> None:
    lines = _lines(_post(service_url, [(f"{label}.png", _image(label)) for label in (3, 1, 2)]))
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert [line["name"] for line in lines] == ["3.png", "1.png", "2.png"]
    assert [_largest_class(line) for line in lines] == ["Inflammatory", "Tumor", "Stroma"]


def test_a_zip_counts_as_the_files_in_it(service_url: str) -> None:
    archive = _zip([("a/1.png", _image(1)), ("a/2.png", _image(2))])
    lines = _lines(_post(service_url, [("all.zip", archive), ("3.png", _image(3))]))
    assert [line["name"] for line in lines] == ["a/1.png", "a/2.png", "3.png"]
    assert [_largest_class(line) for line in lines] == ["Tumor", "Stroma", "Inflammatory"]


def test_a_bad_file_gets_an_error_and_the_others_their_answers(service_url: str) -> None:
    files = [("1.png", _image(1)), ("bad.png", b"nothing"), ("2.png", _image(2))]
    lines = _lines(_post(service_url, files))
    assert [line["status"] for line in lines] == [200, 400, 200]
    assert lines[1]["code"] == "image_unknown"
    assert "outputs" not in lines[1]


def test_each_line_has_the_chosen_outputs(service_url: str) -> None:
    (line,) = _lines(
        _post(service_url, [("1.png", _image(1))], outputs=["labels", "geojson"], mpp=0.5)
    )
    assert list(line["outputs"]) == ["labels", "geojson"]
    labels = Image.open(io.BytesIO(base64.b64decode(line["outputs"]["labels"])))
    assert (np.asarray(labels) == 1).all()
    (feature,) = line["outputs"]["geojson"]["features"]
    assert feature["properties"]["measurements"]["Area um^2"] == 500


def test_a_class_that_is_unknown_is_said_of_each_file(service_url: str) -> None:
    (line,) = _lines(
        _post(service_url, [("1.png", _image(1))], outputs=["geojson"], classes=["Muscle"])
    )
    assert line["status"] == 400
    assert line["code"] == OptionError.code
    assert "'Muscle'" in line["error"]


def test_a_batch_without_a_file_is_a_400_that_says_what_to_send(service_url: str) -> None:
    response = httpx.post(f"{service_url}/batch", files={"image": _image(1)})
    assert refusal_of(response, "'images'") == (400, FormError.code)


def test_too_many_uploads_are_a_400(service_url: str) -> None:
    files = [("x.png", b"x")] * (MAX_BATCH_FILES + 1)
    response = _post(service_url, files)
    assert refusal_of(response, MAX_BATCH_FILES) == (400, FormError.code)


def test_a_zip_bomb_is_refused_by_what_it_says_of_itself() -> None:
    bomb = _zip([(f"{n}.png", bytes(10_000)) for n in range(11)])
    deflated = _zip([("0.png", bytes(100_001))], compression=zipfile.ZIP_DEFLATED)
    for content in (bomb, deflated):
        with raises(ImageTooLargeError, 100_000, code="zip_too_large"):
            _listed(("bomb.zip", content))


def test_how_many_files_a_batch_may_have_is_a_setting() -> None:
    assert len(_listed(*[("x.png", b"x")] * 20)) == 20
    with raises(ImageTooLargeError, 21, 20, code="too_many_files"):
        _listed(*[("x.png", b"x")] * 21)


def test_a_zip_bomb_that_lies_about_its_size_is_not_unpacked() -> None:
    content = bytearray(_zip([("0.png", bytes(10**6))], compression=zipfile.ZIP_DEFLATED))
    for header, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = content.index(header) + offset
        content[at : at + 4] = (100).to_bytes(4, "little")
    (file,) = _listed(("bomb.zip", bytes(content)))
    with raises(ImageError, code="zip_damaged"):
        file.read()


@pytest.mark.parametrize(
    "name",
    ["../1.png", "a/../../1.png", "/etc/1.png", "C:\\1.png", "a\\..\\1.png", "C:1.png", "a\n.png"],
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str) -> None:
    in_zip = _listed(("all.zip", _zip([(name, _image(1))])))
    for (file,) in (in_zip, _listed((name, _image(1)))):
        with raises(ImageError, repr(file.name), code="name_unsafe"):
            file.read()


def test_a_zip_with_backslashes_between_its_folders_is_read_as_with_slashes() -> None:
    files = [
        ("b\\", b""),
        ("b\\1.png", _image(1)),
        ("b\\c\\2.png", _image(2)),
        ("b\\Thumbs.db", b""),
    ]
    listed = _listed(("windows.zip", _zip(files)))
    assert [file.name for file in listed] == ["b/1.png", "b/c/2.png"]
    assert [file.read() for file in listed] == [_image(1), _image(2)]


@pytest.mark.parametrize(
    "name", ["a..b.png", "..hidden.png", "a/b.png", "ä ö.png", "ROI 12:30.png"]
)
def test_an_unusual_name_is_no_trick(name: str) -> None:
    (file,) = _listed(("all.zip", _zip([(name, _image(1))])))
    assert file.name == name
    assert file.read() == _image(1)


def test_folders_and_what_file_managers_leave_in_them_are_left_out() -> None:
    clutter = ["__MACOSX/a/._1.png", "a/__MACOSX/._1.png", ".DS_Store", "a/.DS_Store"]
    clutter += ["a/Thumbs.db", "a/desktop.ini"]
    files = [("a/", b""), ("a/1.png", _image(1)), *((name, b"x") for name in clutter)]
    assert [file.name for file in _listed(("all.zip", _zip(files)))] == ["a/1.png"]


def test_a_batch_may_be_larger_than_one_image(service_url: str) -> None:
    noise = [
        encoded(np.random.default_rng(n).integers(0, 256, (500, 500, 3), np.uint8)) for n in (1, 2)
    ]
    assert sum(map(len, noise)) > 2**20, "more than one upload of an image may have"
    lines = _lines(
        _post(service_url, [("1.png", noise[0]), ("2.zip", _zip([("2.png", noise[1])]))])
    )
    assert [line["status"] for line in lines] == [200, 200]


def test_a_file_of_a_batch_may_not_be_larger_than_one_image(service_url: str) -> None:
    lines = _lines(_post(service_url, [("1.png", bytes(2**20 + 1)), ("2.png", _image(1))]))
    assert [line["status"] for line in lines] == [413, 200]


def test_a_batch_over_its_limit_is_a_413_that_says_to_send_it_in_parts(service_url: str) -> None:
    response = _post(service_url, [("1.png", bytes(18 * 2**20))])
    assert refusal_of(response, "16 MiB", "in parts") == (413, UploadTooLargeError.code)


def test_files_of_a_batch_and_large_images_are_not_kept_in_memory() -> None:
    async def is_in_memory(max_files: int, size: int) -> bool:
        request = httpx.Request("POST", "http://x", files={"images": bytes(size)})
        scope = {
            "type": "http",
            "headers": [(key.lower(), value) for key, value in request.headers.raw],
        }
        body = request.read()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        form = await read_form(Request(scope, receive), "images", max_files=max_files)
        upload = form["images"]
        assert isinstance(upload, UploadFile)
        try:
            return upload._in_memory
        finally:
            await form.close()

    assert asyncio.run(is_in_memory(1, 100_000))
    assert not asyncio.run(is_in_memory(1, 5 * 2**20))
    assert not asyncio.run(is_in_memory(2, 100_000))


def test_a_zip_that_lists_far_too_many_files_is_refused_before_the_list_is_read() -> None:
    content = _zip([(f"{index}{'x' * 60_000}.png", b"") for index in range(2)])
    with raises(ImageTooLargeError, code="zip_too_large"):
        _listed(("long.zip", content))


def test_a_damaged_zip_is_one_file_that_cannot_be_read() -> None:
    content = _zip([("1.png", _image(1))])
    (file,) = _listed(("broken.zip", content[: len(content) // 2]))
    assert file.name == "broken.zip"
    with raises(ImageError, code="zip_damaged"):
        file.read()


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_member_of_any_compression_is_told(method: int) -> None:
    content = bytearray(_zip([("1.png", _image(1))], compression=method))
    content[60:70] = bytes(10)
    (file,) = _listed(("damaged.zip", bytes(content)))
    with raises(ImageError, "cannot be unpacked", code="zip_damaged"):
        file.read()


def test_a_zip_with_a_password_says_so() -> None:
    content = bytearray(_zip([("1.png", _image(1))]))
    for start, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(start) + flags] |= 1
    (file,) = _listed(("locked.zip", bytes(content)))
    with raises(ImageError, "protected by a password", code="zip_damaged"):
        file.read()


def test_a_zip_in_a_zip_is_no_image(service_url: str) -> None:
    nested = _zip([("inner.zip", _zip([("1.png", _image(1))]))])
    (line,) = _lines(_post(service_url, [("outer.zip", nested)]))
    assert (line["name"], line["status"]) == ("inner.zip", 400)


def test_a_member_whose_checksum_is_wrong_is_an_error_of_its_own(service_url: str) -> None:
    content = bytearray(_zip([("1.png", _image(1)), ("2.png", _image(2))]))
    content[content.index(b"IDAT") + 8] ^= 1
    lines = _lines(_post(service_url, [("all.zip", bytes(content))]))
    assert [line["status"] for line in lines] == [400, 200]


@pytest.mark.parametrize("files", [[], [("a/", b""), ("a/.DS_Store", b"x")]])
def test_a_zip_without_files_is_a_line_that_says_so(files: Files) -> None:
    (file,) = _listed(("empty.zip", _zip(files)))
    assert file.name == "empty.zip"
    with raises(ImageError, code="zip_empty"):
        file.read()
