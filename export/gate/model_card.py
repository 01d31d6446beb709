"""`MODEL_CARD.md`: what the model is, what it was trained on, how it was checked, its limits."""

import math
from collections.abc import Iterator
from pathlib import Path

from export.gate.report import measured_against
from export.gate.schema import ArtefactParity, ParityReport
from serve.contract.manifest import Manifest
from train.model.checkpoint import CheckpointCard

MODEL_CARD_FILE = "MODEL_CARD.md"

_SYNTHETIC_DATA = "synthetic"


def write_model_card(
    manifest: Manifest, card: CheckpointCard, report: ParityReport, folder: Path
) -> None:
    """Write the card of a bundle."""
    sections = (
        _head(manifest, card),
        _classes(manifest, card),
        _data(card),
        _scores(card),
        _precision(report),
        _limits(manifest, card),
        _weights(card),
    )
    lines = [line for section in sections for line in (*section, "")]
    (folder / MODEL_CARD_FILE).write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")


def _head(manifest: Manifest, card: CheckpointCard) -> Iterator[str]:
    mpp = "not known" if manifest.mpp is None else f"{manifest.mpp:g} um per pixel"
    model = card.settings.model
    yield f"# {manifest.name} {manifest.version}"
    yield ""
    yield "**Research use only.** Not a medical device, not for diagnosis or treatment."
    yield ""
    yield (
        "Semantic segmentation of haematoxylin-and-eosin tissue: SAM-Path (arXiv 2307.09570) with "
        "Dynamic Focal Attention (arXiv 2604.13479)."
    )
    yield ""
    yield f"- Input: {manifest.tile_size_px} x {manifest.tile_size_px} pixels RGB, at {mpp}"
    yield (
        f"- Encoders: SAM {model.image_encoder} and {model.pathology_encoder}, "
        f"{'frozen' if model.encoders_frozen else 'trained'}"
    )
    yield f"- Checkpoint SHA-256: `{manifest.checkpoint_sha256}`, FocalPath {card.code_version}"


def _classes(manifest: Manifest, card: CheckpointCard) -> Iterator[str]:
    yield "## Classes"
    yield ""
    yield (
        "| Label | Class | Colour | Share of training pixels | Bias in the attention "
        "| Validation Dice | Validation IoU |"
    )
    yield "|---|---|---|---|---|---|---|"
    rows = zip(manifest.classes, card.shares, card.class_attention_bias, strict=True)
    for label, (entry, share, bias) in enumerate(rows, start=1):
        scores = " | ".join(_number(card.metrics, f"{s}/{entry.name}") for s in ("dice", "iou"))
        yield (
            f"| {label} | {entry.name} | `{entry.color}` | {_percent(share)} | {bias:+.3f} "
            f"| {scores} |"
        )
    means = " | ".join(_number(card.metrics, f"{score}/mean") for score in ("dice", "iou"))
    yield f"| | Mean | | | | {means} |"
    yield ""
    yield (
        f"The bias ({card.settings.model.bias}) is added to the logits of the attention from image "
        "to class tokens: above 0 where the model attends more to a class. Unlabelled (0) is never "
        "predicted."
    )


def _data(card: CheckpointCard) -> Iterator[str]:
    yield "## Data"
    yield ""
    data = "; the checkpoint does not say on which data."
    if card.data is not None:
        data = (
            f" on the data set `{card.data.name}`: {card.data.num_training_tiles:,} training and "
            f"{card.data.num_validation_tiles:,} validation tiles."
        )
    yield f"Trained with the preset `{card.settings.preset}`{data}"
    if card.settings.preset == _SYNTHETIC_DATA:
        yield (
            "The preset is for tissue that FocalPath draws itself, no patient's slide: such scores "
            "say nothing about real tissue."
        )
    else:
        yield "The data's terms of use go with the weights."


def _scores(card: CheckpointCard) -> Iterator[str]:
    yield "## How the scores were measured"
    yield ""
    yield (
        "Dice and IoU are pooled over the pixels of all validation tiles, unlabelled pixels left "
        "out, with torch; the checkpoint is the one of the best mean validation Dice, so they "
        "flatter it a little. `python -m train evaluate` gives those of the test tiles."
    )


def _precision(report: ParityReport) -> Iterator[str]:
    yield "## Precision of the artefacts"
    yield ""
    yield (
        f"Against torch in float32 on {report.num_tiles} tiles ({report.tiles}). "
        f"{measured_against(report)} [parity_report.md](parity_report.md) has each class, the "
        "tiles that differ most, and what a CPU cannot prove about fp16."
    )
    yield ""
    yield (
        "| Artefact | Same label | Largest logit difference | Largest IoU score difference "
        "| Mean confidence difference | Most Dice points lost | Recall of the rarest class "
        "| Float32 islands |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for artefact in report.artefacts:
        if artefact.passed:
            yield _artefact_row(artefact)
    for artefact in report.artefacts:
        if not artefact.passed:
            yield ""
            yield f"{artefact.title} was tried and left out: {'; '.join(artefact.failures)}."


def _artefact_row(artefact: ArtefactParity) -> str:
    lost, recall = "-", "-"
    measured = [entry for entry in artefact.classes if entry.dice is not None]
    if measured:
        worst = max(measured, key=lambda entry: entry.dice_loss)
        lost = f"{100 * worst.dice_loss:.3f} ({worst.name})"
    for entry in artefact.classes:
        if entry.name == artefact.rarest_class:
            recall = f"{entry.recall:.4f}, torch {entry.torch_recall:.4f} ({entry.name})"
    return (
        f"| {artefact.title} | {artefact.label_agreement:.4%} "
        f"| {artefact.max_logit_difference:.1e} | {artefact.max_iou_score_difference:.1e} "
        f"| {artefact.mean_confidence_difference:.1e} | {lost} | {recall} "
        f"| {', '.join(artefact.fp32_islands) or '-'} |"
    )


def _limits(manifest: Manifest, card: CheckpointCard) -> Iterator[str]:
    rarest = min(zip(card.shares, manifest.classes, strict=True), key=lambda r: r[0])
    yield "## Limits"
    yield ""
    yield "- Research use only: no clinical validation of any kind."
    yield (
        "- Other scanners, stains, organs and resolutions than those of the training data are "
        "untested; scores there may be far lower."
    )
    yield (
        f"- Every pixel gets one of the {len(manifest.classes)} classes, also where the tissue is "
        "none of them, or there is no tissue."
    )
    if card.pixel_frequencies is not None:
        yield (
            f"- {rarest[1].name} has {rarest[0]:.2%} of the training pixels: its scores are the "
            "least certain."
        )
    yield "- `confidence` is the softmax of the logits and is not calibrated."


def _weights(card: CheckpointCard) -> Iterator[str]:
    weights = card.settings.weights
    yield "## Licences"
    yield ""
    yield "The code is Apache-2.0. The weights are also under the terms of what they started from:"
    yield ""
    if weights.sam_weights is None and weights.pathology_weights is None:
        origin = "random encoders" if card.settings.model.encoders_frozen else "scratch"
        yield f"- no published weights: started from {origin}, so only the data's terms apply"
        return
    if weights.sam_weights is not None:
        yield f"- SAM, `{Path(weights.sam_weights).name}`: Apache-2.0 as published by its authors"
    if weights.pathology_weights is not None:
        yield (
            f"- the pathology encoder, `{Path(weights.pathology_weights).name}`: that of its "
            "authors. HIPT is Apache-2.0 with the Commons Clause (no sale), UNI CC-BY-NC-ND 4.0 "
            "(no commercial use, no derivatives)"
        )


def _percent(share: float) -> str:
    return "not known" if math.isnan(share) else f"{share:.2%}"


def _number(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if name in metrics else "-"
