"""`python -m serve` whose cluster's workers are slow, and die of every slide called poison."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from serve.cli import main
from serve.slides.cluster import engine
from serve.slides.cluster.worker import ClusterWorker, Report
from serve.slides.plan import Block

_TILE_S = 0.01
"""Time enough to kill a worker in the middle of a block, whatever else the machine does."""


class SlowWorker(ClusterWorker):
    def run(self, path: Path, blocks: tuple[Block, ...], ticket: int) -> Report | None:
        if path.name == "poison" and self._opened is not None:
            with (path / "tries").open("a") as file:
                file.write("tried\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(path, blocks, ticket)

    def _count(self, num_tiles: int) -> None:
        time.sleep(_TILE_S)
        super()._count(num_tiles)


if __name__ == "__main__":
    # By its name, so that other processes find it.
    from tests.support import slow_cluster_run

    engine.open_cluster_engine = partial(  # type: ignore[assignment]
        engine.open_cluster_engine, worker=slow_cluster_run.SlowWorker
    )
    sys.exit(main(sys.argv[1:]))
