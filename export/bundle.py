"""The bundle's folder: everything that serving needs, whole or not at all."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console

from export.destination import bundle_destination, is_report, refused_folder
from export.errors import GateError, errors_translated
from export.files import one_at_a_time, replaced_whole, uninterrupted
from export.gate.answers import Answers, onnx_answers, torch_answers
from export.gate.certificate import draw_curve, measure_certificate
from export.gate.gate import Gate
from export.gate.model_card import write_model_card
from export.gate.report import REPORT_FILE, draw_worst_tiles, write_report
from export.gate.schema import ArtefactParity, BlockPeak, ParityReport
from export.gate.tiles import ValidationTiles, validation_tiles
from export.graph.encoders import FoldedSegmenter
from export.graph.nodes import PARITY_OUTPUT
from export.graph.reference import Deployable
from export.graph.to_onnx import check_model, drop_output, export_onnx
from export.manifest import MODEL_FILE, artefacts_of, build_manifest, write_warm_up
from export.precision.artefacts import HalfMaker, judge_in_openvino, make_int8
from export.precision.audit import Peak, audit_activations
from export.precision.half import HalfPrecision, half_blocks
from export.settings import BundleSettings
from export.tensorrt.lint import engine_obstacles
from export.tensorrt.plan import plan_for
from export.triton import ENGINE_PRECISIONS
from serve.contract import openvino
from serve.contract.certificate import ScaleCertificate
from serve.contract.machine import this_processor
from serve.contract.manifest import Artefact, Manifest
from train.model.checkpoint import CheckpointCard, load_checkpoint, read_card, weights_file


@errors_translated()
def write_bundle(checkpoint: Path, bundle: Path, settings: BundleSettings) -> Manifest:
    """Export a checkpoint, prove that it answers as torch does, and write all that serving needs.

    Raises:
        DestinationError: the bundle would replace something else.
        InputError: the checkpoint or the data set cannot be used.
        GraphError: the model does not fit into an ONNX graph.
        GateError: the float32 graph is out of tolerance. Its report is then beside where the
            bundle would be, and a bundle that was there before stays as it was.
    """
    needed = {"the checkpoint": checkpoint, "the data to compare on": settings.validate}
    bundle = bundle_destination(bundle, needed)
    if settings.precision.openvino:
        openvino.require("fp32")  # a missing package is reported before the work
    weights = weights_file(checkpoint)
    check_model(weights, read_card(checkpoint).settings.model)
    # First: damaged files and weights that are not numbers are reported before any work.
    segmenter, card = load_checkpoint(checkpoint)
    deployable = Deployable(segmenter).eval()
    tiles = _tiles(settings, card)
    refused = refused_folder(bundle)
    with replaced_whole(bundle) as staging:
        export = _Export(deployable, card, settings, tiles, staging)
        try:
            export.write_float32(weights)
        except GateError as error:
            with replaced_whole(refused) as folder:
                export.write_parity(folder)
            raise GateError(
                f"{error}. No bundle was written; {refused / REPORT_FILE} shows the classes and "
                "tiles."
            ) from error
        export.write_other_precisions()
        export.certify_scale()
        manifest = export.write_manifest(earlier=bundle)
        report = export.write_parity(staging)
        write_model_card(manifest, card, report, staging, engine_obstacles=export.plan.obstacles)
        # Again: the work takes minutes, and files may have been written there meanwhile. Another
        # export may just be changing the folder: while it does, there is none for a moment.
        with one_at_a_time(bundle.parent):
            bundle_destination(bundle, needed)
    if refused.exists() and is_report(refused):
        with uninterrupted(f"{bundle} is the new bundle"):
            shutil.rmtree(refused, ignore_errors=True)  # of an earlier try
    return manifest


class _Export:
    """One export into a folder that becomes visible once it is whole."""

    def __init__(
        self,
        deployable: Deployable,
        card: CheckpointCard,
        settings: BundleSettings,
        tiles: ValidationTiles,
        folder: Path,
    ) -> None:
        self._deployable, self._card, self._settings = deployable, card, settings
        self._folder = folder
        self._source = folder / "with_logits.onnx"
        self._console = Console()
        self._gate = Gate(
            tiles=tiles,
            expected=torch_answers(deployable, tiles.images),
            class_names=tuple(entry.name for entry in card.classes),
            class_shares=card.shares,
            tolerances=settings.tolerances,
        )
        self._judged: list[ArtefactParity] = []
        self._peaks: dict[str, Peak] = {}
        self._half_blocks: tuple[str, ...] = ()
        self._pictures: list[str] = []
        self._obstacles: dict[str, tuple[str, ...]] = {}
        self._certificate: ScaleCertificate | None = None

    def write_float32(self, weights: Path) -> None:
        """Write the float32 graph.

        Raises:
            GateError: it does not pass.
        """
        tiles = self._gate.tiles
        self._tell(f"Exporting {weights} to ONNX, opset {self._settings.opset}")
        export_onnx(
            self._deployable,
            self._source,
            opset=self._settings.opset,
            form=self._settings.attention,
        )
        self._tell(f"Comparing with torch on {tiles.source}")
        answers = onnx_answers(self._source, tiles.images)
        found = self._gate.judge(answers, MODEL_FILE, "fp32")
        self._take(found, answers, self._source)
        if not found.passed:
            raise GateError(
                f"{MODEL_FILE} does not answer as torch does: {'; '.join(found.failures)}"
            )
        given = {self._card.classes[label - 1].name for label in np.unique(answers.labels)}
        if len(given) == 1:
            self._tell(
                f"Both give every pixel the label {given.pop()}: their agreement proves little. "
                "Look at the model with `python -m train evaluate`, or give tiles of its tissue "
                "with --validate"
            )

    def write_other_precisions(self) -> None:
        """Write the other precisions that pass the gate."""
        precision, source = self._settings.precision, self._source
        # Attention written out: its operator would hide the logits.
        form = replace(self._settings.attention, operator=False)
        folded = FoldedSegmenter(self._deployable, form).eval()
        self._peaks = audit_activations(folded, self._gate.tiles)
        self._half_blocks = half_blocks(onnx.load(str(source)))
        if precision.openvino:
            self._take(*judge_in_openvino(source, self._gate))
        halves: list[HalfPrecision] = []
        if precision.fp16:
            halves.append("fp16")
        if precision.bf16 or (precision.openvino and openvino.problem("bf16") is None):
            halves.append("bf16")
        for half in halves:
            target = self._folder / f"with_logits.{half}.onnx"
            maker = HalfMaker(source, half, self._gate, precision, self._tell)
            found, answers = maker.make(target, self._peaks)
            self._take(found, answers, target)
        if precision.int8:
            target = self._folder / "with_logits.int8.onnx"
            found, answers = make_int8(source, target, self._gate)
            self._take(found, answers, target)
        for path in self._folder.glob("with_logits*"):
            path.unlink()

    def certify_scale(self) -> None:
        """Measure what images of another um per pixel cost, and draw the curve."""
        found = self._certificate = measure_certificate(
            self._gate, self._folder / MODEL_FILE, self._settings.certificate
        )
        if found is not None and self._card.input_mpp is not None:
            draw_curve(found, self._card.classes, self._card.input_mpp, self._folder)

    def write_manifest(self, earlier: Path) -> Manifest:
        """Write the manifest, the warm-up sample and the plan of the TensorRT engine.

        Args:
            earlier: the bundle that is replaced, if it exists.
        """
        artefacts = artefacts_of(self._judged, self._folder, self._settings.tolerances)
        manifest = build_manifest(
            self._settings,
            self._card,
            artefacts,
            self._folder,
            warm_up=write_warm_up(self._folder, self._gate.tiles.images[:1]),
            certificate=self._certificate,
        )
        source = self._engine_source(artefacts)
        self.plan = plan_for(
            manifest,
            source,
            tolerances=self._settings.tolerances,
            obstacles=self._obstacles[source.file],
        )
        self.plan.write(self._folder)
        self._keep_of_engine(earlier)
        manifest.write(self._folder)
        return manifest

    def _engine_source(self, artefacts: tuple[Artefact, ...]) -> Artefact:
        """The graph that a TensorRT plan is to be built from."""
        by_precision: Mapping[str, Artefact] = {entry.precision: entry for entry in artefacts}
        chosen = next(name for name in ENGINE_PRECISIONS if name in by_precision)
        judged = {found.precision for found in self._judged}
        reasons = [
            f"{name} {'did not pass the gate' if name in judged else 'was not asked for'}"
            for name in ENGINE_PRECISIONS[: ENGINE_PRECISIONS.index(chosen)]
        ]
        source = by_precision[chosen]
        obstacles = self._obstacles[source.file]
        if obstacles:
            more = f" (and {len(obstacles) - 1} more, see engine_plan.json)"
            self._tell(
                f"No TensorRT engine can be built from {source.file}; ONNX Runtime serves it. "
                f"{obstacles[0]}{more if len(obstacles) > 1 else ''}"
            )
        else:
            self._tell(
                f"A TensorRT engine would be built from {source.file}"
                + (f": {', '.join(reasons)}" if reasons else "")
            )
        return source

    def _keep_of_engine(self, earlier: Path) -> None:
        """Keep the timings of an earlier engine, which make the next one's build short."""
        timings = earlier / self.plan.timing_cache_file
        if timings.is_file():
            shutil.copyfile(timings, self._folder / timings.name)
        if (plan := earlier / self.plan.plan_file).is_file():
            self._tell(
                f"{plan} is of the earlier bundle and is not kept; build this "
                "one's with `python -m export engine`"
            )

    def write_parity(self, folder: Path) -> ParityReport:
        """Write `parity.json` and the report with its pictures into `folder`."""
        tiles, precision = self._gate.tiles, self._settings.precision
        report = ParityReport(
            tiles=tiles.source,
            num_tiles=len(tiles),
            has_masks=tiles.masks is not None,
            processor=this_processor().title,
            tolerances=asdict(self._settings.tolerances),
            activation_limit=precision.activation_limit,
            peaks=tuple(
                BlockPeak(
                    block=block,
                    magnitude=peak.magnitude,
                    tile=peak.tile,
                    computed_in="half" if block in self._half_blocks else "float32",
                )
                for block, peak in self._peaks.items()
            ),
            artefacts=tuple(self._judged),
            mpp=self._card.input_mpp,
            scale_certificate=self._certificate,
        )
        report.write(folder)
        write_report(report, self._pictures, folder)
        if folder != self._folder:
            for name in self._pictures:
                shutil.copyfile(self._folder / name, folder / name)
        return report

    def _take(self, found: ArtefactParity, answers: Answers, graph: Path | None = None) -> None:
        """Keep the verdict, draw the worst tiles, and put a graph that passes into the bundle."""
        self._judged.append(found)
        picture = draw_worst_tiles(found, answers, self._gate, self._card.classes, self._folder)
        if picture is not None:
            self._pictures.append(picture)
        if not found.passed:
            first, *others = found.failures
            more = f" (and {len(others)} more, see {REPORT_FILE})" if others else ""
            self._tell(f"{found.title} does not pass: {first}{more}")
        elif graph is not None:
            target = self._folder / found.file
            drop_output(graph, target, PARITY_OUTPUT)
            if found.precision != "int8":
                self._obstacles[found.file] = engine_obstacles(target)

    def _tell(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _tiles(settings: BundleSettings, card: CheckpointCard) -> ValidationTiles:
    return validation_tiles(
        settings.validate,
        card.settings.model.input_px,
        settings.num_parity_tiles,
        class_names=tuple(entry.name for entry in card.classes),
        mpp=card.input_mpp,
        squeeze=card.settings.model.squeeze,
    )
