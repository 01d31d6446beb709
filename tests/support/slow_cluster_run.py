"""`python -m serve` whose cluster's workers can be held up, and die of every slide called poison.

Beside the folder of results, a file `hold` with a number has each machine stop in the middle of a
block, once it has finished one and there are so many, until the file changes.
"""

import os
import runpy
import signal
import time
from functools import partial
from pathlib import Path

from serve.slides.cluster import engine
from serve.slides.cluster.worker import ClusterWorker, Report, host_name
from serve.slides.plan import Block
from serve.slides.store import WorkFolder

HOLD_FILE = "hold"


class SlowWorker(ClusterWorker):
    def run(self, path: Path, blocks: tuple[Block, ...], ticket: int) -> Report | None:
        if path.name == "poison" and self._opened is not None:
            with (path / "tries").open("a") as file:
                file.write("tried\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(path, blocks, ticket)

    def _count(self, num_tiles: int) -> None:
        while self._is_held():
            time.sleep(0.05)
        super()._count(num_tiles)

    def _is_held(self) -> bool:
        assert self._path is not None
        hold = self._path.parents[2] / HOLD_FILE
        if not hold.is_file():
            return False
        records = WorkFolder(self._path).records().values()
        is_mine = host_name() in {record.host for record in records}
        return is_mine and len(records) >= int(hold.read_text())


if __name__ == "__main__":
    # By its name, so that other processes find it.
    from tests.support import slow_cluster_run

    engine.open_cluster_engine = partial(  # type: ignore[assignment]
        engine.open_cluster_engine, worker=slow_cluster_run.SlowWorker
    )
    runpy.run_module("serve", run_name="__main__", alter_sys=True)
