"""Files of API keys, as editors on any system write them."""

from pathlib import Path

from serve.contract.errors import SettingsError
from serve.contract.tables import decode_text


def read_key_file(path: Path) -> list[str]:
    """The lines of a file of keys.

    Raises:
        SettingsError: the file cannot be read, or is not text.
    """
    try:
        return decode_text(path.read_bytes()).splitlines()  # Windows PowerShell writes UTF-16
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
