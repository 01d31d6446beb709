"""A worker of a cluster: holds the model, and the slide that it works on.

It is an ordinary class, which the engine makes an actor of. Errors that a user can fix are values
here: Ray would wrap an exception in its traceback.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import ray.util

from serve.contract.errors import FocalPathError
from serve.contract.machine import installed_versions
from serve.contract.strict import Strict
from serve.inference.backend import RunsOn
from serve.settings import InferenceSettings
from serve.slides.block_record import BlockRecord
from serve.slides.errors import ClusterError
from serve.slides.job import SlideJob
from serve.slides.local import OpenModel, open_model
from serve.slides.plan import Block, ModelInfo
from serve.slides.store import WorkFolder
from serve.slides.worker import BlockWorker

T = TypeVar("T")


class Problem(Strict):
    """An error on a worker, as a value."""

    code: str
    reason: str

    @classmethod
    def of(cls, error: FocalPathError | OSError) -> "Problem":
        """The same error as a value, with the machine's name."""
        reason = " ".join(str(error).split())
        return cls(code=getattr(error, "code", "failed"), reason=f"{reason} (on {host_name()})")

    def error(self) -> FocalPathError:
        """The same as an exception."""
        return FocalPathError(self.reason, code=self.code)


class Opening(Strict):
    """What a worker opens."""

    settings: InferenceSettings
    before: RunsOn | None = None
    """What computed earlier results, if the settings leave a choice."""
    model: ModelInfo | None = None
    """The model that it must be, so that all workers give the same answers."""
    cores: int = 0
    """Cores of each worker; 0: all cores of its machine."""
    read_threads: int = 2
    versions: dict[str, str]
    """Of packages; the worker's must be the same."""


class Ready(Strict):
    """The answer of a worker that has opened its model."""

    node: str
    """Ray's name of the machine."""
    host: str
    model: ModelInfo
    versions: dict[str, str]
    """Of what results depend on."""


class Report(Strict):
    """The outcome of some blocks."""

    records: tuple[BlockRecord, ...]
    problem: Problem | None = None


class ClusterWorker:
    """Computes blocks on a machine of the cluster."""

    def __init__(self) -> None:
        self._opened: OpenModel | None = None
        self._read_threads = 1
        self._slide: BlockWorker | None = None
        self._path: Path | None = None
        self._ticket = self._tiles = 0

    def open(self, opening: Opening) -> Ready | Problem:
        """Open the model."""
        try:
            if self._opened is None:
                check_versions(opening.versions)
                opened = open_model(opening.settings, opening.before, cores=opening.cores)
                if opening.model not in (None, opened.model):
                    opened.runner.close()
                    raise ClusterError(
                        f"{opening.settings.bundle} is another model here, or runs differently: "
                        "all machines need the same bundle and the same kind of processor."
                    )
                self._opened, self._read_threads = opened, opening.read_threads
            return Ready(
                node=_node_id(),
                host=host_name(),
                model=self._opened.model,
                versions=own_versions(),
            )
        except (FocalPathError, OSError) as error:
            return Problem.of(error)

    def run(self, path: Path, blocks: tuple[Block, ...], ticket: int) -> Report | None:
        """Compute blocks of the slide whose work folder is `path`.

        Returns:
            The outcome; None if the model is not open because the process was restarted since
            `open`.
        """
        if self._opened is None:
            return None
        self._tiles, self._ticket = 0, ticket
        records: list[BlockRecord] = []
        try:
            self._worker_of(path).run(blocks, on_block=records.append, on_tiles=self._count)
        except (FocalPathError, OSError) as error:
            self._leave_slide()
            return Report(records=tuple(records), problem=Problem.of(error))
        except BaseException:
            self._leave_slide()
            raise
        return Report(records=tuple(records))

    def progress(self) -> tuple[int, int]:
        """The ticket of the running call of `run`, and how many of its tiles are done."""
        return self._ticket, self._tiles

    def close(self) -> None:
        """Close the slide and the model."""
        self._leave_slide()
        if self._opened is not None:
            self._opened.runner.close()
            self._opened = None

    def _worker_of(self, path: Path) -> BlockWorker:
        """Open a slide, and close the one before."""
        if self._slide is None or self._path != path:
            self._leave_slide()
            assert self._opened is not None
            if not path.is_dir():
                raise ClusterError(
                    f"{path} is not there: --out must be a folder that all machines share under "
                    "the same path."
                )
            self._slide = BlockWorker(
                WorkFolder(path),
                self._opened.runner,
                max_batch_size=self._opened.max_batch_size,
                read_threads=self._read_threads,
                host=host_name(),
            )
            self._path = path
        return self._slide

    def _leave_slide(self) -> None:
        slide, self._slide, self._path = self._slide, None, None
        if slide is not None:
            slide.close()

    def _count(self, num_tiles: int) -> None:
        self._tiles += num_tiles


def told(function: Callable[[SlideJob], T], job: SlideJob) -> T | Problem:
    """Do something for a slide in a process of the cluster; an error is a value."""
    try:
        return function(job)
    except (FocalPathError, OSError) as error:
        return Problem.of(error)


def own_versions() -> dict[str, str]:
    """Versions of the installed packages that results depend on."""
    return installed_versions(("focalpath", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino"))


def check_versions(expected: dict[str, str]) -> None:
    """Raise ClusterError where other versions of some packages are installed here."""
    found = installed_versions(tuple(expected))
    differs = [name for name in expected if found.get(name) != expected[name]]
    if differs:
        listed = ", ".join(
            f"{name} {found.get(name, 'is missing')}, not {expected[name]}" for name in differs
        )
        raise ClusterError(f"this machine has {listed}. Install the same on all machines.")


def host_name() -> str:
    """Name and address of this machine."""
    return f"{socket.gethostname()}, {ray.util.get_node_ip_address()}"


def _node_id() -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node
