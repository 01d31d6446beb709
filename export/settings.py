"""The settings of an export, checked before any work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from export.checked import CheckedSettings, Count
from export.gate.certificate import CertificateSettings
from export.gate.schema import Tolerances
from export.graph.attention import AttentionForm, Positions
from export.graph.to_onnx import OPSETS
from export.precision.artefacts import PrecisionSettings
from serve.contract.manifest import MAX_BATCH_SIZE

_NAME = r"^[a-z0-9][a-z0-9_-]*$"
"""What the manifest and Triton accept."""


@dataclass(frozen=True, kw_only=True)
class BundleSettings(CheckedSettings):
    """How a bundle is named, written and checked."""

    name: Annotated[str, Field(pattern=_NAME)] = "segmenter"
    """The model's name, also in Triton."""
    model_version: Annotated[str, Field(min_length=1)] | None = None
    """The model's version. By default the first 12 digits of the checkpoint's SHA-256."""
    opset: Annotated[int, Field(ge=OPSETS[0], le=OPSETS[-1])] = 20
    """ONNX opset of the graph, 20 to 24. From 23 on, attention is ONNX's own operator."""
    max_batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 8
    """Largest batch that a server may send."""
    validate: Path | None = None
    """Data set whose tiles are compared with torch. By default drawn tissue."""
    num_parity_tiles: Count = 8
    """Tiles to compare on."""
    positions: Positions = "dense"
    """How attention gets SAM's relative position. dense: one bias per query and key. extended:
    wider queries and keys, which give the same answers and need no memory for the bias."""
    max_queries: Count | None = 512
    """Queries that attention takes at once. Few of them suit a CPU's caches and bound the memory.
    None takes all: a GPU may run that faster, but the gate, which runs three tiles at once, then
    takes 7 GB per tile of 1024 pixels."""
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    tolerances: Tolerances = field(default_factory=Tolerances)
    certificate: CertificateSettings = field(default_factory=CertificateSettings)

    @property
    def attention(self) -> AttentionForm:
        """How the graph writes attention."""
        return AttentionForm(
            positions=self.positions,
            max_queries=self.max_queries,
            operator=self.opset >= 23,
        )
