import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from train.data.convert.images import FoldSettings
from train.data.convert.ocelot import OcelotSettings, prepare_ocelot
from train.errors import DatasetError, ScaleError, SourceError
from train.pretraining.sources import open_source

SIDE = 32


def _write_ocelot(root: Path, num_pairs: int = 24) -> Path:
    """OCELOT as it is published, two pairs of each case, plain colours."""
    rng = np.random.default_rng(0)
    pairs = {}
    for number in range(num_pairs):
        name = f"{number:03d}"
        for kind in ("tissue", "cell"):
            folder = root / "images" / "train" / kind
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((SIDE, SIDE, 3), rng.integers(60, 200), np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.jpg")
        masks = root / "annotations" / "train" / "tissue"
        masks.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIDE, SIDE), 1 + number % 2, np.uint8)).save(masks / f"{name}.png")
        pairs[name] = {
            "subset": "train",
            "slide_name": f"TCGA-AA-{number // 2:04d}-01Z-00-DX1",
            "mpp_x": 0.25,
            "tissue": {
                "x_start": 0,
                "y_start": 0,
                "x_end": 4096,
                "y_end": 4096,
                "resized_mpp_x": 0.8,
            },
            "cell": {
                **{"x_start": 1024, "y_start": 2048, "x_end": 2048, "y_end": 3072},
                "resized_mpp_x": 0.2,
            },
        }
    (root / "metadata.json").write_text(json.dumps({"sample_pairs": pairs}))
    return root


@pytest.fixture(scope="module")
def ocelot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_ocelot(tmp_path_factory.mktemp("published"))


def test_pretraining_has_the_folds_of_the_prepared_data_set(ocelot: Path, tmp_path: Path) -> None:
    """So a case that a segmenter is tested on is never in pretraining."""
    prepare_ocelot(ocelot, tmp_path / "data", OcelotSettings())
    with (tmp_path / "data" / "folds.csv").open(newline="") as file:
        folds = {row["img_id"]: int(row["fold"]) for row in csv.DictReader(file)}
    found = open_source(ocelot)
    split_of = {
        found.source.slides[slide].name: split
        for split, slides in found.slides.items()
        for slide in slides
    }
    names = {-1: "test", 0: "validation"}
    assert split_of == {name: names.get(fold, "training") for name, fold in folds.items()}
    assert set(split_of.values()) == {"training", "validation", "test"}
    cases = {
        split: {found.source.slides[slide].group for slide in slides}
        for split, slides in found.slides.items()
    }
    assert not cases["training"] & cases["test"]
    assert not cases["training"] & cases["validation"]


def test_the_folds_of_a_data_set_that_was_prepared_otherwise_can_be_given(
    ocelot: Path, tmp_path: Path
) -> None:
    folds = FoldSettings(seed=7)
    prepare_ocelot(ocelot, tmp_path / "data", OcelotSettings(folds=folds))
    file = tmp_path / "data" / "folds.csv"
    with file.open(newline="") as opened:
        tests = {row["img_id"] for row in csv.DictReader(opened) if row["fold"] == "-1"}
    own = open_source(ocelot)
    found = open_source(ocelot, file)
    assert {found.source.slides[slide].name for slide in found.slides["test"]} == tests
    assert found.slides["test"] != own.slides["test"]
    file.write_text("img_id,fold\n000,1\n")
    with raises(DatasetError, file, 23, 24):
        open_source(ocelot, file)


def test_a_data_set_without_um_per_pixel_is_refused(toy_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**content, "mpp": None}))
    with raises(ScaleError, "dataset.json", "mpp"):
        open_source(data)


def test_a_folder_of_no_known_kind_is_refused_with_all_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no slides")
    with raises(SourceError, tmp_path, "folds.csv", "metadata.json", ".svs"):
        open_source(tmp_path)
