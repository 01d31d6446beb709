"""The forms in which a segmentation is handed out, the same over HTTP and on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.answers.annotations import dsa_annotation, geojson
from serve.answers.pictures import (
    arrays_npz,
    confidence_png,
    label_png,
    overlay_png,
    probabilities_npz,
)
from serve.answers.polygons import select_labels, trace_regions
from serve.contract.errors import OptionError
from serve.contract.manifest import Manifest
from serve.inference.segmenter import Segmentation

Form = Literal[
    "json", "labels", "confidence", "overlay", "geojson", "dsa", "probabilities", "arrays"
]
MEDIA_TYPES: dict[Form, str] = {
    "json": "application/json",
    "labels": "image/png",
    "confidence": "image/png",
    "overlay": "image/png",
    "geojson": "application/geo+json",
    "dsa": "application/json",
    "probabilities": "application/x-npz",
    "arrays": "application/x-npz",
}
SUFFIXES: dict[Form, str] = {
    "json": ".json",
    "labels": ".labels.png",
    "confidence": ".confidence.png",
    "overlay": ".overlay.png",
    "geojson": ".geojson",
    "dsa": ".dsa.json",
    "probabilities": ".probabilities.npz",
    "arrays": ".npz",
}

LARGEST = {"alpha": 1, "simplify_px": 100, "min_area_px": 10**9}
"""The largest value of each option that is a number; the smallest is 0."""


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How a form is drawn; each form takes what concerns it.

    Raises:
        OptionError: a number is outside of what it may be.
    """

    alpha: float = 0.5
    """Overlay: 0 shows the image only, 1 the colours only."""
    classes: Sequence[str] = ()
    """Overlay, GeoJSON, DSA: names of the classes to show; by default all."""
    simplify_px: float = 0.0
    """GeoJSON, DSA: see `trace_regions`."""
    min_area_px: int = 0
    """GeoJSON, DSA: see `trace_regions`."""
    with_probabilities: bool = False
    """Arrays: also the probabilities of all classes."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if not 0 <= value <= largest:  # nor is nan
                raise OptionError(f"{name} is {value:g}, expected a number from 0 to {largest}.")


def needs_probabilities(forms: Sequence[Form], options: RenderOptions) -> bool:
    """Whether the image has to be segmented with the probabilities of all classes."""
    return "probabilities" in forms or ("arrays" in forms and options.with_probabilities)


def render(
    form: Form,
    image: NDArray[np.uint8],
    result: Segmentation,
    manifest: Manifest,
    options: RenderOptions,
) -> bytes:
    """The segmentation in one of its forms.

    Args:
        form: which one.
        image: (H, W, 3) uint8 that was segmented.
        result: the segmentation; for `probabilities` made with these.
        manifest: of the model.
        options: how to draw.

    Raises:
        OptionError: a class is not one of the model's.
        ImageTooLargeError: the labels have more outlines than can be of use.
    """
    match form:
        case "json":
            return result.summary.model_dump_json(indent=2).encode()
        case "labels":
            return label_png(result.labels, manifest)
        case "confidence":
            return confidence_png(result.confidence)
        case "overlay":
            shown = labels_of(options.classes, manifest) if options.classes else None
            return overlay_png(image, result.labels, manifest, alpha=options.alpha, shown=shown)
        case "probabilities":
            assert result.low_res is not None, "the caller has to ask for them"
            return probabilities_npz(result.low_res, manifest)
        case "arrays":
            return arrays_npz(result.labels, result.confidence, result.summary, result.low_res)
        case "geojson" | "dsa":
            return _render_regions(form, result, manifest, options)


def labels_of(names: Sequence[str], manifest: Manifest) -> list[int]:
    """The labels of classes by name.

    Raises:
        OptionError: a class is not one of the model's.
    """
    labels = {tissue.name: label for label, tissue in enumerate(manifest.classes, start=1)}
    for name in names:
        if name not in labels:
            raise OptionError(
                f"the model has no class {name!r}, only {', '.join(labels)}. Choose of these."
            )
    return [labels[name] for name in names]


def _render_regions(
    form: Literal["geojson", "dsa"],
    result: Segmentation,
    manifest: Manifest,
    options: RenderOptions,
) -> bytes:
    shown = labels_of(options.classes, manifest) if options.classes else None
    regions = trace_regions(
        result.labels,
        result.confidence,
        simplify_px=options.simplify_px,
        min_area_px=options.min_area_px,
    )
    if shown is not None:
        regions = select_labels(regions, np.array(shown))
    write = geojson if form == "geojson" else dsa_annotation
    return write(regions, result.summary, manifest)
