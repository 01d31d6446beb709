"""A slide's result in numbers: mm2, shares of the tissue and confidence per class."""

from collections.abc import Iterable

from pydantic import Field

from serve.contract.strict import Strict
from serve.inference.summary import LOW_CONFIDENCE, ModelName
from serve.slides.block_record import BlockRecord
from serve.slides.plan import Plan

_UM2_PER_MM2 = 1e6


class SlideClass(Strict):
    """What was found of one class."""

    name: str
    color: str
    label: int = Field(description="value in the label map, from 1")
    cells: int
    area_mm2: float
    tissue_share: float | None = Field(description="share of the tissue's area; null without any")
    mean_confidence: float | None = Field(description="0 to 1; null where the class is not found")
    low_confidence_share: float | None = Field(
        description="share of the class's area whose confidence is below the threshold"
    )


class SlideSummary(Strict):
    """`summary.json` of a slide."""

    name: str
    model: ModelName
    width_px: int
    height_px: int
    mpp: float
    mpp_source: str
    notes: tuple[str, ...] = Field(
        default=(),
        description="what a user should know: that a file of the slide is missing, or that its um "
        "per pixel differ from the model's by more than the export found to be harmless",
    )
    um_per_cell: float
    origin_px: tuple[float, float] = Field(
        description="x and y of the map's corner, in pixels of the slide's level 0"
    )
    tissue_mm2: float = Field(description="area that was segmented")
    has_tissue: bool
    mean_confidence: float | None
    low_confidence_share: float | None
    low_confidence_threshold: float = LOW_CONFIDENCE
    classes: tuple[SlideClass, ...]


def summarise(
    name: str, plan: Plan, records: Iterable[BlockRecord], notes: Iterable[str] = ()
) -> SlideSummary:
    """Add up what the blocks found.

    Args:
        name: of the slide.
        plan: of the slide.
        records: of all its blocks.
        notes: on the slide, as its reader has them.
    """
    num_labels = len(plan.model.classes) + 1
    warning = plan.model.scale_warning(plan.slide.pixel_size)
    cells, sums, low = ([0] * num_labels for _ in range(3))
    for record in records:
        for label, count in enumerate(record.cells):
            cells[label] += count
            sums[label] += record.confidence_sums[label]
            low[label] += record.low_confidence_cells[label]
    cell_y, cell_x = plan.level0_px_per_cell
    mm2_per_cell = cell_y * cell_x * plan.slide.mpp**2 / _UM2_PER_MM2
    total = sum(cells[1:])
    classes = tuple(
        SlideClass(
            name=tissue.name,
            color=tissue.color,
            label=label,
            cells=cells[label],
            area_mm2=round(cells[label] * mm2_per_cell, 6),
            tissue_share=_share(cells[label], total),
            mean_confidence=_share(sums[label], cells[label] * 255),
            low_confidence_share=_share(low[label], cells[label]),
        )
        for label, tissue in enumerate(plan.model.classes, start=1)
    )
    return SlideSummary(
        name=name,
        model=ModelName(name=plan.model.name, version=plan.model.version),
        width_px=plan.slide.width_px,
        height_px=plan.slide.height_px,
        mpp=plan.slide.mpp,
        mpp_source=plan.slide.mpp_source,
        notes=(*notes, *([warning] if warning else [])),
        um_per_cell=plan.um_per_cell,
        origin_px=(plan.origin_px[1], plan.origin_px[0]),
        tissue_mm2=round(total * mm2_per_cell, 6),
        has_tissue=total > 0,
        mean_confidence=_share(sum(sums[1:]), total * 255),
        low_confidence_share=_share(sum(low[1:]), total),
        classes=classes,
    )


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None
