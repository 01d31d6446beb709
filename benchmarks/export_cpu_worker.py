"""One variant of `make benchmark-export`, in its own process, so that its memory can be measured.

It prints a line when it is ready, and then runs once for every line that it reads. Each variant
imports only the packages it needs: ONNX Runtime's process has no torch.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import seconds_of
from serve.contract.machine import peak_memory_mib, usable_cpus

MATMUL_FILE = "matmul_size"
OUTPUTS = ("labels", "confidence", "low_res_probabilities", "iou_scores")
Images = NDArray[np.uint8]
Run = Callable[[Images], NDArray[Any]]
"""From (B, H, W, 3) uint8 to labels (B, H, W)."""


def direct(folder: Path, *, fused: bool) -> Run:
    """SAM-Path's forward pass, rewritten; its ViT-S with or without fused attention."""
    import torch

    from benchmarks.direct_sam_path import DirectSamPath
    from benchmarks.real_size_model import build_benchmark_model, read_model_settings

    model = DirectSamPath(build_benchmark_model(read_model_settings(folder)))
    for block in model.segmenter.pathology_encoder.vit.blocks:
        block.attn.fused_attn = fused

    def run(images: Images) -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).numpy())

    return run


def ours(folder: Path, *, compiled: bool) -> Run:
    """This project's model in torch, eager or compiled."""
    import torch

    from benchmarks.real_size_model import build_benchmark_model, read_model_settings
    from export.graph.reference import Deployable

    model: Any = Deployable(build_benchmark_model(read_model_settings(folder))).eval()
    if compiled:
        model = torch.compile(model)

    def run(images: Images) -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).labels.numpy())

    return run


def onnx_runtime(folder: Path, *, file: str) -> Run:
    """A graph in ONNX Runtime on the CPU, without the parity output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = onnxruntime.InferenceSession(
        folder / file, options, providers=["CPUExecutionProvider"]
    )
    return lambda images: np.asarray(session.run(list(OUTPUTS), {"image": images})[0])


def openvino(folder: Path, *, file: str, precision: Literal["fp32", "bf16"]) -> Run:
    """A graph in OpenVINO, without the parity output."""
    from serve.contract.openvino import OpenVinoModel

    model = OpenVinoModel(folder / file, precision, threads=usable_cpus())
    return lambda images: model.run(images, OUTPUTS)["labels"]


def matmul(folder: Path) -> Run:
    """Not a model: PyTorch's product of two matrices in float32, to compare machines."""
    import torch

    size = int((folder / MATMUL_FILE).read_text(encoding="ascii"))
    left, right = torch.rand(2, size, size)

    def run(images: Images) -> NDArray[Any]:
        return np.asarray((left @ right)[:1].numpy())

    return run


VARIANTS: dict[str, Callable[[Path], Run]] = {
    "direct": lambda folder: direct(folder, fused=False),
    "direct_fused": lambda folder: direct(folder, fused=True),
    "torch": lambda folder: ours(folder, compiled=False),
    "compiled": lambda folder: ours(folder, compiled=True),
    "onnx": lambda folder: onnx_runtime(folder, file="model.onnx"),
    "onnx23": lambda folder: onnx_runtime(folder, file="model.opset23.onnx"),
    "int8": lambda folder: onnx_runtime(folder, file="model.int8.onnx"),
    "openvino_fp32": lambda folder: openvino(folder, file="model.onnx", precision="fp32"),
    "openvino_bf16": lambda folder: openvino(folder, file="model.bf16.onnx", precision="bf16"),
    "matmul": matmul,
}


def main() -> None:
    """Serve runs of the variant in `argv[1]` with the files in the folder `argv[2]`."""
    variant, folder = sys.argv[1], Path(sys.argv[2])
    started = time.perf_counter()
    run = VARIANTS[variant](folder)
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
