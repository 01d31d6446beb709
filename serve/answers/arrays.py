"""A segmentation as numbers: the JSON of its summary, and NumPy arrays in .npz files."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from serve.answers.format import AnswerFormat, Options, Source
from serve.inference.summary import Summary
from serve.inference.tiling import LowResProbabilities


def _probabilities(source: Source, _: Options) -> bytes:
    """`probabilities`, `origin_px` and `stride_px` (y, x) in the image's pixels, and `classes`.

    Cell (i, j) is of the pixels from `origin_px + (i, j) * stride_px` to one stride further.
    """
    assert source.result.low_res is not None, "the caller has to ask for them"
    names = np.array([tissue.name for tissue in source.manifest.classes])
    return _to_npz(_probability_arrays(source.result.low_res) | {"classes": names})


def _arrays(source: Source, _: Options) -> bytes:
    """`labels`, `confidence` and `summary`, and the probabilities' arrays where there are any."""
    result = source.result
    arrays = {
        "labels": result.labels,
        "confidence": result.confidence,
        "summary": np.frombuffer(result.summary.model_dump_json().encode(), np.uint8),
    }
    if result.low_res is not None:
        arrays |= _probability_arrays(result.low_res)
    return _to_npz(arrays)


def _probability_arrays(low_res: LowResProbabilities) -> dict[str, NDArray[Any]]:
    return {
        "probabilities": low_res.probabilities,
        "origin_px": np.array(low_res.origin_px),
        "stride_px": np.array(low_res.stride_px),
    }


def _to_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


class ArraysOptions(Options):
    """What the arrays have beside labels and confidence."""

    probabilities: bool = Field(
        False,
        description="also the probabilities of all classes, as /probabilities has them",
        examples=[True],
    )


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
PROBABILITIES = AnswerFormat(
    name="probabilities",
    title="Probabilities",
    kind="NumPy",
    description="An npz of all classes' probabilities at the decoder's resolution, and where its "
    "cells are.",
    content="NumPy's npz of `probabilities` (C x h x w uint8, 255 = 1.0), `classes` (their names), "
    "`origin_px` and `stride_px` (y, x): cell (i, j) is of the pixels from "
    "origin_px + (i, j) * stride_px to one stride further",
    media_type="application/x-npz",
    suffix=".probabilities.npz",
    needs_probabilities=lambda _: True,
    write=_probabilities,
    in_batch=False,
)
ARRAYS = AnswerFormat(
    name="arrays",
    title="Arrays",
    kind="NumPy",
    description="An npz of `labels`, `confidence` and `summary`, for programs.",
    content="NumPy's npz of `labels` and `confidence` (H x W uint8) and `summary` (the JSON of "
    "/segment as bytes)",
    media_type="application/x-npz",
    suffix=".npz",
    options=ArraysOptions,
    needs_probabilities=lambda options: options.probabilities,
    write=_arrays,
    in_batch=False,
    as_file=False,
)
