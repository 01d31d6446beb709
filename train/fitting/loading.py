"""Loads tiles and whole images, so that an error in a file reaches the user as one message."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from train.data.order import pack_images
from train.errors import FocalPathError, StorageError


class TileLoader(DataLoader[Any]):
    """A loader that raises the errors of its data set in the process that asks for a batch.

    An exception that leaves a loading process is wrapped in the text of its traceback, and its own
    message is lost among it. So errors are items until then.
    """

    def __init__(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] = default_collate, **rest: Any
    ) -> None:
        super().__init__(
            _ErrorsAsItems(dataset),
            collate_fn=_Collate(collate_fn),
            pin_memory=torch.cuda.is_available(),
            **rest,
        )

    def __iter__(self) -> Any:
        """Iterate over the batches.

        Raises:
            FocalPathError: a sample could not be loaded.
        """
        return _raising(super().__iter__())


def whole_image_loader(
    dataset: Any, num_tiles: int, num_workers: int, *, rank: int = 0, num_ranks: int = 1
) -> TileLoader:
    """Load lists of whole images with about `num_tiles` tiles together; each rank has its share."""
    return TileLoader(
        dataset,
        batch_sampler=pack_images(dataset.placements, num_tiles, rank=rank, num_ranks=num_ranks),
        collate_fn=list,
        num_workers=num_workers,
    )


class _ErrorsAsItems(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = cast("Dataset[Any]", dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except FocalPathError as error:
            return error


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        for batch in batches:
            if isinstance(batch, FocalPathError):
                raise batch
            yield batch
    finally:
        # The error keeps this frame. With the iterator in it, its processes would end only with the
        # garbage, in an order in which torch waits five seconds for them.
        del batches


class _Collate:
    """Hands on the first error of a batch, else the batch."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        errors = (sample for sample in samples if isinstance(sample, FocalPathError))
        if (error := next(errors, None)) is not None:
            return error
        try:
            batch = self._collate(samples)
            if get_worker_info() is not None:
                # Else a thread of torch's does it, whose error no one hears: the loop would wait
                # for the batch for ever.
                _share(batch)
        except RuntimeError as error:
            if "</torch_" not in str(error):  # how torch names files in shared memory
                raise
            return StorageError(
                "the processes that load images have no room left in shared memory (/dev/shm). "
                "Give it more, such as --shm-size=8g of docker run, or train with fewer of them: "
                "--num-workers."
            )
        return batch


def _share(found: Any) -> None:
    """Move all tensors to the memory that processes share."""
    if isinstance(found, Tensor):
        found.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(found, dict | list | tuple):
        for part in found.values() if isinstance(found, dict) else found:
            _share(part)
