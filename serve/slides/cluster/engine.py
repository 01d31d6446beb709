"""Runs slides on a Ray cluster: its workers hold the model and compute whole blocks.

Results go straight to the shared folder, where each block appears whole and is the same whoever
computes it. So a block may run twice, and no tile goes through Ray's object store.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.contract.machine import installed_versions
from serve.settings import InferenceSettings
from serve.slides.cluster.connect import Crew, HeadWatch, connect, rooms, size_crew
from serve.slides.cluster.dispatch import Dispatcher, Tell, Worker
from serve.slides.cluster.slide_run import MOST_TRIES, SlideRun
from serve.slides.cluster.worker import (
    ClusterWorker,
    Opening,
    Problem,
    Ready,
    told,
)
from serve.slides.errors import ClusterError, WorkerDiedError, WorkerFailedError
from serve.slides.finish import OnStep
from serve.slides.job import SlideJob, conclude, prepare
from serve.slides.local import ran_on
from serve.slides.options import ClusterOptions
from serve.slides.plan import Block, ModelInfo
from serve.slides.store import WorkFolder
from serve.slides.worker import OnBlock, OnTiles

T = TypeVar("T")
_SLIDES_PER_WORKER = 4
"""Slides in progress per worker: on a fast GPU, writing the outputs of one takes as long as
computing three."""
_PATIENCE_S = 30.0
_WAIT_S = 0.2


class ClusterEngine:
    """See `serve.slides.engine.Engine`.

    Args:
        dispatcher: hands blocks to workers; closed with this.
        head: notices when the cluster's head is lost; closed with this.
        model: that the workers hold.
        num_workers: how many there are, or will be.
    """

    def __init__(
        self, dispatcher: Dispatcher, head: HeadWatch, model: ModelInfo, *, num_workers: int
    ) -> None:
        self._dispatcher = dispatcher
        self._head = head
        self.model = model
        self.slides_at_once = _SLIDES_PER_WORKER * num_workers
        self._homes: dict[str, str] = {}
        self._lock = threading.Lock()

    def prepare(self, job: SlideJob) -> bool:
        """See `Engine.prepare`."""
        home = self._settle_down(job.task.name)
        is_new = False
        try:
            is_new = self._on(home, prepare, job, "plan it")
        finally:
            if not is_new:
                self._move_out(job.task.name)
        return is_new

    def run(
        self,
        work: WorkFolder,
        blocks: Sequence[Block],
        *,
        on_block: OnBlock,
        on_tiles: OnTiles,
    ) -> None:
        """See `Engine.run`."""
        home = self._homes.get(work.name)
        try:
            self._dispatcher.run(SlideRun(work, deque(blocks), on_block, on_tiles, home))
        except BaseException:
            self._move_out(work.name)
            raise

    def finish(self, job: SlideJob, on_step: OnStep) -> None:
        """See `Engine.finish`."""
        on_step("outputs")
        try:
            self._on(self._homes.get(job.task.name), conclude, job, "write its outputs")
        finally:
            self._move_out(job.task.name)

    def close(self) -> None:
        """See `Engine.close`."""
        self._head.close()
        self._dispatcher.close()
        ray.shutdown()

    def _settle_down(self, name: str) -> str | None:
        """Choose the machine with the fewest slides per worker; a slide's blocks prefer it."""
        workers = Counter(self._dispatcher.homes())
        if not workers:
            return None
        with self._lock:
            slides = Counter(self._homes.values())
            home = min(workers, key=lambda node: slides[node] / workers[node])
            self._homes[name] = home
        return home

    def _move_out(self, name: str) -> None:
        with self._lock:
            self._homes.pop(name, None)

    def _on(
        self,
        node: str | None,
        function: Callable[[SlideJob], T],
        job: SlideJob,
        what: str,
    ) -> T:
        """Call a function in a process on a machine, or on another one if that is gone.

        It claims no core, because the workers hold them all for as long as the run goes on.
        """
        options: dict[str, Any] = {"num_cpus": 0, "max_retries": MOST_TRIES - 1}
        if node is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        reference = _told().options(**options).remote(function, job)
        try:
            while not ray.wait([reference], timeout=_WAIT_S)[0]:
                self._check_open(reference)
            answer: T | Problem = ray.get(reference)
        except RayTaskError as error:
            reason = " ".join(f"{type(error.cause).__name__}: {error.cause}".split())
            raise WorkerFailedError(f"{job.task.name}: could not {what}: {reason}") from error
        except RayError as error:
            raise WorkerDiedError(
                f"{job.task.name}: the process that was to {what} died {MOST_TRIES} times. It ran "
                "out of memory, or a library failed on this slide: see Ray's logs. Convert the "
                "slide again, or leave it out."
            ) from error
        if isinstance(answer, Problem):
            raise answer.error()
        return answer

    def _check_open(self, reference: Any) -> None:
        """Stop waiting for a task when the run ends."""
        try:
            self._dispatcher.check_open()
        except CancelledError:
            ray.cancel(reference, force=True)
            raise


def open_cluster_engine(
    settings: InferenceSettings,
    options: ClusterOptions,
    *,
    tell: Tell,
    read_threads: int = 2,
    out: Path | None = None,
    worker: type[ClusterWorker] = ClusterWorker,
) -> ClusterEngine:
    """Connect to a cluster and start its workers.

    The first worker chooses what computes, where the settings leave a choice; the others take the
    same. The engine is ready with the first; the others join when they are.

    Args:
        settings: name the bundle, under a path that all machines share, and what computes.
        options: which cluster, and how many workers.
        tell: called with one line for the user.
        read_threads: threads of each worker that read a slide.
        out: output folder; what computed there before is taken again.
        worker: class of the actors.

    Raises:
        ClusterError: there is no such cluster, or it has no room.
        FocalPathError: the first worker cannot open the model.
    """
    connect(options.cluster)
    try:
        crew = size_crew(rooms(), options, settings)
        actor = _remote(worker).options(
            num_cpus=crew.cpus,
            num_gpus=crew.gpus,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )
        workers = [Worker(actor.remote()) for _ in range(crew.count)]
        bundle = settings.bundle.absolute()
        opening = Opening(
            settings=settings.model_copy(update={"bundle": bundle}),
            cores=crew.cpus,
            before=None if out is None else ran_on(out),
            read_threads=read_threads,
            versions=installed_versions(("focalpath",)),
        )
        first = _open_first(workers[0], opening, crew, tell)
        head = HeadWatch(ray.get_runtime_context().gcs_address, tell)
        dispatcher = Dispatcher(
            workers, _same_as(first, opening), tell=tell, head=lambda: head.error
        )
    except BaseException:
        ray.shutdown()
        raise
    return ClusterEngine(dispatcher, head, first.model, num_workers=crew.count)


@cache
def _told() -> Any:
    """`told` as a Ray task; it is sent to the cluster once."""
    return ray.remote(told)


def _remote(worker: type[ClusterWorker]) -> Any:
    """Ray's class of actors, with a thread of its own for `ClusterWorker.progress`."""
    decorate: Any = ray.remote(concurrency_groups={"progress": 1})  # type: ignore[call-overload]
    return decorate(worker)


def _open_first(worker: Worker, opening: Opening, crew: Crew, tell: Tell) -> Ready:
    options = worker.handle.open.options(max_task_retries=MOST_TRIES - 1)
    reference = options.remote(opening)
    while not ray.wait([reference], timeout=_PATIENCE_S)[0]:
        tell(
            f"waiting for the first of {crew.count} workers; each needs {crew.cpus} CPUs and "
            f"{crew.gpus:g} GPUs"
        )
    try:
        answer: Ready | Problem = ray.get(reference)
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"the first worker died while it opened the model: {reason}") from error
    if isinstance(answer, Problem):
        raise answer.error()
    worker.node, worker.host, worker.state = answer.node, answer.host, "free"
    return answer


def _same_as(first: Ready, opening: Opening) -> Opening:
    """What the other workers open: the same that the first one chose."""
    settings = opening.settings
    if settings.backend == "onnxruntime":
        chosen = {"provider": first.model.runs_on, "precision": first.model.precision}
        settings = settings.model_copy(update=chosen)
    return opening.model_copy(
        update={"settings": settings, "model": first.model, "versions": first.versions}
    )
