"""What the user decides about a bundle, checked before any work."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import SettingsError
from export.gate.schema import Tolerances
from export.graph.attention import AttentionForm, Positions
from export.graph.to_onnx import OPSETS
from export.precision.artefacts import PrecisionSettings

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""As the manifest wants it, and Triton."""


@dataclass(frozen=True, kw_only=True)
class BundleSettings:
    """What a bundle is called and how it is checked."""

    name: str = "segmenter"
    """The model's name, also in Triton."""
    model_version: str | None = None
    """The model's version; by default the first digits of the checkpoint's SHA-256."""
    opset: int = 20
    """ONNX opset of the graph, 20 to 24; from 23 on, attention is ONNX's own operator."""
    max_batch_size: int = 8
    """Largest batch that a server may send."""
    validate: Path | None = None
    """Data set to compare with torch on; by default drawn tissue."""
    num_parity_tiles: int = 8
    """Tiles to compare on."""
    positions: Positions = "dense"
    """How attention gets SAM's relative position. dense: a bias for each query and key; extended:
    wider queries and keys, the same answers without the bias's memory."""
    max_queries: int | None = 512
    """Attention takes at most so many queries at once, which suits a CPU's caches and bounds
    memory; None takes all, which a GPU may run faster, but the gate, which runs three tiles at
    once, then takes 7 GB a tile of 1024 pixels."""
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    tolerances: Tolerances = field(default_factory=Tolerances)

    def __post_init__(self) -> None:
        """Refuse what would fail after the work, or mean nothing."""
        if not _NAME.fullmatch(self.name):
            raise SettingsError(
                f"name is {self.name!r}; give lowercase letters, digits, _ and -, and begin with a "
                "letter or digit"
            )
        if self.model_version == "":
            raise SettingsError("model_version is empty; give one, or leave it out")
        if self.opset not in OPSETS:
            raise SettingsError(f"opset is {self.opset}; give {OPSETS[0]} to {OPSETS[-1]}")
        for name in ("max_batch_size", "num_parity_tiles", "max_queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; give 1 or more")

    @property
    def attention(self) -> AttentionForm:
        """How the graph writes attention."""
        return AttentionForm(
            global_positions=self.positions,
            window_positions=self.positions,
            max_queries=self.max_queries,
            operator=self.opset >= 23,
        )
