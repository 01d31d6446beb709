import codecs
from pathlib import Path

import pytest

from serve.contract.errors import SettingsError
from serve.contract.key_file import read_key
from serve.service.access import ApiKeys
from tests.support.errors import raises

KEY = "0123456789abcdef-of-alice"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark", "utf-16-be with a mark")


def _encoded(text: str, encoding: str) -> bytes:
    name = encoding.partition(" ")[0]
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    return marks.get(name, b"") + text.encode(name)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_keys_are_read_as_editors_and_shells_write_them(
    encoding: str, end: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_bytes(_encoded(f"{KEY}{end}", encoding))
    assert read_key(path) == KEY
    path.write_bytes(_encoded(f"alice:{KEY}{end}", encoding))
    assert ApiKeys(path).name_of(KEY.encode()) == "alice"


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\xff\xfe", b"\x80\x81", "schl\xfcssel".encode()]
)
def test_what_is_no_key_is_one_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    for read in (read_key, ApiKeys):
        with raises(SettingsError, path):
            read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_key, ApiKeys):
        with raises(SettingsError, tmp_path / "nowhere"):
            read(tmp_path / "nowhere")
