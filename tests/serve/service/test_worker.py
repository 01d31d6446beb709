import asyncio
import threading

import pytest

from serve.service.telemetry import Telemetry
from serve.service.worker import Worker
from serve.settings import ServeSettings


def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    may_end = threading.Event()
    begun: list[str] = []

    def work(name: str) -> None:
        begun.append(name)
        assert may_end.wait(10)

    async def main() -> None:
        worker = Worker(ServeSettings(concurrency=1), Telemetry())
        first = asyncio.create_task(worker.run(lambda: work("first")))
        second = asyncio.create_task(worker.run(lambda: work("second")))
        while not begun:
            await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        may_end.set()
        await first
        await worker.run(lambda: work("third"))

    asyncio.run(main())
    assert begun == ["first", "third"]
