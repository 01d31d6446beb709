"""A folder as a zip that is sent while it is made: nothing is kept in memory or on disk."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 2**20


class _Sink(io.RawIOBase):
    """What zipfile writes to; it cannot go back in it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(data)  # type: ignore[call-overload]
        self._parts.append(part)
        return len(part)

    def taken(self) -> bytes:
        """What was written since this was asked last."""
        found = b"".join(self._parts)
        self._parts.clear()
        return found


def zip_folder(folder: Path) -> Iterator[bytes]:
    """The parts of a zip of a folder, whose files are stored as they are: they are compressed."""
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
