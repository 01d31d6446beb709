"""The web page at `/`: the files in `viewer/`, which load nothing from other hosts."""

import re
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

VIEWER = Path(__file__).parent / "viewer"
VIEWER_PATH = "/viewer/"
"""Path of the page's own files. They and `/` hold nothing secret, so they need no key."""
LIBRARY = "openseadragon.min.js"
"""What shows slides. It is not in the repository: `make page` installs it from npm."""
LIBRARY_FILE = VIEWER / "node_modules/openseadragon/build/openseadragon" / LIBRARY

_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""Fixed here: a system's own table may call JavaScript plain text, which browsers refuse."""
_PART = re.compile(r"^(?P<indent> *)<!-- part: (?P<name>\w+) -->\n", re.MULTILINE)
_WEIGHT = re.compile(r"(?:^|;)\s*q=([01](?:\.\d{0,3})?)\s*(?:;|$)")
_FILES = frozenset(path.name for path in VIEWER.iterdir() if path.suffix in _MEDIA_TYPES)
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(_CONTENT_SECURITY_POLICY),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Endpoint = Callable[[Request], Awaitable[Response]]


def page_routes(index: Endpoint) -> list[Route]:
    """`/` answers browsers with the page and programs with `index`; `/viewer/` has its files."""

    async def root(request: Request) -> Response:
        if _wants_page(request.headers.get("accept", "")):
            response = _file_response("index.html")
        else:
            response = await index(request)
        response.headers["Vary"] = "Accept"
        return response

    async def file(request: Request) -> Response:
        return _file_response(request.path_params["name"])

    return [
        Route("/", root, methods=["GET"]),
        Route(f"{VIEWER_PATH}{{name}}", file, methods=["GET"]),
    ]


def _wants_page(accept: str) -> bool:
    """Whether an Accept header names HTML, and nothing of a program's before it (RFC 9110, 12.5.1).

    Anything that is not a number counts as 1.
    """
    weights = {}
    for part in accept.lower().split(","):
        kind, _, parameters = part.partition(";")
        found = _WEIGHT.search(parameters)
        weights[kind.strip()] = float(found[1]) if found else 1.0
    html = weights.get("text/html", 0.0)
    return html > 0 and html >= weights.get("application/json", 0.0)


def read_page(name: str) -> str:
    """A page with the parts that it shares with the other, from `viewer/parts/`."""
    text = (VIEWER / name).read_text(encoding="utf-8")
    return _PART.sub(lambda found: _part(found["name"], found["indent"]), text)


def _part(name: str, indent: str) -> str:
    text = (VIEWER / "parts" / f"{name}.html").read_text(encoding="utf-8")
    return textwrap.indent(text, indent)


def _file_response(name: str) -> Response:
    if name == LIBRARY and LIBRARY_FILE.is_file():
        return FileResponse(LIBRARY_FILE, media_type=_MEDIA_TYPES[".js"], headers=_HEADERS)
    if name not in _FILES:
        raise HTTPException(404, f"{VIEWER_PATH}{name} does not exist.")
    path = VIEWER / name
    if path.suffix == ".html":
        return HTMLResponse(read_page(name), headers=_HEADERS)
    return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)
