"""A segmentation as pictures and arrays: PNG of labels, confidence and overlay, and .npz."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from serve.contract.manifest import Manifest
from serve.inference.summary import Summary
from serve.inference.tiling import LowResProbabilities


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
    return _to_png(blended, compress_level=1)  # a photograph: more effort saves little


def rgb_png(image: NDArray[np.uint8]) -> bytes:
    """An (H, W, 3) uint8 image as a PNG, quickly rather than small."""
    return _to_png(Image.fromarray(image), compress_level=1)


def arrays_npz(
    labels: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    summary: Summary,
    low_res: LowResProbabilities | None = None,
) -> bytes:
    """`labels`, `confidence` and `summary`, and the probabilities' arrays where there are any."""
    arrays: dict[str, NDArray[Any]] = {
        "labels": labels,
        "confidence": confidence,
        "summary": np.frombuffer(summary.model_dump_json().encode(), np.uint8),
    }
    if low_res is not None:
        arrays |= _probability_arrays(low_res)
    return _to_npz(arrays)


def probabilities_npz(low_res: LowResProbabilities, manifest: Manifest) -> bytes:
    """`probabilities`, `origin_px` and `stride_px` (y, x) in the image's pixels, and `classes`.

    Cell (i, j) is of the pixels from `origin_px + (i, j) * stride_px` to one stride further.
    """
    names = np.array([tissue.name for tissue in manifest.classes])
    return _to_npz({**_probability_arrays(low_res), "classes": names})


def _probability_arrays(low_res: LowResProbabilities) -> dict[str, NDArray[Any]]:
    return {
        "probabilities": low_res.probabilities,
        "origin_px": np.array(low_res.origin_px),
        "stride_px": np.array(low_res.stride_px),
    }


def _to_npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _palette_image(labels: NDArray[np.uint8], manifest: Manifest) -> Image.Image:
    indexed = Image.fromarray(labels)
    colors = ["#000000", *(tissue.color for tissue in manifest.classes)]
    indexed.putpalette([channel for color in colors for channel in ImageColor.getrgb(color)])
    return indexed


def _to_png(image: Image.Image, *, compress_level: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()
