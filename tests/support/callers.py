"""Callers who ask a service one after the other while something happens to it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from serve.inference.summary import Summary
from tests.support.pictures import encoded, painted

_TIMEOUT_S = 120.0
_NUM_CALLERS = 3


class Callers:
    """Each asks for an image of one class, and checks every answer."""

    def __init__(self, url: str, log: Path, pool: ThreadPoolExecutor) -> None:
        self._url = url
        self._log = log
        self._stop = threading.Event()
        self.seen: dict[str, int] = {}
        """Answers by the version of the model."""
        labels = range(1, 1 + _NUM_CALLERS)
        self._asking: list[Future[None]] = [pool.submit(self._ask, label) for label in labels]

    def _ask(self, label: int) -> None:
        files = {"image": encoded(painted(np.full((150, 90), label)))}
        while not self._stop.is_set():
            response = httpx.post(f"{self._url}/segment", files=files)
            if "Stub process" in response.text:  # of the stand-in for Triton's backend, which
                continue  # Triton gives up where it stands still for a second
            assert response.status_code == 200, response.text
            summary = Summary.model_validate_json(response.content)
            assert summary.classes[label - 1].pixel_share == 1.0
            version = summary.model.version
            self.seen[version] = self.seen.get(version, 0) + 1

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; what fails meanwhile fails here."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            for one in self._asking:
                if one.done():
                    one.result()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)

    def wait_for_version(self, version: str) -> None:
        """Wait until some more answers are the version's."""
        before = self.seen.get(version, 0)
        self.wait_for(lambda: self.seen.get(version, 0) > before + 5)

    def end(self) -> None:
        """Stop asking; all answers have to be right."""
        self._stop.set()
        for one in self._asking:
            one.result()


@contextmanager
def calling(url: str, log: Path) -> Iterator[Callers]:
    """Have callers ask within the block; afterwards all answers have to have been right."""
    with ThreadPoolExecutor(_NUM_CALLERS) as pool:
        callers = Callers(url, log, pool)
        try:
            yield callers
        finally:
            callers.end()
