"""The queue of images: what it takes, in which order, and what it tells those it refuses."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serve.contract.errors import BusyError
from serve.inference.segmenter import Segmentation, TileSegmenter
from serve.service import work_queue
from serve.service.endpoints import build_app
from serve.service.gateway import build_gateway
from serve.service.work_queue import TileRate, WorkQueue
from serve.settings import ServeSettings
from tests.support.errors import refusal_of
from tests.support.meanwhile import before_call
from tests.support.pictures import blobs, encoded

LIMIT = 128
"""A quarter, 32 tiles, is kept for images of at most 4."""


class _Images:
    """Images whose work ends when the test says so."""

    def __init__(self, queue: WorkQueue) -> None:
        self.queue = queue
        self.begun: list[str] = []
        self.num_ended = 0
        self._may_end: dict[str, threading.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    def send(self, name: str, tiles: int, **options: bool) -> None:
        self._may_end[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            assert self._may_end[name].wait(60)
            return name

        self.tasks[name] = asyncio.create_task(self.queue.run(work, tiles=tiles, **options))

    async def settle(self) -> None:
        """Let all that can begin do so, and all that may not."""
        for _ in range(20):
            await asyncio.sleep(0.001)
        while len(self.begun) < self.num_ended + len(self.queue._at_work):  # a thread may be late
            await asyncio.sleep(0.001)

    async def end(self, name: str) -> None:
        self._may_end[name].set()
        await self.tasks[name]
        self.num_ended += 1
        await self.settle()

    async def end_all(self) -> None:
        for event in self._may_end.values():
            event.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def _run(test: Callable[[_Images], Awaitable[None]], concurrency: int = 1) -> None:
    async def main() -> None:
        images = _Images(WorkQueue(concurrency, LIMIT))
        try:
            await test(images)
        finally:
            await images.end_all()

    asyncio.run(main())


def test_images_are_refused_by_their_tiles_and_not_by_their_number() -> None:
    async def test(images: _Images) -> None:
        for index in range(20):
            images.send(f"small {index}", 1)
        images.send("large", 70)
        await images.settle()
        assert images.queue.refusal(30) is not None  # large ones may have 96
        assert images.queue.refusal(26) is None
        assert images.queue.refusal(4) is None
        images.send("refused", 30)
        with pytest.raises(BusyError) as raised:
            await images.tasks["refused"]
        assert all(str(number) in str(raised.value) for number in (90, 30, LIMIT, 32))

    _run(test)


def test_a_quarter_is_kept_for_small_images() -> None:
    async def test(images: _Images) -> None:
        images.send("huge", 1000)  # larger than the limit, but alone
        await images.settle()
        assert images.begun == ["huge"]
        assert images.queue.refusal(5) is not None
        for index in range(8):
            images.send(f"small {index}", 4)
        await images.settle()
        assert images.queue.tiles == 1032
        assert images.queue.refusal(1) is not None

    _run(test)


def test_large_images_take_half_of_the_threads_at_most() -> None:
    async def test(images: _Images) -> None:
        for index in range(3):
            images.send(f"large {index}", 10)
        for index in range(3):
            images.send(f"small {index}", 1)
        await images.settle()
        assert images.begun == ["large 0", "large 1", "small 0", "small 1"]
        await images.end("small 0")
        assert images.begun[-1] == "small 2"
        await images.end("small 1")
        assert images.begun[-1] == "small 2"  # though a thread is free
        await images.end("large 0")
        assert images.begun[-1] == "large 2"

    _run(test, concurrency=4)


def test_images_are_worked_on_in_the_order_in_which_they_came() -> None:
    async def test(images: _Images) -> None:
        for name, tiles in (("a", 1), ("b", 40), ("c", 1)):
            images.send(name, tiles)
        await images.settle()
        await images.end("a")
        await images.end("b")
        assert images.begun == ["a", "b", "c"]

    _run(test)


def test_an_image_that_is_admitted_already_waits_and_is_not_refused() -> None:
    async def test(images: _Images) -> None:
        images.send("large", 120)
        images.send("of a batch", 120, may_refuse=False)
        await images.settle()
        await images.end("large")
        assert images.begun == ["large", "of a batch"]

    _run(test)


def test_a_caller_who_leaves_gives_its_tiles_back_and_is_not_begun() -> None:
    async def test(images: _Images) -> None:
        images.send("first", 1)
        images.send("leaves", 50)
        await images.settle()
        images.send("stays", 1)
        images.tasks["leaves"].cancel()
        await images.settle()
        assert images.queue.tiles == 2
        await images.end("first")
        assert images.begun == ["first", "stays"]

    _run(test)


def test_a_thread_is_busy_until_its_work_ends_also_when_the_caller_has_left() -> None:
    async def test(images: _Images) -> None:
        images.send("first", 50)
        await images.settle()
        images.tasks["first"].cancel()
        images.send("second", 1)
        await images.settle()
        assert images.begun == ["first"]
        assert images.queue.tiles == 51

    _run(test)


def test_who_is_refused_is_told_when_the_tiles_before_will_be_done() -> None:
    clock = iter([0.0, 10.0, 20.0])
    rate = TileRate(lambda: next(clock))
    queue = WorkQueue(1, LIMIT, rate=rate)
    assert (rate.per_second, queue.seconds_for(100)) == (None, 1)
    rate.begin()
    rate.done(20)
    assert rate.per_second == 2
    assert queue.seconds_for(51) == 26
    rate.done(40)  # twice as fast: the last image counts most
    assert rate.per_second is not None
    assert 3 < rate.per_second < 4
    assert queue.seconds_for(10**6) == 600


def test_a_refusal_waits_for_as_many_tiles_as_are_too_many() -> None:
    async def test(images: _Images) -> None:
        images.queue.rate = rate = TileRate(iter([0.0, 1.0, 1.0]).__next__)
        rate.begin()
        rate.done(2)  # two tiles per second
        images.send("large", 90)
        await images.settle()
        refusal = images.queue.refusal(26)
        assert refusal is not None
        assert refusal.retry_after_s == 10  # 20 tiles over the 96 of large images

    _run(test)


class _Service:
    """The service's application without a server; the model works when the test says so."""

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, **settings: int) -> None:
        self.may_work = threading.Event()
        segment = TileSegmenter.segment
        app = build_app(chosen := ServeSettings(bundle=bundle, threads=1, **settings))
        assert app.state.model.is_ready()

        def slow(segmenter: TileSegmenter, image: np.ndarray, **options: Any) -> Segmentation:
            assert self.may_work.wait(60)
            return segment(segmenter, image, **options)

        monkeypatch.setattr(TileSegmenter, "segment", slow)
        queue = app.state.worker.queue
        self.queue: WorkQueue = queue
        gateway = build_gateway(app, chosen)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(gateway), base_url="http://service"
        )

    def post(self, side: int, path: str = "/segment") -> asyncio.Task[httpx.Response]:
        files = {"image": encoded(blobs(side, side))}
        return asyncio.create_task(self.client.post(path, files=files))

    async def until_tiles(self, tiles: int) -> None:
        while self.queue.tiles != tiles:
            await asyncio.sleep(0.001)


def test_the_service_weighs_images_by_their_head_and_refuses_what_is_too_much(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        service = _Service(toy_bundle, monkeypatch, max_waiting_tiles=16, concurrency=1)
        first = service.post(128)
        await service.until_tiles(9)
        refused = await service.post(100)  # 4 more than the 12 of images of several tiles
        assert (refused.status_code, refused.json()["code"]) == (429, "busy")
        assert int(refused.headers["Retry-After"]) >= 1
        small = service.post(64)
        await service.until_tiles(10)
        metrics = (await service.client.get("/metrics")).text
        assert "focalpath_tiles_in_progress 10.0" in metrics
        assert (await service.client.get("/model")).status_code == 200  # while all threads work
        service.may_work.set()
        assert [(await answer).status_code for answer in (first, small)] == [200, 200]
        assert "focalpath_tiles_per_second" in (await service.client.get("/metrics")).text
        await service.until_tiles(0)

    asyncio.run(main())


def test_what_the_options_make_impossible_is_refused_before_the_image_waits(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        service = _Service(toy_bundle, monkeypatch)  # the model never works
        refused = await service.post(64, "/geojson?classes=Tumour")
        assert refusal_of(refused, "Tumour", "Tumor") == (400, "option_invalid")

    asyncio.run(main())


def test_work_that_ends_just_as_its_loop_is_closed_fails_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.new_event_loop()
    before_call(monkeypatch, loop, "call_soon_threadsafe", loop.close)
    called: list[None] = []
    work_queue._call_in(loop, lambda: called.append(None))
    assert not called
