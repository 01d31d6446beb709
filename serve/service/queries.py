"""The query parameters of the endpoints, derived from the options of the answer formats."""

import difflib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Any, Literal, get_args, get_origin

from fastapi import Request
from pydantic import BaseModel, Field, create_model

from serve.answers.format import AnswerFormat, Options
from serve.answers.registry import batch_formats, merged_options
from serve.contract.errors import OptionError
from serve.images.mpp import MAX_MPP, MIN_MPP


class ImageQuery(Options):
    """Query parameters of every endpoint that takes an image."""

    mpp: float | None = Field(
        None,
        ge=MIN_MPP,
        le=MAX_MPP,
        description="um per pixel of the image; without it the file's own, or else the model's",
        examples=[0.25],
    )


def unknown_option(name: str, known: Collection[str]) -> OptionError:
    """The error of an option that a route does not have, with the nearest one that it has."""
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    listed = f"There are: {', '.join(known)}." if known else "There are none."
    return OptionError(f"{name!r} is not an option here.{hint} {listed}")


def refuse_other_queries(query: type[BaseModel] | None) -> Callable[[Request], Awaitable[None]]:
    """A dependency of a route: refuses what is not in its query, and repeated single values.

    Else one of the values would win silently.
    """
    fields = {} if query is None else query.model_fields

    async def check(request: Request) -> None:  # else FastAPI asks for a thread
        for name, times in Counter(key for key, _ in request.query_params.multi_items()).items():
            if name not in fields:
                raise unknown_option(name, fields)
            if times > 1 and not _takes_list(fields[name].annotation):
                raise OptionError(f"{name} is given {times} times, expected once.")

    return check


def _takes_list(annotation: Any) -> bool:
    return any(get_origin(kind) is list for kind in (annotation, *get_args(annotation)))


def format_query(entry: AnswerFormat) -> type[ImageQuery]:
    """The query parameters of a format's route."""
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in entry.options.model_fields.items()
    }
    return create_model(f"{entry.name}_query", __base__=ImageQuery, **fields)


def batch_query() -> type[ImageQuery]:
    """The query parameters of /batch: the options of its formats, and `outputs`."""
    formats = batch_formats()
    names = tuple(entry.name for entry in formats)
    outputs = Annotated[
        list[Literal[names]],  # type: ignore[valid-type]
        Field(
            default_factory=lambda: [names[0]],
            description="what to answer for each file; binary answers are in base64",
            examples=[["json", "geojson"]],
        ),
    ]
    options = merged_options(formats, ImageQuery)
    return create_model("batch_query", __base__=options, outputs=outputs)
