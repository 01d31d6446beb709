"""What a model answers on a set of tiles, and the runtimes that give such answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import nn

from export.gate.tiles import Images
from export.graph.nodes import PARITY_OUTPUT
from serve.contract.openvino import GraphPrecision, OpenVinoModel

Floats = NDArray[np.floating[Any]]
Outputs = Mapping[str, NDArray[Any]]
"""One batch's answers, by the names of the model's outputs."""

OUTPUTS = ("labels", "confidence", "low_res_probabilities", "iou_scores", PARITY_OUTPUT)
"""The outputs of a graph that still has its logits: the fields of `Answers`."""


@dataclass(frozen=True)
class Answers:
    """A runtime's answers on N tiles; the fields are the model's outputs.

    labels and confidence: (N, H, W) uint8. low_res_probabilities: (N, C, H/4, W/4) uint8.
    iou_scores: (N, C) float. low_res_logits: (N, C, H/4, W/4) float, or None where the model has
    no such output, as in a bundle.
    """

    labels: Images
    confidence: Images
    low_res_probabilities: Images
    iou_scores: Floats
    low_res_logits: Floats | None = None

    @classmethod
    def joined(cls, batches: Iterable[Outputs]) -> Self:
        """Join the outputs of several batches."""
        batches = list(batches)
        names = [name for name in OUTPUTS if name in batches[0]]
        return cls(**{name: np.concatenate([batch[name] for batch in batches]) for name in names})

    def first(self, num_tiles: int) -> Self:
        """The answers on the first tiles alone."""
        return type(self)(
            **{
                name: values[:num_tiles]
                for name in OUTPUTS
                if (values := getattr(self, name)) is not None
            }
        )


def torch_answers(deployable: nn.Module, images: Images) -> Answers:
    """Run torch in float32, tile by tile: at 1024 pixels its attention takes 2 GB per tile.

    Args:
        deployable: a `Deployable`, or what gives the same outputs.
        images: (N, H, W, 3) uint8 RGB.
    """

    def run(batch: Images) -> Outputs:
        with torch.inference_mode():
            output = deployable(torch.from_numpy(batch))
        return {name: getattr(output, name).numpy() for name in OUTPUTS}

    return _in_batches(run, [images[i : i + 1] for i in range(len(images))], "torch")


def onnx_answers(path: Path, images: Images) -> Answers:
    """Run ONNX Runtime's CPU provider.

    Args:
        path: the graph.
        images: (N, H, W, 3) uint8, RGB.
    """
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session_answers(session, images, f"{path.name} in ONNX Runtime")


def openvino_answers(path: Path, images: Images, precision: GraphPrecision) -> Answers:
    """Run OpenVINO as the service does; see `onnx_answers`."""
    model = OpenVinoModel(path, precision)
    return _in_batches(
        lambda batch: model.run(batch, OUTPUTS),
        _alone_then_together(images),
        f"{path.name} in OpenVINO",
    )


def session_answers(session: ort.InferenceSession, images: Images, title: str) -> Answers:
    """Run an open session of ONNX Runtime; see `onnx_answers`."""
    names = [output.name for output in session.get_outputs()]
    return _in_batches(
        lambda batch: dict(zip(names, session.run(names, {"image": batch}), strict=True)),
        _alone_then_together(images),
        title,
    )


def _alone_then_together(images: Images) -> list[Images]:
    """One tile, then three at a time: the graph must not have fixed its batch."""
    return [images[:1], *(images[i : i + 3] for i in range(1, len(images), 3))]


def _in_batches(run: Callable[[Images], Outputs], batches: Sequence[Images], title: str) -> Answers:
    shown = track(batches, title, console=Console(stderr=True), transient=True)
    return Answers.joined(run(batch) for batch in shown)
