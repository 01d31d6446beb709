"""A gate over painted tiles, and answers that differ from torch's where a test wants it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from export.gate.answers import Answers, torch_answers
from export.gate.gate import Gate
from export.gate.schema import Tolerances
from export.gate.tiles import ValidationTiles
from export.graph.reference import Deployable

SIDE, NUM_TILES = 40, 3
CLASS_NAMES = ("Tumor", "Stroma", "Necrosis")


def noise_gate(deployable: Deployable, class_names: Sequence[str], num_tiles: int = 2) -> Gate:
    """Torch's answers of a model on noise."""
    side: Any = deployable.segmenter.input_px
    images = np.random.default_rng(0).integers(0, 256, (num_tiles, side, side, 3), dtype=np.uint8)
    names = tuple(f"tile_{index}" for index in range(num_tiles))
    return Gate(
        tiles=ValidationTiles(source="noise", names=names, images=images, masks=None),
        expected=torch_answers(deployable, images),
        class_names=tuple(class_names),
        tolerances=Tolerances(),
    )


def painted_gate(*, masks: bool = True, shares: Sequence[float] = (0.6, 0.3, 0.1)) -> Gate:
    """Torch is right everywhere: left half Tumor, right half Stroma, a corner Necrosis."""
    labels = np.ones((NUM_TILES, SIDE, SIDE), np.uint8)
    labels[:, :, SIDE // 2 :] = 2
    labels[:, :10, :10] = 3
    rng = np.random.default_rng(0)
    tiles = ValidationTiles(
        source="painted tiles",
        names=tuple(f"tile_{index}" for index in range(NUM_TILES)),
        images=rng.integers(0, 256, (NUM_TILES, SIDE, SIDE, 3), dtype=np.uint8),
        masks=labels.copy() if masks else None,
    )
    expected = Answers(
        labels=labels,
        confidence=np.full_like(labels, 200),
        low_res_probabilities=np.full((NUM_TILES, 3, SIDE // 4, SIDE // 4), 85, np.uint8),
        iou_scores=np.zeros((NUM_TILES, 3), np.float32),
        low_res_logits=rng.normal(size=(NUM_TILES, 3, SIDE // 4, SIDE // 4)).astype(np.float32),
    )
    return Gate(
        tiles=tiles,
        expected=expected,
        class_names=CLASS_NAMES,
        class_shares=shares,
        tolerances=Tolerances(),
    )


def relabelled(gate: Gate, tile: int, num_pixels: int, label: int) -> Answers:
    """Torch's answers with the first pixels of a tile's Necrosis labelled otherwise."""
    labels = gate.expected.labels.copy()
    rows, columns = np.nonzero(labels[tile] == 3)
    labels[tile, rows[:num_pixels], columns[:num_pixels]] = label
    return replace(gate.expected, labels=labels)
