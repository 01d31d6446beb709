import numpy as np
import pytest

from tests.support.errors import raises
from train.data.convert import layout
from train.data.convert.layout import assign_folds, tile_starts
from train.errors import (
    SourceError,
)


@pytest.mark.parametrize(
    ("length_px", "starts"),
    [
        (2467, [0, 722, 1443]),
        (4838, [0, 954, 1908, 2861, 3814]),
        (6275, [0, 876, 1751, 2626, 3501, 4376, 5251]),
        (1036, [0, 12]),
        (1024, [0]),
        (957, [0]),
    ],
)
def test_tiles_of_bcss_lie_where_sam_path_cut_them(length_px: int, starts: list[int]) -> None:
    assert tile_starts(length_px, 1024) == starts


def test_folds_hold_about_as_many_tiles() -> None:
    num_tiles = {"large": 10, **{f"small {index}": 1 for index in range(10)}}
    found = assign_folds(num_tiles, 2, seed=0)
    assert sorted(found.values()).count(found["large"]) == 1


def test_the_largest_patient_is_not_for_validation() -> None:
    assert assign_folds({"large": 10, "small": 1, "other": 1}, 3, seed=0)["large"] != 0


def test_folds_depend_on_the_seed_only() -> None:
    patients = {str(index): 1 for index in range(12)}
    drawn = [assign_folds(patients, 5, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_patient_alone_cannot_be_split_into_training_and_validation() -> None:
    with raises(SourceError, "one"):
        assign_folds({"one": 100}, 5, seed=0)


def test_with_fewer_patients_than_folds_some_are_still_for_validation() -> None:
    assert set(assign_folds({"one": 3, "two": 1}, 5, seed=0).values()) == {0, 1}


def test_images_are_averaged_when_made_smaller() -> None:
    stripes = np.zeros((4, 4, 3), np.uint8)
    stripes[:, ::2] = 200
    assert (layout.resample_image(stripes, 0.5) == 100).all()


def test_labels_are_never_mixed_when_made_smaller() -> None:
    labels = np.kron(np.array([[1, 5], [5, 1]], np.uint8), np.ones((3, 3), np.uint8))
    assert set(np.unique(layout.resample_labels(labels, 0.5))) == {1, 5}


def test_a_region_smaller_than_a_tile_is_padded_with_white_unlabelled_pixels() -> None:
    region = layout.Region("a", "case", np.zeros((2, 3, 3), np.uint8), np.ones((2, 3), np.uint8))
    ((name, image, labels),) = layout._cut(region, 4)
    assert name == "a"
    outside = np.ones((4, 4), bool)
    outside[:2, :3] = False
    np.testing.assert_array_equal(labels == 0, outside)
    np.testing.assert_array_equal((image == 255).all(axis=2), outside)
