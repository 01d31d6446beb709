from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from export.precision.emulation import HalfEmulator
from export.precision.half import convert_to_half
from tests.support.half_graphs import FIRST, two_blocks

IMAGE = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
GAIN = 60_000.0


def _onnx_runtime(model: onnx.ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


def test_it_agrees_with_onnx_own_reference_evaluator() -> None:
    model = convert_to_half(two_blocks(), "fp16")
    names = ["labels", "iou_scores", "low_res_logits"]
    reference = dict(
        zip(names, ReferenceEvaluator(model).run(names, {"image": IMAGE}), strict=True)
    )
    emulated = HalfEmulator(model).run(IMAGE).outputs
    np.testing.assert_array_equal(emulated["labels"], reference["labels"])
    np.testing.assert_allclose(
        emulated["low_res_logits"], reference["low_res_logits"], atol=4e-3, rtol=4e-3
    )


def test_it_loses_the_digits_that_half_precision_does_not_have() -> None:
    model = two_blocks()
    exact = _onnx_runtime(model, IMAGE)["low_res_logits"]
    differences = {
        precision: np.abs(
            HalfEmulator(convert_to_half(model, precision)).run(IMAGE).outputs["low_res_logits"]
            - exact
        ).max()
        for precision in ("fp16", "bf16")
    }
    assert 1e-5 < differences["fp16"] < 2e-2
    assert differences["bf16"] > 2 * differences["fp16"]


def test_an_overflow_that_onnx_runtime_hides_is_found_in_its_block() -> None:
    model = convert_to_half(two_blocks(gain=GAIN), "fp16")
    assert np.isfinite(_onnx_runtime(model, IMAGE)["low_res_logits"]).all()
    nonfinite = HalfEmulator(model).run(IMAGE).nonfinite
    assert next(iter(nonfinite)) == FIRST
    assert nonfinite[FIRST] > 0


def test_bfloat16_has_the_range_for_it() -> None:
    model = convert_to_half(two_blocks(gain=GAIN), "bf16")
    assert HalfEmulator(model).run(IMAGE).nonfinite == {}


@pytest.mark.slow
def test_the_exported_model_answers_nearly_as_in_float32(toy_graph: Path) -> None:
    model = onnx.load(str(toy_graph))
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    emulated = HalfEmulator(convert_to_half(model, "fp16")).run(image)
    expected = _onnx_runtime(model, image)
    assert emulated.nonfinite == {}
    assert set(emulated.outputs) == set(expected)
    assert (emulated.outputs["labels"] == expected["labels"]).mean() > 0.98
