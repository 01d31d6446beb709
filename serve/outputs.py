"""What a segmentation becomes: a label PNG, an overlay, and numbers per class."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from pydantic import BaseModel, ConfigDict, Field

from serve.manifest import Manifest
from serve.tiling import Prediction

LOW_CONFIDENCE = 0.5
"""Pixels whose label has a probability below this count as of low confidence."""
_PIXELS_AT_ONCE = 2**20


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelName(_Answer):
    """Which model answered."""

    name: str
    version: str


class ImageSize(_Answer):
    """The size of the image as it was sent, upright."""

    width_px: int
    height_px: int


class ClassSummary(_Answer):
    """What the model found of one class."""

    name: str
    color: str
    label: int = Field(description="value in the label image, from 1")
    pixel_count: int
    pixel_share: float = Field(description="share of the image's pixels, 0 to 1")
    mean_confidence: float | None = Field(
        description="mean probability of the label over the class's pixels; null if it has none"
    )
    predicted_iou: float = Field(description="the IoU that the model expects of its own mask")


class Summary(_Answer):
    """The answer of `POST /segment`."""

    model: ModelName
    image: ImageSize
    classes: tuple[ClassSummary, ...]
    low_confidence_threshold: float = LOW_CONFIDENCE
    low_confidence_share: float = Field(
        description="share of the pixels whose confidence is below the threshold"
    )


def summarise(prediction: Prediction, manifest: Manifest) -> Summary:
    """Count pixels and average confidences per class."""
    height, width = prediction.labels.shape
    histogram = _joint_histogram(prediction)  # 256 labels x 256 confidences
    counts = histogram.sum(axis=1)
    confidence_sums = histogram @ np.arange(256) / 255
    below = int(np.ceil(LOW_CONFIDENCE * 255))  # first confidence byte that is not low
    classes = tuple(
        ClassSummary(
            name=tissue.name,
            color=tissue.color,
            label=label,
            pixel_count=int(counts[label]),
            pixel_share=float(counts[label] / counts.sum()),
            mean_confidence=float(confidence_sums[label] / counts[label])
            if counts[label]
            else None,
            predicted_iou=float(prediction.iou_scores[label - 1]),
        )
        for label, tissue in enumerate(manifest.classes, start=1)
    )
    return Summary(
        model=ModelName(name=manifest.name, version=manifest.version),
        image=ImageSize(width_px=width, height_px=height),
        classes=classes,
        low_confidence_share=float(histogram[:, :below].sum() / counts.sum()),
    )


def label_png(labels: NDArray[np.uint8], manifest: Manifest) -> bytes:
    """An indexed PNG whose pixel values are the labels and whose palette is the classes' colours.

    Args:
        labels: (H, W) uint8, 0..C.
        manifest: names the colours.
    """
    return _to_png(_palette_image(labels, manifest), compress_level=6)


def overlay_png(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    manifest: Manifest,
    *,
    alpha: float = 0.5,
) -> bytes:
    """The image with the classes' colours over it, as an RGB PNG.

    Args:
        image: (H, W, 3) uint8, RGB in [0, 255].
        labels: (H, W) uint8, 0..C.
        manifest: names the colours.
        alpha: 0 shows the image only, 1 the colours only.
    """
    colors = _palette_image(labels, manifest).convert("RGB")
    blended = Image.blend(Image.fromarray(image), colors, alpha)
    return _to_png(blended, compress_level=1)  # a photograph: more effort saves little


def _palette_image(labels: NDArray[np.uint8], manifest: Manifest) -> Image.Image:
    indexed = Image.fromarray(labels)
    colors = ["#000000", *(tissue.color for tissue in manifest.classes)]
    indexed.putpalette([channel for color in colors for channel in ImageColor.getrgb(color)])
    return indexed


def _to_png(image: Image.Image, *, compress_level: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


def _joint_histogram(prediction: Prediction) -> NDArray[Any]:
    """How often each label has each confidence, (256, 256) int64."""
    labels, confidence = prediction.labels.ravel(), prediction.confidence.ravel()
    histogram = np.zeros(256 * 256, np.int64)
    for start in range(0, len(labels), _PIXELS_AT_ONCE):
        part = slice(start, start + _PIXELS_AT_ONCE)
        pairs = labels[part].astype(np.intp) * 256 + confidence[part]
        histogram += np.bincount(pairs, minlength=len(histogram))
    return histogram.reshape(256, 256)
