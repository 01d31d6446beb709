"""The gate with a graph on a real GPU; skipped where there is none."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.gate.answers import Answers, session_answers
from export.gate.gate import Gate
from export.graph.reference import Deployable
from export.precision.half import convert_to_half, half_blocks
from serve.contract import cuda
from tests.support.cuda import needs_cuda
from tests.support.toy_gate import noise_gate
from train.model.checkpoint import load_checkpoint

pytestmark = pytest.mark.gpu


def cuda_answers(path: Path, images: np.ndarray, **settings: str) -> Answers:
    """By default float32 is multiplied as TF32."""
    return session_answers(cuda.open_session(path, settings=settings), images, "CUDA")


@pytest.fixture(scope="session", autouse=True)
def _needs_cuda() -> None:
    """Comes before what takes a while to make, which is of the session, too."""
    needs_cuda()


@pytest.fixture(scope="module")
def gate(toy_run: Path) -> Gate:
    """Torch's answers in float32, on the CPU."""
    segmenter, card = load_checkpoint(toy_run)
    names = [entry.name for entry in card.classes]
    return noise_gate(Deployable(segmenter).eval(), names, num_tiles=5)


def test_float32_on_the_gpu_passes_the_gate_of_float32(gate: Gate, toy_graph: Path) -> None:
    answers = cuda_answers(toy_graph, gate.tiles.images, use_tf32="0")
    assert gate.judge(answers, "model.onnx", "fp32").failures == ()


def test_tf32_on_the_gpu_passes_the_gate_of_half_precision(gate: Gate, toy_graph: Path) -> None:
    answers = cuda_answers(toy_graph, gate.tiles.images)
    assert gate.judge(answers, "model.onnx", "fp16").failures == ()


@pytest.mark.parametrize("num_islands", [0, 1, 3])
def test_float16_and_mixed_graphs_on_the_gpu_pass_the_gate(
    gate: Gate, toy_graph: Path, tmp_path: Path, num_islands: int
) -> None:
    model = onnx.load(str(toy_graph))
    islands = frozenset(half_blocks(model)[:num_islands])
    half = tmp_path / "half.onnx"
    onnx.save(convert_to_half(model, "fp16", islands), str(half))
    found = gate.judge(cuda_answers(half, gate.tiles.images), "model.fp16.onnx", "fp16")
    assert found.failures == ()
    assert (found.num_nan, found.num_inf) == (0, 0)
