"""The query parameters of the endpoints, derived from the options of the answer formats."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

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


def refuse_repeated(query: ImageQuery, names: Iterable[str]) -> None:
    """Refuse an option of one value that is given several times; else one would win silently.

    Args:
        query: what was read.
        names: of the parameters as they were sent, repetitions included.

    Raises:
        OptionError: there is one.
    """
    for name, times in Counter(names).items():
        if times > 1 and not isinstance(getattr(query, name), list):
            raise OptionError(f"{name} is given {times} times, expected once.")


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
