from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.generated_slide import write_slide
from benchmarks.seams import measure_seams
from benchmarks.slides import SlidesBenchmark, run_benchmark
from benchmarks.slides_memory import Memory, measure
from benchmarks.slides_variants import Variants
from serve.contract.manifest import read_bundle
from serve.inference.batching import pool_of
from serve.settings import InferenceSettings
from serve.slides.job import WORK_FOLDER
from serve.slides.store import WorkFolder
from tests.support.toy_bundle import write_toy_bundle


@pytest.mark.slow
def test_the_benchmark_measures_the_toy_model(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", tile_size_px=256)
    command = SlidesBenchmark(
        settings=InferenceSettings(bundle=bundle, threads=1),
        side_px=512,
        drawn_px=128,
        rounds=1,
        memory_px=(0, 0),
        overlaps=(),
    )
    report = run_benchmark(command, Console(quiet=True))
    assert report.engine.num_tiles == report.model_alone.num_tiles > 0
    assert report.direct.num_tiles == 9
    assert report.same_labels > 0.995
    assert set(report.beyond_inference_cpu) == {"planning", "blocks", "outputs", "all_outputs"}
    assert min(report.beyond_inference_cpu.values()) > 0
    assert set(report.beyond_inference_parts) == {"planning", "tiles", "outputs"}
    assert sum(report.beyond_inference_parts.values()) == pytest.approx(report.beyond_inference)


@pytest.mark.slow
def test_inference_alone_runs_the_tiles_of_the_command_and_writes_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", tile_size_px=256)
    slide, folder = tmp_path / "slide.svs", tmp_path / "out"
    bench = Variants(InferenceSettings(bundle=bundle, threads=1), folder)
    write_slide(slide, 1024, 1024, bench.manifest.mpp or 0, drawn_px=128)
    num_tiles = bench.command(slide).num_tiles
    seen = []
    submit = bench.runner.submit
    monkeypatch.setattr(bench.runner, "submit", lambda *tile: seen.append(tile) or submit(*tile))
    assert bench.inference(slide) > 0
    bench.close()
    assert len(seen) == num_tiles > 1
    assert WorkFolder(folder / "out2" / WORK_FOLDER / "slide").records() == {}


def test_the_generated_slide_is_segmented() -> None:
    command = Memory(width=3000, height=2500, classes=3, format=("ome-zarr",))
    found = measure(command)
    assert found["tiles"] == 12
    assert found["peak_gib"] > 0


class Edgy:
    """Answers differently near the edges of a tile, so that tiles without overlap leave seams."""

    def __init__(self, *, sees_edges: bool) -> None:
        self._sees_edges = sees_edges

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        first = images[:, ::4, ::4, 0].astype(np.int64)
        if self._sees_edges:
            first[:, [0, 1]] = first[:, :, [0, 1]] = 255
            first[:, [-2, -1]] = first[:, :, [-2, -1]] = 0
        low = np.zeros((len(images), 5, *first.shape[1:]), np.uint8)
        low[:, 0], low[:, 1] = first, 255 - first
        return {
            "low_res_probabilities": low,
            "iou_scores": np.zeros((len(images), 5), np.float32),
        }


@pytest.mark.parametrize(
    ("sees_edges", "overlap", "low", "high"),
    [
        (False, 0.0, 0.9, 1.1),
        (True, 0.0, 1.2, 9),
        (True, 0.25, 0.9, 1.1),
    ],
)
def test_seams_are_found_where_they_are(
    sees_edges: bool, overlap: float, low: float, high: float, toy_bundle: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 1))
    image = noise.repeat(4, 0).repeat(4, 1).repeat(3, 2).astype(np.uint8)
    manifest = read_bundle(toy_bundle)
    model: Any = Edgy(sees_edges=sees_edges)
    (seams,) = measure_seams([image], pool_of(model, manifest), manifest, [overlap])
    assert low < seams.ratio < high
