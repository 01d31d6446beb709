"""What a run works with: an engine that computes, and a watcher that is told how it goes."""

from collections.abc import Sequence
from typing import Protocol

from serve.slides.cohort import Outcome
from serve.slides.finish import OnStep
from serve.slides.job import SlideJob
from serve.slides.plan import Block, ModelInfo
from serve.slides.store import WorkFolder
from serve.slides.worker import OnBlock, OnTiles


class Engine(Protocol):
    """Computes blocks: in this process, or on a cluster."""

    @property
    def model(self) -> ModelInfo:
        """The model that it runs."""
        ...

    @property
    def slides_at_once(self) -> int:
        """How many slides to work on at the same time; then from as many threads."""
        ...

    def prepare(self, job: SlideJob) -> bool:
        """Plan a slide; see `serve.slides.job.prepare`."""
        ...

    def run(
        self,
        work: WorkFolder,
        blocks: Sequence[Block],
        *,
        on_block: OnBlock,
        on_tiles: OnTiles,
    ) -> None:
        """Compute blocks of a slide whose folder is begun; see `BlockWorker.run`."""
        ...

    def finish(self, job: SlideJob, on_step: OnStep) -> None:
        """Write the outputs of a slide whose blocks are done; see `serve.slides.job.conclude`."""
        ...

    def close(self) -> None:
        """Stop what is at work and free what is held; not used after. May be called twice."""
        ...


class Watcher:
    """Is told how a run goes, and shows nothing. Every method may be called from any thread."""

    def begin_slide(self, name: str, num_tiles: int, num_done: int) -> None:
        """A slide begins, or goes on with `num_done` of its tiles done."""

    def add_tiles(self, name: str, num_tiles: int) -> None:
        """More tiles are done. What this raises stops the run."""

    def bound_by(self, name: str, stage: str) -> None:
        """Which stage took most of the last block."""

    def step(self, name: str, step: str) -> None:
        """An output is being written."""

    def end_slide(self, outcome: Outcome) -> None:
        """A slide is done, or failed."""

    def note(self, text: str) -> None:
        """Tell what the user should know, such as that a worker died."""

    def close(self) -> None:
        """End the showing."""
