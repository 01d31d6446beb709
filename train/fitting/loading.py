"""Loads samples so that an error in a file reaches the user as one message."""

from collections.abc import Iterator
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, default_collate

from train.errors import FocalPathError


class ErrorsAsItems(Dataset[Any]):
    """A data set whose user errors are items.

    An exception that leaves a loading process is wrapped in the text of its traceback, and its own
    message is lost among it.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = cast("Dataset[Any]", dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        """Load an item, or the error that it ends in."""
        try:
            return self.dataset[key]
        except FocalPathError as error:
            return error


class TileLoader(DataLoader[Any]):
    """A loader of `ErrorsAsItems` that raises the errors in the process that asks for a batch."""

    def __init__(self, dataset: ErrorsAsItems, *, collate_fn: Any = default_collate, **rest: Any):
        super().__init__(dataset, collate_fn=_Collate(collate_fn), **rest)

    def __iter__(self) -> Any:
        """Iterate over the batches.

        Raises:
            FocalPathError: a sample could not be loaded.
        """
        return _raising(super().__iter__())


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
    """Raises the first error of a batch, else hands on the batch."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        errors = (sample for sample in samples if isinstance(sample, FocalPathError))
        return next(errors, None) or self._collate(samples)
