"""A bundle with the real interface and a model of one convolution, for tests that need no torch.

The model labels each pixel by the nearest of five reference colours, at a quarter of the
resolution, so that a test can paint an image and know its labels.
"""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from serve.contract.manifest import (
    LOW_RES_STRIDE,
    Artefact,
    Manifest,
    Parity,
    TissueClass,
    WarmUp,
    interface,
    read_bundle,
    sha256_of,
)

TILE_SIZE_PX = 64
CLASSES = (
    TissueClass(name="Tumor", color="#d62728"),
    TissueClass(name="Stroma", color="#2ca02c"),
    TissueClass(name="Inflammatory", color="#1f77b4"),
    TissueClass(name="Necrosis", color="#bcbd22"),
    TissueClass(name="Other", color="#7f7f7f"),
)
REFERENCE_RGB = np.array(
    [[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [128, 128, 128]], np.float32
)
"""The colour that the model takes for each class: paint with it to get that label."""

_TEMPERATURE = 2_000.0


def write_toy_bundle(
    folder: Path,
    *,
    version: str = "1.0.0",
    max_batch_size: int = 8,
    tile_size_px: int = TILE_SIZE_PX,
) -> Path:
    """Write the bundle and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(_model(tile_size_px), folder / "model.onnx")
    inputs, outputs = interface(tile_size_px, len(CLASSES))
    artefact = Artefact(
        file="model.onnx",
        format="onnx",
        precision="fp32",
        sha256=sha256_of(folder / "model.onnx"),
        parity=Parity(num_tiles=1, label_agreement=1.0, max_logit_difference=0.0),
    )
    Manifest(
        name="segmenter",
        version=version,
        classes=CLASSES,
        mpp=0.5,
        tile_size_px=tile_size_px,
        max_batch_size=max_batch_size,
        opset=20,
        inputs=inputs,
        outputs=outputs,
        class_attention_bias=(0.0,) * len(CLASSES),
        checkpoint_sha256="0" * 64,
        artefacts=(artefact,),
    ).write(folder)
    return folder


def replace_bundle(bundle: Path, version: str, *, is_broken: bool = False, **options: int) -> None:
    """As an export does: a new folder takes the place of the old one."""
    new = write_toy_bundle(bundle.parent / f"new-{version}", version=version, **options)
    if is_broken:
        (new / "model.onnx").write_bytes(b"broken")
    bundle.rename(bundle.parent / f"before-{version}")
    new.rename(bundle)


def add_warm_up(
    bundle: Path,
    image: NDArray[np.uint8],
    labels: NDArray[np.generic],
    *,
    min_agreement: float = 0.98,
) -> None:
    """Give the bundle a warm-up image with these labels."""
    np.savez(bundle / "warm_up.npz", image=image, labels=labels.astype(np.uint8))
    warm_up = WarmUp(
        file="warm_up.npz",
        sha256=sha256_of(bundle / "warm_up.npz"),
        min_agreement=min_agreement,
    )
    read_bundle(bundle).model_copy(update={"warm_up": warm_up}).write(bundle)


def retrain(bundle: Path) -> None:
    """Give the bundle a model of the same interface that labels the classes in reverse."""
    model = onnx.load(bundle / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name in ("weight", "bias"):
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1], tensor.name)
            )
    onnx.save(model, bundle / "model.onnx")
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_text())
    artefact = manifest.artefacts[0].model_copy(update={"sha256": sha256_of(bundle / "model.onnx")})
    manifest.model_copy(update={"artefacts": (artefact,)}).write(bundle)


def _model(tile_size_px: int) -> onnx.ModelProto:
    num_classes = len(CLASSES)
    weight = (2 * REFERENCE_RGB / _TEMPERATURE).reshape(num_classes, 3, 1, 1)
    bias = -(REFERENCE_RGB**2).sum(axis=1) / _TEMPERATURE
    scale = float(LOW_RES_STRIDE)
    constants = {
        "weight": weight.astype(np.float32),
        "bias": bias.astype(np.float32),
        "scales": np.array([1, 1, scale, scale], np.float32),
        "axis": np.array([1], np.int64),
        "spatial": np.array([2, 3], np.int64),
        "c255": np.array(255, np.float32),
        "one": np.array(1, np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        node("Conv", ["nchw", "weight", "bias"], ["full_logits"]),
        node(
            "AveragePool",
            ["full_logits"],
            ["low_res_logits"],
            kernel_shape=[LOW_RES_STRIDE] * 2,
            strides=[LOW_RES_STRIDE] * 2,
        ),
        node("Softmax", ["low_res_logits"], ["low_res_softmax"], axis=1),
        *_to_byte("low_res_softmax", "low_res_probabilities"),
        node("Resize", ["low_res_logits", "", "scales"], ["logits"], mode="linear"),
        node("Softmax", ["logits"], ["softmax"], axis=1),
        node("ReduceMax", ["softmax", "axis"], ["best"], keepdims=0),
        *_to_byte("best", "confidence"),
        node("ArgMax", ["logits"], ["argmax"], axis=1, keepdims=0),
        node("Add", ["argmax", "one"], ["label"]),
        node("Cast", ["label"], ["labels"], to=TensorProto.UINT8),
        node("ReduceMean", ["low_res_softmax", "spatial"], ["iou_scores"], keepdims=0),
    ]
    inputs, outputs = interface(tile_size_px, num_classes)
    types = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}

    def value_info(name: str, dtype: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, types[dtype], ["batch", *shape[1:]])

    graph = helper.make_graph(
        nodes,
        "toy",
        [value_info(t.name, t.dtype, t.shape) for t in inputs],
        [value_info(t.name, t.dtype, t.shape) for t in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _to_byte(probability: str, byte: str) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Mul", [probability, "c255"], [f"{byte}_scaled"]),
        node("Round", [f"{byte}_scaled"], [f"{byte}_rounded"]),
        node("Cast", [f"{byte}_rounded"], [byte], to=TensorProto.UINT8),
    ]
