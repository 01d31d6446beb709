import csv
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from train.data.check import count_splits, find_warnings, report, share_table
from train.data.folder import read_tile_folder
from train.data.leaks import leak_warnings
from train.data.pixels import count_all
from train.errors import DatasetError, ScaleError

Rows = list[tuple[str, int, str]]
ROWS: Rows = [("a", 1, "one"), ("b", 0, "two"), ("c", -1, "three")]


def write_data(root: Path, rows: Rows = ROWS, *, mpp: float | None = 0.5, side: int = 10) -> Path:
    """Tiles that are half Tumor, half Stroma, with the folds and groups of `rows`."""
    for folder in ("img", "mask"):
        (root / folder).mkdir(parents=True)
    labels = np.ones((side, side), np.uint8)
    labels[side // 2 :] = 2
    for name, _, _ in rows:
        Image.new("RGB", (side, side)).save(root / "img" / f"{name}.png")
        Image.fromarray(labels).save(root / "mask" / f"{name}.png")
    with (root / "folds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("img_id", "fold", "group"), *rows])
    classes = [{"name": "Tumor", "color": "#d55e00"}, {"name": "Stroma", "color": "#009e73"}]
    (root / "dataset.json").write_text(json.dumps({"mpp": mpp, "classes": classes}))
    return root


def relabel(root: Path, name: str, labels: np.ndarray) -> None:
    Image.new("RGB", labels.shape[::-1]).save(root / "img" / f"{name}.png")
    Image.fromarray(labels.astype(np.uint8)).save(root / "mask" / f"{name}.png")


def warnings_of(root: Path) -> list[str]:
    folder = read_tile_folder(root)
    return find_warnings(folder, count_splits(folder, count_all(folder)))


def test_shares_are_of_labelled_pixels_and_unlabelled_of_all(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    relabel(root, "a", np.array([[1, 2, 2, 2], [0, 0, 0, 0]]).repeat(50, axis=0)[:100, :])
    folder = read_tile_folder(root)
    table = share_table(folder, count_splits(folder, count_all(folder)))
    training = list(table.columns[1].cells)
    assert training == ["25.00%", "75.00%", "50.00%", "1"]


def a_tiny_class(root: Path) -> None:
    labels = np.ones((10, 100))
    labels[0, :9] = 2
    relabel(root, "a", labels)


def a_missing_class(root: Path) -> None:
    for name in "ac":
        relabel(root, name, np.ones((10, 10)))


def mostly_unlabelled(root: Path) -> None:
    labels = np.zeros((10, 10))
    labels[0], labels[1] = 1, 2
    relabel(root, "b", labels)


def not_square(root: Path) -> None:
    relabel(root, "a", np.array([[1, 2, 1]]))


def named_twice(root: Path) -> None:
    with (root / "folds.csv").open("a", newline="") as file:
        csv.writer(file).writerow(("a", 1, "one"))


def forgotten(root: Path) -> None:
    Image.new("RGB", (10, 10)).save(root / "img" / "d.png")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (None, None),
        (not_square, None),
        (a_tiny_class, "Stroma is tiny: 0.90% of the labelled training pixels (below 1%)"),
        (a_missing_class, "Stroma has no pixel for training and test: training refuses it"),
        (mostly_unlabelled, "80.00% of the validation pixels are unlabelled"),
        (named_twice, "folds.csv names 1 tiles more than once, such as a"),
        (forgotten, "such as d.png"),
    ],
)
def test_what_looks_wrong_is_named(
    tmp_path: Path, change: Callable[[Path], None] | None, found: str | None
) -> None:
    root = write_data(tmp_path / "data")
    if change is not None:
        change(root)
    warnings = warnings_of(root)
    assert len(warnings) == bool(found)
    assert (found or "") in "".join(warnings)


TCGA = ["TCGA-A1-A0SK-DX1_0_0", "TCGA-A1-A0SK-DX1_0_790", "TCGA-OL-A66P-DX1_0_0"]


@pytest.mark.parametrize(
    ("names", "folds", "groups", "found"),
    [
        ("abc", (1, 0, -1), ("one", "one", "x"), "1 of 2 patients or slides are in several folds"),
        (TCGA, (1, 0, -1), ("", "", ""), "TCGA-A1-A0SK in 0 and 1"),
        ([f"roi_{name}" for name in TCGA], (1, 0, -1), ("", "", ""), "TCGA-A1-A0SK in 0 and 1"),
        (TCGA, (1, 0, -1), ("one", "two", "x"), None),
        ("ab", (1, 0), ("one", "two"), "no test tile: there is nothing to report"),
        ("abc", (1, 0, -1), ("P1", "p1", "x"), "may be written in several ways, such as 'P1'"),
        ("abc", (1, 0, -1), ("P 7", "P-007", "x"), "such as 'P 7' and 'P-007'"),
        ("abc", (1, 0, -1), ("", "", "x"), "2 of 3 images have no group in folds.csv"),
        ("abc", (1, 0, -1), ("P1-1", "P11", "P10"), None),
    ],
)
def test_doubtful_folds_and_patients_are_named(
    tmp_path: Path,
    names: Sequence[str],
    folds: tuple[int, ...],
    groups: tuple[str, ...],
    found: str | None,
) -> None:
    rows = list(zip(names, folds, groups, strict=True))
    warnings = warnings_of(write_data(tmp_path / "data", rows))
    assert len(warnings) == bool(found)
    assert (found or "") in "".join(warnings)


@pytest.mark.parametrize(("mpp", "found"), [(None, "dataset.json"), (10, "mpp 10")])
def test_a_missing_or_unusual_resolution_is_named(
    tmp_path: Path, mpp: float | None, found: str
) -> None:
    (warning,) = warnings_of(write_data(tmp_path / "data", mpp=mpp))
    assert found in warning


def test_a_magnification_given_as_mpp_is_refused(tmp_path: Path) -> None:
    with raises(ScaleError, 40.0, 0.05, 20):
        warnings_of(write_data(tmp_path / "data", mpp=40))


def test_an_image_in_two_folds_is_refused(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", [*ROWS, ("a", -1, "one")])
    with raises(DatasetError, "a into the folds 1 and -1"):
        read_tile_folder(root)


@pytest.mark.parametrize(
    ("copy_of", "name", "found"),
    [
        ("a.png", "c.tif", "1 images are in several splits under different names, such as a.png"),
        ("a.png", "d.png", "1 images are there under several names, such as a.png and d.png"),
        ("a.png", "", None),
    ],
)
def test_an_image_under_another_name_is_found_by_its_pixels(
    copy_of: str, name: str, found: str | None, tmp_path: Path
) -> None:
    root = write_data(tmp_path / "data", [*ROWS, ("d", 2, "four")])
    rng = np.random.default_rng(0)
    for path in (root / "img").iterdir():
        Image.fromarray(rng.integers(0, 255, (10, 10, 3), dtype=np.uint8)).save(path)
    if name:
        for path in (root / "img").glob(f"{Path(name).stem}.*"):
            path.unlink()
        Image.open(root / "img" / copy_of).save(root / "img" / name)
    warnings = warnings_of(root)
    assert len(warnings) == bool(found)
    assert (found or "") in "".join(warnings)


def test_leaks_are_told_by_split(tmp_path: Path) -> None:
    rows = [("a", 1, "one"), ("b", 2, "one"), ("c", -1, "one"), ("d", 0, "two"), ("e", 2, "two")]
    (warning,) = leak_warnings(read_tile_folder(write_data(tmp_path / "data", rows)))
    assert warning.startswith("2 of 2 patients or slides are in several splits, such as one in tra")
    rows = [("a", 1, "one"), ("b", 2, "one"), ("c", -1, "two")]
    assert not leak_warnings(read_tile_folder(write_data(tmp_path / "sound", rows)))


@pytest.mark.parametrize("must_train", [False, True])
def test_only_what_must_train_is_refused_without_validation(
    tmp_path: Path, must_train: bool
) -> None:
    root = write_data(tmp_path / "data", [row for row in ROWS if row[1] != 0])
    with raises(DatasetError, "validation") if must_train else nullcontext():
        report(root, must_train=must_train)


def test_the_report_prints_table_and_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_data(tmp_path / "data", ROWS[:2])
    assert report(root, ["found [before]"]) == [
        "found [before]",
        "no test tile: there is nothing to report",
    ]
    output = capsys.readouterr().out
    assert "Stroma" in output
    assert "warning: found [before]" in output


def _state(root: Path, name: str, per_metre: tuple[float, float]) -> None:
    """Write into an image how many pixels it has per metre."""
    path = root / "img" / f"{name}.png"
    Image.open(path).copy().save(path, dpi=tuple(count * 0.0254 for count in per_metre))


def test_the_files_own_um_per_pixel_counts_where_nothing_else_says_it(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", mpp=None)
    for name, _, _ in ROWS:
        _state(root, name, (4e6, 4e6))
    folder = read_tile_folder(root)
    assert (folder.mpp, folder.mpp_is_of_files) == (0.25, True)
    assert {tile.mpp for tiles in folder.tiles.values() for tile in tiles} == {0.25}
    title = str(share_table(folder, count_splits(folder, count_all(folder))).title)
    assert "0.25 um per pixel, as the image files state" in title
    assert warnings_of(root) == []


def test_files_that_differ_in_um_per_pixel_are_each_taken_at_their_own(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", mpp=None)
    for (name, _, _), count in zip(ROWS, [(4e6, 4e6), (2e6, 2e6), (4e6, 2e6)], strict=True):
        _state(root, name, count)
    folder = read_tile_folder(root)
    sizes = [folder.tiles[split][0].pixel_size for split in ("training", "validation", "test")]
    assert sizes == [0.25, 0.5, pytest.approx((0.25, 0.5))]
    assert folder.mpp is None
    assert any("--mpp" in warning for warning in warnings_of(root))


def test_what_dataset_json_says_counts_before_the_files(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", mpp=0.5)
    _state(root, "a", (2e6, 1e6))
    folder = read_tile_folder(root)
    assert (folder.tiles["training"][0].pixel_size, folder.mpp_is_of_files) == (0.5, False)
    assert any("0.5 x 1" in warning for warning in warnings_of(root))


def test_a_file_whose_pixels_are_far_from_squares_is_named(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", mpp=None)
    _state(root, "b", (4e6, 5e5))
    with raises(ScaleError, "b.png", "0.25 x 2"):
        read_tile_folder(root)
