"""Runs an iterator in a thread, a limited number of items ahead of its consumer."""

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
_POLL_S = 0.1
"""How soon the thread notices that nobody wants more."""


class _End:
    """After the last item; with what the iterator raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def ahead(items: Iterator[T], depth: int, *, name: str) -> Generator[T]:
    """Yield the items of an iterator that runs in a thread of its own.

    What the iterator raises is raised here, after the items before it. Closing this stops it.

    Args:
        items: the iterator.
        depth: most items that wait.
        name: of the thread.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | _End) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                return waiting.put(item, timeout=_POLL_S)

    end = _End()

    def run() -> None:
        try:
            while not stop.is_set():
                item = next(items, end)
                put(item)
                if item is end:
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to who consumes
            put(_End(error))

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join()
