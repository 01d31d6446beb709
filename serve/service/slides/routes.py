"""The routes of slides: the list, tiles of slides and of their results, regions, and downloads.

GET  /slides                                        all slides of the folder
GET  /slides/{id}                                   size, um per pixel, tiles, result, last job
GET  /slides/{id}/thumbnail.jpeg                    the whole slide, at most 128 pixels a side
GET  /slides/{id}/tiles/{level}/{column}_{row}.jpeg Deep Zoom
POST /slides/{id}/region/{format}                   segment a region, as /segment and others do
GET  /slides/{id}/result/tiles/{level}/{column}_{row}.png|npz   labels; labels and confidence
GET  /slides/{id}/result/files/{file}               an output; a folder comes as a zip
"""

import hashlib
import re
import stat
from collections.abc import Mapping
from typing import Annotated

from fastapi import Path, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response, StreamingResponse

from serve.answers.format import labels_of
from serve.contract.errors import NotFoundError
from serve.contract.strict import Strict
from serve.service.gateway import IS_HEAD
from serve.service.route import Route
from serve.service.slides.described import (
    RESULT_FILE,
    RESULT_TILE,
    SLIDE,
    SLIDES,
    THUMBNAIL,
    TILE,
    with_errors,
)
from serve.service.slides.documents import SlideList
from serve.service.slides.folder import SlideFile
from serve.service.slides.region import REGION_ROUTE
from serve.service.slides.results import zip_folder
from serve.service.slides.state import SlideId, Slides, slide_of

_TILE_NAME = r"^[0-9]{1,7}_[0-9]{1,7}\.(jpeg|png|npz)$"
_FOR_A_YEAR, _ASK_AGAIN = "private, max-age=31536000, immutable", "private, no-cache"
_JSON = "application/json"
_RANGE = r"(?:\d{1,18}-(?:\d{1,18})?|-\d{1,18})"
_RANGES = re.compile(rf"bytes=\s*{_RANGE}(?:\s*,\s*{_RANGE})*\s*")

Level = Annotated[int, Path(ge=0, le=64, description="of the pyramid", examples=[0])]
TileName = Annotated[
    str, Path(pattern=_TILE_NAME, description="column, row and kind", examples=["0_0.jpeg"])
]


class TileQuery(Strict):
    """The query of a tile."""

    v: str = Field(
        "",
        max_length=64,
        description="version of the slide or result: with the right one the tile may be kept",
        examples=["5c1f0e9a7b3d2e4f"],
    )


class ResultTileQuery(TileQuery):
    """The query of a tile of a result."""

    classes: list[str] = Field(
        default_factory=list,
        description="names of the classes to show in a PNG; by default all",
        examples=[["Tumor", "Stroma"]],
    )


async def _list(request: Request) -> Response:
    """All slides of the folder, with the state of each."""
    slides: Slides = request.app.state.slides
    found = SlideList(slides=await run_in_threadpool(slides.entries))
    return Response(found.model_dump_json(), media_type=_JSON)


async def _slide(request: Request, slide_id: SlideId) -> Response:
    """A slide: size, um per pixel, how its tiles lie, its result and its last job."""
    slides, slide = await slide_of(request, slide_id)
    return Response((await slides.info(slide)).model_dump_json(), media_type=_JSON)


async def _thumbnail(
    request: Request, slide_id: SlideId, query: Annotated[TileQuery, Query()]
) -> Response:
    """The whole slide, at most 128 pixels a side."""
    slides, slide = await slide_of(request, slide_id)
    headers = _cached(slide.version, query.v, slide.id, "thumbnail")
    return await _jpeg(request, headers, slides, slide, "thumbnail")


async def _tile(
    request: Request,
    slide_id: SlideId,
    level: Level,
    name: TileName,
    query: Annotated[TileQuery, Query()],
) -> Response:
    """A Deep Zoom tile of the slide: level 0 is one pixel, the last is full resolution."""
    slides, slide = await slide_of(request, slide_id)
    column, row, kind = _parts(name)
    if kind != "jpeg":
        raise NotFoundError(f"Tiles of slides are .jpeg, not .{kind}.")
    headers = _cached(slide.version, query.v, slide.id, level, name)
    place = {"level": level, "column": column, "row": row}
    return await _jpeg(request, headers, slides, slide, "tile", **place)


async def _result_tile(
    request: Request,
    slide_id: SlideId,
    level: Level,
    name: TileName,
    query: Annotated[ResultTileQuery, Query()],
) -> Response:
    """A tile of the result, level 0 the finest.

    `.png`: the labels with the classes' colours. `.npz`: `labels` and `confidence`, uint8, as
    `numpy.load` reads them.
    """
    slides, slide = await slide_of(request, slide_id)
    result = await run_in_threadpool(slides.results.get, slide.name)
    column, row, kind = _parts(name)
    if kind == "jpeg":
        raise NotFoundError("Tiles of results are .png or .npz, not .jpeg.")
    headers = _cached(result.version, query.v, slide.id, level, name, *query.classes)
    if _is_known(request, headers):
        return Response(status_code=304, headers=headers)
    model = result.passport.plan.model
    shown = labels_of(query.classes, model.classes) or list(range(1, len(model.classes) + 1))
    _, content = await slides.readers.ask(
        "cells",
        store=str(result.store),
        version=result.version,
        level=level,
        column=column,
        row=row,
        form=kind,
        colors=[tissue.color for tissue in model.classes],
        shown=shown,
    )
    media_type = "image/png" if kind == "png" else "application/x-npz"
    return Response(content, media_type=media_type, headers=headers)


async def _file(
    request: Request,
    slide_id: SlideId,
    file: Annotated[
        str, Path(max_length=300, description="as the slide lists it", examples=["summary.json"])
    ],
) -> Response:
    """An output of the result; the OME-Zarr comes as a zip."""
    slides, slide = await slide_of(request, slide_id)
    path, found, entry = await run_in_threadpool(slides.results.download, slide.name, file)
    if stat.S_ISDIR(found.st_mode):
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{file}.zip")
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        parts = () if IS_HEAD in request.scope else zip_folder(path)
        return StreamingResponse(parts, media_type=entry.media_type, headers=headers)
    _ignore_invalid_range(request)
    answer = FileResponse(
        path,
        media_type=entry.media_type,
        filename=file,
        headers={"Cache-Control": _ASK_AGAIN, "X-Content-Type-Options": "nosniff"},
        stat_result=found,
    )
    if _is_known(request, answer.headers):
        kept = {name: answer.headers[name] for name in ("ETag", "Cache-Control", "Last-Modified")}
        return Response(status_code=304, headers=kept)
    return answer


def _ignore_invalid_range(request: Request) -> None:
    """Ignore a Range header that cannot be understood, as RFC 9110, section 14.2 has it."""
    stated = request.headers.get("range", "")
    spans = re.findall(r"(\d+)-(\d+)", stated)
    if not _RANGES.fullmatch(stated) or any(int(first) > int(last) for first, last in spans):
        headers = request.scope["headers"]
        request.scope["headers"] = [pair for pair in headers if pair[0] != b"range"]


def _parts(name: str) -> tuple[int, int, str]:
    place, _, kind = name.partition(".")
    column, _, row = place.partition("_")
    return int(column), int(row), kind


async def _jpeg(
    request: Request,
    headers: dict[str, str],
    slides: Slides,
    slide: SlideFile,
    operation: str,
    **place: int,
) -> Response:
    """What a reader's process makes of a slide, unless the caller has it."""
    if _is_known(request, headers):
        return Response(status_code=304, headers=headers)
    _, content = await slides.readers.ask(operation, **slides.place(slide), **place)
    return Response(content, media_type="image/jpeg", headers=headers)


def _cached(version: str, asked: str, *parts: object) -> dict[str, str]:
    """Cache headers of a tile: unlimited if its address names its version."""
    digest = hashlib.sha256(repr((version, *parts)).encode()).hexdigest()[:24]
    keep = _FOR_A_YEAR if asked == version else _ASK_AGAIN
    return {"ETag": f'"{digest}"', "Cache-Control": keep}


def _is_known(request: Request, headers: Mapping[str, str]) -> bool:
    known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
    return "*" in known or headers["ETag"] in (tag.removeprefix("W/") for tag in known)


def slide_routes() -> tuple[Route, ...]:
    """The routes, of an application whose state has `slides`."""
    slide = "/slides/{slide_id}"
    thumbnail, file = f"{slide}/thumbnail.jpeg", f"{slide}/result/files/{{file}}"
    tile = f"{slide}/tiles/{{level}}/{{name}}"
    result_tile = f"{slide}/result/tiles/{{level}}/{{name}}"
    found = (400, 404, 429, 503)
    return (
        Route("GET", "/slides", _list, with_errors(SLIDES, 400, 503)),
        Route("GET", slide, _slide, with_errors(SLIDE, *found)),
        Route("GET", thumbnail, _thumbnail, with_errors(THUMBNAIL, *found), TileQuery),
        Route("GET", tile, _tile, with_errors(TILE, *found), TileQuery),
        Route("GET", result_tile, _result_tile, with_errors(RESULT_TILE, *found), ResultTileQuery),
        REGION_ROUTE,
        Route("GET", file, _file, with_errors(RESULT_FILE, 400, 404, 503)),
    )
