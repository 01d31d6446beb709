"""`MODEL_CARD.md`: what the model is, what it was trained on, how it was checked, its limits."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from export.gate.certificate import certificate_section
from export.gate.report import logit_difference, measured_against
from export.gate.schema import ArtefactParity, ParityReport
from serve.contract.manifest import Manifest
from serve.contract.markdown import markdown_table
from train.model.checkpoint import CheckpointCard
from train.model.class_bias import find_strategy

MODEL_CARD_FILE = "MODEL_CARD.md"


def write_model_card(
    manifest: Manifest,
    card: CheckpointCard,
    report: ParityReport,
    folder: Path,
    *,
    engine_obstacles: Sequence[str] = (),
) -> None:
    """Write the card of a bundle.

    Args:
        manifest: of the bundle.
        card: of the checkpoint.
        report: what the gate measured.
        folder: gets the file.
        engine_obstacles: why no TensorRT engine can be built; empty where one can.
    """
    sections = (
        _head(manifest, card),
        _classes(manifest, card),
        _data(card),
        _scores(card),
        _precision(report, engine_obstacles),
        certificate_section(
            manifest.scale_certificate, [entry.name for entry in manifest.classes], manifest.mpp
        ),
        _limits(manifest, card),
        _licences(card),
    )
    text = "\n\n".join(part for section in sections for part in section)
    (folder / MODEL_CARD_FILE).write_text(text + "\n", encoding="utf-8")


def _head(manifest: Manifest, card: CheckpointCard) -> Iterator[str]:
    mpp = "not known" if manifest.mpp is None else f"{manifest.mpp:g} um per pixel"
    model = card.settings.model
    yield f"# {manifest.name} {manifest.version}"
    yield "**Research use only.** Not a medical device, not for diagnosis or treatment."
    method = "SAM-Path (arXiv 2307.09570)"
    if any(card.class_attention_bias):
        method += " with a bias per class in its attention (arXiv 2604.13479)"
    yield f"Semantic segmentation of haematoxylin-and-eosin tissue: {method}."
    if card.imported_from is not None:
        yield (
            f"**FocalPath did not train this model.** {card.imported_from} did, with settings that "
            "its checkpoint does not fully state; FocalPath imported the weights."
        )
    side = manifest.tile_size_px
    yield (
        f"- Input: {side} x {side} pixels RGB, at {mpp}\n"
        f"- Encoders: SAM {model.image_encoder} and {model.pathology_encoder}, "
        f"{'frozen' if model.encoders_frozen else 'trained'}\n"
        f"- Checkpoint SHA-256: `{manifest.checkpoint_sha256}`, FocalPath {card.code_version}"
    )


def _classes(manifest: Manifest, card: CheckpointCard) -> Iterator[str]:
    yield "## Classes"
    headers = (
        *("Label", "Class", "Colour", "Share of training pixels", "Bias in the attention"),
        *("Validation Dice", "Validation IoU"),
    )
    rows: list[Sequence[object]] = [
        (
            label,
            entry.name,
            f"`{entry.color}`",
            _percent(share),
            f"{bias:+.3f}",
            *(_number(card.metrics, f"{score}/{entry.name}") for score in ("dice", "iou")),
        )
        for label, (entry, share, bias) in enumerate(
            zip(manifest.classes, card.shares, card.class_attention_bias, strict=True), start=1
        )
    ]
    means = (_number(card.metrics, f"{score}/mean") for score in ("dice", "iou"))
    rows.append(("", "Mean", "", "", "", *means))
    yield markdown_table(headers, rows, align="rllrrrr")
    if any(card.class_attention_bias):
        strategy = find_strategy(card.settings.model.bias)
        yield (
            f"The bias is `{strategy.name}`: {strategy.help} It is added to the logits of the "
            "attention from image to class tokens: above 0 for classes that the model attends to "
            "more. Unlabelled (0) is never predicted."
        )
    else:
        yield "The model has no bias in its attention. Unlabelled (0) is never predicted."


def _data(card: CheckpointCard) -> Iterator[str]:
    yield "## Data"
    trained = "The checkpoint does not say on which data it was trained."
    if card.data is not None:
        trained = (
            f"Trained on the data set `{card.data.name}`: {card.data.num_training_tiles:,} "
            f"training and {card.data.num_validation_tiles:,} validation tiles."
        )
    yield (
        f"{trained}\nThe data's terms of use go with the weights. Where the tiles are drawn "
        "(`python -m train prepare synthetic`), the scores say nothing about real tissue."
    )


def _scores(card: CheckpointCard) -> Iterator[str]:
    yield "## How the scores were measured"
    if not card.metrics:
        yield "The checkpoint has no scores. `python -m train evaluate` measures them on your data."
        return
    if card.imported_from is not None:
        chosen = "They were measured at the import; how the checkpoint was chosen is not known."
    elif card.settings.optimization.keep_epoch == "last":
        chosen = "The checkpoint is that of the last epoch."
    else:
        chosen = (
            "The checkpoint is the one of the best mean validation Dice, so they flatter it a "
            "little."
        )
    yield (
        "Dice and IoU are pooled over the pixels of all validation tiles, unlabelled pixels left "
        f"out, with torch.\n{chosen}\n"
        "`python -m train evaluate` gives the scores of the test tiles."
    )


def _precision(report: ParityReport, engine_obstacles: Sequence[str]) -> Iterator[str]:
    yield "## Precision of the artefacts"
    yield (
        f"Against torch in float32 on {report.num_tiles} tiles ({report.tiles}). "
        f"{measured_against(report)} [parity_report.md](parity_report.md) has each class, the "
        "tiles that differ most, and what a CPU cannot prove about fp16."
    )
    headers = (
        *("Artefact", "Same label", "Largest logit difference", "Largest IoU score difference"),
        *("Mean confidence difference", "Most Dice points lost", "Recall of the rarest class"),
        "Float32 islands",
    )
    passed = [_artefact_row(artefact) for artefact in report.artefacts if artefact.passed]
    yield markdown_table(headers, passed, align="lrrrrrrl")
    for artefact in report.artefacts:
        if not artefact.passed:
            yield f"{artefact.title} was tried and left out: {'; '.join(artefact.failures)}."
    if engine_obstacles:
        yield (
            "No TensorRT engine can be built: its parser would refuse the graph. "
            f"{engine_obstacles[0]}"
        )


def _artefact_row(artefact: ArtefactParity) -> Sequence[str]:
    lost, recall = "-", "-"
    measured = [entry for entry in artefact.classes if entry.dice is not None]
    if measured:
        worst = max(measured, key=lambda entry: entry.dice_loss)
        lost = f"{100 * worst.dice_loss:.3f} ({worst.name})"
    for entry in artefact.classes:
        if entry.name == artefact.rarest_class:
            recall = f"{entry.recall:.4f}, torch {entry.torch_recall:.4f} ({entry.name})"
    return (
        artefact.title,
        f"{artefact.label_agreement:.4%}",
        logit_difference(artefact),
        f"{artefact.max_iou_score_difference:.1e}",
        f"{artefact.mean_confidence_difference:.1e}",
        lost,
        recall,
        ", ".join(artefact.fp32_islands) or "-",
    )


def _limits(manifest: Manifest, card: CheckpointCard) -> Iterator[str]:
    yield "## Limits"
    yield "\n".join(_limits_of(manifest, card))


def _limits_of(manifest: Manifest, card: CheckpointCard) -> Iterator[str]:
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
        share, rarest = min(
            zip(card.pixel_frequencies, manifest.classes, strict=True), key=lambda pair: pair[0]
        )
        yield (
            f"- {rarest.name} has {share:.2%} of the training pixels: its scores are the least "
            "certain."
        )
    yield "- `confidence` is the softmax of the logits and is not calibrated."
    if manifest.label_note:
        yield f"- {manifest.label_note}"
    if not manifest.predicts_iou:
        yield (
            "- The IoU head was not trained (its loss had no weight), so `iou_scores` mean nothing "
            "and are not shown."
        )


def _licences(card: CheckpointCard) -> Iterator[str]:
    yield "## Licences"
    yield "The code is Apache-2.0. The weights are also under the terms of what they started from:"
    yield "\n".join(_terms(card))


def _terms(card: CheckpointCard) -> Iterator[str]:
    weights = card.settings.weights
    if card.origins:
        for origin in card.origins:
            yield f"- {origin.part}: {origin.name}, `{origin.file}`. Its terms: {origin.licence}"
    elif card.imported_from is not None:
        yield (
            f"- the whole model: weights of {card.imported_from}, whose terms the checkpoint does "
            "not state. SAM is Apache-2.0, HIPT is Apache-2.0 with the Commons Clause (no sale)"
        )
    elif weights.sam_weights is None and weights.pathology_weights is None:
        start = "random encoders" if card.settings.model.encoders_frozen else "scratch"
        yield f"- no published weights: started from {start}, so only the data's terms apply"
    if card.origins:
        return
    # Checkpoints of older versions name their files only.
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
