"""The parity report for people: Markdown, and pictures of the tiles that differ most."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from export.gate.answers import Answers
from export.gate.certificate import certificate_section
from export.gate.gate import Gate
from export.gate.schema import ArtefactParity, ParityReport
from serve.contract.markdown import markdown_table
from train.settings import LabelClass

REPORT_FILE = "parity_report.md"
NUM_PICTURED_TILES = 3
_UNLABELLED_COLOR = "#ffffff"
_DIFFERENT_COLOR = "#d6001c"


def write_report(report: ParityReport, pictures: Sequence[str], folder: Path) -> None:
    """Write `parity_report.md`; `pictures` are files beside it, by `picture_name`."""
    parts = [
        "# Parity with torch",
        f"Every artefact against torch in float32 on {report.tiles}. {measured_against(report)}",
        _summary(report),
    ]
    for artefact in report.artefacts:
        parts += _section(artefact, picture_name(artefact) in pictures)
    if report.artefacts:
        names = [entry.name for entry in report.artefacts[0].classes]
        parts += certificate_section(report.scale_certificate, names, report.mpp)
    if report.peaks:
        parts += _audit(report)
    parts += _how(report)
    (folder / REPORT_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def measured_against(report: ParityReport) -> str:
    """Say what the scores compare with, and which classes have none."""
    against = "the masks" if report.has_masks else "torch's labels, as there are no masks"
    text = f"Dice, IoU and recall are against {against}."
    missing = report.unmeasured_classes
    if missing:
        text += f" Not measured, as torch finds none of it on these tiles: {', '.join(missing)}."
    return text


def picture_name(artefact: ArtefactParity) -> str:
    """The file with an artefact's worst tiles."""
    runtime = "openvino_" if artefact.measured_with == "OpenVINO" else ""
    return f"parity_{runtime}{artefact.precision}.png"


def draw_worst_tiles(
    artefact: ArtefactParity,
    answers: Answers,
    gate: Gate,
    classes: Sequence[LabelClass],
    folder: Path,
) -> str | None:
    """Draw the tiles with the most differing labels; None where no label differs."""
    order = np.argsort([tile.label_agreement for tile in artefact.tiles], kind="stable")
    worst = [int(i) for i in order if artefact.tiles[i].label_agreement < 1][:NUM_PICTURED_TILES]
    if not worst:
        return None
    colors = ListedColormap([_UNLABELLED_COLOR, *(entry.color for entry in classes)])
    titles = ["Image", "Torch, float32", artefact.title, "Difference"]
    if gate.tiles.masks is not None:
        titles.insert(1, "Mask")
    width = 2.3 * len(titles)
    figure = Figure(figsize=(width, 2.55 * len(worst) + 0.5), layout="constrained", dpi=100)
    grid = figure.subplots(len(worst), len(titles), squeeze=False)
    for line, index in zip(grid, worst, strict=True):
        expected, found = gate.expected.labels[index], answers.labels[index]
        maps = [expected, found]
        if gate.tiles.masks is not None:
            maps.insert(0, gate.tiles.masks[index])
        line[0].imshow(gate.tiles.images[index])
        for axes, labels in zip(line[1:-1], maps, strict=True):
            axes.imshow(labels, cmap=colors, vmin=0, vmax=len(classes), interpolation="nearest")
        line[-1].imshow(_paint_difference(gate.tiles.images[index], expected != found))
        num_different = int((expected != found).sum())
        line[0].set_ylabel(gate.tiles.names[index], fontsize=9)
        line[-1].set_xlabel(
            f"{_counted(num_different, 'pixel')} ({_share(num_different / expected.size)})",
            fontsize=9,
        )
        for axes in line:
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    patches = [Patch(facecolor=entry.color, label=entry.name) for entry in classes]
    patches.append(Patch(facecolor=_DIFFERENT_COLOR, label="another label than torch"))
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    name = picture_name(artefact)
    figure.savefig(folder / name, metadata={"Software": None})
    return name


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _share(share: float) -> str:
    """Format a share so that one above 0 never reads as 0."""
    return "below 0.001%" if share < 1e-5 else f"{share:.3%}"


def _paint_difference(image: Any, different: Any) -> Any:
    """The image in pale grey with the differing pixels, a little widened, in red."""
    widened = different.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            widened |= np.roll(different, step, axis=axis)
    painted = np.repeat(image.mean(axis=2, keepdims=True) / 2 + 127, 3, axis=2).astype(np.uint8)
    painted[widened] = [int(_DIFFERENT_COLOR[place : place + 2], 16) for place in (1, 3, 5)]
    return painted


def _summary(report: ParityReport) -> str:
    headers = (
        *("Artefact", "Passed", "Measured with", "Same label", "Largest logit difference"),
        *("Largest IoU score difference", "Mean confidence difference", "Float32 islands"),
    )
    rows = [
        (
            artefact.title,
            "yes" if artefact.passed else "**no**",
            artefact.measured_with,
            f"{artefact.label_agreement:.4%}",
            logit_difference(artefact),
            f"{artefact.max_iou_score_difference:.1e}",
            f"{artefact.mean_confidence_difference:.1e}",
            ", ".join(artefact.fp32_islands) or "-",
        )
        for artefact in report.artefacts
    ]
    return markdown_table(headers, rows, align="lllrrrrl")


def logit_difference(artefact: ArtefactParity) -> str:
    """The largest difference of a logit, or a dash where the artefact gives none."""
    difference = artefact.max_logit_difference
    return "-" if difference is None else f"{difference:.1e}"


def _section(artefact: ArtefactParity, has_picture: bool) -> Iterator[str]:
    yield f"## {artefact.title}"
    if artefact.failures:
        yield "Not passed, and not served:"
        yield "\n".join(f"- {failure}" for failure in artefact.failures)
    else:
        yield "Passed."
    yield markdown_table(
        ("Class", "Pixels", "Torch's label kept", "Dice", "IoU", "Recall"),
        [
            (
                f"{entry.name}{' (rarest)' if entry.name == artefact.rarest_class else ''}",
                f"{entry.num_pixels:,}",
                "-" if entry.agreement is None else f"{entry.agreement:.3%}",
                _score(entry.torch_dice, entry.dice),
                _score(entry.torch_iou, entry.iou),
                _score(entry.torch_recall, entry.recall),
            )
            for entry in artefact.classes
        ],
        align="lrrrrr",
    )
    yield "In brackets the difference from torch's scores."
    yield f"NaN: {artefact.num_nan}, infinite: {artefact.num_inf}, in logits and IoU scores."
    if artefact.emulation is not None:
        tiles = _counted(artefact.emulation.num_tiles, "tile")
        yield (
            f"With each node's result rounded, on {tiles}: "
            f"{artefact.emulation.label_agreement:.4%} of the labels are torch's, "
            f"{sum(artefact.emulation.nonfinite.values())} NaN or infinite values on the way."
        )
    worst = sorted(artefact.tiles, key=lambda tile: tile.label_agreement)[:NUM_PICTURED_TILES]
    listing = ", ".join(f"{tile.name} {tile.label_agreement:.3%}" for tile in worst)
    yield f"Tiles with the fewest of torch's labels: {listing}."
    if has_picture:
        yield f"![Tiles that differ most]({picture_name(artefact)})"


def _score(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{after:.4f} ({after - before:+.4f})"


def _audit(report: ParityReport) -> Iterator[str]:
    yield "## Activations"
    yield (
        "The largest magnitude of each block in torch and float32, attention logits and weights "
        f"included. fp16 ends at 65,504; a block beyond {report.activation_limit:,.0f} is not "
        "computed in fp16."
    )
    yield markdown_table(
        ("Block", "Largest magnitude", "Tile", "In half precision"),
        [
            (
                peak.block,
                f"{peak.magnitude:,.1f}",
                peak.tile,
                "yes" if peak.computed_in == "half" else "no, always float32",
            )
            for peak in report.peaks
        ],
        align="lrll",
    )


def _how(report: ParityReport) -> Iterator[str]:
    yield "## How this was measured"
    measured = [
        "Torch runs the trained model in float32 on the CPU; ONNX Runtime runs each artefact on "
        "the CPU, one tile alone and then three at a time. Its CPU backend computes fp16 in "
        "float32 and leaves roundings out, so it cannot prove fp16 safe: therefore the activations "
        "above, and an emulation in which every node runs by itself and its result is rounded to "
        "the graph's type, as a GPU's kernels do. Neither is a GPU: a TensorRT plan is compared "
        "again where it is built."
    ]
    of_bf16 = {entry.measured_with for entry in report.artefacts if entry.precision == "bf16"}
    if of_bf16:
        alone = " alone" if of_bf16 == {"emulation"} else ", and in OpenVINO"
        measured.append(f"That backend does not run bf16: it is measured by the emulation{alone}.")
    if any(entry.measured_with == "OpenVINO" for entry in report.artefacts):
        measured.append("OpenVINO runs each graph in the precision that the graph is written in.")
    yield "\n".join(measured)
    if report.processor is not None:
        yield (
            f"Runtimes choose their kernels by the processor. This one was {report.processor}; on "
            "another kind the service compares itself with the bundle's warm-up image first."
        )
    limits = ", ".join(f"{name} {value:g}" for name, value in report.tolerances.items())
    yield f"Tolerances: {limits}."
