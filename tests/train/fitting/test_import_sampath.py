import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.toy_data import TILE_SIZE_PX, toy_settings
from tests.train.model.test_pretrained import NUM_CLASSES, sam_of, same
from train.cli import main
from train.errors import FocalPathError
from train.fitting.import_sampath import import_sampath, load_sampath_weights, num_sampath_classes
from train.fitting.run import evaluate
from train.model.checkpoint import load_checkpoint, read_card
from train.model.segmenter import Segmenter
from train.model.weight_files import read_weights


@pytest.fixture
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(toy_settings().model, NUM_CLASSES).eval()


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


@pytest.fixture
def sampath_file(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Lightning checkpoint with SAM-Path's names, of random weights."""
    weights = {}
    for name, value in sam_of(TILE_SIZE_PX).state_dict().items():
        weights[f"model.model.{name}"] = value
    theirs = {
        "neck.": "model.fusion_neck.",
        "pathology_encoder.vit.": "model.extra_encoder.model.",
        "mask_decoder.": "model.model.mask_decoder.",
    }
    stale = [name for name in weights if name.startswith("model.model.mask_decoder.output_hyper")]
    for name in stale:
        del weights[name]
    for name, value in segmenter.state_dict().items():
        for ours, prefix in theirs.items():
            if name.startswith(ours):
                weights[prefix + name.removeprefix(ours)] = torch.randn_like(value)
    path = tmp_path / "sampath.ckpt"
    configuration = lightning_hyper_parameters(monkeypatch)
    torch.save({"state_dict": weights, "epoch": 31, "hyper_parameters": configuration}, path)
    monkeypatch.undo()  # no such package is installed where the file is read
    return path


def test_a_sampath_checkpoint_is_converted_key_by_key(segmenter: Segmenter, sampath_file: Path):
    load_sampath_weights(segmenter, sampath_file)
    theirs = read_weights(sampath_file)["state_dict"]
    ours = segmenter.state_dict()
    assert same(ours["neck.0.weight"], theirs["model.fusion_neck.0.weight"])
    assert same(
        ours["mask_decoder.mask_tokens.weight"],
        theirs["model.model.mask_decoder.mask_tokens.weight"],
    )
    assert same(
        ours["pathology_encoder.vit.norm.bias"], theirs["model.extra_encoder.model.norm.bias"]
    )
    assert not segmenter.class_attention_bias.delta.any()


def test_a_sampath_checkpoint_tells_its_number_of_classes(sampath_file: Path):
    assert num_sampath_classes(sampath_file) == NUM_CLASSES


@pytest.mark.parametrize("content", [torch.zeros(3), [1]])
def test_a_state_dict_that_is_none_is_refused(tmp_path: Path, content: object):
    torch.save({"state_dict": content}, tmp_path / "sampath.ckpt")
    with pytest.raises(FocalPathError, match="where a dictionary of tensors by name was expected"):
        num_sampath_classes(tmp_path / "sampath.ckpt")


def test_the_configuration_in_a_sampath_checkpoint_is_read_as_plain_values(sampath_file: Path):
    with pytest.raises(UnpicklingError):  # so that the fixture is what a real file is
        torch.load(sampath_file, weights_only=True)
    configuration = read_weights(sampath_file)["hyper_parameters"]["cfg"]
    assert type(configuration) is OrderedDict
    assert configuration["opt"]["steps"] == [1, 2]


def test_an_imported_sampath_checkpoint_is_one_of_ours(
    sampath_file: Path, toy_data: Path, tmp_path: Path
):
    import_sampath(sampath_file, tmp_path / "run", toy_data, toy_settings())
    segmenter, card = load_checkpoint(tmp_path / "run")
    theirs = read_weights(sampath_file)["state_dict"]
    assert same(segmenter.neck[0].weight, theirs["model.fusion_neck.0.weight"])
    assert card.settings.model.bias == "none"
    assert card.classes[0].name == "Tumor"
    assert card.metrics == pytest.approx(
        evaluate(segmenter, card, toy_data, "validation"), nan_ok=True
    )


def test_an_imported_checkpoint_is_scored_at_its_presets_size(
    sampath_file: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    toy = "--tile-size-px 64 --image-encoder tiny --pathology-encoder-depth 1 --decoder-dim 32"
    toy += " --pathology-encoder vit_tiny_patch16_224 --no-score"
    arguments = [str(sampath_file), str(tmp_path / "run"), "--data", str(toy_data), *toy.split()]
    monkeypatch.setattr(sys, "argv", ["train", "import-sampath", "crag", *arguments])
    main()
    assert read_card(tmp_path / "run").settings.model.score_size_px == 1536


def test_an_import_replaces_no_trained_model_unasked(
    sampath_file: Path, toy_data: Path, tmp_path: Path
):
    importing = partial(
        import_sampath, sampath_file, tmp_path, toy_data, toy_settings(), score=False
    )
    (tmp_path / "model.safetensors").write_bytes(b"trained")
    with pytest.raises(FocalPathError, match="has a trained model.*--overwrite"):
        importing()
    importing(overwrite=True)
    load_checkpoint(tmp_path)


def test_a_sampath_checkpoint_with_an_unknown_key_is_refused(
    segmenter: Segmenter, sampath_file: Path
):
    weights = read_weights(sampath_file)["state_dict"]
    weights["model.dense_prompt_decoder.layers.0.norm1.weight"] = torch.ones(4)
    torch.save({"state_dict": weights}, sampath_file)
    with pytest.raises(FocalPathError, match="dense_prompt_decoder.*no such weight"):
        load_sampath_weights(segmenter, sampath_file)
