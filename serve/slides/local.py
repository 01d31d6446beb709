"""The engine of one process: the model as `python -m serve segment` opens it."""

from collections.abc import Sequence

from serve.contract.manifest import Manifest, read_bundle
from serve.inference.batching import TileRunner
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings
from serve.slides.plan import Block, ModelInfo, describe_model
from serve.slides.store import WorkFolder
from serve.slides.worker import BlockWorker, OnBlock, OnTiles


class LocalEngine:
    """See `serve.slides.run.Engine`.

    Args:
        runner: the model; closed with this.
        model: as plans name it.
        max_batch_size: tiles that it takes at once.
        read_threads: threads that read a slide.
    """

    def __init__(
        self, runner: TileRunner, model: ModelInfo, *, max_batch_size: int, read_threads: int = 2
    ) -> None:
        self._runner = runner
        self._model = model
        self._max_batch_size = max_batch_size
        self._read_threads = read_threads

    @property
    def model(self) -> ModelInfo:
        """See `Engine.model`."""
        return self._model

    def run(
        self,
        work: WorkFolder,
        blocks: Sequence[Block],
        *,
        on_block: OnBlock,
        on_tiles: OnTiles,
    ) -> None:
        """See `Engine.run`."""
        with BlockWorker(
            work,
            self._runner,
            max_batch_size=self._max_batch_size,
            read_threads=self._read_threads,
        ) as worker:
            worker.run(blocks, on_block=on_block, on_tiles=on_tiles)

    def close(self) -> None:
        """See `Engine.close`."""
        self._runner.close()


def open_local_engine(settings: InferenceSettings, *, read_threads: int = 2) -> LocalEngine:
    """Open the model that the settings name.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        BackendUnavailableError: the backend does not answer.
        CohortError: the bundle does not state its um per pixel.
    """
    manifest = read_bundle(settings.bundle)
    model = model_of(settings, manifest)
    runner = open_segmenter(settings, manifest).backend
    size = settings.max_batch_size or manifest.max_batch_size
    return LocalEngine(
        runner,
        model,
        max_batch_size=size * settings.parallel_batches,
        read_threads=read_threads,
    )


def model_of(settings: InferenceSettings, manifest: Manifest) -> ModelInfo:
    """The model that the settings name, as plans name it; on every machine the same."""
    is_triton = settings.backend == "triton"
    runs_on = "triton" if is_triton else f"onnxruntime {settings.provider}"
    return describe_model(manifest, settings.precision, runs_on)
