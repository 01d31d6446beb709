"""Errors of files that loading processes meet."""

import multiprocessing
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from tests.support.errors import raises
from train.data.dataset import TileDataset
from train.data.folder import read_tile_folder
from train.data.scale import TileScale
from train.errors import ImageFileError, StorageError
from train.fitting.loading import TileLoader


class Limited(Dataset[Any]):
    """Its process cannot share more than a few bytes, as where /dev/shm is full."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return {"name": "a", "image": torch.zeros(3, 64, 64)}


@pytest.mark.parametrize("collate", [default_collate, list])
def test_too_little_shared_memory_is_told_and_not_waited_for(collate: Callable[[Any], Any]):
    loader = TileLoader(Limited(), batch_size=2, num_workers=1, collate_fn=collate, timeout=60)
    with raises(StorageError, "/dev/shm", "--shm-size"):
        next(iter(loader))


def test_a_damaged_image_reaches_the_loop_as_the_one_message_that_it_is(
    toy_data: Path, tmp_path: Path
):
    data = shutil.copytree(toy_data, tmp_path / "data")
    tiles = read_tile_folder(data).tiles["training"]
    dataset = TileDataset(tiles, 5, TileScale(tile_size_px=64, mpp=0.5))
    tiles[1].image.write_bytes(tiles[1].image.read_bytes()[:500])
    loader = TileLoader(dataset, batch_size=len(dataset), num_workers=1)
    before = set(multiprocessing.active_children())
    with raises(ImageFileError, "tile1.png") as found:
        next(iter(loader))
    assert "Traceback" not in str(found.value)
    assert set(multiprocessing.active_children()) <= before
