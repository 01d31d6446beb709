"""Files that appear whole, by a rename, and errors of the disk as what they are."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.slides.errors import OutputError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole, by a rename; several processes may write it at once."""
    with appearing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file, which appears under its name at the end."""
    # Not named by the process: containers on many machines have the same few numbers.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Tell errors of the disk as what they are.

    Raises:
        OutputError: the disk is full or may not be written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}. Make room or choose another "
            "--out, and give the same command again: what is done is kept."
        ) from error
