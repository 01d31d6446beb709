"""OpenVINO as a backend: the bundle's float32 or bfloat16 graph on the CPU of this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BundleError
from serve.contract.manifest import Artefact, Manifest
from serve.contract.openvino import GraphPrecision, OpenVinoModel
from serve.inference.backend import check_interface, in_batches, onnx_artefact


class OpenVinoBackend:
    """Runs a bundle's ONNX file in OpenVINO, in this process.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        precision: which of its ONNX files.
        threads: CPU threads for one inference; 0 takes one per core.
        parallel: batches that run at the same time.

    Raises:
        BundleError: the bundle has no such file, OpenVINO cannot compile it, or it did not pass
            the export's gate in OpenVINO.
        BackendUnavailableError: OpenVINO is not installed, or this processor lacks bfloat16.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        precision: str = "fp32",
        threads: int = 0,
        parallel: int = 1,
    ) -> None:
        artefact = onnx_artefact(manifest, precision)
        self._manifest = manifest
        self._model: OpenVinoModel | None = OpenVinoModel(
            bundle / artefact.file,
            openvino_precision(artefact),
            threads=threads,
            parallel=parallel,
        )
        check_interface(bundle / artefact.file, manifest, self._model.interface)

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        assert self._model is not None, "used after close"
        return in_batches(self._model.run, images, outputs, self._manifest)

    def is_ready(self) -> bool:
        """True until it is closed: a compiled model answers."""
        return self._model is not None

    def close(self) -> None:
        """Free the compiled model."""
        self._model = None


def openvino_precision(artefact: Artefact) -> GraphPrecision:
    """The precision that OpenVINO runs a file in.

    Raises:
        BundleError: the file did not pass the export's gate in OpenVINO.
    """
    if not artefact.passed_with("openvino") or artefact.precision not in ("bf16", "fp32"):
        raise BundleError(
            f"OpenVINO may not run {artefact.file}: it did not pass the export's gate there. "
            "Export with --openvino, which tries fp32 and bf16 (parity_report.md says what passed) "
            "and choose one with FOCALPATH_PRECISION; or choose another FOCALPATH_PROVIDER."
        )
    return artefact.precision
