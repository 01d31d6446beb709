import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train.fitting.import_sampath
from tests.support.commands import run_train
from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.sam_path_oracle import SamPath, random_sam_path
from tests.support.toy_data import TILE_SIZE_PX, toy_settings
from train.commands.fitting import ImportSampath
from train.data.folder import read_tile_folder
from train.errors import (
    CheckpointError,
    DatasetError,
    DestinationError,
    FocalPathError,
    RunError,
    SettingsError,
    WeightsError,
)
from train.fitting.evaluation import predict_split
from train.fitting.import_sampath import import_sampath
from train.fitting.predict import predict_images
from train.fitting.run import fit
from train.fitting.run_lock import only_run
from train.fitting.scores import evaluate
from train.model.checkpoint import load_checkpoint, read_card
from train.model.segmenter import labels_from_logits
from train.model.weight_files import read_weights
from train.presets import CRAG_MPP

NUM_CLASSES = 5
BCSS = toy_settings(preset="bcss")


def lightning_hyper_parameters(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Lightning's save_hyperparameters keeps of SAM-Path: a configuration of python-box."""
    classes: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "box", ModuleType("box"))
    for module, name, base in (("box.box", "Box", dict), ("box.box_list", "BoxList", list)):
        classes[name] = type(name, (base,), {"__module__": module})
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        setattr(sys.modules[module], name, classes[name])
    steps = classes["BoxList"]([1, 2])
    configuration = classes["Box"](opt=classes["Box"](steps=steps))
    configuration.__dict__["_box_config"] = {"box_class": classes["Box"]}
    steps.__dict__["box_options"] = {"default_box": False}
    return {"cfg": configuration, "lr_steps": (10, 20)}


@pytest.fixture(scope="module")
def sam_path() -> SamPath:
    return random_sam_path(NUM_CLASSES)


@pytest.fixture
def sampath_file(sam_path: SamPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Lightning checkpoint with SAM-Path's names, of random weights."""
    path = tmp_path / "sampath.ckpt"
    configuration = lightning_hyper_parameters(monkeypatch)
    torch.save({**sam_path.checkpoint(), "hyper_parameters": configuration}, path)
    monkeypatch.undo()  # no such package is installed where the file is read
    return path


def smooth_images(number: int, side: int = TILE_SIZE_PX) -> Tensor:
    """(N, 3, H, W) uint8 images with structure at the size of a patch."""
    torch.manual_seed(9)
    coarse = torch.rand(number, 3, side // 5, side // 5)
    images = torch.nn.functional.interpolate(coarse, side, mode="bicubic")
    return (255 * images.clamp(0, 1)).byte()


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [5, 2])
def test_an_imported_model_gives_all_labels_of_sam_path(tmp_path: Path, num_classes: int):
    theirs = random_sam_path(num_classes)
    torch.save(theirs.checkpoint(), tmp_path / "sampath.ckpt")
    names = [f"class {index}" for index in range(num_classes)]
    import_sampath(tmp_path / "sampath.ckpt", tmp_path / "run", toy_settings(), class_names=names)
    segmenter, _ = load_checkpoint(tmp_path / "run")
    images = smooth_images(4)
    with torch.no_grad():
        found = labels_from_logits(segmenter(images.float()).low_res_logits, TILE_SIZE_PX)
    expected = torch.stack([theirs.label(image.permute(1, 2, 0)) for image in images])
    assert len(expected.unique()) > 1
    assert torch.equal(found, expected)


def write_larger_images(root: Path, images: Tensor, file_of_folds: str) -> Path:
    """A data set of two classes in SAM-Path's layout, at 0.5 um per pixel."""
    for name in ("img", "mask"):
        (root / name).mkdir(parents=True)
    rows = ["img_id,fold"]
    for index, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "img" / f"image{index}.png")
        mask = np.where(pixels[..., 0] > 127, 2, 1).astype(np.uint8)
        Image.fromarray(mask).save(root / "mask" / f"image{index}.png")
        rows.append(f"image{index},{(-1, 0, 1)[index % 3]}")
    (root / file_of_folds).write_text("\n".join(rows))
    classes = [{"name": name, "color": "#009e73"} for name in ("Non-gland", "Gland")]
    (root / "dataset.json").write_text(json.dumps({"mpp": 0.5, "classes": classes}))
    return root


def test_an_imported_model_of_larger_images_gives_all_labels_of_sam_path(tmp_path: Path):
    """As CRAG's: images of 1.5 tiles, which SAM-Path resizes in float without antialiasing."""
    theirs, images = random_sam_path(2), smooth_images(3, 96)
    torch.save(theirs.checkpoint(), tmp_path / "sampath.ckpt")
    data = write_larger_images(tmp_path / "data", images, "cv.csv")
    settings = toy_settings(model={"mpp": 0.75})
    card = import_sampath(
        tmp_path / "sampath.ckpt", tmp_path / "run", settings, data=data, score=False
    )
    segmenter, _ = load_checkpoint(tmp_path / "run")
    (found,) = predict_split(segmenter, card, read_tile_folder(data), "test", tta=False)
    expected = theirs.label(images[0].permute(1, 2, 0))
    assert len(expected.unique()) == 2
    assert torch.equal(found.predicted, expected)
    assert (card.settings.model.resized_from_px, card.input_mpp) == (96, 0.5)
    # The files state no um per pixel: assumed is what the model is given, as in serving.
    predict_images(tmp_path / "run", data / "img" / "image0.png", tmp_path / "predicted")
    with Image.open(tmp_path / "predicted" / "masks" / "image0.png") as mask:
        assert np.array_equal(mask, expected)
    outside = replace(card.settings.model, resized_from_px=None)
    (other,) = predict_split(
        segmenter,
        replace(card, settings=replace(card.settings, model=outside)),
        read_tile_folder(data),
        "test",
        tta=False,
    )
    assert not torch.equal(other.predicted, expected)  # so that who resizes matters


def test_an_imported_model_of_the_preset_crag_resizes_its_images_itself(tmp_path: Path):
    torch.save(random_sam_path(2).checkpoint(), tmp_path / "sampath.ckpt")
    settings = toy_settings(preset="crag", model={"mpp": 1.5 * CRAG_MPP})
    card = import_sampath(tmp_path / "sampath.ckpt", tmp_path / "run", settings)
    assert card.settings.model.resized_from_px == 96
    assert card.input_mpp == pytest.approx(CRAG_MPP)


@pytest.mark.parametrize(("factor", "wanted_px"), [(1.3, "83.2"), (0.75, "48")])
def test_an_import_that_cannot_resize_as_sam_path_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, wanted_px: str
):
    torch.save(random_sam_path(2).checkpoint(), tmp_path / "sampath.ckpt")
    settings = toy_settings(preset="crag", model={"mpp": factor * CRAG_MPP})
    ImportSampath(
        checkpoint=tmp_path / "sampath.ckpt", out=tmp_path / "run", settings=settings
    ).run()
    card = read_card(tmp_path / "run")
    assert card.settings.model.resized_from_px is None
    assert wanted_px in card.label_note
    assert card.label_note in capsys.readouterr().err


@pytest.mark.parametrize("content", [torch.zeros(3), [1]])
def test_a_state_dict_that_is_none_is_refused(tmp_path: Path, content: object):
    torch.save({"state_dict": content}, tmp_path / "sampath.ckpt")
    with raises(WeightsError, "sampath.ckpt"):
        import_sampath(tmp_path / "sampath.ckpt", tmp_path / "run", BCSS)


def test_the_configuration_in_a_sampath_checkpoint_is_read_as_plain_values(sampath_file: Path):
    with pytest.raises(UnpicklingError):  # so that the fixture is what a real file is
        torch.load(sampath_file, weights_only=True)
    configuration = read_weights(sampath_file)["hyper_parameters"]["cfg"]
    assert type(configuration) is OrderedDict
    assert configuration["opt"]["steps"] == [1, 2]


def test_an_import_with_data_has_its_classes_shares_and_scores(
    sampath_file: Path, toy_data: Path, tmp_path: Path
):
    import_sampath(sampath_file, tmp_path / "run", toy_settings(), data=toy_data)
    segmenter, card = load_checkpoint(tmp_path / "run")
    assert card.settings.model.bias == "none"
    assert card.settings.model.pathology_positions == "dino"
    assert card.classes[0].name == "Tumor"
    assert sum(card.shares) == pytest.approx(1)
    assert card.metrics == pytest.approx(
        evaluate(segmenter, card, toy_data, "validation"), nan_ok=True
    )


def test_an_import_without_data_has_the_presets_classes_and_says_whose_weights_it_has(
    sampath_file: Path, tmp_path: Path
):
    import_sampath(sampath_file, tmp_path / "run", toy_settings(preset="bcss", model={"mpp": 0.25}))
    card = read_card(tmp_path / "run")
    assert [entry.name for entry in card.classes][:2] == ["Tumor", "Stroma"]
    assert card.mpp == 0.25
    assert card.pixel_frequencies is None
    assert not card.metrics
    assert card.imported_from == "SAM-Path"
    terms = {origin.part: origin.licence for origin in card.origins}
    assert "Commons Clause" in terms["pathology encoder"]
    assert "Apache-2.0" in terms["image encoder and decoder"]
    assert "none" in terms["whole model"]


def test_the_command_imports_without_data(sampath_file: Path, tmp_path: Path):
    toy = "--tile-size-px 64 --image-encoder tiny --pathology-encoder-depth 1 --decoder-dim 32"
    toy += " --pathology-encoder vit_tiny_patch16_224 --class-names A B C D [E]"
    run_train("import-sampath", "bcss", sampath_file, tmp_path / "run", *toy.split())
    assert [entry.name for entry in read_card(tmp_path / "run").classes][4] == "[E]"


def two_classes(theirs: SamPath, path: Path) -> None:
    torch.save(random_sam_path(2).checkpoint(), path)


def a_dense_prompt_decoder(theirs: SamPath, path: Path) -> None:
    content = theirs.checkpoint()
    content["state_dict"]["model.dense_prompt_decoder.layers.0.norm1.weight"] = torch.ones(4)
    torch.save(content, path)


def no_pathology_encoder(theirs: SamPath, path: Path) -> None:
    weights = theirs.checkpoint()["state_dict"]
    kept = {name: value for name, value in weights.items() if "extra_encoder" not in name}
    torch.save({"state_dict": kept}, path)


def an_unknown_weight(theirs: SamPath, path: Path) -> None:
    content = theirs.checkpoint()
    content["state_dict"]["model.model.mask_decoder.extra.weight"] = torch.ones(4)
    torch.save(content, path)


def another_model(theirs: SamPath, path: Path) -> None:
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, path)


def tokens_of(shape: tuple[int, ...], theirs: SamPath, path: Path) -> None:
    content = theirs.checkpoint()
    content["state_dict"]["model.model.mask_decoder.mask_tokens.weight"] = torch.ones(shape)
    torch.save(content, path)


@pytest.mark.parametrize(
    "wrapper", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_forward_module.{}"]
)
def test_words_around_the_names_are_read_past(sam_path: SamPath, tmp_path: Path, wrapper: str):
    weights = sam_path.checkpoint()["state_dict"]
    torch.save({n: v for n, v in weights.items()}, tmp_path / "plain.ckpt")
    torch.save({wrapper.format(n): v for n, v in weights.items()}, tmp_path / "wrapped.ckpt")
    runs = [tmp_path / name for name in ("plain", "wrapped")]
    for run in runs:
        import_sampath(run.with_suffix(".ckpt"), run, BCSS)
    first, second = ((run / "model.safetensors").read_bytes() for run in runs)
    assert first == second


def whole_numbers(part: str, theirs: SamPath, path: Path) -> None:
    weights = theirs.checkpoint()["state_dict"]
    torch.save({n: v.long() if part in n else v for n, v in weights.items()}, path)


@pytest.mark.parametrize(
    ("make", "kind", "values"),
    [
        (partial(whole_numbers, "mask_tokens"), WeightsError, ["whole numbers", "mask_tokens"]),
        (partial(tokens_of, ()), CheckpointError, ["mask_tokens", "()"]),
        (partial(tokens_of, (2, 32)), CheckpointError, ["mask_tokens", "(2, 32)"]),
        (an_unknown_weight, WeightsError, ["mask_decoder.extra.weight"]),
        (two_classes, CheckpointError, ["2 classes", "bcss", "crag"]),
        (a_dense_prompt_decoder, CheckpointError, ["dense_prompt_decoder", "late fusion"]),
        (no_pathology_encoder, CheckpointError, ["extra_encoder", "late fusion"]),
        (another_model, CheckpointError, ["mask_tokens"]),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_for_its_reason(
    sam_path: SamPath,
    tmp_path: Path,
    make: Callable[[SamPath, Path], None],
    kind: type[FocalPathError],
    values: list[str],
):
    make(sam_path, tmp_path / "other.ckpt")
    with raises(kind, *values):
        import_sampath(tmp_path / "other.ckpt", tmp_path / "run", BCSS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["image_encoder.pos_embed", "rel_pos", "extra_encoder.model.pos"])
def test_whole_numbers_are_not_resized_to_another_tile(
    sam_path: SamPath, tmp_path: Path, part: str
):
    whole_numbers(part, sam_path, tmp_path / "other.ckpt")
    settings = toy_settings(preset="bcss", model={"tile_size_px": 2 * TILE_SIZE_PX})
    with raises(WeightsError, "pos"):
        import_sampath(tmp_path / "other.ckpt", tmp_path / "run", settings)


@pytest.mark.parametrize(
    "names",
    [
        ["A", "B"],
        ["A", "B", "C", "D", "A"],
        ["A", "", "C", "D", "E"],
        ["A", "B\n", "C", "D", "mean"],
    ],
)
def test_class_names_that_are_not_as_many_and_different_are_refused(
    sampath_file: Path, tmp_path: Path, names: list[str]
):
    with raises(CheckpointError, "--class-names"):
        import_sampath(sampath_file, tmp_path / "run", toy_settings(), class_names=names)


def test_an_import_replaces_no_trained_model_unasked(sampath_file: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    importing = partial(import_sampath, sampath_file, run, BCSS)
    left = ["last.ckpt", "metrics.csv", "model.safetensors", "run.yaml", "training.png"]
    for name in left:
        (run / name).write_bytes(b"trained")
        if name.endswith(("ckpt", "safetensors")):
            with raises(DestinationError, run, "--overwrite"):
                importing()
    assert sorted(path.name for path in run.iterdir()) == left
    importing(overwrite=True)
    load_checkpoint(run)
    assert sorted(path.name for path in run.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_import_leaves_a_folder_in_which_a_process_trains_alone(
    sampath_file: Path, tmp_path: Path, overwrite: bool
):
    with only_run(tmp_path, is_first=True):
        with raises(RunError, tmp_path):
            import_sampath(sampath_file, tmp_path, BCSS, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir() if path != sampath_file] == [".lock"]


def test_a_run_that_ends_during_an_import_is_not_replaced_unasked(
    sampath_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    run.mkdir()
    trained = partial((run / "model.safetensors").write_bytes, b"trained")
    before_call(monkeypatch, train.fitting.import_sampath, "only_run", trained)
    with raises(DestinationError, run, "--overwrite"):
        import_sampath(sampath_file, run, BCSS)
    assert (run / "model.safetensors").read_bytes() == b"trained"


def test_class_names_beside_a_data_set_are_refused(
    sampath_file: Path, toy_data: Path, tmp_path: Path
):
    names = [entry.name for entry in read_tile_folder(toy_data).classes]
    with raises(SettingsError, "--data", "--class-names"):
        import_sampath(sampath_file, tmp_path / "run", BCSS, data=toy_data, class_names=names)


def test_a_checkpoint_that_is_not_there_is_one_of_sam_path(tmp_path: Path):
    with raises(CheckpointError, tmp_path / "no.ckpt", "SAM-Path"):
        import_sampath(tmp_path / "no.ckpt", tmp_path / "run", BCSS)


def test_masks_of_0_and_1_as_in_sam_paths_crag_are_recognised(tmp_path: Path):
    data = write_larger_images(tmp_path / "data", smooth_images(3, 96), "cv.csv")
    for path in (data / "mask").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) - 1).save(path)
    torch.save(random_sam_path(2).checkpoint(), tmp_path / "sampath.ckpt")
    with raises(DatasetError, "Gland", "0, 1", "mask_values"):
        import_sampath(tmp_path / "sampath.ckpt", tmp_path / "run", toy_settings(), data=data)


@pytest.mark.slow
def test_dfa_trains_on_from_an_imported_checkpoint(
    sampath_file: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import_sampath(sampath_file, tmp_path / "imported", toy_settings(), data=toy_data, score=False)
    settings = toy_settings(
        # No step changes the weights by more than a rounding, so that the start can be told.
        optimization={"epochs": 1, "learning_rate": 1e-12},
        weights={"from_run": str(tmp_path / "imported")},
    )
    fit(settings, toy_data, tmp_path / "run")
    segmenter, card = load_checkpoint(tmp_path / "run")
    imported, imported_card = load_checkpoint(tmp_path / "imported")
    torch.testing.assert_close(segmenter.neck[0].weight, imported.neck[0].weight)
    assert segmenter.class_attention_bias.delta.any()  # DFA's prior, not the imported zeros
    assert "class_attention_bias.delta" in capsys.readouterr().out
    assert card.settings.model.pathology_positions == "dino"
    assert card.origins[1:] == imported_card.origins
