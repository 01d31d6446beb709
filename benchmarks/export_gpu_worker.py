"""The work of `make benchmark-gpu` that runs in other processes: graphs, and timing of variants.

The functions return `Failed` on any error, so that a failed variant is a line of the report.
"""

import io
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.export_gpu_variants import FORMS, VARIANTS, Answer, Compute, Device, Images, Task
from benchmarks.harness import seconds_of
from benchmarks.real_size_model import build_benchmark_model, draw_tiles
from export.errors import FocalPathError
from export.graph.nodes import PARITY_OUTPUT
from export.graph.reference import Deployable
from export.graph.to_onnx import OPSETS, drop_output, export_onnx
from export.precision.half import convert_to_half
from serve.contract.machine import this_processor
from serve.contract.strict import Strict
from train.settings import ModelSettings

_WARM_UP_RUNS = 3
_CODEC_RUNS = 3
"""Decoding and encoding do not depend on the variant, and take longer than the model."""
_OPERATOR_OPSET = 23
"""The first with ONNX's Attention operator."""
_NUM_DRAWN = 2
"""Tiles that are drawn, which takes seconds each; the others are these, turned."""
EXPECTED_FILE = "expected.npz"
"""Answers of the first variant."""

P = ParamSpec("P")
T = TypeVar("T")


class Stages(Strict):
    """Median milliseconds per batch."""

    decode_ms: float
    copy_ms: float
    """To the device and back."""
    compute_ms: float
    encode_ms: float
    first_run_ms: float
    """The first computation of this batch size, which chooses kernels and takes memory."""


@dataclass(frozen=True)
class Throughput:
    """A device, and the rate that it reaches."""

    device: str
    flops: float


class Measured(Strict):
    """The measurement of one variant at one batch size."""

    stages: Stages
    memory_gib: float | None
    """GPU memory in use after the runs, of all processes."""
    label_agreement: float
    """Share of pixels with the same label as the first variant that ran, usually eager float32."""
    max_logit_difference: float | None = None
    """Largest difference of a logit from that variant's."""
    num_not_finite: int | None = None
    """Logits that are NaN or infinite."""


@dataclass(frozen=True)
class Failed:
    """Why something did not run."""

    why: str


def _or_failed(function: Callable[P, T]) -> Callable[P, T | Failed]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | Failed:
        try:
            return function(*args, **kwargs)
        except FocalPathError as error:
            return Failed(_first_line(error))
        except Exception as error:  # the other variants must still run
            traceback.print_exc()
            return Failed(f"{type(error).__name__}: {_first_line(error)}")

    return call


@_or_failed
def measure_peak(device: Device, size: int) -> Throughput:
    """Measure the rate of a product of two bfloat16 matrices of side `size`."""
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(_WARM_UP_RUNS):
        left @ right
    times = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - started)
    name = torch.cuda.get_device_name() if device == "cuda" else this_processor().name
    return Throughput(name, 2 * size**3 / statistics.median(times))


@_or_failed
def write_graphs(model: ModelSettings, folder: Path, form: str) -> None:
    """Export the model in float32 and half precision, with and without the gate's output."""
    source = folder / f"{form}.fp32.logits.onnx"
    if not source.is_file():
        building = source.with_suffix(".part")
        deployable = Deployable(build_benchmark_model(model)).eval()
        export_onnx(deployable, building, opset=opset_of(form), form=FORMS[form])
        building.rename(source)
    half = folder / f"{form}.fp16.logits.onnx"
    if not half.is_file():
        onnx.save(convert_to_half(onnx.load(str(source)), "fp16"), str(half))
    for path in (source, half):
        drop_output(path, folder / path.name.replace(".logits", ""), PARITY_OUTPUT)


def opset_of(form: str) -> int:
    """ONNX opset of a form's graphs."""
    return _OPERATOR_OPSET if FORMS[form].operator else OPSETS[0]


@_or_failed
def measure(task: Task, batch_size: int) -> Measured:
    """Measure a variant; it stays loaded in this process."""
    compute = _load(task)
    drawn = _drawn(task)
    tiles = (np.rot90(drawn[i % len(drawn)], i // len(drawn)) for i in range(batch_size))
    pictures = [png(tile) for tile in tiles]
    answer, stages = measure_stages(compute, pictures, task.device, task.num_runs)
    memory_gib = None
    if task.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory_gib = (total - free) / 2**30
    labels = answer.labels.cpu().numpy().astype(np.uint8)
    logits = None if answer.logits is None else answer.logits.float().cpu().numpy()
    compared = _compare(labels, logits, task)
    return Measured(stages=stages, memory_gib=memory_gib, **compared)


def _drawn(task: Task) -> Images:
    """Tiles for all variants: (N, H, W, 3) uint8 RGB."""
    file = task.folder / "tiles.npy"
    if not file.is_file():
        np.save(file, draw_tiles(_NUM_DRAWN, task.model.tile_size_px))
    return np.load(file)  # type: ignore[no-any-return]


_loaded: dict[tuple[str, Path], Compute] = {}
"""Variants that this process has loaded, by name and by the folder of their graphs."""


def _load(task: Task) -> Compute:
    key = (task.variant, task.folder)
    if key not in _loaded:
        _loaded[key] = VARIANTS[task.variant].load(task)
    return _loaded[key]


def _compare(labels: Images, logits: NDArray[np.float32] | None, task: Task) -> dict[str, Any]:
    """Compare with the first variant that ran, on the tiles of both; fields of `Measured`."""
    file = task.folder / EXPECTED_FILE
    stored = dict(np.load(file)) if file.is_file() else {"variant": np.array(task.variant)}
    if str(stored["variant"]) == task.variant:
        stored["labels"] = labels
        if logits is not None:
            stored["logits"] = logits
        np.savez(file, **stored)
    expected = stored["labels"]
    num_tiles = min(len(labels), len(expected))
    agreement = float((labels[:num_tiles] == expected[:num_tiles]).mean())
    if logits is None or "logits" not in stored:
        return {"label_agreement": agreement}
    num_tiles = min(len(logits), len(stored["logits"]))
    difference = np.abs(logits[:num_tiles] - stored["logits"][:num_tiles])
    finite = difference[np.isfinite(difference)]
    return {
        "label_agreement": agreement,
        "max_logit_difference": float(finite.max()) if finite.size else None,
        "num_not_finite": int((~np.isfinite(logits)).sum()),
    }


def measure_stages(
    compute: Compute, pictures: list[bytes], device: Device, num_runs: int
) -> tuple[Answer, Stages]:
    """Time the stages of a batch of PNG images; returns the last answer."""
    side = Image.open(io.BytesIO(pictures[0])).size[0]
    # Pinned memory, as in a server: the GPU copies it without the CPU.
    pinned = device == "cuda"
    on_host = torch.empty((len(pictures), side, side, 3), dtype=torch.uint8, pin_memory=pinned)
    labels = torch.empty((len(pictures), side, side), dtype=torch.uint8, pin_memory=pinned)
    decode = [_milliseconds(lambda: _decode(pictures, on_host)) for _ in range(_CODEC_RUNS)]
    times: list[tuple[float, ...]] = []
    for _ in range(_WARM_UP_RUNS + num_runs):
        marks = [time.perf_counter()]
        images = on_host.to(device, non_blocking=True)
        synchronize(device)
        marks.append(time.perf_counter())
        answer = compute(images)
        synchronize(device)
        marks.append(time.perf_counter())
        labels.copy_(answer.labels, non_blocking=True)
        synchronize(device)
        marks.append(time.perf_counter())
        copy, computing, back = np.diff(marks) * 1e3
        times.append((copy + back, computing))
    encode = [
        _milliseconds(lambda: [png(one) for one in labels.numpy()]) for _ in range(_CODEC_RUNS)
    ]
    medians = [float(value) for value in np.median(times[_WARM_UP_RUNS:], axis=0)]
    return answer, Stages(
        decode_ms=statistics.median(decode),
        copy_ms=medians[0],
        compute_ms=medians[1],
        encode_ms=statistics.median(encode),
        first_run_ms=times[0][1],
    )


def _decode(pictures: list[bytes], images: torch.Tensor) -> None:
    for place, picture in zip(images.numpy(), pictures, strict=True):
        place[:] = np.asarray(Image.open(io.BytesIO(picture)))


def _milliseconds(run: Callable[[], object]) -> float:
    return seconds_of(run) * 1e3


def synchronize(device: Device) -> None:
    """Wait until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image as a PNG, as the service does."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
