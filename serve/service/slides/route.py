"""A route of slides or jobs as one entry, from which the application and OpenAPI take it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from serve.contract.strict import Strict
from serve.service.openapi import Responses
from serve.service.queries import refuse_other_queries
from serve.service.slides.described import with_errors
from serve.service.slides.folder import SlideFile
from serve.service.slides.state import Slides

SlideId = Annotated[
    str, Path(description="of a slide, from /slides", examples=["0f2d8c6b7e3a4d5f"])
]


@dataclass(frozen=True)
class Route:
    """A path, what answers it, and with what."""

    method: str
    path: str
    endpoint: Any
    """Its name, without the underscore, is the route's."""
    answers: Responses
    errors: tuple[int, ...]
    """Statuses of the errors that it may answer with, except for those of keys, and 500."""
    query: type[Strict] | None = None
    """None: it takes no query."""


def add_routes(app: FastAPI, routes: Iterable[Route], key_errors: Responses) -> None:
    """Add routes to an application whose state gets `slides`."""
    for route in routes:
        if route.query is not None:
            app.state.queries[route.path] = tuple(route.query.model_fields)
        app.add_api_route(
            route.path,
            route.endpoint,
            dependencies=[Depends(refuse_other_queries(route.query))],
            methods=[route.method],
            name=route.endpoint.__name__.removeprefix("_"),
            response_class=Response,
            responses=with_errors(route.answers, *route.errors, keys=key_errors),
        )


async def slide_of(request: Request, slide_id: str) -> tuple[Slides, SlideFile]:
    """The slides of the application, and the one of an id.

    Raises:
        NotFoundError: there is none of this id.
    """
    slides: Slides = request.app.state.slides
    return slides, await run_in_threadpool(slides.folder.find, slide_id)
