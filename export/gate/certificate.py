"""Measures the scale certificate: the gate's tiles as sources of another um per pixel see them.

Each tile is brought to a source's um per pixel and back to the model's, as serving does with an
image of that source. Where the source is coarser, detail is lost on the way. Where it is finer, the
data set's own pixels are used if they are as fine; otherwise the tile is only enlarged and reduced,
which shows what two resamplings cost. The curve is ours; no paper has it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console
from rich.progress import track

from export.checked import CheckedSettings, NumberOf, Share
from export.errors import SettingsError
from export.gate.gate import Gate
from export.gate.scores import compare_classes
from export.gate.tiles import Images
from serve.contract.certificate import ScaleCertificate, ScalePoint
from serve.contract.markdown import markdown_table
from train.settings import LabelClass

CURVE_FILE = "parity_scale.png"
_MAX_LEVEL_TICKS = 6
"""More labels than these on the axis would overlap."""
_NOT_RESAMPLED = 0.02
"""Serving does not resample an image whose um per pixel is this near the model's."""


@dataclass(frozen=True, kw_only=True)
class CertificateSettings(CheckedSettings):
    """What the scale certificate measures, and the level below which serving warns."""

    scale_factors: tuple[Annotated[float, Field(ge=0.25, le=4)], ...] = (0.8, 0.9, 1.1, 1.25)
    """um per pixel of the sources that are tried, over the model's. Above 1 is coarser."""
    scale_tiles: NumberOf = 8
    """Tiles to try them on, at most those that are compared with torch. Each costs as many runs
    as there are factors; 0 leaves the certificate out."""
    min_scale_agreement: Share = 0.95
    """Serving warns where a smaller share of the labels stays the same (our choice)."""
    max_scale_dice_loss: Share = 0.05
    """Serving warns where a class loses more Dice (our choice)."""

    def __post_init__(self) -> None:
        """Refuse a value out of its range, and factors at which serving does not resample."""
        super().__post_init__()
        for factor in self.scale_factors:
            if abs(factor - 1) <= _NOT_RESAMPLED:
                raise SettingsError(
                    f"--scale-factors has {factor:g}; expected none within {_NOT_RESAMPLED:.0%} of "
                    "1, where serving does not resample."
                )


def measure_certificate(
    gate: Gate, graph: Path, settings: CertificateSettings
) -> ScaleCertificate | None:
    """Run the float32 graph on the gate's tiles at every factor.

    Args:
        gate: its tiles, and torch's answers at the model's own um per pixel.
        graph: the model as ONNX, with the output `labels`.
        settings: factors and level.

    Returns:
        The certificate, or None where it is left out or an um per pixel is not known.
    """
    from_scale = gate.tiles.from_scale
    count = min(settings.scale_tiles, len(gate.tiles))
    factors = sorted(set(settings.scale_factors))
    if from_scale is None or not count or not factors:
        return None
    expected = gate.expected.labels[:count]
    masks = None if gate.tiles.masks is None else gate.tiles.masks[:count]
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def point(factor: float, labels: Images) -> ScalePoint:
        classes = compare_classes(labels, expected, masks, gate.class_names)
        return ScalePoint(
            factor=factor,
            label_agreement=float((labels == expected).mean()),
            dice=tuple(entry.dice for entry in classes),
        )

    points = [point(1.0, expected)]
    for factor in track(factors, "scale certificate", console=Console(stderr=True), transient=True):
        tiles = from_scale(factor, count)
        labels = [session.run(["labels"], {"image": tile[None]})[0] for tile in tiles]
        points.append(point(factor, np.concatenate(labels)))
    return ScaleCertificate(
        num_tiles=count,
        has_masks=masks is not None,
        real_detail_from=gate.tiles.own_factor,
        min_agreement=settings.min_scale_agreement,
        max_dice_loss=settings.max_scale_dice_loss,
        points=tuple(sorted(points, key=lambda found: found.factor)),
    )


def certificate_section(
    certificate: ScaleCertificate | None, class_names: Sequence[str], mpp: float | None
) -> Iterator[str]:
    """The certificate in Markdown: what was measured, a table, the curve.

    Args:
        certificate: None where there is none.
        class_names: the C classes.
        mpp: the model's um per pixel.
    """
    yield "## Scale certificate"
    if certificate is None or mpp is None:
        yield (
            "Not measured: it was left out, or the model's um per pixel is not known. Serving "
            "gives no warning about an image's scale."
        )
        return
    against = "the masks" if certificate.has_masks else f"the answers at {mpp:g} um per pixel"
    yield (
        f"An image of another um per pixel than the model's {mpp:g} is resampled to it. Detail "
        "that a coarser image lacks does not come back. This is what it costs on "
        f"{certificate.num_tiles} tiles, of which each was brought to the um per pixel of the "
        "source and back: the share of labels that stay as they are at the model's own, and Dice "
        f"per class against {against}."
    )
    enlarged = [p.factor for p in certificate.points if p.factor < certificate.real_detail_from]
    if enlarged:
        yield (
            f"At {', '.join(f'{factor * mpp:.4g}' for factor in enlarged)} um per pixel the tiles "
            "had no finer pixels to show and were only enlarged: these rows tell what two "
            "resamplings cost, not what a finer scan shows."
        )
    yield _table(certificate, class_names, mpp)
    yield (
        f"Serving warns where fewer than {certificate.min_agreement:.0%} of the labels stay, or a "
        f"class loses more than {100 * certificate.max_dice_loss:g} Dice points, and about every "
        f"image coarser than {certificate.points[-1].factor * mpp:.4g} um per pixel, which was "
        "not tried."
    )
    yield f"![Labels and Dice over the source's um per pixel]({CURVE_FILE})"


def _table(certificate: ScaleCertificate, class_names: Sequence[str], mpp: float) -> str:
    headers = ("um per pixel", "Factor", "Same label", *(f"Dice {n}" for n in class_names), "Holds")
    rows = [
        (
            f"{point.factor * mpp:.4g}",
            f"{point.factor:g}",
            f"{point.label_agreement:.2%}",
            *("-" if dice is None else f"{dice:.4f}" for dice in point.dice),
            "yes" if certificate.holds(point) else "**no**",
        )
        for point in certificate.points
    ]
    return markdown_table(headers, rows, align="r" * (len(headers) - 1) + "l")


def draw_curve(
    certificate: ScaleCertificate, classes: Sequence[LabelClass], mpp: float, folder: Path
) -> None:
    """Draw agreement and Dice per class over the um per pixel of the source."""
    at = [point.factor * mpp for point in certificate.points]
    figure = Figure(figsize=(7.5, 3.8), layout="constrained", dpi=110)
    axes = figure.subplots()
    agreement = [point.label_agreement for point in certificate.points]
    axes.plot(at, agreement, color="black", marker="o", linewidth=2, label="same label")
    axes.axhline(certificate.min_agreement, color="0.5", linestyle=":", linewidth=1)
    for index, entry in enumerate(classes):
        dice = [point.dice[index] for point in certificate.points]
        if any(value is not None for value in dice):
            known = [math.nan if value is None else value for value in dice]
            axes.plot(at, known, color=entry.color, marker="s", markersize=4, label=entry.name)
    axes.axvline(mpp, color="0.8", linewidth=1, zorder=0)
    axes.set_xscale("log")
    labels = [f"{value:.3g}" for value in at]
    axes.set_xticks(at, labels, rotation=0 if len(at) <= _MAX_LEVEL_TICKS else 60)
    axes.minorticks_off()
    axes.set_xlabel(f"um per pixel of the source (the model's is {mpp:g})")
    axes.set_ylabel("share of labels, Dice")
    axes.set_ylim(top=1.02)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(folder / CURVE_FILE, metadata={"Software": None})
