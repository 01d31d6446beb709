"""Streams a folder as a zip, without keeping the zip in memory or on disk."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 2**20


class _Sink(io.RawIOBase):
    """A file for zipfile to write to, which cannot seek."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(data)  # type: ignore[call-overload]
        self._parts.append(part)
        return len(part)

    def taken(self) -> bytes:
        """Return what was written since the last call."""
        found = b"".join(self._parts)
        self._parts.clear()
        return found


def zip_folder(folder: Path) -> Iterator[bytes]:
    """The parts of a folder's zip. Its files are stored as they are, since they are compressed."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            entry = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix())
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := file.read(_CHUNK_BYTES):
                    target.write(chunk)
                    yield sink.taken()
    yield sink.taken()
