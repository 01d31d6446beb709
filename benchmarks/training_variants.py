"""The variants of a training step and an epoch that `benchmarks.training` measures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.direct_sam_path import DirectDecoder
from benchmarks.training_model import Encoder, Learner, training_settings
from train.checked import CheckedSettings, Count
from train.data.dataset import TileDataset
from train.data.folder import Split, read_tile_folder
from train.data.scale import TileScale
from train.data.synthetic.dataset import SyntheticSettings, write_dataset
from train.data.synthetic.tissue import CLASSES
from train.fitting.embedding_cache import EmbeddingCache
from train.metrics import PooledConfusion
from train.model.segmenter import SegmenterOutput, encode_for_training, labels_from_logits
from train.settings import RuntimeSettings, Settings


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
    image_encoder: Encoder = "vit_b"
    """SAM's encoder; smaller ones are for tests."""
    peak_memory: bool = True
    """Also measure each variant's peak memory, in another process."""
    out: Path = Path("artifacts/results/train/benchmark.json")
    """File to write to."""


class TrainingBenchmark(Learner):
    """One model, its tiles, and the variants of a step and an epoch on them."""

    def __init__(self, settings: BenchmarkSettings, folder: Path) -> None:
        """Build the model, its tiles and the embedding cache, in `folder`."""
        self.training = _training_settings(settings, folder / "cache")
        super().__init__(self.training)
        self.direct_decoder = DirectDecoder(self.segmenter)
        self.tiles = _tiles(settings, self.training, folder / "data")
        cache = EmbeddingCache(self.training, self.segmenter)
        for tiles in self.tiles:
            cache.fill(tiles, range(1), settings.batch_size)
        self.cached = [cache.in_place_of_pixels(tiles) for tiles in self.tiles]
        self.batch_size = settings.batch_size

    def direct(self) -> float:
        """Encoders in float32, then one image after another through SAM's own decoder."""
        batch = self._batch(self.tiles[0])
        with torch.no_grad():
            features = self.segmenter.encode(batch["image"].float())
        return self._learn_from(self.direct_decoder(features), batch["labels"])

    def from_images(self) -> float:
        """Our step without a cache: encoders in bfloat16 autocast, the batch decoded at once."""
        return self._step(self._batch(self.tiles[0]))

    def from_cache(self) -> float:
        """Our step on features read from the embedding cache."""
        return self._step(self._batch(self.cached[0]))

    def decoder_one_by_one(self) -> float:
        """SAM's own decoder, one image after another, on cached features."""
        batch = self._batch(self.cached[0])
        return self._learn_from(self.direct_decoder(batch["features"].float()), batch["labels"])

    def epoch_from_images(self) -> int:
        """An epoch without a cache."""
        return self._epoch(*self.tiles)

    def epoch_from_cache(self) -> int:
        """An epoch with all tiles in the cache, as every epoch after the first."""
        return self._epoch(*self.cached)

    def _epoch(self, training: TileDataset, validation: TileDataset) -> int:
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

    def _batches(self, tiles: TileDataset) -> Any:
        for batch in DataLoader(tiles, batch_size=self.batch_size):
            yield {
                name: value.to(self.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }

    def _batch(self, tiles: TileDataset) -> dict[str, Any]:
        batch: dict[str, Any] = next(self._batches(tiles))
        return batch

    def _features(self, batch: Mapping[str, Any]) -> Tensor:
        if "features" in batch:
            cached: Tensor = batch["features"].float()
            return cached
        return encode_for_training(self.segmenter, batch["image"], mixed_precision=True)

    def _step(self, batch: Mapping[str, Any]) -> float:
        return self._learn_from(self.segmenter.decode(self._features(batch)), batch["labels"])

    def _learn_from(self, output: SegmenterOutput, labels: Tensor) -> float:
        return self.learn(self.loss(output, labels)["loss"])


def _training_settings(settings: BenchmarkSettings, cache: Path) -> Settings:
    training = training_settings(settings.image_encoder, settings.tile_size_px, frozen=True)
    return replace(
        training,
        optimization=replace(training.optimization, precision="bf16-mixed"),
        augmentation=replace(training.augmentation, augment="none"),
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
