"""A segmentation as pictures: PNG of the labels, of the confidence, and of the overlay."""

import io
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from serve.answers.format import AnswerFormat, ClassOptions
from serve.contract.manifest import Manifest


def label_png(labels: NDArray[np.uint8], manifest: Manifest) -> bytes:
    """An indexed PNG whose pixel values are the labels and whose palette is the classes' colours.

    Args:
        labels: (H, W) uint8, 0..C.
        manifest: names the colours.
    """
    return _to_png(_palette_image(labels, manifest), compress_level=6)


def confidence_png(confidence: NDArray[np.uint8]) -> bytes:
    """A grey PNG of the confidence.

    Args:
        confidence: (H, W) uint8, 255 = 1.0.
    """
    return _to_png(Image.fromarray(confidence), compress_level=1)


def overlay_png(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    manifest: Manifest,
    *,
    alpha: float = 0.5,
    shown: Sequence[int] | None = None,
) -> bytes:
    """The image with the classes' colours over it, as an RGB PNG.

    Args:
        image: (H, W, 3) uint8, RGB in [0, 255].
        labels: (H, W) uint8, 0..C.
        manifest: names the colours.
        alpha: 0 shows the image only, 1 the colours only.
        shown: labels whose colours are shown; by default all.
    """
    picture = Image.fromarray(image)
    colors = _palette_image(labels, manifest).convert("RGB")
    blended = Image.blend(picture, colors, alpha)
    if shown is not None:
        visible = np.isin(np.arange(256), shown) * np.uint8(255)
        blended = Image.composite(blended, picture, Image.fromarray(visible[labels]))
    return _to_photo_png(blended)


def rgb_png(image: NDArray[np.uint8]) -> bytes:
    """An (H, W, 3) uint8 image as a PNG, quickly rather than small."""
    return _to_photo_png(Image.fromarray(image))


def _palette_image(labels: NDArray[np.uint8], manifest: Manifest) -> Image.Image:
    indexed = Image.fromarray(labels)
    colors = [(0, 0, 0), *(tissue.rgb for tissue in manifest.classes)]
    indexed.putpalette([channel for color in colors for channel in color])
    return indexed


def _to_photo_png(image: Image.Image) -> bytes:
    """Quickly: no search for repeated bytes, of which filtered tissue has few.

    Tissue takes 10% less time and 10% fewer bytes than with the search at the same level.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def _to_png(image: Image.Image, *, compress_level: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


class OverlayOptions(ClassOptions):
    """How the overlay is drawn."""

    alpha: float = Field(
        0.5, ge=0, le=1, description="0 shows the image only, 1 the colours only", examples=[0.4]
    )


LABELS = AnswerFormat(
    name="labels",
    title="Labels",
    kind="PNG",
    description="An indexed PNG: its pixel values are the labels, its palette is the colours.",
    media_type="image/png",
    suffix=".labels.png",
    write=lambda source, _: label_png(source.result.labels, source.manifest),
)
CONFIDENCE = AnswerFormat(
    name="confidence",
    title="Confidence",
    kind="PNG",
    description="A grey PNG of the probability of each pixel's label, 255 = 1.0.",
    media_type="image/png",
    suffix=".confidence.png",
    write=lambda source, _: confidence_png(source.result.confidence),
)
OVERLAY = AnswerFormat(
    name="overlay",
    title="Overlay",
    kind="PNG",
    description="The image with the classes' colours over it, as a PNG.",
    media_type="image/png",
    suffix=".overlay.png",
    options=OverlayOptions,
    write=lambda source, options: overlay_png(
        source.image,
        source.result.labels,
        source.manifest,
        alpha=options.alpha,
        shown=options.shown(source.manifest),
    ),
)
