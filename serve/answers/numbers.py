"""A segmentation as numbers: the JSON of its summary."""

from serve.answers.format import AnswerFormat
from serve.inference.summary import Summary

NUMBERS = AnswerFormat(
    name="json",
    title="Numbers",
    kind="JSON",
    description="Numbers per class: share of the pixels, area, confidence, predicted IoU.",
    media_type="application/json",
    suffix=".json",
    route="/segment",
    document=Summary,
    write=lambda source, _: source.result.summary.model_dump_json(indent=2).encode(),
)
