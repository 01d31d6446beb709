import csv
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.contract.refusal import as_flag
from tests.support.errors import raises
from train.data.synthetic import dataset as synthetic
from train.data.synthetic import tissue
from train.data.synthetic.dataset import CLASSES, SyntheticSettings, make_tile, write_dataset
from train.data.synthetic.nuclei import LYMPHOCYTE, Stains, draw_nuclei
from train.data.synthetic.tissue import INFLAMMATORY, NECROSIS, STROMA, TUMOR
from train.errors import DestinationError, SettingsError

SMALL = SyntheticSettings(num_train=3, num_validation=1, num_test=2, tile_size_px=64)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tile(index: int, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    return make_tile(np.random.default_rng(np.random.SeedSequence((0, index))), size_px)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "dataset"
    write_dataset(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def tiles() -> list[tuple[np.ndarray, np.ndarray]]:
    return [tile(index, 64) for index in range(80)]


def test_the_same_seed_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", SMALL)
    assert digest(tmp_path / "again") == digest(dataset)


@pytest.mark.slow
def test_another_seed_gives_other_tiles(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", SyntheticSettings(num_train=1, tile_size_px=64, seed=1))
    ours, theirs = digest(dataset), digest(tmp_path / "other")
    assert ours["img/tile_00000.png"] != theirs["img/tile_00000.png"]


def test_a_tile_is_the_same_however_many_others_there_are(dataset: Path, tmp_path: Path) -> None:
    few = SyntheticSettings(num_train=0, num_validation=0, num_test=2, tile_size_px=64)
    write_dataset(tmp_path / "few", few)
    ours, theirs = digest(dataset), digest(tmp_path / "few")
    names = [name for name in theirs if name.endswith(".png")]
    assert len(names) == 4
    assert all(ours[name] == theirs[name] for name in names)


def test_the_layout_is_that_of_sam_path(dataset: Path) -> None:
    with (dataset / "folds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["fold"]) for row in rows] == [-1, -1, 0, 1, 1, 1]
    for number, row in enumerate(rows):
        for kind, drawn in zip(("img", "mask"), tile(number, 64), strict=True):
            with Image.open(dataset / kind / f"{row['img_id']}.png") as image:
                np.testing.assert_array_equal(image, drawn)
    assert len(list((dataset / "img").iterdir())) == len(rows)


def test_the_description_names_the_classes_in_label_order(dataset: Path) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    assert description == {
        "mpp": 0.5,
        "classes": [asdict(entry) for entry in CLASSES],
    }
    assert [c["name"] for c in description["classes"]] == [
        "Tumor", "Stroma", "Inflammatory", "Necrosis", "Other",
    ]  # fmt: skip


@pytest.mark.slow
def test_inflammatory_and_necrosis_are_equally_rare(
    tiles: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    labels = np.stack([labels for _, labels in tiles])
    shares = np.bincount(labels.ravel(), minlength=6) / labels.size
    assert 0.75 < shares[INFLAMMATORY] / shares[NECROSIS] < 1.25
    assert 0.03 < shares[INFLAMMATORY] < 0.09
    assert shares[STROMA] > 0.3
    assert 0 < shares[0] < 0.04


def test_no_class_is_in_every_tile_but_all_are_in_some(
    tiles: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    for label in (TUMOR, INFLAMMATORY, NECROSIS):
        present = [bool((labels == label).any()) for _, labels in tiles]
        assert 0 < sum(present) < len(present)


def test_nuclei_are_darker_and_bluer_than_collagen() -> None:
    image, labels = tile(8, 192)
    stroma = image[labels == STROMA].astype(float)
    light = stroma.sum(axis=1)
    nuclei = stroma[light < np.quantile(light, 0.03)].mean(axis=0)
    collagen = stroma[np.abs(light - np.median(light)) < 5].mean(axis=0)
    assert nuclei.sum() < 0.6 * collagen.sum()
    # Haematoxylin takes red, eosin lets it through; both take more green than blue.
    assert nuclei[2] - nuclei[0] > 10 > collagen[2] - collagen[0]
    assert collagen[1] < collagen[2] < collagen[0]


def test_light_absorbed_by_two_stains_is_the_product_of_each() -> None:
    def photograph(haematoxylin: float, eosin: float) -> np.ndarray:
        amounts = np.full((2, 48, 48), [[[haematoxylin]], [[eosin]]], np.float32)
        image = tissue._photograph(np.random.default_rng(0), Stains(*amounts), 0.5)
        return np.asarray(image.mean(axis=(0, 1)))

    white, blue, pink, both = (
        photograph(*amounts) for amounts in ((0, 0), (0.5, 0), (0, 0.3), (0.5, 0.3))
    )
    assert (white > 235).all()
    assert blue.argmax() == 2
    assert pink.argmax() == 0
    np.testing.assert_allclose(both, blue * pink / white, rtol=0.02)


def test_necrosis_holds_no_whole_nuclei(tiles: list[tuple[np.ndarray, np.ndarray]]) -> None:
    dark = {}
    for label in (TUMOR, NECROSIS):
        pixels = np.concatenate([image[labels == label] for image, labels in tiles])
        dark[label] = (pixels.sum(axis=1) < 360).mean()
    assert dark[NECROSIS] < 0.3 * dark[TUMOR]


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_a_lymphocyte_is_seven_micrometres_across_at_any_mpp(mpp: float) -> None:
    stains = Stains(*np.zeros((2, 64, 64), np.float32))
    centre = np.array([[32, 32]], np.float32)
    draw_nuclei(np.random.default_rng(0), stains, centre, None, LYMPHOCYTE, mpp)
    area_um2 = (stains.haematoxylin > 0.3).sum() * mpp**2
    assert 5.5 < 2 * np.sqrt(area_um2 / np.pi) < 8.5


def test_nuclei_beyond_the_edge_are_cut_by_it() -> None:
    stains = Stains(*np.zeros((2, 32, 32), np.float32))
    centres = np.array([[0, 0], [31, 16], [45, 16], [-60, 5], [90, 90]], np.float32)
    draw_nuclei(np.random.default_rng(0), stains, centres, None, LYMPHOCYTE, 0.5)
    assert stains.haematoxylin[0, 0] > 0.3
    assert stains.haematoxylin[31, 16] > 0.3
    assert stains.haematoxylin[14:18, 14:18].max() == 0


def test_the_same_settings_leave_the_folder_as_it_is(dataset: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    write_dataset(dataset, SMALL)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_other_settings_are_refused_and_nothing_is_touched(dataset: Path) -> None:
    before = digest(dataset)
    other = SyntheticSettings(num_train=4, num_validation=1, num_test=2, tile_size_px=64)
    with raises(DestinationError, dataset, "'num_train': 3", "'num_train': 4"):
        write_dataset(dataset, other)
    assert digest(dataset) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with raises(DestinationError, tmp_path, "settings.json"):
        write_dataset(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interruption_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*args: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make_tile(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "make_tile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "dataset", SMALL)
    assert len(calls) >= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"), [("num_train", -1), ("tile_size_px", 8), ("mpp", 0.0), ("seed", -1)]
)
def test_settings_that_cannot_be_made_are_refused(field: str, value: float) -> None:
    with raises(SettingsError, as_flag(field), value):
        SyntheticSettings(**{field: value})  # type: ignore[arg-type]
