"""The interface of all inference backends, what is told of them, and the code that they share.

`serve.inference.onnxruntime` and `serve.inference.openvino` run the bundle's ONNX file in this
process, `serve.inference.triton` asks a Triton server. All answer with the arrays of the
manifest's interface.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BundleError
from serve.contract.manifest import Artefact, Manifest
from serve.contract.strict import Strict

InferBatch = Callable[[NDArray[np.uint8], Sequence[str]], dict[str, NDArray[Any]]]


class Backend(Protocol):
    """Runs the model on tiles; many threads may use it at once."""

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the model.

        Args:
            images: (B, T, T, 3) uint8, RGB in [0, 255], any B from 1.
            outputs: names from the manifest's outputs; only these are returned.

        Returns:
            The named outputs, with the dtypes and shapes of `serve.contract.manifest.interface`.

        Raises:
            BackendUnavailableError: the backend does not answer.
        """
        ...

    def is_ready(self) -> bool:
        """Whether `infer` can answer now."""
        ...

    def close(self) -> None:
        """Free all resources. The backend must not be used afterwards."""
        ...


class _OnProvider(Strict):
    """A file of the bundle on a provider."""

    provider: str
    """`cpu`, `cuda`, `openvino` or `triton`."""
    precision: str | None
    """Of the file; None for Triton, which chooses by itself."""

    @property
    def title(self) -> str:
        """For people, such as `openvino in bf16`."""
        return f"{self.provider} in {self.precision}" if self.precision else self.provider


class Trial(_OnProvider):
    """One provider that was tried on this machine."""

    precision: str
    is_proven: bool
    """Whether the export's gate proved it on this kind of processor."""
    seconds: float | None = None
    """Time for one tile; None where it did not run."""
    label_agreement: float | None = None
    """Share of the warm-up image's labels that are those of the export."""
    problem: str | None = None
    """Why it was rejected; None where it ran, even if another was faster."""


class RunsOn(_OnProvider):
    """What runs the model, and why."""

    runtime: str
    """Name and version."""
    processor: str
    """Name and kind of this machine's processor."""
    reason: str
    trials: tuple[Trial, ...] = ()


def in_batches(
    infer_batch: InferBatch, images: NDArray[np.uint8], outputs: Sequence[str], manifest: Manifest
) -> dict[str, NDArray[Any]]:
    """Split `images` into batches that the model takes, and join the answers."""
    side = manifest.tile_size_px
    assert images.dtype == np.uint8
    assert images.shape[1:] == (side, side, 3), images.shape
    size = manifest.max_batch_size
    answers = [
        infer_batch(images[start : start + size], outputs) for start in range(0, len(images), size)
    ]
    if len(answers) == 1:
        return answers[0]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}


_TYPES = {"uint8": ("tensor(uint8)", "u8"), "float32": ("tensor(float)", "f32")}
"""What ONNX Runtime and OpenVINO call the manifest's types."""


def check_interface(
    file: Path, manifest: Manifest, found: Sequence[tuple[str, str, tuple[Any, ...]]]
) -> None:
    """Raise BundleError for a graph whose inputs and outputs are not those of the manifest.

    Args:
        file: of the graph.
        manifest: the bundle's.
        found: name, type and shape of each, in order; sides that are no positive number are open.
    """
    expected = [*manifest.inputs, *manifest.outputs]
    if len(found) == len(expected) and all(
        name == spec.name
        and kind in _TYPES[spec.dtype]
        and len(shape) == len(spec.shape)
        and all(side in (known, -1) for side, known in _known(spec.shape, shape))
        for (name, kind, shape), spec in zip(found, expected, strict=True)
    ):
        return
    raise BundleError(
        f"{file} has the inputs and outputs {list(found)}, expected "
        f"{[(spec.name, spec.dtype, spec.shape) for spec in expected]} as in the manifest. Export "
        "the checkpoint again.",
        code="bundle_damaged",
    )


def _known(shape: tuple[int, ...], stated: tuple[Any, ...]) -> Iterator[tuple[int, int]]:
    pairs = zip(shape, stated, strict=True)
    return ((side, known) for side, known in pairs if isinstance(known, int) and known > 0)


def onnx_artefact(manifest: Manifest, precision: str) -> Artefact:
    """The bundle's ONNX file of this precision.

    Raises:
        BundleError: the bundle has no such file.
    """
    found = {a.precision: a for a in manifest.artefacts if a.format == "onnx"}
    if precision not in found:
        raise BundleError(
            f"the bundle has no ONNX file in {precision}, only in {', '.join(found) or 'none'}. "
            "Choose one with FOCALPATH_PRECISION, or export again."
        )
    return found[precision]


def first_line(error: object) -> str:
    """The first line of an error's message, without a full stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
