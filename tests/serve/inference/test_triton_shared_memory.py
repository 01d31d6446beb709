import errno
import os
from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from serve.contract.manifest import read_bundle
from serve.inference.triton import TritonBackend
from serve.inference.triton_shared_memory import SharedTensors


class FakeTriton:
    """Registers regions, or refuses with the status that is set."""

    status: str | None = None
    in_use: tuple[str, ...] = ()
    """Statuses of the next refusals to unregister a region."""
    num_unregistered = 0

    def register_system_shared_memory(self, *_: object, client_timeout: float) -> None:
        if self.status is not None:
            raise InferenceServerException("no", f"StatusCode.{self.status}")

    def unregister_system_shared_memory(self, _: str, client_timeout: float) -> None:
        if self.in_use:
            status, *rest = self.in_use
            self.in_use = tuple(rest)
            raise InferenceServerException("no", f"StatusCode.{status}")
        self.num_unregistered += 1


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def tensors(triton: FakeTriton, toy_bundle: Path) -> SharedTensors:
    return SharedTensors(triton, read_bundle(toy_bundle))  # type: ignore[arg-type]


def _regions() -> set[Path]:
    """Those of this process: another one's tests may use some at the same time."""
    return set(Path("/dev/shm").glob(f"focalpath-{os.getpid()}-*"))


@pytest.mark.parametrize(
    ("status", "works_later"),
    [("UNAVAILABLE", True), ("DEADLINE_EXCEEDED", True), ("INTERNAL", False)],
)
def test_shared_memory_is_used_again_when_triton_is_back_and_not_where_triton_cannot_see_it(
    status: str, works_later: bool, triton: FakeTriton, tensors: SharedTensors
) -> None:
    before = _regions()
    triton.status = status
    assert tensors.take(1) is None
    assert _regions() == before
    triton.status = None
    place = tensors.take(1)
    assert (place is not None) == works_later
    if place is not None:
        place.close()


@pytest.mark.parametrize(
    ("refusals", "given_back"), [(("INTERNAL", "INTERNAL"), True), (("UNAVAILABLE",), False)]
)
def test_a_region_that_triton_still_uses_is_given_back_a_moment_later(
    refusals: tuple[str, ...], given_back: bool, triton: FakeTriton, tensors: SharedTensors
) -> None:
    before = _regions()
    place = tensors.take(1)
    assert place is not None
    triton.in_use = refusals
    place.close()
    assert triton.num_unregistered == given_back
    assert _regions() == before


@pytest.mark.parametrize(
    ("refusal", "asked"), [("DEADLINE_EXCEEDED", 1), ("UNAVAILABLE", 1), (None, 3)]
)
def test_a_triton_that_does_not_answer_is_asked_once_at_the_end(
    refusal: str | None, asked: int, triton: FakeTriton, tensors: SharedTensors
) -> None:
    before = _regions()
    places = [tensors.take(1) for _ in range(3)]
    for place in places:
        assert place is not None
        tensors.give_back(place)
    triton.in_use = (refusal,) * 3 if refusal else ()
    tensors.close()
    assert triton.num_unregistered + (3 if refusal else 0) - len(triton.in_use) == asked
    assert _regions() == before


def test_a_full_dev_shm_is_noticed_before_anything_is_written_to_it(
    tensors: SharedTensors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = _regions()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert tensors.take(1) is None
    assert "No space left on device" in caplog.text
    assert _regions() == before


@pytest.mark.parametrize(
    ("url", "setting", "expected"),
    [
        ("127.0.0.1:1", "auto", True),
        ("localhost:1", "auto", True),
        ("[::1]:1", "auto", True),
        ("192.0.2.1:1", "auto", False),
        ("triton:1", "auto", False),
        ("triton:1", "on", True),
        ("127.0.0.1:1", "off", False),
    ],
)
def test_shared_memory_is_chosen_where_triton_is_on_this_machine(
    url: str, setting: str, expected: bool, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(TritonBackend, "_check_interface", lambda _: "1")
    monkeypatch.setattr(SharedTensors, "take", lambda _, num_tiles: asked.append(num_tiles))
    monkeypatch.setattr(TritonBackend, "_ask", lambda *_: None)
    backend = TritonBackend(url, read_bundle(toy_bundle), shared_memory=setting)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):  # the answer of `_ask` is none
        backend.infer(np.zeros((1, 64, 64, 3), np.uint8), ["labels"])
    backend.close()
    assert asked == [1] * expected
