"""The data loaders of a training run: training tiles and whole validation images."""

from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from train.data.augmentation import NUM_VIEWS
from train.data.dataset import TileDataset, WholeImageDataset
from train.data.folder import TileFolder
from train.data.order import EpochSampler
from train.data.pixels import pixel_areas
from train.data.scale import TileScale
from train.fitting.embedding_cache import CachedTileDataset, CachedWholeImages, EmbeddingCache
from train.fitting.evaluation import whole_image_loader
from train.fitting.loading import ErrorsAsItems, TileLoader
from train.fitting.sampling import BalancedSampler, balanced_weights
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
    """Make the loaders of training tiles and of whole validation images, or of their features."""
    model, cached = settings.model, settings.runtime.embedding_cache is not None
    scale = TileScale(tile_size_px=model.tile_size_px, mpp=model.mpp)
    num_classes = len(folder.classes)
    training = TileDataset(
        folder.tiles["training"],
        num_classes,
        scale,
        settings.augmentation,
        seed=settings.optimization.seed,
        fixed=cached,
    )
    weights = None
    if settings.optimization.sampling == "balanced":
        areas = pixel_areas(folder, "training")
        weights = balanced_weights(counts, areas, [image for image, _ in training.items])
    validation = WholeImageDataset(folder.tiles["validation"], num_classes, scale)
    if not cached:
        return (
            _training_loader(training, settings, trainer, first_epoch, weights),
            _validation_loader(validation, settings, trainer),
        )
    # Lightning moves the model to the device only later.
    cache = EmbeddingCache(settings, segmenter.to(trainer.strategy.root_device))
    num_views = NUM_VIEWS if settings.augmentation.augment == "dihedral" else 1
    batch_size = settings.optimization.batch_size
    cache.fill(training, range(num_views), batch_size)
    cache.fill(validation, range(1), batch_size)
    return (
        _training_loader(
            CachedTileDataset(training, cache), settings, trainer, first_epoch, weights
        ),
        _validation_loader(CachedWholeImages(validation, cache), settings, trainer),
    )


def _training_loader(
    dataset: TileDataset | CachedTileDataset,
    settings: Settings,
    trainer: L.Trainer,
    first_epoch: int,
    weights: NDArray[np.float64] | None,
) -> DataLoader[Any]:
    optimization = settings.optimization
    # Workers ask it for tiles before Lightning tells it the epoch that a resumed run is in.
    where = {
        "rank": trainer.global_rank,
        "num_ranks": trainer.world_size,
        "epoch": first_epoch,
    }
    sampler = (
        EpochSampler(len(dataset), optimization.seed, **where)
        if weights is None
        else BalancedSampler(weights, optimization.seed, **where)
    )
    num_workers = settings.augmentation.num_workers
    return TileLoader(
        ErrorsAsItems(dataset),
        batch_size=optimization.batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= optimization.batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # keep the decoded images of the worker processes
        pin_memory=torch.cuda.is_available(),
    )


def _validation_loader(
    dataset: WholeImageDataset | CachedWholeImages, settings: Settings, trainer: L.Trainer
) -> DataLoader[Any]:
    """Each rank counts its share of the images; the counts are added up at the end."""
    return whole_image_loader(
        dataset,
        settings.optimization.batch_size,
        settings.augmentation.num_workers,
        rank=trainer.global_rank,
        num_ranks=trainer.world_size,
    )
