"""Measures the largest activation per block, in torch and float32, on real tiles.

ONNX Runtime on the CPU computes half precision in float32, so it hides overflows. This audit finds
them before any conversion. It covers every operation, including the attention logits. It skips the
intermediate values of layer norms, which stay in float32.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from export.errors import InputError
from export.gate.tiles import ValidationTiles
from export.graph.nodes import block_of_module


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of a block's values, and the tile that reached it."""

    magnitude: float
    tile: str


def audit_activations(deployable: nn.Module, tiles: ValidationTiles) -> dict[str, Peak]:
    """Run the model on each tile and record the largest magnitude per block.

    Returns:
        Peaks by block, named as in `export.precision.half.half_blocks`, in order of computation.

    Raises:
        InputError: the model computes a NaN or an infinity in float32.
    """
    peaks: dict[str, Peak] = {}
    pairs = list(zip(tiles.names, tiles.images, strict=True))
    shown = track(pairs, "activations", console=Console(stderr=True), transient=True)
    for tile, image in shown:
        recorder = _Recorder()
        # Fused attention would hide its logits. inference_mode would hide the parts of an
        # operation from the recorder, so no_grad is used.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), recorder.watching(deployable):
            deployable(torch.from_numpy(image[None]))
        if recorder.first_nonfinite is not None:
            raise InputError(
                f"{recorder.first_nonfinite} computes NaN or infinity in float32 on {tile}; the "
                "checkpoint cannot be used in any precision. Train it again."
            )
        for block, magnitude in recorder.largest.items():
            if block not in peaks or magnitude > peaks[block].magnitude:
                peaks[block] = Peak(magnitude, tile)
    return peaks


class _Recorder(TorchDispatchMode):  # type: ignore[misc,no-untyped-call,unused-ignore]
    """Records the result of every operation under the block of the innermost running module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: dict[str, float] = {}
        self.first_nonfinite: str | None = None
        self._running = [block_of_module("")]
        self._num_norms = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Track the running module and record all operations."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                handles = (
                    module.register_forward_pre_hook(self._entering(block_of_module(name))),
                    module.register_forward_hook(self._left),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            stack.enter_context(self)
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._num_norms:
            # A layer norm also returns mean and 1 / std, which are never in half precision.
            is_norm = func is torch.ops.aten.native_layer_norm.default
            self._record(result[0] if is_norm else result)
        return result

    def _entering(self, block: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._running.append(block)
            if _is_norm(module):
                self._num_norms += 1
            self._record(inputs)
            self._record(tuple(module.parameters(recurse=False)))
            self._record(tuple(module.buffers(recurse=False)))  # folded constants

        return hook

    def _left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._record(output)
        self._running.pop()
        if _is_norm(module):
            self._num_norms -= 1

    def _record(self, values: Any) -> None:
        if isinstance(values, tuple | list):
            for value in values:
                self._record(value)
        elif isinstance(values, Tensor) and values.is_floating_point() and values.numel():
            low, high = torch.ops.aten.aminmax(values.detach())  # without a copy of the tensor
            magnitude = float(torch.maximum(-low, high))
            block = self._running[-1]
            if math.isfinite(magnitude):
                self.largest[block] = max(magnitude, self.largest.get(block, 0.0))
            elif self.first_nonfinite is None:
                self.first_nonfinite = block


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | LayerNorm2d)
