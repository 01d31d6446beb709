"""What the gate measures and allows. `parity.json` in the bundle is a `ParityReport`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from export.checked import CheckedSettings, NotNegative, Share
from serve.contract.certificate import ScaleCertificate
from serve.contract.manifest import Parity
from serve.contract.strict import Strict

PARITY_FILE = "parity.json"

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Runtime = Literal["ONNX Runtime", "emulation", "OpenVINO", "TensorRT"]


@dataclass(frozen=True, kw_only=True)
class Tolerances(CheckedSettings):
    """How far an artefact may be from torch in float32, in shares of pixels and Dice in [0, 1]."""

    fp32_agreement: Share = 0.9999
    """Least share of pixels with torch's label in float32."""
    fp32_dice_loss: Share = 0.002
    """Most Dice that a class may lose in float32; measured where there are masks."""
    fp32_logit_difference: NotNegative = 1e-3
    """Largest difference of a low-resolution logit in float32."""
    fp32_iou_score_difference: NotNegative = 0.001
    """Largest difference of a predicted IoU score in float32."""
    fp32_confidence_difference: Share = 0.0005
    """Largest mean difference of the confidence and the low-resolution probabilities, in [0, 1],
    in float32."""
    half_agreement: Share = 0.995
    """Least share of pixels with torch's label in fp16 and bf16."""
    half_dice_loss: Share = 0.002
    """Most Dice that a class may lose in fp16 and bf16."""
    half_iou_score_difference: NotNegative = 0.01
    """Largest difference of a predicted IoU score in fp16 and bf16."""
    half_confidence_difference: Share = 0.005
    """Largest mean difference of the confidence in fp16 and bf16."""
    int8_agreement: Share = 0.99
    """Least share of pixels with torch's label in int8."""
    int8_dice_loss: Share = 0.01
    """Most Dice that a class may lose in int8."""
    int8_iou_score_difference: NotNegative = 0.02
    """Largest difference of a predicted IoU score in int8."""
    int8_confidence_difference: Share = 0.01
    """Largest mean difference of the confidence in int8."""
    agreement_dice_loss: Share = 0.05
    """Most Dice with torch's labels that a class may lose in any precision; measured where there
    are no masks."""

    def limits(
        self,
        precision: Precision,
        *,
        has_masks: bool = True,
        byte_difference: int | None = None,
    ) -> "GateLimits":
        """The limits of one precision; `byte_difference` is passed through."""
        prefix = "half" if precision in ("fp16", "bf16") else precision
        values: dict[str, Any] = {
            entry.name: getattr(self, f"{prefix}_{entry.name}", None)
            for entry in fields(GateLimits)
        }
        values["byte_difference"] = byte_difference
        if not has_masks:
            values["dice_loss"] = self.agreement_dice_loss
        return GateLimits(**values)


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """What an artefact of one precision has to keep to; see `Tolerances`."""

    agreement: float
    dice_loss: float
    logit_difference: float | None
    iou_score_difference: float
    confidence_difference: float
    """Of the confidence and the low-resolution probabilities."""
    byte_difference: int | None


class ClassParity(Strict):
    """One class in the reference and in the artefact; scores are None where they are not defined.

    They are against the masks, or against the reference's labels where there are no masks. The
    reference, whose scores begin with `torch_`, is torch, or ONNX Runtime for a TensorRT plan.
    """

    name: str
    num_pixels: int
    """Of the masks, or of the reference's labels."""
    agreement: float | None
    """Share of the reference's pixels of this class that the artefact gives it, too."""
    torch_dice: float | None
    dice: float | None
    torch_iou: float | None
    iou: float | None
    torch_recall: float | None
    recall: float | None

    @property
    def dice_loss(self) -> float:
        """How much Dice the class loses; below 0 where it gains."""
        if self.torch_dice is None or self.dice is None:
            return 0.0
        return self.torch_dice - self.dice


class TileParity(Strict):
    """One tile."""

    name: str
    label_agreement: float
    max_logit_difference: float | None
    """Of the values that are finite; None where the artefact gives no logits."""


class EmulationParity(Strict):
    """Half precision with each node's result rounded, on the first tiles."""

    num_tiles: int
    label_agreement: float
    nonfinite: dict[str, int]
    """NaN and infinite values of each block that has some."""


class ArtefactParity(Strict):
    """What was measured of one artefact, and the verdict."""

    file: str
    precision: Precision
    measured_with: Runtime
    num_tiles: int
    label_agreement: float
    num_unknown_labels: int
    """Pixels whose label is not a class."""
    max_logit_difference: float | None
    """None where the artefact gives no logits, such as a TensorRT plan."""
    max_iou_score_difference: float
    mean_confidence_difference: float
    """As a share of 1."""
    mean_probability_difference: float
    """Of the low-resolution probabilities, as a share of 1."""
    max_byte_difference: int
    """The largest of a confidence or low-resolution probability, where 255 is 1.0."""
    num_nan: int
    num_inf: int
    rarest_class: str | None
    """The class with the fewest training pixels among those that the tiles have."""
    fp32_islands: tuple[str, ...] = ()
    emulation: EmulationParity | None = None
    classes: tuple[ClassParity, ...]
    tiles: tuple[TileParity, ...]
    failures: tuple[str, ...]
    """Why it is not in the bundle; empty if it is."""

    @property
    def passed(self) -> bool:
        """Whether the bundle may have it."""
        return not self.failures

    @property
    def title(self) -> str:
        """The file, and the runtime where it is not ONNX Runtime."""
        return f"{self.file} in OpenVINO" if self.measured_with == "OpenVINO" else self.file

    def for_manifest(self) -> Parity:
        """The part that the manifest records."""
        return Parity(
            num_tiles=self.num_tiles,
            label_agreement=self.label_agreement,
            max_logit_difference=self.max_logit_difference,
        )


class BlockPeak(Strict):
    """The largest magnitude of a block's values in torch and float32."""

    block: str
    magnitude: float
    tile: str
    computed_in: Literal["half", "float32"]
    """What `model.fp16.onnx` computes it in, islands aside."""


class ParityReport(Strict):
    """The content of `parity.json`."""

    schema_version: Literal[2] = 2
    tiles: str
    num_tiles: int
    has_masks: bool
    processor: str | None = None
    """Name and kind of the processor that the runtimes ran on; None in older reports."""
    tolerances: dict[str, float]
    activation_limit: float
    """The largest magnitude that a block may reach in fp16."""
    peaks: tuple[BlockPeak, ...]
    artefacts: tuple[ArtefactParity, ...]
    mpp: float | None = None
    """um per pixel of the model; None where it is not known, and in older reports."""
    scale_certificate: ScaleCertificate | None = None
    """None where it was left out or could not be measured, and in older reports."""

    @property
    def unmeasured_classes(self) -> tuple[str, ...]:
        """The classes of which torch finds no pixel where there are some: nothing to compare."""
        classes = self.artefacts[0].classes if self.artefacts else ()
        return tuple(entry.name for entry in classes if not entry.torch_recall)

    def write(self, folder: Path) -> None:
        """Write `parity.json` into `folder`."""
        path = folder / PARITY_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
