"""The process that opens slides for the service: `python -m serve.service.slides.reading FD`.

It answers requests on a socket, one at a time. A request is JSON; an answer is JSON and then bytes.
Nothing is pickled, so that a crafted slide which takes over this process cannot send the service an
object. An unexpected error ends the process, and `readers` starts another.
"""

import json
import resource
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serve.answers.pictures import rgb_png
from serve.contract.errors import FocalPathError, message_of
from serve.contract.unchanged import while_unchanged
from serve.images.readers.errors import SlideError, SlideFormatError, SlideReadError
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import open_reader
from serve.images.readers.slide_files import files_of
from serve.service.slides.cells import cells_npz, cells_png
from serve.service.slides.deep_zoom import DeepZoom, thumbnail_jpeg, tile_jpeg
from serve.service.slides.folder import is_inside, without_folders

MAX_MEMORY_BYTES = 4 * 2**30
"""Limit of the process's address space. A decompression bomb ends the process, not the machine."""
_MAX_OPEN = 4

Answer = tuple[dict[str, Any], bytes]


class OpenSlides:
    """Keeps the most recently used slides open."""

    def __init__(self) -> None:
        self._readers: OrderedDict[tuple[str, str, float | None], RegionReader] = OrderedDict()

    def get(self, request: dict[str, Any]) -> RegionReader:
        """The slide of a request.

        Raises:
            SlideError: it cannot be opened.
        """
        key = _key(request)
        reader = self._readers.get(key)
        if reader is None:
            _refuse_links_out(Path(request["path"]), Path(request["root"]))
            while len(self._readers) >= _MAX_OPEN:
                self._readers.popitem(last=False)[1].close()
            reader = open_reader(Path(request["path"]), mpp=request.get("mpp"))
            self._readers[key] = reader
        self._readers.move_to_end(key)
        return reader

    def close(self, request: dict[str, Any]) -> None:
        """Close the slide of a request, so that the next one opens it anew."""
        reader = self._readers.pop(_key(request), None)
        if reader is not None:
            reader.close()


def _key(request: dict[str, Any]) -> tuple[str, str, float | None]:
    return request.get("path", ""), request.get("version", ""), request.get("mpp")


def _refuse_links_out(path: Path, root: Path) -> None:
    """Raise SlideFormatError if one of the slide's files lies outside of `root`.

    A link may lead out of it, and so may a name in the text of a MIRAX, VMS or VMU slide.
    """
    if path.is_dir():
        others = [file for file in path.rglob("*") if file.is_symlink()]
    else:
        others = files_of(path)
    for file in (path, *others):
        if not is_inside(file, root):
            raise SlideFormatError(
                f"{path.name} has a file outside of the folder of slides. Copy its files there."
            )


def _info(slides: OpenSlides, request: dict[str, Any]) -> Answer:
    """What a viewer needs to know of a slide."""
    reader = slides.get(request)
    bounds = reader.bounds
    size = reader.pixel_size
    fields = {
        "width_px": reader.width_px,
        "height_px": reader.height_px,
        "bounds": [bounds.x, bounds.y, bounds.width, bounds.height],
        "mpp": reader.mpp,
        "mpp_xy": None if size is None or size.x == size.y else [size.x, size.y],
        "mpp_source": reader.mpp_source,
        "notes": reader.contradiction,
        "reader": reader.name,
        "num_levels": DeepZoom(bounds).num_levels,
        "fingerprint": reader.fingerprint(),
    }
    return fields, b""


def _tile(slides: OpenSlides, request: dict[str, Any]) -> Answer:
    reader = slides.get(request)
    return {}, tile_jpeg(reader, request["level"], request["column"], request["row"])


def _thumbnail(slides: OpenSlides, request: dict[str, Any]) -> Answer:
    return {}, thumbnail_jpeg(slides.get(request))


def _region(slides: OpenSlides, request: dict[str, Any]) -> Answer:
    """A region of level 0 at another um per pixel, as a PNG."""
    reader = slides.get(request)
    mpp, own = request["target_mpp"], reader.require_pixel_size()
    height = max(round(request["height"] * own.y / mpp), 1)
    width = max(round(request["width"] * own.x / mpp), 1)
    pixels = reader.read_um(request["y"] * own.y, request["x"] * own.x, height, width, mpp)
    return {"downsample": [mpp / own.x, mpp / own.y]}, rgb_png(pixels)


def _cells(_: OpenSlides, request: dict[str, Any]) -> Answer:
    """A tile of a result."""
    store = Path(request["store"])
    place = (store, request["level"], request["column"], request["row"])

    def cut() -> bytes:
        if request["form"] == "npz":
            return cells_npz(*place)
        return cells_png(*place, colors=request["colors"], shown=request["shown"])

    return {}, while_unchanged(store.parent, cut)


OPERATIONS: dict[str, Callable[[OpenSlides, dict[str, Any]], Answer]] = {
    "info": _info,
    "tile": _tile,
    "thumbnail": _thumbnail,
    "region": _region,
    "cells": _cells,
}


def serve_requests(connection: Connection) -> None:
    """Answer requests until the other side closes the connection."""
    slides = OpenSlides()
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            fields, content = OPERATIONS[request["operation"]](slides, request)
        except (FocalPathError, OSError) as error:  # a file may not be read, or was removed
            if isinstance(error, SlideReadError | OSError):  # OpenSlide would read nothing more
                slides.close(request)
            kind = SlideError if isinstance(error, OSError) else type(error)
            root = Path(request["root"]) if "root" in request else None
            fields = {
                "error": without_folders(message_of(error), root),
                "code": getattr(error, "code", kind.code),
                "kinds": [parent.__name__ for parent in kind.__mro__],
            }
            content = b""
        connection.send_bytes(json.dumps(fields).encode())
        connection.send_bytes(content)


def main() -> None:
    """Serve the socket that the service has opened."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's: it closes the socket
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve_requests(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
