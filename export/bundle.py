"""The bundle's folder: everything that serving needs, whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from rich.console import Console

from export.artefacts import HalfMaker, PrecisionSettings, make_int8
from export.attention import AttentionForm
from export.audit import Peak, audit_activations
from export.deployable import Deployable
from export.engine_plan import plan_for
from export.folded import FoldedSegmenter
from export.model_card import write_model_card
from export.onnx_graph import PARITY_OUTPUT, export_onnx
from export.parity import Answers, Gate, onnx_answers, torch_answers
from export.parity_report import draw_worst_tiles, write_report
from export.parity_schema import (
    ArtefactParity,
    BlockPeak,
    ParityReport,
    Precision,
    Tolerances,
)
from export.precision import HalfPrecision, half_blocks
from export.tensorrt_lint import require_clean
from export.validation import Images, validation_tiles
from serve.manifest import Artefact, Manifest, TissueClass, WarmUp, interface, sha256_of
from train.checkpoint import WEIGHTS_FILE, CheckpointCard, load_checkpoint
from train.errors import FocalPathError

MODEL_FILE = "model.onnx"
WARM_UP_FILE = "warm_up.npz"
MIN_WARM_UP_AGREEMENT = 0.98
"""Share of labels that a server has to agree on: other hardware and precisions round otherwise."""
_DIGITS_OF_VERSION = 12
_ENGINE_PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")
"""What a TensorRT plan is built from: the first that the bundle has."""


@dataclass(frozen=True, kw_only=True)
class BundleSettings:
    """What a bundle is called and how it is checked."""

    name: str = "segmenter"
    """The model's name, also in Triton."""
    model_version: str | None = None
    """The model's version; by default the first digits of the checkpoint's SHA-256."""
    opset: int = 20
    """ONNX opset of the graph."""
    max_batch_size: int = 8
    """Largest batch that a server may send."""
    validate: Path | None = None
    """Data set to compare with torch on; by default drawn tissue."""
    num_parity_tiles: int = 8
    """Tiles to compare on."""
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    tolerances: Tolerances = field(default_factory=Tolerances)


def write_bundle(checkpoint: Path, bundle: Path, settings: BundleSettings) -> Manifest:
    """Export a checkpoint, prove that it answers as torch does, and write all that serving needs.

    Raises:
        FocalPathError: the checkpoint cannot be used, or the float32 graph is out of tolerance. A
            bundle that was there before stays as it was.
    """
    segmenter, card = load_checkpoint(checkpoint)
    weights = checkpoint / WEIGHTS_FILE if checkpoint.is_dir() else checkpoint
    with _replaced_whole(bundle) as staging:
        export = _Export(Deployable(segmenter).eval(), card, settings, staging)
        export.write_artefacts(weights)
        manifest = export.write_manifest(sha256_of(weights))
        export.write_reports(manifest)
    return manifest


class _Export:
    """One export into a folder that nobody sees until it is whole."""

    def __init__(
        self,
        deployable: Deployable,
        card: CheckpointCard,
        settings: BundleSettings,
        folder: Path,
    ) -> None:
        self._deployable, self._card, self._settings = deployable, card, settings
        self._folder = folder
        self._console = Console()
        names = tuple(entry.name for entry in card.classes)
        tiles = validation_tiles(
            settings.validate,
            card.settings.model.tile_size_px,
            settings.num_parity_tiles,
            class_names=names,
            mpp=card.mpp,
        )
        self._gate = Gate(
            tiles=tiles,
            expected=torch_answers(deployable, tiles.images),
            class_names=names,
            class_shares=card.pixel_frequencies,
            tolerances=settings.tolerances,
        )
        self._judged: list[ArtefactParity] = []
        self._peaks: dict[str, Peak] = {}
        self._half_blocks: tuple[str, ...] = ()
        self._pictures: list[str] = []

    def write_artefacts(self, weights: Path) -> None:
        """Write every form of the model that passes the gate.

        Raises:
            FocalPathError: the float32 graph does not pass.
        """
        settings, tiles = self._settings, self._gate.tiles
        source = self._folder / "with_logits.onnx"
        self._say(f"Exporting {weights} to ONNX, opset {settings.opset}")
        export_onnx(self._deployable, source, opset=settings.opset)
        self._say(f"Comparing with torch on {tiles.source}")
        answers = onnx_answers(source, tiles.images)
        found = self._gate.judge(answers, MODEL_FILE, "fp32")
        if not found.passed:
            raise FocalPathError(
                f"{MODEL_FILE} does not answer as torch does: {'; '.join(found.failures)}. No "
                "bundle was written."
            )
        self._keep(source, found, answers)
        # Attention written out: its operator would hide the logits.
        folded = FoldedSegmenter(self._deployable, AttentionForm()).eval()
        self._peaks = audit_activations(folded, tiles)
        self._half_blocks = half_blocks(onnx.load(str(source)))
        halves: list[HalfPrecision] = []
        if settings.precision.fp16:
            halves.append("fp16")
        if settings.precision.bf16:
            halves.append("bf16")
        for precision in halves:
            target = self._folder / f"with_logits.{precision}.onnx"
            maker = HalfMaker(source, precision, self._gate, settings.precision, self._say)
            found, answers = maker.make(target, self._peaks)
            self._keep(target, found, answers)
        if settings.precision.int8:
            target = self._folder / "with_logits.int8.onnx"
            self._keep(target, *make_int8(source, target, self._gate))
        for path in self._folder.glob("with_logits*"):
            path.unlink()

    def write_manifest(self, checkpoint_sha256: str) -> Manifest:
        """Write the manifest, the warm-up sample and the plan of the TensorRT engine."""
        artefacts = tuple(
            Artefact(
                file=found.file,
                format="onnx",
                precision=found.precision,
                sha256=sha256_of(self._folder / found.file),
                parity=found.for_manifest(),
            )
            for found in self._judged
            if found.passed
        )
        warm_up = _write_warm_up(self._folder, self._gate.tiles.images[:1])
        manifest = _manifest(self._settings, self._card, checkpoint_sha256, artefacts, warm_up)
        by_precision: Mapping[str, Artefact] = {entry.precision: entry for entry in artefacts}
        chosen = next(by_precision[name] for name in _ENGINE_PRECISIONS if name in by_precision)
        plan_for(manifest, chosen).write(self._folder)
        manifest.write(self._folder)
        return manifest

    def write_reports(self, manifest: Manifest) -> None:
        """Write `parity.json`, the report with its pictures, and the model card."""
        tiles, precision = self._gate.tiles, self._settings.precision
        report = ParityReport(
            tiles=tiles.source,
            num_tiles=len(tiles),
            has_masks=tiles.masks is not None,
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
        )
        report.write(self._folder)
        write_report(report, self._pictures, self._folder)
        write_model_card(manifest, self._card, report, self._folder)

    def _keep(self, source: Path, found: ArtefactParity, answers: Answers) -> None:
        """Note the verdict, draw the worst tiles, and put what passed into the bundle."""
        self._judged.append(found)
        picture = draw_worst_tiles(found, answers, self._gate, self._card.classes, self._folder)
        if picture is not None:
            self._pictures.append(picture)
        if not found.passed:
            first, *others = found.failures
            more = f" (and {len(others)} more, see parity_report.md)" if others else ""
            self._say(f"{found.file} is not in the bundle: {first}{more}")
            return
        target = self._folder / found.file
        _save_without_logits(source, target)
        if found.precision != "int8":
            require_clean(target)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _save_without_logits(source: Path, target: Path) -> None:
    """Copy a graph without the gate's output and without the exporter's notes.

    The notes quote the source's paths on the machine that exported.
    """
    model = onnx.load(str(source))
    kept = [output for output in model.graph.output if output.name != PARITY_OUTPUT]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *kept):
        del part.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(target))


def _manifest(
    settings: BundleSettings,
    card: CheckpointCard,
    checkpoint_sha256: str,
    artefacts: tuple[Artefact, ...],
    warm_up: WarmUp,
) -> Manifest:
    tile_size_px = card.settings.model.tile_size_px
    inputs, outputs = interface(tile_size_px, len(card.classes))
    return Manifest(
        name=settings.name,
        version=settings.model_version or checkpoint_sha256[:_DIGITS_OF_VERSION],
        classes=tuple(TissueClass(name=c.name, color=c.color.lower()) for c in card.classes),
        mpp=card.mpp,
        tile_size_px=tile_size_px,
        max_batch_size=settings.max_batch_size,
        opset=settings.opset,
        inputs=inputs,
        outputs=outputs,
        class_attention_bias=card.class_attention_bias,
        checkpoint_sha256=checkpoint_sha256,
        artefacts=artefacts,
        warm_up=warm_up,
    )


def _write_warm_up(folder: Path, images: Images) -> WarmUp:
    """Write the first of `images` with its labels, for a server to compare with its own."""
    session = onnxruntime.InferenceSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"])
    (labels,) = session.run(["labels"], {"image": images})
    np.savez_compressed(folder / WARM_UP_FILE, image=images[0], labels=labels[0])
    return WarmUp(
        file=WARM_UP_FILE,
        sha256=sha256_of(folder / WARM_UP_FILE),
        min_agreement=MIN_WARM_UP_AGREEMENT,
    )


@contextmanager
def _replaced_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `folder` at the end, or vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    staging.chmod(0o755)
    try:
        yield staging
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(staging, folder)
            shutil.rmtree(old)
        else:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
