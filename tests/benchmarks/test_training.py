import json
from pathlib import Path

import pytest
import torch

from benchmarks.training import EPOCHS, STEPS, memory_of_variant, run_benchmark
from benchmarks.training_variants import BenchmarkSettings, TrainingBenchmark
from train.model.segmenter import Segmenter, SegmenterOutput

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tmp_path: Path) -> BenchmarkSettings:
    return BenchmarkSettings(
        tile_size_px=64,
        image_encoder="tiny",
        repeats=1,
        peak_memory=False,
        out=tmp_path / "results" / "train.json",
    )


def test_every_variant_takes_the_same_step(settings: BenchmarkSettings, tmp_path: Path):
    losses = [getattr(TrainingBenchmark(settings, tmp_path), name)() for name in STEPS]
    assert losses == pytest.approx([losses[0]] * 4, rel=2e-3)


def test_a_direct_step_learns(settings: BenchmarkSettings, tmp_path: Path):
    benchmark = TrainingBenchmark(settings, tmp_path / "cache")
    before = benchmark.segmenter.mask_decoder.iou_token.weight.clone()
    benchmark.direct()
    assert not before.equal(benchmark.segmenter.mask_decoder.iou_token.weight)


def test_an_epoch_trains_on_every_tile_and_counts_validation_pixels(
    settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learned: list[int] = []
    learn = TrainingBenchmark._learn_from

    def spy(self: TrainingBenchmark, output: SegmenterOutput, labels: torch.Tensor) -> float:
        learned.append(len(labels))
        return learn(self, output, labels)

    monkeypatch.setattr(TrainingBenchmark, "_learn_from", spy)
    benchmark = TrainingBenchmark(settings, tmp_path)
    for name in EPOCHS:
        pixels = getattr(benchmark, name)()
        assert 0.8 * 2 * 64 * 64 < pixels <= 2 * 64 * 64
    assert learned == [2, 2] * 2


def test_an_epoch_from_the_cache_does_not_encode(
    settings: BenchmarkSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    benchmark = TrainingBenchmark(settings, tmp_path)
    monkeypatch.delattr(Segmenter, "encode")
    benchmark.epoch_from_cache()
    with pytest.raises(AttributeError):
        benchmark.epoch_from_images()


def test_the_report_names_the_machine_and_every_variant(settings: BenchmarkSettings):
    run_benchmark(settings)
    report = json.loads(settings.out.read_text())
    assert report["machine"]
    assert set(report["steps"]) == set(STEPS.values())
    assert set(report["epochs"]) == set(EPOCHS.values())
    assert report["epoch_steps"] == 2


def test_memory_is_that_of_one_variant_alone(settings: BenchmarkSettings, tmp_path: Path):
    assert 0 < memory_of_variant(settings, str(tmp_path), "from_cache") < 64
