"""Makes the artefacts in other precisions. The gate judges each before it enters the bundle."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from rich.console import Console
from rich.progress import track

from export.checked import CheckedSettings, NumberOf, PositiveShare
from export.gate.answers import Answers, onnx_answers, openvino_answers
from export.gate.gate import Gate
from export.gate.schema import ArtefactParity, EmulationParity, Runtime
from export.precision.audit import Peak
from export.precision.emulation import HalfEmulator
from export.precision.half import (
    FLOAT16_MAX,
    HalfPrecision,
    constants_beyond,
    convert_to_half,
    half_blocks,
)
from export.precision.int8 import quantize_int8
from export.precision.islands import smallest_islands
from serve.contract import openvino

Measured = tuple[ArtefactParity, Answers]
"""The gate's verdict on an artefact, and its answers."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings(CheckedSettings):
    """The precisions to try besides float32."""

    fp16: bool = True
    """Half precision, for GPUs."""
    bf16: bool = False
    """bfloat16. ONNX Runtime's CPU provider cannot run it, so the gate uses OpenVINO or
    emulation."""
    int8: bool = False
    """8-bit matrix products, for CPUs."""
    openvino: bool = False
    """Also judge the graphs in OpenVINO, so that a service may use it: float32, and bfloat16 if
    this machine's processor supports it."""
    fp32_islands: tuple[str, ...] = ()
    """Blocks that stay in float32 in half precision. parity.json lists all block names."""
    auto_islands: bool = True
    """Also keep blocks in float32 whose activations are too large, or that would fail the gate.
    Otherwise, half precision is refused in these cases."""
    fp16_range_share: PositiveShare = 0.1
    """Largest activation in fp16, as a share of float16's maximum of 65,504."""
    num_emulated_tiles: NumberOf = 2
    """Number of tiles on which fp16 is also emulated node by node. 0 skips the emulation."""

    @property
    def activation_limit(self) -> float:
        """The largest magnitude that an activation may reach in fp16."""
        return self.fp16_range_share * FLOAT16_MAX


class HalfMaker:
    """Makes the half precision graph with the float32 islands that it needs."""

    def __init__(
        self,
        source: Path,
        precision: HalfPrecision,
        gate: Gate,
        settings: PrecisionSettings,
        tell: Callable[[str], None],
    ) -> None:
        """Load the float32 graph `source`, which still has its logits."""
        self._model = onnx.load(str(source))
        self._precision = precision
        self._gate = gate
        self._settings = settings
        self._tell = tell
        self._blocks = half_blocks(self._model, precision)
        self._file = f"model.{precision}.onnx"

    def make(self, target: Path, peaks: Mapping[str, Peak]) -> Measured:
        """Write the graph, including its logits, to `target` and judge it.

        Raises:
            SettingsError: an island is not a block, or every block is an island.
        """
        islands = frozenset(self._settings.fp32_islands)
        constants = constants_beyond(self._model) if self._precision == "fp16" else {}
        too_large = self._too_large(peaks, islands) | {
            block: reason for block, reason in constants.items() if block not in islands
        }
        # Constants beyond float16 need islands; without them there is no graph to judge.
        held = too_large.keys() if self._settings.auto_islands else constants.keys()
        if held and islands | held >= set(self._blocks):
            return self._refuse_all(too_large.values())
        islands |= held
        if too_large and self._settings.auto_islands:
            self._tell(f"Kept in float32: {'; '.join(too_large.values())}")
        found, answers = self._judge(target, islands)
        if not self._settings.auto_islands:
            return _refused(found, too_large.values()), answers
        if found.passed:
            return found, answers
        self._tell(f"{found.file} does not pass ({found.failures[0]}); looking for islands")
        candidates = [block for block in self._blocks if block not in islands]
        more = smallest_islands(
            candidates,
            lambda chosen: (
                len(chosen) == len(candidates) or self._judge(target, islands | chosen)[0].passed
            ),
        )
        if len(more) == len(candidates):
            return found, answers
        self._tell(f"{', '.join(sorted(more))} stay in float32 so that {found.file} passes")
        return self._judge(target, islands | more)

    def _too_large(self, peaks: Mapping[str, Peak], islands: frozenset[str]) -> dict[str, str]:
        """For each block whose activations are too large for fp16, the reason."""
        if self._precision == "bf16":
            return {}  # bf16 has the range of float32
        limit = self._settings.activation_limit
        return {
            block: f"{block} reaches {peak.magnitude:,.0f} on tile {peak.tile}, more than "
            f"{limit:,.0f}"
            for block, peak in peaks.items()
            if peak.magnitude > limit and block in self._blocks and block not in islands
        }

    def _refuse_all(self, reasons: Iterable[str]) -> Measured:
        """Refuse a graph that has no block in half precision; return torch's answers."""
        answers = self._gate.expected
        found = self._gate.judge(answers, self._file, self._precision, fp32_islands=self._blocks)
        failures = ("every block would have to stay in float32", *reasons)
        return found.model_copy(update={"failures": failures}), answers

    def _judge(self, target: Path, islands: frozenset[str]) -> Measured:
        converted = convert_to_half(self._model, self._precision, islands)
        onnx.save(converted, str(target))
        num_tiles = len(self._gate.tiles)
        num_emulated = min(self._settings.num_emulated_tiles, num_tiles)
        emulation: EmulationParity | None = None
        answers, measured_with = self._run(target)
        if answers is None:
            answers, emulation = self._emulate(converted, num_tiles)
        elif num_emulated:
            emulation = self._emulate(converted, num_emulated)[1]
        found = self._gate.judge(
            answers,
            self._file,
            self._precision,
            fp32_islands=tuple(block for block in self._blocks if block in islands),
            emulation=emulation,
            measured_with=measured_with,
        )
        return found, answers

    def _run(self, target: Path) -> tuple[Answers | None, Runtime]:
        """The graph's answers, or None if no runtime here can run it."""
        images = self._gate.tiles.images
        if self._precision == "fp16":
            return onnx_answers(target, images), "ONNX Runtime"
        if self._settings.openvino and openvino.problem("bf16") is None:
            return openvino_answers(target, images, "bf16"), "OpenVINO"
        return None, "emulation"

    def _emulate(self, model: onnx.ModelProto, num_tiles: int) -> tuple[Answers, EmulationParity]:
        emulator = HalfEmulator(model)
        shown = track(
            self._gate.tiles.images[:num_tiles],
            f"{self._precision}, node by node",
            console=Console(stderr=True),
            transient=True,
        )
        runs = [emulator.run(image[None]) for image in shown]
        answers = Answers.joined(run.outputs for run in runs)
        nonfinite: dict[str, int] = {}
        for run in runs:
            for block, count in run.nonfinite.items():
                nonfinite[block] = nonfinite.get(block, 0) + count
        expected = self._gate.expected.labels[:num_tiles]
        return answers, EmulationParity(
            num_tiles=num_tiles,
            label_agreement=float((answers.labels == expected).mean()),
            nonfinite=nonfinite,
        )


def make_int8(source: Path, target: Path, gate: Gate) -> Measured:
    """Write the int8 graph, including its logits, to `target` and judge it."""
    quantize_int8(source, target)
    answers = onnx_answers(target, gate.tiles.images)
    return gate.judge(answers, "model.int8.onnx", "int8"), answers


def judge_in_openvino(source: Path, gate: Gate) -> Measured:
    """Judge the float32 graph in OpenVINO."""
    answers = openvino_answers(source, gate.tiles.images, "fp32")
    return gate.judge(answers, "model.onnx", "fp32", measured_with="OpenVINO"), answers


def _refused(found: ArtefactParity, reasons: Iterable[str]) -> ArtefactParity:
    advice = "; keep it in float32 with --fp32-islands, or drop --no-auto-islands"
    more = tuple(f"{reason}{advice}" for reason in reasons)
    return found.model_copy(update={"failures": (*more, *found.failures)})
