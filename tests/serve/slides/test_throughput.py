from typing import Any

import pytest

from serve.contract.manifest import Manifest
from serve.settings import InferenceSettings
from serve.slides import throughput
from serve.slides.throughput import for_throughput, free_memory

GIB = 2**30


def manifest_of(tile: int, most: int = 8) -> Manifest:
    return Manifest.model_construct(tile_size_px=tile, max_batch_size=most)


def chosen(settings: InferenceSettings) -> tuple[int, int, int]:
    return settings.threads, settings.parallel_batches, settings.max_batch_size


@pytest.mark.parametrize(
    ("tile", "memory_gib", "cores", "expected"),
    [
        (256, 64, 16, (1, 16, 4)),
        (1024, 64, 16, (1, 16, 1)),
        (1024, 12, 16, (4, 4, 1)),
        (1024, 0.1, 16, (16, 1, 1)),
        (1024, 64, 1, (1, 1, 1)),
    ],
)
def test_one_inference_per_core_as_far_as_memory_goes(
    tile: int,
    memory_gib: float,
    cores: int,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throughput, "free_memory", lambda: int(memory_gib * GIB))
    settings = InferenceSettings(provider="cpu")
    assert chosen(for_throughput(settings, manifest_of(tile), cores=cores)) == expected


@pytest.mark.parametrize(
    "own",
    [
        {"threads": 3},
        {"parallel_batches": 2},
        {"max_batch_size": 1},
        {"provider": "cuda"},
        {"backend": "triton"},
    ],
)
def test_what_the_user_chose_is_kept(own: dict[str, Any]) -> None:
    settings = InferenceSettings(**{"provider": "cpu", **own})
    threads = settings.threads or 5
    found = for_throughput(settings, manifest_of(256), cores=5)
    assert found == settings.model_copy(update={"threads": threads})


def test_a_container_has_no_more_memory_than_its_limit(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "_CGROUP", tmp_path)
    assert free_memory() > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert free_memory() > 4000
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 1000\n")
    assert free_memory() == 4000
