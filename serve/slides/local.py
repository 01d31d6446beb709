"""The engine of one process: the model as `python -m serve segment` opens it.

While the model works on one slide, the outputs of the slide before are written, and the next one is
planned and its first tiles are read, so that a GPU does not wait for any of it.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serve.contract.manifest import read_bundle
from serve.contract.unchanged import while_unchanged
from serve.inference.backend import RunsOn
from serve.inference.batching import TileRunner
from serve.inference.segmenter import TileSegmenter, open_segmenter
from serve.settings import InferenceSettings
from serve.slides.errors import CohortError, ResultError
from serve.slides.finish import OnStep, read_passport
from serve.slides.job import WORK_FOLDER, SlideJob, conclude, prepare
from serve.slides.plan import Block, ModelInfo, Plan
from serve.slides.store import WorkFolder
from serve.slides.throughput import for_throughput
from serve.slides.worker import BlockWorker, OnBlock, OnTiles

_PATIENCE_S = 120.0
"""Seconds during which a tile is sent again to a Triton that restarts; a slide is hours of work."""


class LocalEngine:
    """See `serve.slides.engine.Engine`.

    Args:
        runner: the model; closed with this.
        model: as plans name it.
        max_batch_size: tiles that it takes at once.
        read_threads: threads that read a slide.
    """

    slides_at_once = 2
    """One that the model works on, and one that is planned or whose outputs are written."""

    def __init__(
        self, runner: TileRunner, model: ModelInfo, *, max_batch_size: int, read_threads: int = 2
    ) -> None:
        self._runner = runner
        self.model = model
        self._max_batch_size = max_batch_size
        self._read_threads = read_threads
        self._computing = threading.Lock()

    def prepare(self, job: SlideJob) -> bool:
        """See `Engine.prepare`."""
        return prepare(job)

    def run(
        self, work: WorkFolder, blocks: Sequence[Block], *, on_block: OnBlock, on_tiles: OnTiles
    ) -> None:
        """See `Engine.run`."""
        with BlockWorker(
            work,
            self._runner,
            max_batch_size=self._max_batch_size,
            read_threads=self._read_threads,
        ) as worker:
            # The model works on one slide at a time.
            worker.run(blocks, turn=self._computing, on_block=on_block, on_tiles=on_tiles)

    def finish(self, job: SlideJob, on_step: OnStep) -> None:
        """See `Engine.finish`."""
        conclude(job, on_step)

    def close(self) -> None:
        """See `Engine.close`."""
        self._runner.close()


def open_local_engine(
    settings: InferenceSettings, *, read_threads: int = 2, out: Path | None = None
) -> LocalEngine:
    """Open the model that the settings name.

    Args:
        settings: name the bundle and what computes.
        read_threads: threads that read a slide.
        out: output folder. Where `auto` leaves a choice, what computed there before is taken again:
            another provider rounds differently, and unfinished slides could not be continued.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        BackendUnavailableError: the backend does not answer.
        CohortError: the bundle does not state its um per pixel.
    """
    opened = open_model(settings, None if out is None else ran_on(out))
    return LocalEngine(
        opened.runner,
        opened.model,
        max_batch_size=opened.max_batch_size,
        read_threads=read_threads,
    )


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to run tiles."""

    runner: TileRunner
    model: ModelInfo
    max_batch_size: int
    """Tiles that it takes at once."""


def open_model(
    settings: InferenceSettings, before: RunsOn | None = None, *, cores: int = 0
) -> OpenModel:
    """Open the model that the settings name, for as many tiles per second as possible.

    Args:
        settings: name the bundle and what computes.
        before: what computed before, where the settings leave a choice.
        cores: that it may use; 0: all.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        BackendUnavailableError: the backend does not answer.
        CohortError: the bundle does not state its um per pixel.
    """

    def open_once() -> OpenModel:
        manifest = read_bundle(settings.bundle)
        wanted = for_throughput(settings, manifest, cores=cores)
        segmenter = open_segmenter(wanted, manifest, before=before, patience_s=_PATIENCE_S)
        size = wanted.max_batch_size or manifest.max_batch_size
        return OpenModel(segmenter.backend, model_of(segmenter), size * wanted.parallel_batches)

    return while_unchanged(settings.bundle, open_once, discard=lambda opened: opened.runner.close())


def model_of(segmenter: TileSegmenter) -> ModelInfo:
    """The model as plans name it, with what computes it.

    Raises:
        CohortError: the bundle does not state its um per pixel.
    """
    manifest, runs_on = segmenter.manifest, segmenter.runs_on
    if manifest.mpp is None:
        raise CohortError(
            f"the bundle of {manifest.name} {manifest.version} does not state its um per pixel, so "
            "slides cannot be scaled to it. Train and export with `mpp` set."
        )
    precision = (runs_on and runs_on.precision) or "as served"
    sha256 = {str(artefact.precision): artefact.sha256 for artefact in manifest.artefacts}
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        checkpoint_sha256=manifest.checkpoint_sha256,
        artefact_sha256=sha256.get(precision, manifest.artefacts[0].sha256),
        precision=precision,
        runs_on="unknown" if runs_on is None else runs_on.provider,
        mpp=manifest.mpp,
        tile_size_px=manifest.tile_size_px,
        classes=manifest.classes,
        scale_certificate=manifest.scale_certificate,
    )


def ran_on(out: Path) -> RunsOn | None:
    """What computed the results in a folder, or the work that was begun there."""
    for path in (*sorted(out.glob(f"{WORK_FOLDER}/*")), *sorted(out.glob("*"))):
        plan = _plan_in(path)
        if plan is not None:
            return RunsOn(
                provider=plan.model.runs_on,
                precision=plan.model.precision,
                runtime="",
                processor="",
                reason="results in the output folder",
            )
    return None


def _plan_in(folder: Path) -> Plan | None:
    """The plan of a result, or of work in progress; None where there is none that can be read."""
    with suppress(ResultError):
        return read_passport(folder).plan
    with suppress(ResultError, OSError):
        return WorkFolder(folder).plan()
    return None
