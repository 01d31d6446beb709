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
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Path, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response, StreamingResponse

from serve.answers.format import labels_of
from serve.answers.registry import FORMATS
from serve.contract.errors import ImageTooLargeError, NotFoundError, OptionError
from serve.contract.strict import Strict
from serve.images.mpp import MAX_MPP, MIN_MPP
from serve.service.kept import KEEP_HEADER
from serve.service.openapi import Responses
from serve.service.queries import refuse_other_queries
from serve.service.slides.described import (
    REGION,
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
from serve.service.slides.state import Slides
from serve.service.slides.zipped import zip_folder
from serve.service.worker import Job, Worker, response_of

_TILE_NAME = r"^[0-9]{1,7}_[0-9]{1,7}\.(jpeg|png|npz)$"
_FOR_A_YEAR, _ASK_AGAIN = "private, max-age=31536000, immutable", "private, no-cache"
_JSON = "application/json"

SlideId = Annotated[
    str, Path(description="of a slide, from /slides", examples=["0f2d8c6b7e3a4d5f"])
]
Level = Annotated[int, Path(ge=0, le=64, description="of the pyramid", examples=[0])]
TileName = Annotated[
    str, Path(pattern=_TILE_NAME, description="column, row and kind", examples=["0_0.jpeg"])
]
_REGION_FORMATS = tuple(entry.path[1:] for entry in FORMATS.values())


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


class RegionQuery(Strict):
    """The region, in pixels of the slide's level 0."""

    x: float = Field(ge=-1e7, le=1e7, description="left edge", examples=[1024])
    y: float = Field(ge=-1e7, le=1e7, description="top edge", examples=[2048])
    width: float = Field(ge=1, le=1e7, description="pixels across", examples=[512])
    height: float = Field(ge=1, le=1e7, description="pixels down", examples=[512])
    mpp: float | None = Field(
        None,
        ge=MIN_MPP,
        le=MAX_MPP,
        description="um per pixel of level 0, where the file does not say it or is wrong",
        examples=[0.25],
    )


async def _of(request: Request, slide_id: str) -> tuple[Slides, SlideFile]:
    slides: Slides = request.app.state.slides
    return slides, await run_in_threadpool(slides.folder.find, slide_id)


async def _list(request: Request) -> Response:
    """All slides of the folder, with the state of each."""
    slides: Slides = request.app.state.slides
    found = SlideList(slides=await run_in_threadpool(slides.entries))
    return Response(found.model_dump_json(), media_type=_JSON)


async def _slide(request: Request, slide_id: SlideId) -> Response:
    """A slide: size, um per pixel, how its tiles lie, its result and its last job."""
    slides, slide = await _of(request, slide_id)
    return Response((await slides.info(slide)).model_dump_json(), media_type=_JSON)


async def _thumbnail(
    request: Request, slide_id: SlideId, query: Annotated[TileQuery, Query()]
) -> Response:
    """The whole slide, at most 128 pixels a side."""
    slides, slide = await _of(request, slide_id)
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
    slides, slide = await _of(request, slide_id)
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
    slides, slide = await _of(request, slide_id)
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


async def _region(
    request: Request,
    slide_id: SlideId,
    format_: Annotated[
        Literal[_REGION_FORMATS],  # type: ignore[valid-type]
        Path(alias="format", description="as the routes of images"),
    ],
    query: Annotated[RegionQuery, Query()],
) -> Response:
    """Segment a region at the model's um per pixel, as an image of it would be.

    Outlines are in pixels of the slide's level 0. What of it lies outside of the slide is white. A
    region of too many pixels is a 413.
    """
    slides, slide = await _of(request, slide_id)
    state = request.app.state
    worker: Worker = state.worker
    manifest = await worker.look(state.model.manifest)
    found, _ = await slides.readers.ask("info", **slides.place(slide), mpp=query.mpp)
    _refuse_outside(query, found["bounds"], slide.file)
    own = found["mpp"]
    target = manifest.mpp or own
    if own is not None:
        _refuse_large(query, own / target, slides.max_region_px)
    place = {"x": query.x, "y": query.y, "width": query.width, "height": query.height}
    drawn, png = await slides.readers.ask(
        "region", **slides.place(slide), mpp=query.mpp, target_mpp=target, **place
    )
    width, height = drawn["level0_px"]
    name = f"{slide.name} [x={query.x:.2f},y={query.y:.2f},w={width:.4f},h={height:.4f}].png"
    entry = next(entry for entry in FORMATS.values() if entry.path[1:] == format_)
    keep = request.headers.get(KEEP_HEADER, "no") != "no"
    job = Job(formats=(entry.name,), mpp=target, keep=keep)
    tiles = await worker.look(lambda: worker.weigh(state.model, png, job))
    done = await worker.run(lambda: worker.answer(state.model, png, job, name), tiles=tiles)
    return response_of(done, entry)


def _refuse_outside(query: RegionQuery, bounds: tuple[int, int, int, int], file: str) -> None:
    x, y, width, height = bounds
    if (
        query.x >= x + width
        or query.y >= y + height
        or query.x + query.width <= x
        or query.y + query.height <= y
    ):
        raise OptionError(
            f"The region lies outside of {file}, which goes from x {x} to {x + width} and from y "
            f"{y} to {y + height}."
        )


def _refuse_large(query: RegionQuery, scale: float, limit: int) -> None:
    pixels = query.width * query.height * scale**2
    if pixels > limit:
        raise ImageTooLargeError(
            f"The region has {pixels:.0f} pixels at the model's um per pixel, at most {limit} are "
            "accepted. Draw a smaller one, or segment the slide with POST /jobs."
        )


async def _file(
    request: Request,
    slide_id: SlideId,
    file: Annotated[
        str, Path(max_length=300, description="as the slide lists it", examples=["summary.json"])
    ],
) -> Response:
    """An output of the result; the OME-Zarr comes as a zip."""
    slides, slide = await _of(request, slide_id)
    path, entry = await run_in_threadpool(slides.results.download, slide.name, file)
    if path.is_dir():
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{file}.zip")
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(zip_folder(path), media_type=entry.media_type, headers=headers)
    return FileResponse(
        path,
        media_type=entry.media_type,
        filename=file,
        headers={"Cache-Control": _ASK_AGAIN, "X-Content-Type-Options": "nosniff"},
    )


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


def _is_known(request: Request, headers: dict[str, str]) -> bool:
    known = request.headers.get("if-none-match", "")
    return headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known.split(","))


def add_slide_routes(app: FastAPI, key_errors: Responses) -> None:
    """Add the routes to an application whose state gets `slides`."""
    below = "/slides/{slide_id}"
    routes: list[tuple[str, str, Any, Responses]] = [
        ("GET", "/slides", _list, with_errors(SLIDES, 400, 503, keys=key_errors)),
        ("GET", below, _slide, with_errors(SLIDE, 400, 404, 429, 503, keys=key_errors)),
        (
            "GET",
            f"{below}/thumbnail.jpeg",
            _thumbnail,
            with_errors(THUMBNAIL, 400, 404, 429, 503, keys=key_errors),
        ),
        (
            "GET",
            f"{below}/tiles/{{level}}/{{name}}",
            _tile,
            with_errors(TILE, 400, 404, 429, 503, keys=key_errors),
        ),
        (
            "GET",
            f"{below}/result/tiles/{{level}}/{{name}}",
            _result_tile,
            with_errors(RESULT_TILE, 400, 404, 429, 503, keys=key_errors),
        ),
        (
            "POST",
            f"{below}/region/{{format}}",
            _region,
            with_errors(REGION, 400, 404, 408, 413, 429, 503, 504, keys=key_errors),
        ),
        (
            "GET",
            f"{below}/result/files/{{file}}",
            _file,
            with_errors(RESULT_FILE, 400, 404, 503, keys=key_errors),
        ),
    ]
    queries: dict[Any, type[Strict]] = {
        _thumbnail: TileQuery,
        _tile: TileQuery,
        _result_tile: ResultTileQuery,
        _region: RegionQuery,
    }
    for method, path, endpoint, responses in routes:
        if endpoint in queries:
            app.state.queries[path] = tuple(queries[endpoint].model_fields)
        app.add_api_route(
            path,
            endpoint,
            dependencies=[Depends(refuse_other_queries(queries.get(endpoint)))],
            methods=[method],
            name=endpoint.__name__.removeprefix("_"),
            response_class=Response,
            responses=responses,
        )
