import json
from pathlib import Path

import pytest

from train.benchmark import Benchmark, run_benchmark
from train.settings import BenchmarkSettings


@pytest.fixture
def settings(tmp_path: Path) -> BenchmarkSettings:
    return BenchmarkSettings(
        tile_size_px=64, image_encoder="tiny", repeats=1, out=tmp_path / "results" / "train.json"
    )


def test_every_variant_takes_the_same_step(settings: BenchmarkSettings, tmp_path: Path):
    names = ("direct", "from_images", "decoder_one_by_one", "from_cache")
    losses = [getattr(Benchmark(settings, tmp_path / name), name)() for name in names]
    assert losses == pytest.approx([losses[0]] * 4, rel=2e-3)


def test_a_direct_step_learns(settings: BenchmarkSettings, tmp_path: Path):
    benchmark = Benchmark(settings, tmp_path / "cache")
    before = benchmark.segmenter.mask_decoder.iou_token.weight.clone()
    benchmark.direct()
    assert not before.equal(benchmark.segmenter.mask_decoder.iou_token.weight)


def test_the_report_names_machine_memory_and_every_step(settings: BenchmarkSettings):
    timings = run_benchmark(settings)
    report = json.loads(settings.out.read_text())
    assert report["machine"]
    assert report["peak_memory_gib"] > 0
    assert set(report["steps"]) == {timing.name for timing in timings}
