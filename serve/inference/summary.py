"""A segmentation in numbers: pixels, area and confidence per class."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, JsonValue

from serve.contract.manifest import Manifest, TissueClass
from serve.contract.strict import Strict
from serve.images.mpp import ASSUMED, FROM_REQUEST, UNKNOWN, Mpp, MppSource, PixelSize, sides_of
from serve.images.tiles import UNSCALED, scale_to
from serve.inference.tiling import Prediction

_SOURCES = {
    FROM_REQUEST: "as requested",
    ASSUMED: "assumed: the model's own",
}
LOW_CONFIDENCE = 0.5
"""A pixel is of low confidence if the probability of its label is below this."""
_PIXELS_AT_ONCE = 2**20


class ModelName(Strict):
    """Which model answered."""

    name: str
    version: str


class ImageInfo(Strict):
    """The image as it was sent, upright."""

    width_px: int
    height_px: int
    mpp: float | None = Field(
        description="um per pixel that the image was taken to have; where pixels are not squares, "
        "the side of the square with the same area"
    )
    mpp_source: MppSource = Field(
        description=f"where `mpp` is from: `{FROM_REQUEST}`; what in the file states it, such as "
        "`OME-XML`, `Aperio MPP`, `ImageJ unit`, `TIFF resolution`, `PNG density` or `JPEG "
        f"density`; or `{ASSUMED}`: neither states it, so the labels are right only if the image "
        f"is at the model's own. `{UNKNOWN}`: the model's own is not known either"
    )
    mpp_xy: PixelSize | None = Field(
        default=None,
        description="um per pixel along a row and along a column, where pixels are not squares",
    )
    mpp_note: str = Field(
        default="",
        description="what the file states about its um per pixel, if that was not believed",
    )
    notes: tuple[str, ...] = Field(
        default=(),
        description="how the pixels that were segmented differ from the file's, such as turned "
        "upright; where the request states another um per pixel than the file; where it differs "
        "from the model's by more than the export found to be harmless; and where the labels of a "
        "resampled image are not those of the software that trained the model",
    )

    @property
    def is_mpp_known(self) -> bool:
        """Whether somebody stated the um per pixel: the request or the file."""
        return self.mpp is not None and self.mpp_source not in (ASSUMED, UNKNOWN)

    @property
    def scale(self) -> str:
        """The um per pixel and where it is from, for people."""
        if self.mpp is None:
            return "um per pixel unknown"
        sides = self.mpp_xy or f"{self.mpp:.4g}"
        return f"{sides} um per pixel, {_SOURCES.get(self.mpp_source, self.mpp_source)}"

    @property
    def um2_per_px(self) -> float | None:
        """Area of a pixel, where it is known and not assumed."""
        return self.mpp**2 if self.is_mpp_known and self.mpp else None


class ClassSummary(Strict):
    """What the model found of one class."""

    name: str
    color: str
    label: int = Field(description="value in the label image, from 1")
    pixel_count: int
    pixel_share: float = Field(description="share of the image's pixels, 0 to 1")
    area_um2: float | None = Field(
        description="null where the image's um per pixel is not known but assumed"
    )
    mean_confidence: float | None = Field(
        description="mean probability of the label over the class's pixels; null if it has none"
    )
    low_confidence_share: float | None = Field(
        description="share of the class's pixels whose confidence is below the threshold; null "
        "if it has none"
    )
    predicted_iou: float | None = Field(
        description="the IoU that the model expects of its own mask, 0 to 1; null where it was "
        "not trained to predict it"
    )


SUMMARY_EXAMPLE: dict[str, JsonValue] = {
    "model": {"name": "segmenter", "version": "1.0.0"},
    "image": {"width_px": 1024, "height_px": 1024, "mpp": 0.25, "mpp_source": "OME-XML"},
    "classes": [
        {
            "name": "Tumor",
            "color": "#d62728",
            "label": 1,
            "pixel_count": 262144,
            "pixel_share": 0.25,
            "area_um2": 16384.0,
            "mean_confidence": 0.93,
            "low_confidence_share": 0.02,
            "predicted_iou": 0.81,
        }
    ],
    "low_confidence_threshold": LOW_CONFIDENCE,
    "low_confidence_share": 0.03,
}


class Summary(Strict):
    """The answer of `POST /segment`."""

    model_config = ConfigDict(json_schema_extra={"examples": [SUMMARY_EXAMPLE]})

    model: ModelName
    image: ImageInfo
    classes: tuple[ClassSummary, ...]
    low_confidence_threshold: float = LOW_CONFIDENCE
    low_confidence_share: float = Field(
        description="share of the pixels whose confidence is below the threshold"
    )

    def with_notes(self, mpp_note: str, notes: tuple[str, ...]) -> Self:
        """Return a copy with the notes from reading the image's file."""
        image = self.image.model_copy(
            update={
                "mpp_note": "" if self.image.is_mpp_known else mpp_note,
                "notes": (*notes, *self.image.notes),
            }
        )
        return self.model_copy(update={"image": image})


def summarise(
    prediction: Prediction,
    manifest: Manifest,
    *,
    mpp: Mpp | None = None,
    mpp_source: MppSource = UNKNOWN,
) -> Summary:
    """Count pixels and average confidences per class.

    Args:
        prediction: of the whole image.
        manifest: of the model that made it.
        mpp: um per pixel of the image.
        mpp_source: where that is from.
    """
    height, width = prediction.labels.shape
    sides = None if mpp is None else sides_of(mpp)
    warning = None if sides is None else manifest.scale_warning(max(sides.x, sides.y))
    label_note = "" if scale_to(manifest.mpp, mpp) == UNSCALED else manifest.label_note
    image = ImageInfo(
        width_px=width,
        height_px=height,
        mpp=None if sides is None else sides.mean,
        mpp_xy=None if sides is None or sides.x == sides.y else sides,
        mpp_source=mpp_source,
        notes=tuple(note for note in (warning, label_note) if note),
    )
    histogram = _joint_histogram(prediction)  # 256 labels x 256 confidences
    first_high = int(np.ceil(LOW_CONFIDENCE * 255))  # first confidence byte that is not low
    low = int(histogram[:, :first_high].sum())
    iou_scores = prediction.iou_scores if manifest.predicts_iou else None
    classes = tuple(
        _summarise_class(tissue, label, histogram[label], height * width, image, iou_scores)
        for label, tissue in enumerate(manifest.classes, start=1)
    )
    return Summary(
        model=ModelName(name=manifest.name, version=manifest.version),
        image=image,
        classes=classes,
        low_confidence_share=low / (height * width),
    )


def _summarise_class(
    tissue: TissueClass,
    label: int,
    confidences: NDArray[np.int64],
    num_pixels: int,
    image: ImageInfo,
    iou_scores: NDArray[np.float32] | None,
) -> ClassSummary:
    """Compute the numbers of one class from its (256,) histogram of confidence."""
    count = int(confidences.sum())
    first_high = int(np.ceil(LOW_CONFIDENCE * 255))
    return ClassSummary(
        name=tissue.name,
        color=tissue.color,
        label=label,
        pixel_count=count,
        pixel_share=count / num_pixels,
        area_um2=None if image.um2_per_px is None else count * image.um2_per_px,
        mean_confidence=float(confidences @ np.arange(256)) / 255 / count if count else None,
        low_confidence_share=int(confidences[:first_high].sum()) / count if count else None,
        # The model's output has no bounds.
        predicted_iou=None if iou_scores is None else float(np.clip(iou_scores[label - 1], 0, 1)),
    )


def _joint_histogram(prediction: Prediction) -> NDArray[Any]:
    """Count the pixels per label and confidence: (256, 256) int64."""
    labels, confidence = prediction.labels.ravel(), prediction.confidence.ravel()
    histogram = np.zeros(256 * 256, np.int64)
    for start in range(0, len(labels), _PIXELS_AT_ONCE):
        part = slice(start, start + _PIXELS_AT_ONCE)
        pairs = labels[part].astype(np.intp) * 256 + confidence[part]
        histogram += np.bincount(pairs, minlength=len(histogram))
    return histogram.reshape(256, 256)
