"""What runs on machines beside the blocks: planning slides and writing outputs, without Ray."""

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from ray.exceptions import RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.contract.errors import FocalPathError
from serve.slides.cluster import engine as module
from serve.slides.cluster.connect import HeadWatch
from serve.slides.cluster.engine import ClusterEngine
from serve.slides.cluster.worker import Problem
from serve.slides.cohort import SlideTask
from serve.slides.errors import WorkerDiedError, WorkerFailedError
from serve.slides.job import SlideJob
from serve.slides.options import RunOptions
from tests.support.slide_models import model_info

LARGE, SMALL = "a" * 56, "b" * 56
"""Ray's names of machines."""


class Crew:
    """A dispatcher whose workers are on some machines."""

    def __init__(self, *nodes: str) -> None:
        self._nodes = list(nodes)

    def homes(self) -> list[str]:
        return self._nodes

    def check_open(self) -> None:
        pass


class Cluster:
    """Answers every task with `answer`; remembers where it was to run."""

    def __init__(self) -> None:
        self.answer: object = True
        self.nodes: list[str | None] = []

    def __call__(self) -> "Cluster":
        return self

    def options(self, **options: object) -> "Cluster":
        assert options["num_cpus"] == 0  # the workers hold them all
        assert options["max_retries"] == 2
        where = options.get("scheduling_strategy")
        assert where is None or isinstance(where, NodeAffinitySchedulingStrategy)
        assert where is None or where.soft  # another will do where it is gone
        self.nodes.append(where and where.node_id)
        return self

    def remote(self, function: object, job: SlideJob) -> object:
        return self

    def wait(self, references: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return references, []

    def get(self, reference: object) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(module, "ray", made)
    monkeypatch.setattr(module, "_told", made)
    return made


def engine_on(*nodes: str) -> ClusterEngine:
    crew = Crew(*nodes)
    head = HeadWatch("", lambda _: None)  # looks nowhere
    head.close()
    return ClusterEngine(crew, head, model_info(), num_workers=len(nodes))  # type: ignore[arg-type]


def job(name: str) -> SlideJob:
    return SlideJob(
        out=Path("out"),
        task=SlideTask(path=Path(f"{name}.svs"), name=name),
        options=RunOptions(),
        formats=(),
        model=model_info(),
    )


def test_slides_settle_on_machines_by_their_number_of_workers(cluster: Cluster) -> None:
    engine = engine_on(LARGE, LARGE, SMALL)
    for number in range(6):
        assert engine.prepare(job(f"slide{number}"))
    assert sorted(map(str, cluster.nodes)) == [LARGE] * 4 + [SMALL] * 2


def test_outputs_are_written_where_the_slide_was_planned_and_make_room(cluster: Cluster) -> None:
    engine = engine_on(LARGE, SMALL)
    engine.prepare(job("first"))
    cluster.answer = None
    engine.finish(job("first"), lambda _: None)
    assert cluster.nodes[0] == cluster.nodes[1]
    cluster.answer = False  # finished before: it needs no machine
    engine.prepare(job("second"))
    cluster.answer = True
    engine.prepare(job("third"))
    assert cluster.nodes == [LARGE] * 4


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (WorkerCrashedError(), WorkerDiedError, "worker_died"),
        (RayTaskError("run", "Traceback", TypeError("a bug")), WorkerFailedError, "worker_failed"),
        (Problem(code="slide_scale", reason="no um per pixel"), FocalPathError, "slide_scale"),
    ],
)
def test_a_slide_whose_planning_or_outputs_fail_fails_in_one_line(
    answer: object, kind: type[FocalPathError], code: str, cluster: Cluster
) -> None:
    engine = engine_on(LARGE)
    cluster.answer = answer
    for call in (engine.prepare, lambda work: engine.finish(work, lambda _: None)):
        with pytest.raises(kind) as caught:
            call(job("slide"))
        assert caught.value.code == code
        assert "\n" not in str(caught.value)
