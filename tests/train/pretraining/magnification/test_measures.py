"""Each measure on answers made by hand."""

import numpy as np
import pytest
from scipy import stats

from train.intervals import bootstrap_interval
from train.pretraining.footprints import Footprint
from train.pretraining.magnification.embedding import color_matched, color_target
from train.pretraining.magnification.probe import (
    CaseBootstrap,
    Embedded,
    balanced_accuracy,
    fit_probe,
    retention,
    retrieve,
    scale_leakage,
)
from train.pretraining.magnification.segmentation import (
    _add_to_cells,
    cohen_kappa,
    mean_iou,
    score_maps,
)


def _blobs(seed: int, shift: float = 0.0, number: int = 60) -> Embedded:
    """Two classes apart along the first axis, moved along the second."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 2 + 1
    features = rng.normal(size=(number, 4)).astype(np.float32)
    features[:, 0] += 8 * labels
    features[:, 1] += shift
    return Embedded(features, labels, np.array([f"case{i % 6}" for i in range(number)]))


def test_ratios_by_hand() -> None:
    matrix = np.array([[0.8, 0.6], [0.5, 0.75]])
    found = retention(matrix, num_classes=5)
    assert found.retained == pytest.approx(0.75)
    assert found.above_chance == pytest.approx(0.4 / 0.6)
    assert found.of_ceiling == pytest.approx(0.8)


def test_an_encoder_at_chance_retains_all_and_nothing_above_chance() -> None:
    found = retention(np.full((2, 2), 0.2), num_classes=5)
    assert found.retained == pytest.approx(1)
    assert np.isnan(found.above_chance)


def test_a_probe_knows_its_classes_and_takes_no_statistics_of_the_test_scale() -> None:
    probe = fit_probe(_blobs(0), _blobs(1))
    test = _blobs(2)
    assert balanced_accuracy(test.labels, probe.predict(test.features)) == 1
    moved = _blobs(2).features + np.float32([100, 0, 0, 0])
    assert set(probe.predict(moved)) == {2}


def test_the_scale_leaks_from_embeddings_that_it_moves_and_not_from_others() -> None:
    apart = {1.0: _blobs(3), 0.25: _blobs(4, shift=20)}
    alike = {1.0: _blobs(5), 0.25: _blobs(6)}
    assert scale_leakage(apart, apart) > 0.95
    assert scale_leakage(alike, {1.0: _blobs(7), 0.25: _blobs(8)}) < 0.75


def test_resamples_of_cases_are_the_same_for_every_encoder_and_hold_the_estimate() -> None:
    test = _blobs(9)
    wrong = np.where(test.groups == "case0", 3 - test.labels, test.labels)
    first, second = (
        CaseBootstrap(test.groups).balanced_accuracies(test.labels, wrong, test.groups, 2)
        for _ in range(2)
    )
    assert np.array_equal(first, second)
    low, high = bootstrap_interval(first, ())
    assert low < balanced_accuracy(test.labels, wrong) <= high
    assert high > low


def test_retrieval_ranks_its_own_place_first_or_at_chance() -> None:
    gallery = np.eye(10, dtype=np.float32)
    cases = np.array([f"case{i % 3}" for i in range(10)])
    own = retrieve(gallery, gallery, CaseBootstrap(cases), cases)
    assert own.recall_at_1 == 1
    assert bootstrap_interval(own.resampled, ()) == (1, 1)
    next_to_another = np.roll(gallery, 1, axis=0) + 0.5 * gallery
    turned = retrieve(next_to_another, gallery, CaseBootstrap(cases), cases)
    assert bootstrap_interval(turned.resampled, ()) == (0.5, 0.5)
    assert turned.recall_at_1 == 0
    assert turned.num_places == 10


def test_a_constant_map_is_consistent_and_retains_next_to_nothing() -> None:
    truth = np.repeat(np.repeat(np.arange(1, 5).reshape(2, 2), 4, 0), 4, 1)
    constant = np.ones_like(truth)
    right = score_maps([truth], [truth], 4)
    flat = score_maps([constant], [truth], 4)
    assert mean_iou(constant, constant, 4) == 1
    assert (right.mean_iou, right.boundary_f1, right.speckle) == (1, 1, 0)
    assert flat.mean_iou == pytest.approx(1 / 16)
    assert flat.boundary_f1 == 0


def test_speckle_counts_small_components_and_boundaries_forgive_one_cell() -> None:
    truth = np.ones((8, 8), np.int64)
    truth[:, 4:] = 2
    dotted = truth.copy()
    dotted[2, 1] = 2
    assert score_maps([dotted], [truth], 2).speckle == pytest.approx(1 / 64)
    shifted = np.ones((8, 8), np.int64)
    shifted[:, 5:] = 2
    assert score_maps([shifted], [truth], 2).boundary_f1 == 1


def test_unlabelled_cells_count_nowhere() -> None:
    truth = np.array([[1, 0], [1, 0]])
    predicted = np.array([[1, 2], [1, 2]])
    assert score_maps([predicted], [truth], 2).mean_iou == 1


def test_the_edge_of_the_labels_is_no_boundary_to_find() -> None:
    truth = np.ones((8, 8), np.int64)
    truth[:, 4:] = 2
    truth[6:] = 0
    flat = np.ones_like(truth)
    assert score_maps([truth], [truth], 2).boundary_f1 == 1
    assert score_maps([flat], [truth], 2).boundary_f1 == 0


def test_an_encoder_that_says_the_same_of_all_places_finds_none() -> None:
    """Ties share their ranks, as in scipy: a collapsed encoder is at chance, not perfect."""
    rng = np.random.default_rng(0)
    cases = np.array([f"case{i % 3}" for i in range(9)])
    same = np.ones((9, 4), np.float32)
    for embedded in (same, np.zeros_like(same)):
        found = retrieve(embedded, embedded, CaseBootstrap(cases), cases)
        assert (found.recall_at_1, found.mean_reciprocal_rank) == (0, pytest.approx(1 / 5))
    queries, gallery = (rng.integers(-1, 2, (9, 2)).astype(np.float32) for _ in range(2))
    queries[:, 0] = gallery[:, 0] = 1  # few directions: some are equal
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        gallery / np.linalg.norm(gallery, axis=1)[:, None]
    ).T
    ranks = np.diagonal(stats.rankdata(-cosine.round(5), axis=1))
    found = retrieve(queries, gallery, CaseBootstrap(cases), cases)
    assert found.mean_reciprocal_rank == pytest.approx((1 / ranks).mean())


def test_kappa_takes_chance_off() -> None:
    first = np.array([1, 1, 2, 2])
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(first, np.array([1, 2, 1, 2])) == pytest.approx(0)


@pytest.mark.parametrize("side", [2, 8])
def test_patches_finer_and_coarser_than_a_cell_land_where_they_lie(side: int) -> None:
    """A tile of 32 um, cells of 8 um; the left half is class 0."""
    square = Footprint(100.0, 200.0, 32.0)
    found = np.zeros((side, side, 2))
    found[:, : side // 2, 0] = 1
    found[:, side // 2 :, 1] = 1
    sums, counts = np.zeros((4, 4, 2)), np.zeros((4, 4, 1))
    _add_to_cells(sums, counts, found, square, square, 8.0)
    assert np.array_equal((sums / counts).argmax(-1), [[0, 0, 1, 1]] * 4)


def test_colour_matching_takes_the_colour_and_leaves_the_texture() -> None:
    rng = np.random.default_rng(0)
    pink = np.clip(rng.normal((220, 150, 190), 12, (32, 32, 3)), 0, 255).astype(np.uint8)
    purple = np.clip(pink.astype(int) - (60, 40, 10), 0, 255).astype(np.uint8)
    target = color_target([pink])
    matched = color_matched(purple, target)
    assert np.abs(matched.mean((0, 1)) - pink.mean((0, 1))).max() < 3
    assert np.corrcoef(matched[..., 0].ravel(), purple[..., 0].ravel())[0, 1] > 0.95
