"""Segmentation across scales: a linear head on patch tokens, the same area at every scale.

Maps are compared on cells of 8 um. A constant map is perfectly consistent, so reports show
consistency beside retention.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from train.data.folder import Split
from train.errors import SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.magnification.embedding import Square, encode
from train.pretraining.magnification.labelled import LabelledSlides
from train.pretraining.magnification.probe import Embedded, Probe, fit_probe

CELL_UM = 8.0
_SPECKLE_UM2 = 400.0
_MAX_PATCHES = 12_000
_MIN_SHARE = 0.6

Map = NDArray[np.int64]
Read = Callable[[Sequence[Square]], list[NDArray[np.uint8]]]
"""Reads squares of slides as tiles of one size in pixels, in the colours that are looked at."""


@dataclass(frozen=True)
class MapScores:
    """Scores of maps against the truth, pooled over squares."""

    mean_iou: float
    boundary_f1: float
    speckle: float
    """Share of the area in components below 400 um2, minus that of the truth."""


def true_map(slides: LabelledSlides, slide: int, square: Footprint) -> Map:
    """The class with most pixels in each cell of a square; 0 where most are unlabelled."""
    counts = _count_labels(slides, slide, square, max(1, round(square.side_um / CELL_UM)))
    return np.asarray(counts.argmax(axis=-1), np.int64)


def _count_labels(
    slides: LabelledSlides, slide: int, square: Footprint, num_cells: int
) -> NDArray[np.int64]:
    """Pixels of each label in the cells of a square: (num_cells, num_cells, 1 + C)."""
    labels, mpp = slides.read_labels(slide)
    edges = np.linspace(0, square.side_um, num_cells + 1)
    rows = np.round((square.y_um + edges) / mpp).astype(int)
    columns = np.round((square.x_um + edges) / mpp).astype(int)
    num_labels = len(slides.classes) + 1
    counts = np.zeros((num_cells, num_cells, num_labels), np.int64)
    for i in range(num_cells):
        for j in range(num_cells):
            part = labels[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            counts[i, j] = np.bincount(part.ravel(), minlength=num_labels)
    return counts


def require_patches(
    slides: LabelledSlides, squares: Mapping[Split, Sequence[Square]], side: int
) -> None:
    """Check that a head can be fitted and scored.

    Args:
        slides: what the squares are cut from.
        squares: of each split.
        side: patches along a side of a square.

    Raises:
        SourceError: a split has no square, the training squares have clear patches of one class
            alone, or the validation squares have none.
    """
    needed: dict[Split, int] = {"training": 2, "validation": 1, "test": 0}
    for split, least in needed.items():
        of_split = squares[split]
        found = [_patch_labels(slides, slide, square, side) for slide, square in of_split]
        num_classes = len(set(np.concatenate([*found, np.zeros(1, np.int64)]).tolist()) - {0})
        if not of_split or num_classes < least:
            raise SourceError(
                f"the {split} slides have {len(of_split)} squares to segment, with patches of "
                f"{num_classes} classes; expected squares, with at least {least}. Raise "
                "--squares-per-slide, lower --tile-px, or take more slides."
            )


def fit_head(
    encoder: nn.Module,
    slides: LabelledSlides,
    squares: tuple[Sequence[Square], Sequence[Square]],
    read: Read,
) -> Probe:
    """Fit a linear head on the patch tokens of training squares; validation squares choose C."""
    parts = [_labelled_patches(encoder, slides, part, read) for part in squares]
    return fit_probe(parts[0], parts[1])


def _labelled_patches(
    encoder: nn.Module, slides: LabelledSlides, squares: Sequence[Square], read: Read
) -> Embedded:
    _, tokens = encode(encoder, read(squares))  # N x P x D
    side = round(tokens.shape[1] ** 0.5)
    features, labels, groups = [], [], []
    for (slide, square), patches in zip(squares, tokens, strict=True):
        found = _patch_labels(slides, slide, square, side)
        kept = found > 0
        features.append(patches[kept])
        labels.append(found[kept])
        groups.append(np.full(int(kept.sum()), slides.info(slide).group))
    joined = Embedded(np.concatenate(features), np.concatenate(labels), np.concatenate(groups))
    if len(joined.labels) <= _MAX_PATCHES:
        return joined
    chosen = np.random.default_rng(0).choice(len(joined.labels), _MAX_PATCHES, replace=False)
    return Embedded(joined.features[chosen], joined.labels[chosen], joined.groups[chosen])


def _patch_labels(slides: LabelledSlides, slide: int, square: Footprint, side: int) -> Map:
    """The class with at least 60% of a patch's pixels, else 0: (side * side,)."""
    counts = _count_labels(slides, slide, square, side)
    largest = counts[..., 1:].max(axis=-1)
    is_clear = largest >= _MIN_SHARE * np.maximum(1, counts.sum(axis=-1))
    return np.where(is_clear, counts[..., 1:].argmax(axis=-1) + 1, 0).ravel()


def predict_map(
    encoder: nn.Module,
    head: Probe,
    slide: int,
    square: Footprint,
    tile_um: float,
    read: Read,
) -> Map:
    """Predict the classes 1..C of a square's cells, from tiles with sides of `tile_um`.

    Probabilities are brought to cells before the choice: area means of finer patches, or the patch
    that a cell lies in.
    """
    tiles = _cover(square, tile_um)
    _, tokens = encode(encoder, read([(slide, tile) for tile in tiles]))
    side = round(tokens.shape[1] ** 0.5)
    flat = (tokens.reshape(-1, tokens.shape[-1]) - head.mean) / head.deviation
    probabilities = head.model.predict_proba(flat).reshape(len(tiles), side, side, -1)
    num_cells = max(1, round(square.side_um / CELL_UM))
    cell_um = square.side_um / num_cells
    sums = np.zeros((num_cells, num_cells, probabilities.shape[-1]))
    counts = np.zeros((num_cells, num_cells, 1))
    for tile, found in zip(tiles, probabilities, strict=True):
        _add_to_cells(sums, counts, found, tile, square, cell_um)
    chosen = (sums / np.maximum(counts, 1e-9)).argmax(axis=-1)
    return np.asarray(head.model.classes_[chosen], np.int64)


def _cover(square: Footprint, side_um: float) -> list[Footprint]:
    """Tiles of `side_um` that cover a square, spread evenly; the last ends where it ends."""
    count = max(1, int(np.ceil(square.side_um / side_um - 1e-6)))
    starts = np.linspace(0, max(0.0, square.side_um - side_um), count)
    return [
        Footprint(square.y_um + float(y), square.x_um + float(x), side_um)
        for y in starts
        for x in starts
    ]


def _add_to_cells(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    found: NDArray[np.float64],
    tile: Footprint,
    square: Footprint,
    cell_um: float,
) -> None:
    side, num_cells = len(found), len(sums)
    patch_um = tile.side_um / side
    if patch_um <= cell_um:  # area means: each patch goes to the cell of its centre
        centres = (np.arange(side) + 0.5) * patch_um
        rows = ((tile.y_um - square.y_um + centres) / cell_um).astype(int).clip(0, num_cells - 1)
        columns = ((tile.x_um - square.x_um + centres) / cell_um).astype(int)
        columns = columns.clip(0, num_cells - 1)
        at = np.ix_(rows, columns)
        np.add.at(sums, at, found)
        np.add.at(counts, at, 1)
        return
    centres = (np.arange(num_cells) + 0.5) * cell_um  # each cell takes the patch it lies in
    rows = np.floor((square.y_um + centres - tile.y_um) / patch_um).astype(int)
    columns = np.floor((square.x_um + centres - tile.x_um) / patch_um).astype(int)
    inside_rows = np.flatnonzero((rows >= 0) & (rows < side))
    inside_columns = np.flatnonzero((columns >= 0) & (columns < side))
    at = np.ix_(inside_rows, inside_columns)
    sums[at] += found[np.ix_(rows[inside_rows], columns[inside_columns])]
    counts[at] += 1


def score_maps(predicted: Sequence[Map], truth: Sequence[Map], num_classes: int) -> MapScores:
    """Score predicted maps against the truth of the same squares; unlabelled cells do not count."""
    found, expected = (np.concatenate([m.ravel() for m in maps]) for maps in (predicted, truth))
    labelled = expected > 0
    speckles = [
        _speckle(np.where(t > 0, p, 0)) - _speckle(t) for p, t in zip(predicted, truth, strict=True)
    ]
    return MapScores(
        mean_iou=mean_iou(found[labelled], expected[labelled], num_classes),
        boundary_f1=_boundary_f1(predicted, truth),
        speckle=float(np.mean(speckles)),
    )


def mean_iou(first: Map, second: Map, num_classes: int) -> float:
    """Mean IoU over the classes that are in either map. Symmetric."""
    ious = []
    for label in range(1, num_classes + 1):
        union = ((first == label) | (second == label)).sum()
        if union:
            ious.append(((first == label) & (second == label)).sum() / union)
    return float(np.mean(ious)) if ious else float("nan")


def cohen_kappa(first: Map, second: Map) -> float:
    """Agreement of two maps beyond chance; NaN where both are of one and the same class."""
    labels = np.union1d(first, second)
    observed = float((first == second).mean())
    expected = float(sum((first == label).mean() * (second == label).mean() for label in labels))
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def _boundary(cells: Map) -> NDArray[np.bool_]:
    """Cells whose right or lower neighbour is of another class; the labels' edge is no boundary."""
    found = np.zeros(cells.shape, bool)
    for here, there, at in (
        (cells[:, :-1], cells[:, 1:], found[:, :-1]),
        (cells[:-1], cells[1:], found[:-1]),
    ):
        at |= (here != there) & (here > 0) & (there > 0)
    return found


def _boundary_f1(maps: Sequence[Map], truths: Sequence[Map]) -> float:
    """F1 of boundary cells, matched within one cell (8 um)."""
    matched_predicted = num_predicted = matched_true = num_true = 0
    near = np.ones((3, 3), bool)
    for predicted, truth in zip(maps, truths, strict=True):
        found, expected = _boundary(np.where(truth > 0, predicted, 0)), _boundary(truth)
        matched_predicted += int((found & ndimage.binary_dilation(expected, near)).sum())
        matched_true += int((expected & ndimage.binary_dilation(found, near)).sum())
        num_predicted += int(found.sum())
        num_true += int(expected.sum())
    if not num_predicted and not num_true:
        return 1.0
    precision = matched_predicted / max(1, num_predicted)
    recall = matched_true / max(1, num_true)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _speckle(cells: Map) -> float:
    """Share of the labelled area in components smaller than 400 um2."""
    smallest = _SPECKLE_UM2 / CELL_UM**2
    small = total = 0
    for label in np.unique(cells[cells > 0]):
        components, _ = ndimage.label(cells == label)
        sizes = np.bincount(components.ravel())[1:]
        small += int(sizes[sizes < smallest].sum())
        total += int(sizes.sum())
    return small / total if total else 0.0
