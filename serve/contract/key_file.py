"""Files of API keys, as editors on any system write them."""

import codecs
from pathlib import Path

from serve.contract.errors import SettingsError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the byte-order mark at the start of a file; Windows PowerShell writes UTF-16."""


def read_key_file(path: Path) -> list[str]:
    """The lines of a file of keys.

    Raises:
        SettingsError: the file cannot be read, or is not text.
    """
    try:
        content = path.read_bytes()
        encoding = next((one for mark, one in _MARKS.items() if content.startswith(mark)), "utf-8")
        return content.decode(encoding).splitlines()
    except OSError as error:
        raise SettingsError(
            f"The API keys in {path} cannot be read: {error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"The API keys in {path} cannot be read: the file is not text in UTF-8 or UTF-16. Save "
            "it as UTF-8."
        ) from error


def read_key(path: Path | None) -> str | None:
    """The API key on the first line of a file; None without a file.

    Raises:
        SettingsError: the file cannot be read, or does not start with an API key.
    """
    if path is None:
        return None
    lines = [line.strip() for line in read_key_file(path) if line.strip()]
    if not lines or not (lines[0].isascii() and lines[0].isprintable()):
        found = "no printable ASCII text" if lines else "nothing"
        raise SettingsError(f"{path} has {found} on its first line, expected an API key.")
    return lines[0]
