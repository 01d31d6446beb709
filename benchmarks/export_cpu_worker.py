"""One variant of `make benchmark-export`, in its own process, so that its memory can be measured.

It prints a line when it is ready, and then runs once for every line that it reads. Each variant
imports only the packages it needs: ONNX Runtime's process has no torch.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import seconds_of
from serve.contract.machine import peak_memory_mib, usable_cpus

OUTPUTS = ("labels", "confidence", "low_res_probabilities", "iou_scores")
Images = NDArray[np.uint8]
Work = dict[str, Any]
"""The `folder` of the graphs and tiles, the `model`'s settings, and `matmul_size`."""
Run = Callable[[Images], NDArray[Any]]
"""From (B, H, W, 3) uint8 to labels (B, H, W)."""


def direct(work: Work, *, fused: bool) -> Run:
    """SAM-Path's forward pass, rewritten; its ViT-S with or without fused attention."""
    import torch

    from benchmarks.direct_sam_path import DirectSamPath
    from benchmarks.real_size_model import build_benchmark_model
    from train.settings import ModelSettings

    model = DirectSamPath(build_benchmark_model(ModelSettings(**work["model"])))
    for block in model.segmenter.pathology_encoder.vit.blocks:
        block.attn.fused_attn = fused

    def run(images: Images) -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).numpy())

    return run


def ours(work: Work, *, compiled: bool) -> Run:
    """This project's model in torch, eager or compiled."""
    import torch

    from benchmarks.real_size_model import build_benchmark_model
    from export.graph.reference import Deployable
    from train.settings import ModelSettings

    model: Any = Deployable(build_benchmark_model(ModelSettings(**work["model"]))).eval()
    if compiled:
        model = torch.compile(model)

    def run(images: Images) -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).labels.numpy())

    return run


def onnx_runtime(work: Work, *, file: str) -> Run:
    """A graph in ONNX Runtime on the CPU, without the parity output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = onnxruntime.InferenceSession(
        Path(work["folder"], file), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: np.asarray(session.run(list(OUTPUTS), {"image": images})[0])


def openvino(work: Work, *, file: str, precision: Literal["fp32", "bf16"]) -> Run:
    """A graph in OpenVINO, without the parity output."""
    from serve.contract.openvino import OpenVinoModel

    model = OpenVinoModel(Path(work["folder"], file), precision, threads=usable_cpus())
    return lambda images: model.run(images, OUTPUTS)["labels"]


def matmul(work: Work) -> Run:
    """Not a model: PyTorch's product of two matrices in float32, to compare machines."""
    import torch

    left, right = torch.rand(2, work["matmul_size"], work["matmul_size"])

    def run(images: Images) -> NDArray[Any]:
        return np.asarray((left @ right)[:1].numpy())

    return run


VARIANTS: dict[str, Callable[[Work], Run]] = {
    "direct": partial(direct, fused=False),
    "direct_fused": partial(direct, fused=True),
    "torch": partial(ours, compiled=False),
    "compiled": partial(ours, compiled=True),
    "onnx": partial(onnx_runtime, file="model.onnx"),
    "onnx23": partial(onnx_runtime, file="model.opset23.onnx"),
    "int8": partial(onnx_runtime, file="model.int8.onnx"),
    "openvino_fp32": partial(openvino, file="model.onnx", precision="fp32"),
    "openvino_bf16": partial(openvino, file="model.bf16.onnx", precision="bf16"),
    "matmul": matmul,
}


def main() -> None:
    """Serve runs of the variant in `argv[1]`, of the work in `argv[2]` as JSON."""
    variant, work = sys.argv[1], json.loads(sys.argv[2])
    folder = Path(work["folder"])
    started = time.perf_counter()
    run = VARIANTS[variant](work)
    images = np.load(folder / "images.npy")
    np.save(folder / f"{variant}.labels.npy", run(images))
    ready = {"first_s": time.perf_counter() - started}
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        seconds = seconds_of(lambda: run(images))
        answer = {"seconds": seconds, "peak_memory_mib": peak_memory_mib()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
