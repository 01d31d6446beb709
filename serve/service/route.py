"""A route as one entry, from which the application and the OpenAPI document take it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from serve.service.openapi import Responses
from serve.service.queries import refuse_other_queries


@dataclass(frozen=True)
class Route:
    """A path, what answers it, and with what."""

    method: str
    path: str
    endpoint: Any
    responses: Responses
    """By status, without those of keys."""
    query: type[BaseModel] | None = None
    """None: it takes no query."""
    body: dict[str, Any] | None = None
    """The description of a body that FastAPI does not read."""
    name: str | None = None
    """By default that of the endpoint, without the underscore."""


def add_routes(app: FastAPI, routes: Iterable[Route], key_errors: Responses) -> None:
    """Add routes to an application, with the errors of keys where it asks for some."""
    for route in routes:
        app.add_api_route(
            route.path,
            route.endpoint,
            dependencies=[Depends(refuse_other_queries(route.query))],
            methods=[route.method],
            name=route.name or route.endpoint.__name__.removeprefix("_"),
            response_class=Response,
            responses={**route.responses, **key_errors},
            openapi_extra=route.body,
        )
