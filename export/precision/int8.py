"""An int8 graph for CPUs: dynamic quantisation of the encoders' and the decoder's projections."""

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from export.graph.nodes import ModelGraph

SENSITIVE = (
    "patch_embed",
    "neck",
    "output_upscaling",
    "output_hypernetworks_mlps",
    "iou_prediction_head",
)
"""Parts whose products stay in float32, 1% of the work. The range of raw pixels would hide small
steps. No later layer averages out the errors of the last layers."""


def quantize_int8(source: Path, target: Path) -> None:
    """Write `source` with int8 weights, one scale per channel, for products with a constant.

    Activations are quantised at run time, so no calibration data is needed. Products of two
    activations, inside attention, stay in float32.
    """
    graph = ModelGraph(onnx.load(str(source), load_external_data=False))
    # ONNX Runtime supports one scale per channel for matrices only.
    matrices = {name for name, entry in graph.initializers.items() if len(entry.dims) == 2}
    chosen = [
        node.name
        for node in graph.nodes
        if node.op_type == "MatMul"
        and node.input[1] in matrices
        and not any(part in node.input[1] for part in SENSITIVE)
    ]
    root = logging.getLogger()
    root.addFilter(_is_no_advice)
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=chosen,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    # The advice is for developers of the graph, not for users who export one.
    return not record.getMessage().startswith("Please consider to run pre-processing")
