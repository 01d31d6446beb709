import json
import math
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from tests.support.errors import raises
from tests.support.toy_data import changed, rows_of, toy_settings, write_toy_data
from train.comparison.compare import data_fingerprint
from train.data.folder import read_tile_folder
from train.errors import RunError, StorageError
from train.fitting.resume import WholeStateIO, changed_inputs, resumed_epoch, run_inputs
from train.fitting.run import fit
from train.fitting.trainer import trainer_of
from train.settings import Settings

pytestmark = pytest.mark.slow


def swap_classes(data: Path) -> None:
    path = data / "dataset.json"
    content = json.loads(path.read_text())
    names = [entry["name"] for entry in content["classes"]]
    content["mask_values"] = dict(zip("021345", [None, *names], strict=True))
    path.write_text(json.dumps(content))


def mirror_a_mask(data: Path, name: str = "tile0") -> None:
    path = data / "mask" / f"{name}.bmp"
    size = path.stat().st_size
    with Image.open(path) as mask:
        ImageOps.mirror(mask).save(path)
    assert path.stat().st_size == size


def mirror_a_validation_mask(data: Path) -> None:
    mirror_a_mask(data, "tile2")


def state_an_images_scale(data: Path) -> None:
    path = data / "folds.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"{line},{'' if i else 'mpp'}" for i, line in enumerate(lines)))
    path.write_text(path.read_text().replace("tile0,1,", "tile0,1,0.25"))


def test_inputs_of_an_earlier_version_say_nothing_of_masks():
    now = {"seed": 1, "labels": "abc"}
    assert changed_inputs({"seed": 1}, now) == {}
    assert list(changed_inputs({"seed": 2, "labels": "d"}, now)) == ["labels", "seed"]
    assert list(changed_inputs({}, now)) == ["seed"]
    assert changed_inputs({"optimization": {"seed": 1}}, now) == {}


def test_how_a_run_is_computed_is_no_input_but_rounded_features_are(toy_data: Path):
    plain = toy_settings(model={"encoders_frozen": True}, augmentation={"augment": "none"})
    cached = changed(plain, runtime={"embedding_cache": "cache"})
    elsewhere = {"embedding_cache": "moved", "track": "mlflow", "compile": True}
    other = changed(
        cached,
        preset="small",
        augmentation={"num_workers": 3},
        runtime={**elsewhere, "exportable": False},
    )
    folder = read_tile_folder(toy_data)
    inputs = [run_inputs(settings, folder, None) for settings in (plain, cached, other)]
    assert list(changed_inputs(*inputs[:2])) == ["embedding_cache"]
    assert changed_inputs(*inputs[1:]) == {}


def test_the_difficulty_is_an_input_also_where_a_class_has_none(toy_data: Path):
    folder = read_tile_folder(toy_data)
    inputs = [
        run_inputs(toy_settings(), folder, torch.tensor([dice, math.nan]))
        for dice in (0.5, 0.5, 0.25)
    ]
    assert inputs[0]["difficulty_from"] == [0.5, None]  # NaN is not equal to itself
    assert changed_inputs(*inputs[:2]) == {}
    assert list(changed_inputs(*inputs[1:])) == ["difficulty_from"]


def rename_a_class(data: Path) -> None:
    path = data / "dataset.json"
    path.write_text(path.read_text().replace('"Tumor"', '"Tumour"'))


def halve_the_scale(data: Path) -> None:
    path = data / "dataset.json"
    path.write_text(path.read_text().replace('"mpp": 0.5', '"mpp": 0.25'))


def enlarge_an_image(data: Path) -> None:
    path = data / "img" / "tile0.png"
    with Image.open(path) as image:
        larger = image.resize((65, 64))
    larger.save(path)


@pytest.mark.parametrize(
    "change",
    [
        *(swap_classes, mirror_a_mask, mirror_a_validation_mask),
        *(rename_a_class, halve_the_scale, state_an_images_scale, enlarge_an_image),
    ],
)
def test_what_labels_mean_is_an_input_of_a_run_and_of_a_comparison(
    change: Callable[[Path], None], tmp_path: Path
):
    data = write_toy_data(tmp_path / "data", num_train=2, num_validation=1)
    for path in (data / "mask").iterdir():
        with Image.open(path) as mask:
            mask.save(path.with_suffix(".bmp"))
        path.unlink()

    def inputs() -> tuple[object, str]:
        folder = read_tile_folder(data)
        return run_inputs(toy_settings(), folder, None), data_fingerprint(folder)

    before = inputs()
    assert inputs() == before
    change(data)
    assert [new == old for new, old in zip(inputs(), before, strict=True)] == [False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (toy_settings(model={"decoder_dim": 64}), "decoder_dim 32 -> 64"),
        (toy_settings(model={"bias": "none"}), "bias dfa -> none"),
        (toy_settings(bias={"bias_gamma": 1.0}), "bias_gamma 0.5 -> 1.0"),
        (toy_settings(optimization={"seed": 7}), "seed 0 -> 7"),
        (toy_settings(optimization={"learning_rate": 1.0}), "learning_rate 0.001 -> 1.0"),
        (toy_settings(runtime={"devices": 2}), "devices 1 -> 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_is_not_resumed_with_other_settings(
    run_copy: Path, toy_data: Path, settings: Settings, message: str
):
    with raises(RunError, f": {message}. "):
        fit(settings, toy_data, run_copy, resume=True)


def test_a_run_is_not_resumed_on_other_data(run_copy: Path, data_copy: Path):
    folds = data_copy / "folds.csv"
    folds.write_text(folds.read_text().replace("tile7,1", "tile7,0"))
    with raises(RunError, ": data "):
        fit(toy_settings(), data_copy, run_copy, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state[:1000],
        lambda _: b"",
        lambda _: b"not a checkpoint",
        lambda state: state[: len(state) // 2] + b"flipped" + state[len(state) // 2 + 7 :],
    ],
)
def test_a_damaged_state_is_told(run_copy: Path, toy_data: Path, damage: Callable[[bytes], bytes]):
    last = run_copy / "last.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    with raises(RunError, "last.ckpt", "--overwrite"):
        fit(toy_settings(), toy_data, run_copy, resume=True)


def test_a_run_without_a_state_is_told(tmp_path: Path):
    last = tmp_path / "last.ckpt"
    with raises(RunError, last, "--resume"):
        resumed_epoch(last, {})


def test_a_run_goes_on_from_the_epoch_after_its_last(toy_run: Path):
    last = toy_run / "last.ckpt"
    inputs = torch.load(last, weights_only=True)["callbacks"]["RunInputs"]["inputs"]
    assert resumed_epoch(last, inputs) == 2  # counted from 0


def test_a_finished_run_is_resumed_from_a_moved_data_set_and_left_as_it_is(
    run_copy: Path, data_copy: Path
):
    before = (run_copy / "last.ckpt").read_bytes()
    fit(toy_settings(augmentation={"num_workers": 1}), data_copy, run_copy, resume=True)
    assert (run_copy / "last.ckpt").read_bytes() == before


def test_a_full_disk_keeps_the_state_of_the_epoch_before(tmp_path: Path):
    last = tmp_path / "last.ckpt"
    WholeStateIO().save_checkpoint({"epoch": 1}, last)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with raises(StorageError, last):
            WholeStateIO().save_checkpoint({"epoch": torch.zeros(1000)}, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert torch.load(last, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [last]


def test_a_run_writes_its_state_so(tmp_path: Path):
    assert isinstance(trainer_of(toy_settings(), tmp_path, []).strategy.checkpoint_io, WholeStateIO)


def test_a_run_that_stopped_early_is_not_trained_further(toy_data: Path, tmp_path: Path):
    # A rate this small changes no prediction: the first epoch stays the best.
    still = {"epochs": 6, "learning_rate": 1e-12}
    settings = toy_settings(runtime={"patience": 1}, optimization=still)
    run = tmp_path / "run"
    for resume in (False, True):
        fit(settings, toy_data, run, resume=resume)
        assert [row["epoch"] for row in rows_of(run)] == [1, 2]


def test_a_finished_run_goes_on_with_more_epochs(run_copy: Path, toy_data: Path):
    fit(toy_settings(optimization={"epochs": 3}), toy_data, run_copy, resume=True)
    assert [row["epoch"] for row in rows_of(run_copy)] == [1, 2, 3]
    with raises(RunError, "epochs 3 -> 2"):
        fit(toy_settings(), toy_data, run_copy, resume=True)


def test_a_run_whose_best_weights_are_gone_is_not_resumed(toy_data: Path, run_copy: Path):
    (run_copy / "model.safetensors").unlink()
    with raises(RunError, "last.ckpt without model.safetensors", "--overwrite"):
        fit(toy_settings(optimization={"epochs": 3}), toy_data, run_copy, resume=True)
    assert len(rows_of(run_copy)) == 2
