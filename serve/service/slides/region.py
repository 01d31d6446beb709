"""The route that segments a region of a slide, as the routes of images segment an image."""

from typing import Annotated, Literal

from fastapi import Path, Query, Request
from pydantic import Field
from starlette.responses import Response

from serve.answers.frame import Frame
from serve.answers.registry import FORMATS
from serve.contract.errors import ImageTooLargeError, OptionError
from serve.contract.strict import Strict
from serve.images.mpp import MAX_MPP, MIN_MPP
from serve.images.tiles import check_enlargement
from serve.service.kept import KEEP_HEADER
from serve.service.route import Route
from serve.service.slides.described import REGION, with_errors
from serve.service.slides.state import SlideId, slide_of
from serve.service.worker import Job, answer_image

_REGION_FORMATS = tuple(entry.path[1:] for entry in FORMATS.values())


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
    slides, slide = await slide_of(request, slide_id)
    state = request.app.state
    manifest = await state.worker.look(state.model.manifest)
    found, _ = await slides.readers.ask("info", **slides.place(slide), mpp=query.mpp)
    _refuse_outside(query, found["bounds"], slide.file)
    own = found["mpp"]
    target = manifest.mpp or own
    if own is not None:
        check_enlargement(target, own, "the slide")
        _refuse_large(query, own / target, slides.max_region_px)
    place = {"x": query.x, "y": query.y, "width": query.width, "height": query.height}
    drawn, png = await slides.readers.ask(
        "region", **slides.place(slide), mpp=query.mpp, target_mpp=target, **place
    )
    across, down = drawn["downsample"]
    entry = next(entry for entry in FORMATS.values() if entry.path[1:] == format_)
    keep = request.headers.get(KEEP_HEADER, "no") != "no"
    job = Job(
        formats=(entry.name,),
        mpp=target,
        mpp_source=found["mpp_source"],
        notes=tuple(found["notes"]),
        frame=Frame((query.x, query.y), (across, down)),
        keep=keep,
    )
    return await answer_image(state, png, job, slide.name)


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


REGION_ROUTE = Route(
    "POST",
    "/slides/{slide_id}/region/{format}",
    _region,
    with_errors(REGION, 400, 404, 408, 413, 429, 503, 504),
    RegionQuery,
)
