import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from tests.support.errors import raises
from tests.support.toy_data import TILE_SIZE_PX, changed, toy_settings
from train.errors import EncoderError, WeightsError
from train.model.encoder_kinds import ENCODER_KINDS
from train.model.segmenter import Segmenter
from train.model.starting_weights import starting_weights
from train.settings import Settings

MEAN, STD = (0.7, 0.6, 0.5), (0.2, 0.3, 0.4)
DINOV2 = {"embed_dim": 48, "num_heads": 3, "depth": 2}


def timm_model(name: str, **args: Any) -> Any:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, **args).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def starting_from(path: Path, **model: Any) -> Settings:
    if path.is_dir():
        model = {"pathology_encoder_depth": None, **model}
    return toy_settings(weights={"pathology_weights": str(path)}, model=model)


def started(settings: Settings) -> Segmenter:
    start = starting_weights(settings)
    segmenter = Segmenter(start.settings.model, 5).eval()
    start.load_into(segmenter, ())
    return segmenter


def features(segmenter: Segmenter, image: Tensor) -> Tensor:
    with torch.no_grad():
        return segmenter.pathology_encoder(255 * image).flatten(2).transpose(1, 2)


def test_a_local_folder_of_timms_sets_everything_by_itself(tmp_path: Path):
    theirs = timm_model("vit_giant_patch14_reg4_dinov2", img_size=56, **DINOV2)
    theirs.pretrained_cfg.update(mean=MEAN, std=STD)
    save_for_hf(theirs, str(tmp_path), model_args={**DINOV2, "img_size": 56})
    assert (tmp_path / "config.json").is_file()
    segmenter = started(starting_from(tmp_path))
    model = starting_weights(starting_from(tmp_path)).settings.model  # all that the folder says
    assert model.pathology_encoder == "vit_giant_patch14_reg4_dinov2"
    assert (model.pathology_encoder_depth, model.pathology_positions) == (None, "timm")
    assert set(Segmenter(model, 5).pathology_encoder.vit.state_dict()) == set(theirs.state_dict())
    image = torch.rand(1, 3, TILE_SIZE_PX, TILE_SIZE_PX)
    with torch.no_grad():
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
        small = torch.nn.functional.interpolate((image - mean) / std, 56, mode="bilinear")
        expected = theirs.forward_features(small)[:, 5:]
    torch.testing.assert_close(features(segmenter, image), expected, atol=1e-4, rtol=1e-4)


def write_config(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_a_config_does_not_say_is_read_off_the_weights(tmp_path: Path):
    """As UNI2-h's and Virchow2's, which leave SwiGLU to the code on their pages."""
    args = {"embed_dim": 48, "num_heads": 3, "depth": 2}
    theirs = timm_model(
        "vit_giant_patch14_224",
        img_size=56,
        reg_tokens=8,
        no_embed_class=True,
        init_values=1e-5,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer="silu",
        mlp_ratio=5.33334,
        **args,
    )
    config = {"architecture": "vit_giant_patch14_224", "model_args": args}
    model = starting_weights(
        starting_from(write_config(tmp_path / "uni2", theirs.state_dict(), config))
    ).settings.model
    found = Segmenter(model, 5).pathology_encoder.vit.state_dict()
    expected = theirs.state_dict()
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}


@pytest.mark.parametrize(
    ("said", "values"),
    [
        ({"depth": 3}, ["depth 3", "2"]),
        ({"embed_dim": 96}, ["embed_dim 96", "48"]),
        ({"reg_tokens": 4}, ["reg_tokens 4", "0"]),
        ({"patch_size": 16}, ["patch_size 16", "14"]),
        ({"init_values": 1.0}, ["init_values"]),
        ({"mlp_layer": "SwiGLUPacked"}, ["mlp_layer"]),
    ],
)
def test_a_config_that_contradicts_its_weights_is_refused(
    tmp_path: Path, said: dict[str, Any], values: list[str]
):
    args = {"embed_dim": 48, "num_heads": 3, "depth": 2}
    theirs = timm_model("vit_small_patch14_dinov2", img_size=56, **args).state_dict()
    weights = {name: value for name, value in theirs.items() if ".ls" not in name}
    config = {"architecture": "vit_small_patch14_dinov2", "model_args": {**args, **said}}
    folder = write_config(tmp_path / "vit", weights, config)
    with raises(WeightsError, "config.json", *values):
        starting_weights(starting_from(folder))


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("{", "not valid JSON"),
        ("[]", "list"),
        ("{}", "architecture"),
        ('{"model_type": "swin"}', "swin"),
        ('{"model_type": "dinov2", "layer_norm_eps": 1e-6}', "patch_size"),
        ('{"model_type": "vit"}', "layer_norm_eps"),
        ('{"architecture": "x", "model_args": {"in_chans": 1}}', "in_chans"),
        ('{"architecture": "x", "model_args": {"norm_layer": {}}}', "norm_layer"),
        ('{"architecture": "x", "mean": [0.5]}', "mean"),
        ('{"architecture": "x", "mean": [123.7, 116.3, 103.5]}', "[0, 1]"),
        ('{"architecture": "x", "mean": [0.5, 0.5, NaN]}', "[0, 1]"),
        ('{"architecture": "x", "std": [-1, 1, 1]}', "[0, 1]"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path: Path, content: str, value: str):
    save_file(
        timm_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(content)
    with raises(WeightsError, value):
        starting_weights(starting_from(tmp_path))


def test_a_folder_of_transformers_is_taken_with_its_preprocessor(tmp_path: Path):
    config = {
        "model_type": "vit",
        "patch_size": 16,
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "layer_norm_eps": 1e-6,
    }
    weights = timm_model("vit_tiny_patch16_224", embed_dim=48, depth=1).state_dict()
    folder = write_config(tmp_path / "phikon", weights, config)
    inputs = {"image_mean": list(MEAN), "image_std": list(STD)}
    (folder / "preprocessor_config.json").write_text(json.dumps(inputs))
    model = starting_weights(starting_from(folder)).settings.model
    assert model.pathology_mean == MEAN
    assert started(starting_from(folder)).pathology_encoder.embed_dim == 48


@pytest.mark.parametrize(
    ("names", "value"), [(["config.json"], "0 files"), (["a.pth", "b.safetensors"], "2 files")]
)
def test_a_folder_without_one_file_of_weights_is_refused(
    tmp_path: Path, names: list[str], value: str
):
    for name in names:
        (tmp_path / name).write_text("{}")
    with raises(WeightsError, value):
        starting_weights(starting_from(tmp_path))


def test_another_encoder_than_the_folders_is_refused(tmp_path: Path):
    weights = timm_model("vit_tiny_patch16_224", depth=1).state_dict()
    folder = write_config(tmp_path / "vit", weights, {"architecture": "vit_tiny_patch16_224"})
    with raises(WeightsError, "--pathology-encoder"):
        starting_weights(starting_from(folder, pathology_encoder="vit_base_patch16_224"))


def test_layer_scale_and_registers_of_a_plain_file_are_read_off_it(tmp_path: Path):
    """As UNI's and Virchow2's pytorch_model.bin."""
    theirs = timm_model("vit_tiny_patch16_224", img_size=64, depth=1, init_values=0.5, reg_tokens=4)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    segmenter = started(starting_from(tmp_path / "pytorch_model.bin"))
    image = torch.rand(1, 3, TILE_SIZE_PX, TILE_SIZE_PX)
    with torch.no_grad():
        expected = theirs.forward_features((image - 0.5) / 0.5)[:, 5:]
    torch.testing.assert_close(features(segmenter, image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("no_embed_class", [True, False])
@pytest.mark.parametrize("reg_tokens", [0, 4])
def test_positions_of_another_tile_are_resized_with_and_without_prefix_tokens(
    tmp_path: Path, no_embed_class: bool, reg_tokens: int
):
    theirs = timm_model(
        "vit_tiny_patch16_224", depth=1, reg_tokens=reg_tokens, no_embed_class=no_embed_class
    )
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    loaded = started(starting_from(tmp_path / "vit.pth")).pathology_encoder.vit
    theirs.set_input_size(img_size=TILE_SIZE_PX)
    torch.testing.assert_close(loaded.pos_embed, theirs.pos_embed)


def test_a_dino_file_has_its_positions_resized_as_dino_does_and_the_settings_say_so(tmp_path: Path):
    theirs = timm_model("vit_tiny_patch16_224", depth=1)
    teacher = {f"module.backbone.{name}": v for name, v in theirs.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / "vit256_small_dino.pth")
    settings = starting_from(tmp_path / "vit256_small_dino.pth")
    assert starting_weights(settings).settings.model.pathology_positions == "dino"
    positions = started(settings).pathology_encoder.vit.pos_embed
    patches = theirs.pos_embed[:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(patches, scale_factor=4.1 / 14, mode="bicubic")
    torch.testing.assert_close(positions[:, 1:], expected.flatten(2).transpose(1, 2))
    other = started(changed(settings, model={"pathology_positions": "timm"}))
    assert not torch.equal(other.pathology_encoder.vit.pos_embed, positions)


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "reg_token", "norm.weight"])
@pytest.mark.parametrize("shape", [(), (17,), (17, 192), (0,)])
def test_weights_of_an_odd_shape_are_one_error(tmp_path: Path, name: str, shape: tuple[int, ...]):
    weights = timm_model("vit_tiny_patch16_224", depth=1).state_dict()
    torch.save({**weights, name: torch.ones(shape)}, tmp_path / "vit.pth")
    with raises(WeightsError, f"{name} is {shape}"):
        started(starting_from(tmp_path / "vit.pth"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    weights = timm_model("vit_tiny_patch16_224", depth=1).state_dict()
    weights["norm.bias"][3] = torch.inf
    torch.save(weights, tmp_path / "vit.pth")
    with raises(WeightsError, "norm.bias"):
        started(starting_from(tmp_path / "vit.pth"))


@pytest.mark.parametrize(
    ("name", "title", "licence"),
    [
        ("hipt", ENCODER_KINDS["hipt"].title, "Commons Clause"),
        ("vit_small_patch16_224", "vit_small_patch16_224", "does not know"),
    ],
)
def test_the_licence_of_weights_is_that_of_their_short_name_or_said_to_be_unknown(
    tmp_path: Path, name: str, title: str, licence: str
):
    weights = timm_model("vit_small_patch16_224", depth=1).state_dict()
    torch.save(weights, tmp_path / "vit.pth")
    settings = starting_from(tmp_path / "vit.pth", pathology_encoder=name)
    (origin,) = starting_weights(settings).origins
    assert origin.name == title
    assert licence in origin.licence
    assert origin.sha256 is not None


def test_frozen_encoders_without_weights_are_refused():
    settings = toy_settings(model={"encoders_frozen": True})
    with raises(WeightsError, "--sam-weights", "--pathology-weights"):
        starting_weights(settings)


@pytest.mark.parametrize("name", ["mlp_layer", "act_layer", "norm_layer"])
def test_a_wrong_layer_is_refused(name: str):
    settings = toy_settings()
    model = replace(settings.model, pathology_args={name: "Magic"})
    with raises(EncoderError, "agic"):  # timm writes it small
        Segmenter(model, 5)
