"""Probes on frozen embeddings: classes across scales, the scale itself, and retrieval."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainValidator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from train.intervals import draw_counts

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Array = Annotated[
    NDArray[np.float64], PlainValidator(lambda numbers: np.asarray(numbers, np.float64))
]
"""Numbers that pydantic reads back from JSON."""

_REGULARISATION = tuple(float(10.0**power) for power in range(-4, 5, 2))
NUM_RESAMPLES = 2000
_SAME_SIMILARITY = 1e-6
"""Cosines that differ by less are equal: float32 rounds them so."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings (N, D) with labels (N,) in 1..C and the case (N,) of each."""

    features: Floats
    labels: Labels
    groups: NDArray[np.str_]


@dataclass(frozen=True)
class Probe:
    """A linear classifier with the statistics of the scale that it was trained at.

    Statistics of the scale that it is tested at would be adaptation to it.
    """

    mean: Floats
    deviation: Floats
    model: LogisticRegression

    def predict(self, features: Floats) -> Labels:
        """Labels (N,) of embeddings (N, D)."""
        found = self.model.predict((features - self.mean) / self.deviation)
        return np.asarray(found, np.int64)


def fit_probe(training: Embedded, validation: Embedded) -> Probe:
    """Fit a balanced multinomial regression; C is chosen on validation tiles of the same scale.

    Args:
        training: tiles to fit.
        validation: tiles that choose the regularisation.
    """
    mean = training.features.mean(axis=0)
    deviation = training.features.std(axis=0) + 1e-6
    best: tuple[float, Probe] | None = None
    for strength in _REGULARISATION:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit((training.features - mean) / deviation, training.labels)
        probe = Probe(mean, deviation, model)
        score = balanced_accuracy(validation.labels, probe.predict(validation.features))
        if best is None or score > best[0]:
            best = (score, probe)
    assert best is not None
    return best[1]


def balanced_accuracy(truth: Labels, predicted: Labels) -> float:
    """Mean recall over the classes in `truth`, in [0, 1]; NaN where `truth` is empty."""
    classes = np.unique(truth)
    if not len(classes):
        return float("nan")
    return float(np.mean([(predicted[truth == label] == label).mean() for label in classes]))


@dataclass(frozen=True)
class Retention:
    """How much of a probe's accuracy is left at another scale.

    `matrix[a, b]` is the balanced accuracy of a probe trained at scale a and tested at b.
    """

    retained: float
    """M(coarse to fine) over M(coarse to coarse): the paper's headline is 0.967."""
    above_chance: float
    """The same with chance, 1 / C, taken off both."""
    of_ceiling: float
    """M(coarse to fine) over M(fine to fine)."""


def retention(matrix: NDArray[np.float64], num_classes: int) -> Retention:
    """The three ratios from coarse (index 0) to fine (the last index)."""
    chance = 1 / num_classes
    at_home, away, ceiling = matrix[0, 0], matrix[0, -1], matrix[-1, -1]
    return Retention(
        retained=float(away / at_home),
        above_chance=float((away - chance) / (at_home - chance)) if at_home > chance else np.nan,
        of_ceiling=float(away / ceiling),
    )


class CaseBootstrap:
    """The same resamples of cases for every encoder, so that differences are paired."""

    def __init__(self, groups: NDArray[np.str_], seed: int = 0) -> None:
        self.cases = np.unique(groups)
        rng = np.random.default_rng(seed)
        self.draws = draw_counts(rng, len(self.cases), NUM_RESAMPLES)

    def balanced_accuracies(
        self, truth: Labels, predicted: Labels, groups: NDArray[np.str_], num_classes: int
    ) -> NDArray[np.float64]:
        """Balanced accuracy of every resample, (resamples,), over the classes that were drawn."""
        right = np.zeros((len(self.cases), num_classes))
        total = np.zeros((len(self.cases), num_classes))
        case = np.searchsorted(self.cases, groups)
        np.add.at(total, (case, truth - 1), 1)
        np.add.at(right, (case, truth - 1), predicted == truth)
        found, drawn = self.draws @ right, self.draws @ total
        shares = np.divide(found, drawn, out=np.full_like(found, np.nan), where=drawn > 0)
        return np.asarray(np.nanmean(shares, axis=1), np.float64)

    def means(self, values: NDArray[np.float64], groups: NDArray[np.str_]) -> NDArray[np.float64]:
        """Mean of `values` (N,) in every resample, (resamples,)."""
        case = np.searchsorted(self.cases, groups)
        sums = np.bincount(case, values, minlength=len(self.cases))
        counts = np.bincount(case, minlength=len(self.cases)).astype(np.float64)
        drawn = self.draws @ counts
        means = np.full(len(drawn), np.nan)
        np.divide(self.draws @ sums, drawn, out=means, where=drawn > 0)
        return means


def scale_leakage(training: Mapping[float, Embedded], test: Mapping[float, Embedded]) -> float:
    """Balanced accuracy of a probe that tells the scale of a tile: lower leaks less.

    Args:
        training: tiles of each scale to fit.
        test: tiles of each scale to score.
    """

    def joined(parts: Mapping[float, Embedded]) -> Embedded:
        return Embedded(
            np.concatenate([part.features for part in parts.values()]),
            np.concatenate(
                [np.full(len(part.labels), i + 1) for i, part in enumerate(parts.values())]
            ),
            np.concatenate([part.groups for part in parts.values()]),
        )

    fitted, tested = joined(training), joined(test)
    half = np.arange(len(fitted.labels)) % 2 == 0
    parts = [
        Embedded(fitted.features[rows], fitted.labels[rows], fitted.groups[rows])
        for rows in (half, ~half)
    ]
    probe = fit_probe(parts[0], parts[1])
    return balanced_accuracy(tested.labels, probe.predict(tested.features))


@dataclass(frozen=True)
class Retrieval:
    """How often a query finds its own place."""

    recall_at_1: float
    recall_at_5: float
    mean_reciprocal_rank: float
    num_places: int
    resampled: Array
    """Mean reciprocal rank of every resample of cases, (resamples,)."""


def retrieve(
    queries: Floats, gallery: Floats, bootstrap: CaseBootstrap, groups: NDArray[np.str_]
) -> Retrieval:
    """Rank gallery rows by cosine similarity; row i of both is the same place.

    Rows that are equally near share the mean of their ranks: else an encoder that says the same of
    all places would find each of them.

    Args:
        queries: (N, D).
        gallery: (N, D).
        bootstrap: resamples of the cases.
        groups: (N,), the case of each place.
    """

    def unit(rows: Floats) -> Floats:
        return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9))

    similarity = unit(queries) @ unit(gallery).T
    own = np.diagonal(similarity)[:, None]
    nearer = (similarity > own + _SAME_SIMILARITY).sum(axis=1)
    as_near = (np.abs(similarity - own) <= _SAME_SIMILARITY).sum(axis=1)  # itself among them
    ranks = nearer + (1 + as_near) / 2
    return Retrieval(
        recall_at_1=float((ranks <= 1).mean()),
        recall_at_5=float((ranks <= 5).mean()),
        mean_reciprocal_rank=float((1 / ranks).mean()),
        num_places=len(gallery),
        resampled=bootstrap.means(1 / ranks, groups),
    )
