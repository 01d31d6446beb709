"""What keeps an artefact out of the bundle, in words for the user."""

from collections.abc import Iterator

import numpy as np

from export.gate.schema import ArtefactParity, EmulationParity, GateLimits
from export.gate.tiles import Images


def failures_of(
    found: ArtefactParity, limits: GateLimits, labels: Images, expected: Images, *, reference: str
) -> Iterator[str]:
    """Say where an artefact does not keep to its limits, the most telling first.

    Args:
        found: what was measured.
        limits: of its precision.
        labels: (N, H, W) uint8, the artefact's.
        expected: the reference's labels, of the same shape.
        reference: its name, such as torch.
    """
    if found.num_nan or found.num_inf:
        yield f"{found.num_nan} NaN and {found.num_inf} infinite logits and IoU scores"
    if found.num_unknown_labels:
        yield f"{found.num_unknown_labels} pixels have a label that is none of the classes"
    if found.label_agreement < limits.agreement:
        worst = min(found.tiles, key=lambda tile: tile.label_agreement)
        yield (
            f"{found.label_agreement:.4%} of the labels are those of {reference}, expected at "
            f"least {100 * limits.agreement:g}%; fewest on tile {worst.name} "
            f"({worst.label_agreement:.4%}); {_class_that_loses_most(found, labels, expected)} "
            "loses most of them"
        )
    yield from _lost_dice(found, limits, labels, expected)
    yield from _differences(found, limits)
    if found.emulation is not None:
        yield from _emulated(found.emulation, limits, reference)


def _lost_dice(
    found: ArtefactParity, limits: GateLimits, labels: Images, expected: Images
) -> Iterator[str]:
    for label, entry in enumerate(found.classes, start=1):
        if entry.dice_loss > limits.dice_loss:
            differs = ((labels == label) != (expected == label)).sum(axis=(1, 2))
            yield (
                f"class {entry.name} loses {100 * entry.dice_loss:.2f} Dice points "
                f"({entry.torch_dice:.4f} to {entry.dice:.4f}), at most "
                f"{100 * limits.dice_loss:.2f} may be lost; most on tile "
                f"{found.tiles[int(differs.argmax())].name}"
            )


def _differences(found: ArtefactParity, limits: GateLimits) -> Iterator[str]:
    if found.max_iou_score_difference > limits.iou_score_difference:
        yield (
            f"an IoU score differs by {found.max_iou_score_difference:.4f}, at most "
            f"{limits.iou_score_difference:g} is allowed"
        )
    means = {
        "confidence": found.mean_confidence_difference,
        "low_res_probabilities": found.mean_probability_difference,
    }
    for name, difference in means.items():
        if difference > limits.confidence_difference:
            yield (
                f"{name} differs by {difference:.4f} on average, at most "
                f"{limits.confidence_difference:g} is allowed"
            )
    if limits.byte_difference is not None and found.max_byte_difference > limits.byte_difference:
        yield (
            f"a confidence or probability differs by {found.max_byte_difference} of 255, at most "
            f"{limits.byte_difference} is allowed"
        )
    largest, limit = found.max_logit_difference, limits.logit_difference
    if largest is not None and limit is not None and not largest < limit:
        worst = max(found.tiles, key=lambda tile: tile.max_logit_difference or 0.0)
        yield (
            f"a logit differs by {largest:.2e} on tile {worst.name}, expected less than {limit:.0e}"
        )


def _emulated(emulation: EmulationParity, limits: GateLimits, reference: str) -> Iterator[str]:
    where = f"with each node rounded, on {emulation.num_tiles} tiles,"
    if emulation.nonfinite:
        block, count = next(iter(emulation.nonfinite.items()))
        yield f"{where} {block} is the first block with NaN or infinite values ({count})"
    if emulation.label_agreement < limits.agreement:
        yield (
            f"{where} {emulation.label_agreement:.4%} of the labels are those of {reference}, "
            f"expected at least {100 * limits.agreement:g}%"
        )


def _class_that_loses_most(found: ArtefactParity, labels: Images, expected: Images) -> str:
    lost = np.bincount(expected[labels != expected], minlength=1 + len(found.classes))
    return found.classes[int(lost[1:].argmax())].name
