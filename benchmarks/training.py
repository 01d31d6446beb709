"""Measures a training step and an epoch beside a direct SAM-Path loop, in one run.

Every step takes the same batch, model size (SAM ViT-B, ViT-S/16, 1024 x 1024, random weights), loss
and optimizer. The direct loop follows the published description of SAM-Path (arXiv 2307.09570):
encoders in float32 and eager mode, then one image after another through SAM's own decoder.

An epoch is a complete one, over a few tiles: it reads images or features and labels from the disk,
trains on them, predicts the validation tiles and counts their pixels.
"""

import statistics
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from benchmarks.direct_sam_path import DirectDecoder
from benchmarks.harness import (
    median_speedup,
    one_line_errors,
    seconds_of,
    take_turns,
    write_report,
)
from serve.contract.machine import peak_memory_mib, this_processor
from train.checked import CheckedSettings, Count
from train.data.dataset import TileDataset
from train.data.folder import Split, read_tile_folder
from train.data.scale import TileScale
from train.data.synthetic.dataset import SyntheticSettings, write_dataset
from train.data.synthetic.tissue import CLASSES
from train.fitting.embedding_cache import CachedTileDataset, EmbeddingCache
from train.fitting.losses import SegmentationLoss
from train.metrics import PooledConfusion
from train.model.segmenter import (
    Segmenter,
    SegmenterOutput,
    encode_for_training,
    labels_from_logits,
)
from train.presets import bcss
from train.settings import ModelSettings, RuntimeSettings, Settings

Tiles = TileDataset | CachedTileDataset

STEPS = {
    "direct": "direct SAM-Path loop, encoders included",
    "from_images": "ours from images (bfloat16 encoders)",
    "decoder_one_by_one": "SAM's decoder image by image, on given features",
    "from_cache": "ours on features read from the embedding cache",
}
"""Methods of `TrainingBenchmark` that take a step, and their titles."""
EPOCHS = {
    "epoch_from_images": "ours from images (bfloat16 encoders)",
    "epoch_from_cache": "ours from the embedding cache",
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(CheckedSettings):
    """Options of the benchmark."""

    batch_size: Count = 2
    """Tiles per step."""
    repeats: Count = 5
    """Steps and epochs per variant; the variants take turns, and the median counts."""
    epoch_steps: Count = 2
    """Training steps per epoch; half as many tiles are validation tiles."""
    tile_size_px: int = 1024
    """Side of the tiles."""
    image_encoder: Literal["tiny", "vit_b", "vit_l", "vit_h"] = "vit_b"
    """SAM's encoder; smaller ones are for tests."""
    peak_memory: bool = True
    """Also measure each variant's peak memory, in another process."""
    out: Path = Path("artifacts/results/train/benchmark.json")
    """File to write to."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one variant's steps or epochs."""

    name: str
    seconds: tuple[float, ...]
    median_s: float
    peak_memory_gib: float | None = None
    """Of a process that runs the variant once: GPU memory, or else resident memory."""


class TrainingBenchmark:
    """One model, its tiles, and the variants of a step and an epoch on them."""

    def __init__(self, settings: BenchmarkSettings, folder: Path) -> None:
        """Build the model, its tiles and the embedding cache, in `folder`."""
        torch.manual_seed(0)
        self.training = _training_settings(settings, folder / "cache")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.segmenter = Segmenter(self.training.model, len(CLASSES)).train()
        self.segmenter.to(self.device)
        self.loss = SegmentationLoss(self.training.loss)
        trained = [p for p in self.segmenter.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=1e-4)
        self.direct_decoder = DirectDecoder(self.segmenter)
        self.tiles = _tiles(settings, self.training, folder / "data")
        cache = EmbeddingCache(self.training, self.segmenter)
        for tiles in self.tiles:
            cache.fill(tiles, range(1), settings.batch_size)
        self.cached = [CachedTileDataset(tiles, cache) for tiles in self.tiles]
        self.batch_size = settings.batch_size

    def direct(self) -> float:
        """Encoders in float32, then one image after another through SAM's own decoder."""
        batch = self._batch(self.tiles[0])
        with torch.no_grad():
            features = self.segmenter.encode(batch["image"].float())
        return self._learn(self.direct_decoder(features), batch["labels"])

    def from_images(self) -> float:
        """Our step without a cache: encoders in bfloat16 autocast, the batch decoded at once."""
        return self._step(self._batch(self.tiles[0]))

    def from_cache(self) -> float:
        """Our step on features read from the embedding cache."""
        return self._step(self._batch(self.cached[0]))

    def decoder_one_by_one(self) -> float:
        """SAM's own decoder, one image after another, on cached features."""
        batch = self._batch(self.cached[0])
        return self._learn(self.direct_decoder(batch["features"].float()), batch["labels"])

    def epoch_from_images(self) -> int:
        """An epoch without a cache."""
        return self._epoch(*self.tiles)

    def epoch_from_cache(self) -> int:
        """An epoch with all tiles in the cache, as every epoch after the first."""
        return self._epoch(*self.cached)

    def _epoch(self, training: Tiles, validation: Tiles) -> int:
        """Train on every tile, predict the validation tiles, and return their number of pixels."""
        confusion = PooledConfusion(len(CLASSES)).to(self.device)
        for batch in self._batches(training):
            self._step(batch)
        with torch.no_grad():
            for batch in self._batches(validation):
                output = self.segmenter.decode(self._features(batch))
                labels = batch["labels"]
                predicted = labels_from_logits(output.low_res_logits, labels.shape[-1])
                confusion.update(predicted, labels)
        return int(confusion.compute().sum())

    def _batches(self, tiles: Tiles) -> Any:
        for batch in DataLoader(tiles, batch_size=self.batch_size):
            yield {
                name: value.to(self.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }

    def _batch(self, tiles: Tiles) -> dict[str, Any]:
        batch: dict[str, Any] = next(self._batches(tiles))
        return batch

    def _features(self, batch: Mapping[str, Any]) -> Tensor:
        if "features" in batch:
            cached: Tensor = batch["features"].float()
            return cached
        return encode_for_training(self.segmenter, batch["image"], mixed_precision=True)

    def _step(self, batch: Mapping[str, Any]) -> float:
        return self._learn(self.segmenter.decode(self._features(batch)), batch["labels"])

    def _learn(self, output: SegmenterOutput, labels: Tensor) -> float:
        loss: Tensor = self.loss(output, labels)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def run_benchmark(settings: BenchmarkSettings) -> dict[str, list[Timing]]:
    """Measure all variants in turns, print tables and write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        benchmark = TrainingBenchmark(settings, Path(folder))
        timings = {
            "steps": _measure(benchmark, STEPS, settings.repeats),
            "epochs": _measure(benchmark, EPOCHS, settings.repeats),
        }
        del benchmark
        if settings.peak_memory:
            timings = {
                kind: _with_memory(found, settings, folder) for kind, found in timings.items()
            }
    _print(timings, settings)
    _write(timings, settings)
    return timings


def _measure(
    benchmark: TrainingBenchmark, variants: Mapping[str, str], repeats: int
) -> list[Timing]:
    console = Console(stderr=True)
    seconds = take_turns(
        {name: partial(seconds_of, getattr(benchmark, name)) for name in variants},
        repeats,
        tell=console.print,
    )
    return [
        Timing(name=name, seconds=tuple(values), median_s=statistics.median(values))
        for name, values in seconds.items()
    ]


def _with_memory(timings: list[Timing], settings: BenchmarkSettings, folder: str) -> list[Timing]:
    """Add the peak memory of each variant, each measured in a new process."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool:
        peaks = pool.map(partial(peak_memory_gib, settings, folder), [t.name for t in timings])
        return [replace(t, peak_memory_gib=p) for t, p in zip(timings, peaks, strict=True)]


def peak_memory_gib(settings: BenchmarkSettings, folder: str, variant: str) -> float:
    """Peak memory of this process while it builds the model and runs a variant once."""
    with redirect_stdout(StringIO()):
        getattr(TrainingBenchmark(settings, Path(folder)), variant)()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory_mib() / 1024


def _training_settings(settings: BenchmarkSettings, cache: Path) -> Settings:
    preset = bcss()
    pathology = (
        "vit_small_patch16_224" if settings.image_encoder != "tiny" else "vit_tiny_patch16_224"
    )
    model = ModelSettings(
        tile_size_px=settings.tile_size_px,
        image_encoder=settings.image_encoder,
        pathology_encoder=pathology,
    )
    return replace(
        preset,
        model=model,
        optimization=replace(preset.optimization, precision="bf16-mixed"),
        augmentation=replace(preset.augmentation, augment="none"),
        runtime=RuntimeSettings(embedding_cache=str(cache)),
    )


def _tiles(
    settings: BenchmarkSettings, training: Settings, folder: Path
) -> tuple[TileDataset, TileDataset]:
    """Write training and validation tiles of synthetic tissue to the disk."""
    num_train = settings.epoch_steps * settings.batch_size
    recipe = SyntheticSettings(
        num_train=num_train,
        num_validation=max(1, num_train // 2),
        num_test=0,
        tile_size_px=settings.tile_size_px,
    )
    write_dataset(folder, recipe)
    found = read_tile_folder(folder)
    scale = TileScale(tile_size_px=training.model.tile_size_px, mpp=found.mpp)
    splits: tuple[Split, ...] = ("training", "validation")
    first, second = (TileDataset(found.tiles[s], len(CLASSES), scale) for s in splits)
    return first, second


def _print(timings: Mapping[str, list[Timing]], settings: BenchmarkSettings) -> None:
    titles = {
        "steps": (f"A step of {settings.batch_size} tiles of {settings.tile_size_px} px", STEPS),
        "epochs": (f"An epoch of {settings.epoch_steps} steps, validation included", EPOCHS),
    }
    for kind, found in timings.items():
        title, names = titles[kind]
        table = Table("", title=title)
        for column in ("median s", "times faster", "peak GiB"):
            table.add_column(column, justify="right")
        for timing in found:
            peak = "" if timing.peak_memory_gib is None else f"{timing.peak_memory_gib:.1f}"
            ratio = f"{median_speedup(found[0].seconds, timing.seconds):.1f}"
            table.add_row(names[timing.name], f"{timing.median_s:.2f}", ratio, peak)
        Console().print(table)
    Console().print(machine())


def _write(timings: Mapping[str, list[Timing]], settings: BenchmarkSettings) -> None:
    report = {
        "machine": machine(),
        "torch": torch.__version__,
        **{name: value for name, value in asdict(settings).items() if name != "out"},
        **{
            kind: {
                names[timing.name]: {k: v for k, v in asdict(timing).items() if k != "name"}
                for timing in timings[kind]
            }
            for kind, names in (("steps", STEPS), ("epochs", EPOCHS))
        },
    }
    write_report(settings.out.parent, settings.out.stem, report)


def machine() -> str:
    """The GPU's name, or the processor's and the threads that torch uses."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{this_processor().name}, {torch.get_num_threads()} threads"


@one_line_errors()
def main() -> None:
    """Run the benchmark and print its tables."""
    config = (tyro.conf.OmitArgPrefixes,)
    run_benchmark(tyro.cli(BenchmarkSettings, prog="python -m benchmarks.training", config=config))


if __name__ == "__main__":
    main()
