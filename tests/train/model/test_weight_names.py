from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from tests.support.errors import raises
from train.errors import WeightsError
from train.model.weight_names import as_timm, vit_facts

Weights = dict[str, Tensor]
FILE = Path("vit.pth")
DIM, HEADS, DEPTH, SIDE = 48, 3, 2, 4


def random_like(model: torch.nn.Module) -> Weights:
    torch.manual_seed(0)
    return {name: 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}


def dinov2(name: str = "vit_small_patch14_reg4_dinov2", **args: Any) -> Any:
    sizes = {"embed_dim": DIM, "num_heads": HEADS, "depth": DEPTH, "img_size": 14 * SIDE}
    return timm.create_model(name, num_classes=0, **{**sizes, **args}).eval()


def as_dinov2(weights: Weights, *, registers: bool, swiglu: bool = False) -> Weights:
    """timm's weights under the names of DINOv2's own code."""
    theirs = dict(weights)
    theirs["mask_token"] = torch.zeros(1, DIM)
    if registers:
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.cat([torch.randn(1, 1, DIM), theirs["pos_embed"]], dim=1)
    if swiglu:
        theirs = {
            name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
            for name, value in theirs.items()
        }
    return theirs


def in_chunks(weights: Weights) -> Weights:
    """As DINOv2 names its blocks where FSDP wraps them in chunks."""
    return {name.replace("blocks.", "blocks.0."): value for name, value in weights.items()}


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("swiglu", [True, False])
def test_dinov2_names_become_those_that_timm_converts_them_to(registers: bool, swiglu: bool):
    size = "giant" if swiglu else "small"
    model = dinov2(f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2")
    theirs = as_dinov2(random_like(model), registers=registers, swiglu=swiglu)
    expected = checkpoint_filter_fn(dict(theirs), model)
    found = as_timm(theirs, FILE).tensors
    found.pop("mask_token", None)
    assert found.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_teacher_of_a_dinov2_training_is_taken_without_its_heads_and_chunks():
    model = dinov2()
    theirs = in_chunks(as_dinov2(random_like(model), registers=True))
    teacher = {f"backbone.{name}": value for name, value in theirs.items()}
    teacher |= {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.g": torch.ones(1)}
    student = {name: torch.zeros_like(value) for name, value in teacher.items()}
    found = as_timm({"teacher": teacher, "student": student}, FILE)
    assert torch.equal(
        found.tensors["blocks.1.attn.qkv.weight"], theirs["blocks.0.1.attn.qkv.weight"]
    )
    assert set(model.state_dict()) <= set(found.tensors)


@pytest.mark.parametrize(
    "prefix", ["teacher.backbone.", "module.teacher.", "model.teacher.backbone."]
)
def test_a_teacher_beside_its_student_in_one_dictionary_is_taken(prefix: str):
    weights = random_like(dinov2("vit_small_patch14_dinov2"))
    both = {f"{prefix}{name}": value for name, value in weights.items()}
    both |= {f"student.backbone.{name}": torch.zeros_like(v) for name, v in weights.items()}
    found = as_timm({"state_dict": both}, FILE).tensors
    assert torch.equal(found["norm.weight"], weights["norm.weight"])


@pytest.mark.parametrize(
    ("content", "way"),
    [
        ({"norm.weight": torch.ones(1)}, "timm"),
        ({"teacher": {"module.backbone.norm.weight": torch.ones(1)}}, "dino"),
        ({"backbone.norm.weight": torch.ones(1)}, "dino"),
        ({"mask_token": torch.ones(1)}, "dino"),
        (
            {
                "register_tokens": torch.ones(1, 4, 2),
                "cls_token": torch.ones(1, 1, 2),
                "pos_embed": torch.ones(1, 5, 2),
            },
            "timm",
        ),
    ],
)
def test_the_kind_of_file_tells_how_positions_are_resized(content: dict[str, Any], way: str):
    assert as_timm(content, FILE).positions == way


@pytest.mark.parametrize("mean", ["teacher", "state_dict_ema", "model_ema"])
def test_the_mean_over_a_training_is_taken_before_its_last_step(mean: str):
    last = {"norm.weight": torch.zeros(1)}
    content = {"model": last, "state_dict": last, mean: {"norm.weight": torch.ones(1)}}
    assert as_timm(content, FILE).tensors["norm.weight"] == 1


def test_two_encoders_in_one_file_are_refused():
    with raises(WeightsError, "norm.weight"):
        as_timm({"norm.weight": torch.ones(1), "backbone.norm.weight": torch.ones(1)}, FILE)


def transformers_weights(*, is_dinov2: bool, registers: int = 0, swiglu: bool = False) -> Weights:
    """Random weights under the names of ViTModel or Dinov2Model."""
    torch.manual_seed(0)
    shapes = {
        "embeddings.cls_token": (1, 1, DIM),
        "embeddings.mask_token": (1, DIM),
        "embeddings.position_embeddings": (1, 1 + SIDE**2, DIM),
        "embeddings.patch_embeddings.projection.weight": (DIM, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (DIM,),
        "layernorm.weight": (DIM,),
        "layernorm.bias": (DIM,),
    }
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, DIM)
    if not is_dinov2:
        shapes |= {"pooler.dense.weight": (DIM, DIM), "pooler.dense.bias": (DIM,)}
    linear = {
        **{f"attention.attention.{part}": (DIM, DIM) for part in ("query", "key", "value")},
        "attention.output.dense": (DIM, DIM),
    }
    if not is_dinov2:
        linear |= {"intermediate.dense": (4 * DIM, DIM), "output.dense": (DIM, 4 * DIM)}
    elif swiglu:
        linear |= {"mlp.weights_in": (2 * 128, DIM), "mlp.weights_out": (DIM, 128)}
    else:
        linear |= {"mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)}
    norms = ("norm1", "norm2") if is_dinov2 else ("layernorm_before", "layernorm_after")
    for block in (f"encoder.layer.{index}." for index in range(DEPTH)):
        for name, shape in linear.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in norms:
            shapes |= {f"{block}{name}.weight": (DIM,), f"{block}{name}.bias": (DIM,)}
        if is_dinov2:
            shapes |= {f"{block}layer_scale{index}.lambda1": (DIM,) for index in (1, 2)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def transformers_features(w: Weights, image: Tensor) -> Tensor:
    """Patch tokens (B, N, D), computed from these weights by their definitions."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    projection = "embeddings.patch_embeddings.projection"
    x = F.conv2d(image, w[f"{projection}.weight"], w[f"{projection}.bias"], stride=14)
    x = torch.cat([w["embeddings.cls_token"], x.flatten(2).transpose(1, 2)], dim=1)
    x = x + w["embeddings.position_embeddings"]
    if (registers := w.get("embeddings.register_tokens")) is not None:
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
    for block in (f"encoder.layer.{index}" for index in range(DEPTH)):
        is_dinov2 = f"{block}.norm1.weight" in w
        before, after = ("norm1", "norm2") if is_dinov2 else ("layernorm_before", "layernorm_after")
        y = norm(x, f"{block}.{before}")
        heads = [
            linear(y, f"{block}.attention.attention.{part}")
            .unflatten(2, (HEADS, -1))
            .transpose(1, 2)
            for part in ("query", "key", "value")
        ]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        y = linear(y, f"{block}.attention.output.dense")
        x = x + y * w.get(f"{block}.layer_scale1.lambda1", torch.ones(()))
        y = norm(x, f"{block}.{after}")
        if not is_dinov2:
            y = linear(F.gelu(linear(y, f"{block}.intermediate.dense")), f"{block}.output.dense")
        elif f"{block}.mlp.fc1.weight" in w:
            y = linear(F.gelu(linear(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        else:
            gate, value = linear(y, f"{block}.mlp.weights_in").chunk(2, dim=-1)
            y = linear(F.silu(gate) * value, f"{block}.mlp.weights_out")
        x = x + y * w.get(f"{block}.layer_scale2.lambda1", torch.ones(()))
    return norm(x, "layernorm")[:, -(SIDE**2) :]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("vit_small_patch14_dinov2", {"is_dinov2": True}),
        ("vit_small_patch14_reg4_dinov2", {"is_dinov2": True, "registers": 4}),
        ("vit_giant_patch14_dinov2", {"is_dinov2": True, "swiglu": True}),
        ("vit_small_patch16_224", {"is_dinov2": False}),
    ],
    ids=["dinov2", "registers", "swiglu", "vit"],
)
def test_weights_of_transformers_give_their_own_features(architecture: str, kind: dict[str, Any]):
    weights = transformers_weights(**kind)
    model = dinov2(architecture, patch_size=14)
    found = as_timm(weights, FILE).tensors
    found.pop("mask_token")
    model.load_state_dict(found)
    image = torch.rand(1, 3, 14 * SIDE, 14 * SIDE)
    with torch.no_grad():
        features = model.forward_features(image)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(
            features, transformers_features(weights, image), atol=1e-4, rtol=1e-4
        )


def test_the_shapes_of_weights_tell_the_architecture():
    facts = vit_facts(dinov2("vit_giant_patch14_reg4_dinov2").state_dict())
    assert facts is not None
    assert (facts.patch_size, facts.embed_dim, facts.depth) == (14, DIM, DEPTH)
    assert (facts.num_registers, facts.has_layer_scale, facts.has_swiglu) == (4, True, True)
