"""What a cluster costs beside one process: `python -m benchmarks.slides_cluster`.

The same slide goes through the engine of one process and through one Ray worker on this machine, in
turns, with the same model, threads and blocks. The cluster is started once, before.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from pydantic import Field
from rich.console import Console

from benchmarks.generated_slide import Clock, SlideOptions, segment, write_slide
from benchmarks.harness import machine_line, one_line_errors, take_turns, write_report
from serve.contract.machine import installed_versions
from serve.contract.manifest import read_bundle, sha256_of
from serve.contract.strict import Strict
from serve.slides.cluster.engine import open_cluster_engine
from serve.slides.engine import Engine
from serve.slides.finish import read_passport
from serve.slides.local import open_local_engine
from serve.slides.options import ClusterOptions, RunOptions
from serve.slides.outputs.registry import formats_of
from serve.slides.run import Cohort


class Cost(Strict):
    """Time that something takes."""

    wall: float
    cpu: float
    """Of this process and of all that it has started, Ray's included. Other work on the machine
    hardly changes it."""


class Round(Strict):
    """Seconds of one slide."""

    computing: Cost
    whole: Cost


class ClusterReport(Strict):
    """What `slides_cluster.json` holds."""

    machine: str
    packages: dict[str, str]
    model: str
    threads: int
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float]
    block_cells: int
    num_blocks: int
    num_tiles: dict[str, int] = Field(
        description="that ran, per engine: blocks that one worker gets at different times share no "
        "answers"
    )
    rounds: dict[str, list[Round]] = Field(description="per engine")
    per_block_ms: Cost = Field(
        description="median over the rounds of what computing costs more on the cluster, per block"
    )
    per_slide_ms: Cost = Field(
        description="the same of planning the slide and writing its outputs, per slide"
    )
    same_bytes: bool


@dataclass(frozen=True, kw_only=True)
class ClusterBenchmark(SlideOptions):
    """Measure what a block costs more on a cluster."""

    side_px: int = 4096
    """Side of the slide."""
    block_cells: int = 256
    """Side of the blocks."""
    rounds: int = 5
    """Turns of each engine."""


class _Measured:
    """An engine, and what it has run."""

    def __init__(self, engine: Engine, slide: Path, block_cells: int) -> None:
        self._engine, self._slide = engine, slide
        self._options = RunOptions(block_cells=block_cells)
        self.outs: list[Path] = []
        self.num_tiles = 0

    def run(self) -> Round:
        """Segment the slide into a new folder beside it."""
        out = Path(tempfile.mkdtemp(dir=self._slide.parent))
        self.outs.append(out)
        clock = Clock(_now)
        cohort = Cohort(out, self._engine, self._options, formats_of(("ome-zarr",)), clock)
        started = _now()
        (outcome,) = segment(cohort, [self._slide])
        self.num_tiles = outcome.num_tiles
        return Round(computing=_less(clock.computed, clock.began), whole=_less(_now(), started))


def run_benchmark(command: ClusterBenchmark, console: Console) -> ClusterReport:
    """Measure both engines in turns."""
    manifest = read_bundle(command.settings.bundle)
    assert manifest.mpp is not None
    load = _load()
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "slide.svs"
        write_slide(slide, command.side_px, command.side_px, manifest.mpp, command.drawn_px)
        local = open_local_engine(command.settings)
        options = ClusterOptions(cluster="local", workers=1)
        cluster = open_cluster_engine(command.settings, options, tell=console.print)
        engines = {
            name: _Measured(engine, slide, command.block_cells)
            for name, engine in (("process", local), ("cluster", cluster))
        }
        variants = {name: engine.run for name, engine in engines.items()}
        try:
            rounds = take_turns(variants, command.rounds, console.print)
        finally:
            cluster.close()
            local.close()
        outs = [out for engine in engines.values() for out in engine.outs]
        passport = read_passport(outs[0] / "slide")
        contents = [_contents(out) for out in outs]
    return ClusterReport(
        machine=machine_line(),
        packages=installed_versions(("focalpath", "ray", "onnxruntime", "zarr", "numpy")),
        model=f"{manifest.name} {manifest.version}, tiles of {manifest.tile_size_px} px",
        threads=command.settings.threads,
        load_before=load,
        load_after=_load(),
        block_cells=command.block_cells,
        num_blocks=passport.num_blocks,
        num_tiles={name: engine.num_tiles for name, engine in engines.items()},
        rounds=rounds,
        per_block_ms=_more(rounds, lambda turn: turn.computing, passport.num_blocks),
        per_slide_ms=_more(rounds, lambda turn: _less(turn.whole, turn.computing), 1),
        same_bytes=all(content == contents[0] for content in contents),
    )


def _now() -> Cost:
    """The clock, and the CPU time of this process and of all that it has started."""
    cpu, own = 0.0, psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            cpu += times.user + times.system + times.children_user + times.children_system
    return Cost(wall=time.perf_counter(), cpu=cpu)


def _less(one: Cost, other: Cost) -> Cost:
    return Cost(wall=round(one.wall - other.wall, 3), cpu=round(one.cpu - other.cpu, 3))


def _more(rounds: dict[str, list[Round]], cost: Callable[[Round], Cost], count: int) -> Cost:
    """Milliseconds that the cluster takes more, by a count."""
    pairs = zip(rounds["process"], rounds["cluster"], strict=True)
    more = [_less(cost(two), cost(one)) for one, two in pairs]
    return Cost(
        wall=round(1000 * statistics.median(cost.wall for cost in more) / count, 1),
        cpu=round(1000 * statistics.median(cost.cpu for cost in more) / count, 1),
    )


def _contents(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a result but the passport, which has times in it."""
    return {
        path.relative_to(out).as_posix(): sha256_of(path)
        for path in (out / "slide").rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def _load() -> tuple[float, float, float]:
    """The machine's load over 1, 5 and 15 minutes."""
    one, five, fifteen = (float(word) for word in Path("/proc/loadavg").read_text().split()[:3])
    return one, five, fifteen


@one_line_errors()
def main() -> None:
    """Run the command line."""
    command = tyro.cli(ClusterBenchmark, description=__doc__)
    console = Console()
    report = run_benchmark(command, console)
    write_report(command.out, "slides_cluster", report)
    console.print(report.model_dump())


if __name__ == "__main__":
    main()
