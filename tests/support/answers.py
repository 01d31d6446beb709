"""What answers are written from, made from labels alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.answers.format import Source
from serve.contract.manifest import Manifest
from serve.inference.segmenter import Segmentation
from serve.inference.summary import summarise
from serve.inference.tiling import LowResProbabilities, Prediction


def source_of(
    manifest: Manifest,
    labels: NDArray[np.uint8],
    *,
    image: NDArray[np.uint8] | None = None,
    confidence: int = 204,
    low_res: LowResProbabilities | None = None,
    **scale: Any,
) -> Source:
    """An image, black where none is given, that was segmented to these labels."""
    certain = np.full(labels.shape, confidence, np.uint8)
    summary = summarise(Prediction(labels, certain, np.zeros(5, np.float32)), manifest, **scale)
    pixels = np.zeros((*labels.shape, 3), np.uint8) if image is None else image
    return Source(pixels, Segmentation(labels, certain, summary, low_res), manifest)
