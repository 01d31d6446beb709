from dataclasses import replace

import pytest
import torch

from tests.support.toy_data import TILE_SIZE_PX, toy_settings
from train.model.segmenter import Segmenter, encode_for_training, labels_from_logits
from train.presets import bcss

NUM_CLASSES = 5


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(toy_settings().model, NUM_CLASSES).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, 3, TILE_SIZE_PX, TILE_SIZE_PX)).float()


def test_masks_have_a_channel_for_unlabelled_and_each_class(
    segmenter: Segmenter, images: torch.Tensor
):
    output = segmenter(images)
    assert output.low_res_logits.shape == (3, 1 + NUM_CLASSES, TILE_SIZE_PX // 4, TILE_SIZE_PX // 4)
    assert output.iou_scores.shape == (3, 1 + NUM_CLASSES)


def test_an_image_is_segmented_the_same_alone_as_in_a_batch(
    segmenter: Segmenter, images: torch.Tensor
):
    together = segmenter(images).low_res_logits
    alone = torch.cat([segmenter(image[None]).low_res_logits for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_labels_are_never_unlabelled():
    logits = torch.zeros(1, 1 + NUM_CLASSES, 4, 4)
    logits[:, 0] = 100
    logits[:, 3] = 1
    assert (labels_from_logits(logits, 16) == 3).all()


def test_frozen_encoders_get_no_gradient_and_stay_in_evaluation_mode(images: torch.Tensor):
    settings = toy_settings(model={"encoders_frozen": True})
    segmenter = Segmenter(settings.model, NUM_CLASSES).train()
    segmenter(images).low_res_logits.sum().backward()
    assert not segmenter.image_encoder.training
    assert not segmenter.pathology_encoder.training
    trained = {name for name, p in segmenter.named_parameters() if p.grad is not None}
    assert not any("encoder." in name for name in trained if not name.startswith("prompt"))
    assert "neck.0.weight" in trained


@pytest.mark.parametrize(
    ("frozen", "mixed", "expected"),
    [(True, True, torch.bfloat16), (True, False, torch.float32), (False, True, torch.float32)],
)
def test_frozen_encoders_run_in_bfloat16_in_a_mixed_run_on_a_cpu(
    images: torch.Tensor, frozen: bool, mixed: bool, expected: torch.dtype
):
    settings = toy_settings(model={"encoders_frozen": frozen})
    segmenter = Segmenter(settings.model, NUM_CLASSES)
    seen: list[torch.dtype] = []
    layer = segmenter.image_encoder.blocks[0].attn.qkv
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    features = encode_for_training(segmenter, images.to(torch.uint8), mixed_precision=mixed)
    assert seen == [expected]
    assert features.dtype == torch.float32
    assert features.requires_grad is not frozen


def test_sams_published_names_load_unmapped(segmenter: Segmenter):
    names = set(segmenter.state_dict())
    published = {
        "image_encoder.patch_embed.proj.weight",
        "image_encoder.blocks.0.attn.rel_pos_h",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.iou_token.weight",
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight",
        "mask_decoder.transformer.final_attn_token_to_image.v_proj.bias",
        "mask_decoder.output_upscaling.0.weight",
        "mask_decoder.output_hypernetworks_mlps.0.layers.2.bias",
        "mask_decoder.iou_prediction_head.layers.0.weight",
    }
    assert published <= names


@pytest.mark.slow
def test_the_real_size_joins_sams_768_and_the_pathology_encoders_384_channels():
    with torch.device("meta"):
        segmenter = Segmenter(bcss().model, NUM_CLASSES)
    assert segmenter.neck[0].weight.shape == (256, 768 + 384, 1, 1)
    assert segmenter.pathology_encoder.vit.pos_embed.shape == (1, 1 + 4096, 384)
    assert len(segmenter.image_encoder.blocks) == 12


def test_254_classes_work(images: torch.Tensor):
    segmenter = Segmenter(toy_settings().model, 254).eval()
    assert segmenter(images[:1]).low_res_logits.shape[1] == 255


@pytest.fixture(scope="module")
def pyramid() -> Segmenter:
    torch.manual_seed(0)
    model = replace(toy_settings().model, image_encoder="tiny_pyramid")
    return Segmenter(model, NUM_CLASSES).eval()


@torch.no_grad()
def test_each_skip_connection_changes_only_the_masks_of_its_own_place(
    pyramid: Segmenter, images: torch.Tensor
):
    features = pyramid.encode(images)
    assert features.shape[1] == pyramid.num_features
    before = pyramid.decode(features).low_res_logits
    parts = features.split(pyramid.feature_dims, dim=1)
    for position in (1, 2):
        varied = [part.clone() for part in parts]
        varied[position][:, :, 1, 2] += 1  # the pixels of one token
        change = pyramid.decode(torch.cat(varied, dim=1)).low_res_logits - before
        by_token = change.abs().amax(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).amax(dim=(-2, -1))
        row, column = divmod(int(by_token[0].argmax()), by_token.shape[-1])
        assert (row, column) == (1, 2)
        assert by_token[0, 1, 2] > 0


def test_encoders_without_skip_connections_have_the_weights_that_they_always_had(
    segmenter: Segmenter, pyramid: Segmenter
):
    new = {name for name in pyramid.state_dict() if "mask_decoder.skips" in name}
    assert new
    assert not any("skips" in name for name in segmenter.state_dict())
    assert segmenter.num_features == 128 + 192
