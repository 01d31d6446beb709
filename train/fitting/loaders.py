"""The data loaders of a training run: training tiles and whole validation images."""

from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from train.data.augmentation import NUM_VIEWS
from train.data.dataset import TileDataset, WholeImageDataset
from train.data.folder import TileFolder
from train.data.order import BalancedSampler, EpochSampler, balanced_weights
from train.data.pixels import pixel_areas
from train.data.scale import TileScale
from train.fitting.embedding_cache import EmbeddingCache
from train.fitting.loading import TileLoader, whole_image_loader
from train.model.segmenter import Segmenter
from train.settings import Settings


def make_loaders(
    folder: TileFolder,
    settings: Settings,
    segmenter: Segmenter,
    trainer: L.Trainer,
    first_epoch: int,
    counts: NDArray[np.int64],
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Make the loaders of training tiles and of whole validation images, or of their features.

    Each rank counts its share of the validation images; the counts are added up at the end.
    """
    model, is_cached = settings.model, settings.runtime.embedding_cache is not None
    batch_size, num_workers = settings.optimization.batch_size, settings.augmentation.num_workers
    scale = TileScale(tile_size_px=model.tile_size_px, mpp=model.mpp)
    num_classes = len(folder.classes)
    training = TileDataset(
        folder.tiles["training"],
        num_classes,
        scale,
        settings.augmentation,
        seed=settings.optimization.seed,
        fixed=is_cached,
    )
    validation = WholeImageDataset(folder.tiles["validation"], num_classes, scale)
    ranks = {"rank": trainer.global_rank, "num_ranks": trainer.world_size}
    # Workers ask it for tiles before Lightning tells it the epoch that a resumed run is in.
    where = {"seed": settings.optimization.seed, "epoch": first_epoch, **ranks}
    sampler = EpochSampler(len(training), **where)
    if settings.optimization.sampling == "balanced":
        image_of_tile = [image for image, _ in training.items]
        weights = balanced_weights(counts, pixel_areas(folder, "training"), image_of_tile)
        sampler = BalancedSampler(weights, **where)
    if is_cached:
        # Lightning moves the model to the device only later.
        segmenter = segmenter.to(trainer.strategy.root_device)
        training, validation = _from_cache(training, validation, settings, segmenter)
    training_loader = TileLoader(
        training,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # keep the decoded images of the worker processes
    )
    return training_loader, whole_image_loader(validation, batch_size, num_workers, **ranks)


def _from_cache(
    training: TileDataset, validation: WholeImageDataset, settings: Settings, segmenter: Segmenter
) -> tuple[TileDataset, WholeImageDataset]:
    """Encode what is not in the cache yet; returns the same data with features for images."""
    cache = EmbeddingCache(settings, segmenter)
    num_views = NUM_VIEWS if settings.augmentation.augment == "dihedral" else 1
    cache.fill(training, range(num_views), settings.optimization.batch_size)
    cache.fill(validation, range(1), settings.optimization.batch_size)
    return cache.in_place_of_pixels(training), cache.in_place_of_pixels(validation)
