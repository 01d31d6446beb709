from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.support.errors import raises
from tests.support.toy_data import toy_settings
from train.errors import EncoderError, WeightsError
from train.model.pathology_encoder import PathologyEncoder
from train.model.pretrained import load_vit
from train.model.segmenter import Segmenter
from train.model.weight_files import read_weights
from train.model.weight_names import as_timm
from train.settings import ModelSettings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _model(**changes: Any) -> ModelSettings:
    return replace(toy_settings().model, **changes)


def load_file_of_vit(segmenter: Segmenter, path: Path) -> None:
    load_vit(segmenter, as_timm(read_weights(path), path), path)


def test_hipts_architecture_is_normalised_as_hipt() -> None:
    encoder = PathologyEncoder(_model(pathology_encoder="vit_small_patch16_224"))
    assert encoder.mean.flatten().tolist() == [127.5] * 3
    assert encoder.std.flatten().tolist() == [127.5] * 3


def test_a_tag_brings_its_own_normalisation() -> None:
    encoder = PathologyEncoder(_model(pathology_encoder="vit_small_patch16_224.dino"))
    assert encoder.mean.flatten().tolist() == pytest.approx([255 * x for x in IMAGENET_MEAN])
    assert encoder.std.flatten().tolist() == pytest.approx([255 * x for x in IMAGENET_STD])


def test_weights_with_layer_scale_and_imagenets_normalisation_give_timms_features(
    tmp_path: Path,
) -> None:
    """As UNI's do."""
    torch.manual_seed(0)
    theirs: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=1, init_values=0.5, num_classes=0
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "uni.bin")
    model = _model(
        pathology_layer_scale=True, pathology_mean=IMAGENET_MEAN, pathology_std=IMAGENET_STD
    )
    segmenter = Segmenter(model, 5).eval()
    load_file_of_vit(segmenter, tmp_path / "uni.bin")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = theirs.forward_features((image - mean) / std)[:, 1:]
        found = segmenter.pathology_encoder(255 * image).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, tokens)


def test_layer_scale_weights_in_a_model_without_are_refused(tmp_path: Path) -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=1, init_values=0.5, num_classes=0
    )
    torch.save(theirs.state_dict(), tmp_path / "uni.bin")
    segmenter = Segmenter(toy_settings().model, 5)
    with raises(WeightsError, "blocks.0.ls1.gamma", "LayerScale"):
        load_file_of_vit(segmenter, tmp_path / "uni.bin")


def test_a_name_that_timm_does_not_know_is_refused() -> None:
    with raises(EncoderError, "vit_smal_patch16_224", "uni2-h", "vit_small_patch16_224"):
        PathologyEncoder(_model(pathology_encoder="vit_smal_patch16_224"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "swin_tiny_patch4_window7_224",
        "samvit_base_patch16",
        "mobilenetv3_small_100",
    ],
)
def test_a_model_without_tokens_of_16_pixels_is_refused(name: str) -> None:
    with raises(EncoderError, name):
        PathologyEncoder(_model(pathology_encoder=name, pathology_encoder_depth=None))


def test_a_transformer_with_other_patches_is_refused() -> None:
    with raises(EncoderError, "32"):
        PathologyEncoder(_model(pathology_encoder="vit_small_patch32_224"))


def test_a_transformer_that_drops_tokens_is_refused() -> None:
    with raises(EncoderError, "vit_tiny_patch16_224", "64 pixels"):
        PathologyEncoder(_model(pathology_args={"patch_drop_rate": 0.5}))
