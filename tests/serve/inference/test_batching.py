import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError
from serve.inference.batching import TileBatcher, TilePool
from tests.support.errors import raises

SIDE = 4


class EchoBackend:
    """Answers each tile with its first pixel; can be held up, and remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, tuple[str, ...]]] = []
        self.running, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.is_held = False
        self.error: Exception | None = None
        self.is_closed = False

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        self.batches.append((len(images), tuple(outputs)))
        self.running.release()
        if self.is_held:
            assert self.go_on.acquire(timeout=60)
        if self.error is not None:
            raise self.error
        return {name: images[:, 0, 0, 0].astype(int) for name in outputs}

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def backend() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
def batcher(backend: EchoBackend) -> Iterator[TileBatcher]:
    batcher = TileBatcher(backend, max_batch_size=4)
    yield batcher
    backend.is_held = False
    backend.go_on.release(100)
    batcher.close()


def _tile(value: int) -> NDArray[np.uint8]:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def _hold(backend: EchoBackend, batcher: TileBatcher) -> None:
    """Have a batch of one tile running until `go_on` is released."""
    backend.is_held = True
    batcher.submit(_tile(0), ("labels",))
    assert backend.running.acquire(timeout=60)


def test_tiles_that_wait_while_a_batch_runs_are_the_next_ones_up_to_the_largest(
    backend: EchoBackend, batcher: TileBatcher
) -> None:
    _hold(backend, batcher)
    futures = [batcher.submit(_tile(value), ("labels",)) for value in range(6)]
    backend.go_on.release(3)
    assert [future.result(60)["labels"] for future in futures] == list(range(6))
    assert [size for size, _ in backend.batches] == [1, 4, 2]


def test_after_a_shared_batch_the_next_waits_until_it_is_full(backend: EchoBackend) -> None:
    batcher = TileBatcher(backend, max_batch_size=2, max_delay_s=600)
    _hold(backend, batcher)
    shared = [batcher.submit(_tile(value), ("labels",)) for value in (1, 2)]
    backend.go_on.release(10)
    assert [future.result(60)["labels"] for future in shared] == [1, 2]
    first = batcher.submit(_tile(3), ("labels",))
    second = batcher.submit(_tile(4), ("labels",))
    assert (first.result(60)["labels"], second.result(60)["labels"]) == (3, 4)
    batcher.close()
    assert [size for size, _ in backend.batches] == [1, 2, 2]


def test_a_single_caller_never_waits_for_others(backend: EchoBackend) -> None:
    batcher = TileBatcher(backend, max_batch_size=8, max_delay_s=600)
    for value in range(3):
        future = batcher.submit(_tile(value), ("labels",))
        assert future.result(60)["labels"] == value
    batcher.close()


def test_each_gets_the_outputs_that_it_asked_for(
    backend: EchoBackend, batcher: TileBatcher
) -> None:
    _hold(backend, batcher)
    first = batcher.submit(_tile(1), ("labels", "confidence"))
    second = batcher.submit(_tile(2), ("iou_scores", "labels"))
    backend.go_on.release(2)
    assert set(first.result(60)) == {"labels", "confidence"}
    assert set(second.result(60)) == {"iou_scores", "labels"}
    assert backend.batches[1] == (2, ("labels", "confidence", "iou_scores"))


def test_callers_in_many_threads_get_their_own_answers(batcher: TileBatcher) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda value: batcher.submit(_tile(value), ("labels",)).result(), range(200))
        )
    assert [int(answer["labels"]) for answer in answers] == list(range(200))


def test_an_error_reaches_all_who_wait_for_the_batch_and_nobody_after(
    backend: EchoBackend, batcher: TileBatcher
) -> None:
    backend.error = BackendUnavailableError("lost")
    future = batcher.submit(_tile(1), ("labels",))
    with raises(BackendUnavailableError, "lost"):
        future.result(60)
    backend.error = None
    assert batcher.submit(_tile(2), ("labels",)).result(60)["labels"] == 2


def test_a_tile_that_nobody_waits_for_any_more_is_not_run(
    backend: EchoBackend, batcher: TileBatcher
) -> None:
    _hold(backend, batcher)
    gone = batcher.submit(_tile(1), ("labels",))
    kept = batcher.submit(_tile(2), ("labels",))
    assert gone.cancel()
    backend.go_on.release(2)
    assert kept.result(60)["labels"] == 2
    assert [size for size, _ in backend.batches] == [1, 1]


def test_closing_finishes_what_waits_and_then_closes_the_backend(
    backend: EchoBackend, batcher: TileBatcher
) -> None:
    _hold(backend, batcher)
    futures = [batcher.submit(_tile(value), ("labels",)) for value in (1, 2)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    assert not backend.is_closed
    backend.go_on.release(2)
    closing.join(60)
    assert [future.result(0)["labels"] for future in futures] == [1, 2]
    assert backend.is_closed


def test_what_is_closed_takes_no_tile(batcher: TileBatcher) -> None:
    batcher.close()
    assert not batcher.is_ready()
    with raises(BackendUnavailableError):
        batcher.submit(_tile(1), ("labels",))


def test_the_wait_is_told_in_the_context_of_the_request(backend: EchoBackend) -> None:
    request = ContextVar("request", default="none")
    waits: list[tuple[str, bool]] = []
    batcher = TileBatcher(
        backend,
        max_batch_size=4,
        observe_wait=lambda seconds: waits.append((request.get(), seconds >= 0)),
    )
    request.set("mine")
    batcher.submit(_tile(1), ("labels",)).result(60)
    batcher.close()
    assert waits == [("mine", True)]


def test_whatever_fails_in_a_batch_the_next_one_is_answered(backend: EchoBackend) -> None:
    seconds: list[float] = []

    def observe(waited: float) -> None:
        seconds.append(waited)
        if len(seconds) == 1:
            raise OSError("no space left for metrics")

    batcher = TileBatcher(backend, max_batch_size=4, observe_wait=observe)
    with raises(OSError, "no space left for metrics"):
        batcher.submit(_tile(1), ("labels",)).result(60)
    assert batcher.submit(_tile(2), ("labels",)).result(60)["labels"] == 2
    batcher.close()


def test_a_pool_has_several_tiles_at_the_backend_at_once(backend: EchoBackend) -> None:
    backend.is_held = True
    pool = TilePool(backend, max_tiles=3)
    futures = [pool.submit(_tile(value), ("labels",)) for value in range(5)]
    for _ in range(3):
        assert backend.running.acquire(timeout=60)
    assert len(backend.batches) == 3
    backend.go_on.release(5)
    assert [future.result(60)["labels"] for future in futures] == list(range(5))
    pool.close()
    assert backend.is_closed


def test_an_image_of_one_tile_does_not_wait_for_those_of_larger_images(
    backend: EchoBackend,
) -> None:
    pool = TilePool(backend, max_tiles=1)
    backend.is_held = True
    futures = [pool.submit(_tile(value), ("labels",)) for value in range(3)]
    assert backend.running.acquire(timeout=60)
    backend.is_held = False
    assert pool.ask(_tile(7), ("labels",)) == {"labels": 7}
    assert not any(future.done() for future in futures)
    backend.go_on.release()
    pool.close()


def test_as_many_batches_run_at_the_same_time_as_are_allowed(backend: EchoBackend) -> None:
    batcher = TileBatcher(backend, max_batch_size=1, parallel=2)
    backend.is_held = True
    futures = [batcher.submit(_tile(value), ("labels",)) for value in range(3)]
    for _ in range(2):
        assert backend.running.acquire(timeout=60)
    assert not backend.running.acquire(timeout=0.05)
    backend.go_on.release(3)
    assert [future.result(60)["labels"] for future in futures] == [0, 1, 2]
    batcher.close()
    assert backend.is_closed


def test_what_waits_is_answered_by_all_threads_before_they_end(backend: EchoBackend) -> None:
    batcher = TileBatcher(backend, max_batch_size=2, parallel=3)
    futures = [batcher.submit(_tile(value), ("labels",)) for value in range(50)]
    batcher.close()
    assert [future.result(60)["labels"] for future in futures] == list(range(50))


def test_a_batch_ends_its_wait_where_another_thread_takes_the_tile_that_woke_it(
    backend: EchoBackend,
) -> None:
    batcher = TileBatcher(backend, max_batch_size=4, max_delay_s=0.05)
    _hold(backend, batcher)
    futures = [batcher.submit(_tile(value), ("labels",)) for value in (1, 2)]
    backend.is_held = False
    backend.go_on.release()
    assert [future.result(60)["labels"] for future in futures] == [1, 2]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # no other thread runs while this one computes
    try:
        future = batcher.submit(_tile(3), ("labels",))  # the batch before had two: it waits
        time.sleep(0.01)
        batcher._queue.put(None)
        assert batcher._queue.get_nowait() is None
        end = time.perf_counter() + 0.06
        while time.perf_counter() < end:
            pass
    finally:
        sys.setswitchinterval(interval)
    assert future.result(60)["labels"] == 3
    batcher.close()


def test_a_pool_closes_its_backend_after_an_image_of_one_tile(backend: EchoBackend) -> None:
    pool = TilePool(backend, max_tiles=1)
    backend.is_held = True
    with ThreadPoolExecutor(2) as threads:
        asking = threads.submit(pool.ask, _tile(7), ("labels",))
        assert backend.running.acquire(timeout=60)
        closing = threads.submit(pool.close)
        with pytest.raises(TimeoutError):
            closing.result(0.05)
        assert not backend.is_closed
        backend.go_on.release()
        assert asking.result(60) == {"labels": 7}
    assert backend.is_closed


@pytest.mark.parametrize("ask", ["ask", "submit"])
def test_a_pool_that_is_closed_refuses_tiles(ask: str, backend: EchoBackend) -> None:
    pool = TilePool(backend, max_tiles=1)
    pool.close()
    with raises(BackendUnavailableError, "closed"):
        getattr(pool, ask)(_tile(1), ("labels",))
    assert not backend.batches


def test_a_pool_is_closed_after_an_interrupt_came_in_the_middle_of_asking(
    backend: EchoBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asking(set[int]):
        def discard(self, _: int) -> None:
            raise KeyboardInterrupt

    pool = TilePool(backend, max_tiles=1)
    monkeypatch.setattr(pool, "_asking", Asking())
    with pytest.raises(KeyboardInterrupt):
        pool.ask(_tile(1), ("labels",))
    assert pool._asking
    pool.close()
    assert backend.is_closed
