"""Errors of files that loading processes meet."""

import multiprocessing
import shutil
from pathlib import Path

from tests.support.errors import raises
from train.data.dataset import TileDataset
from train.data.folder import read_tile_folder
from train.data.scale import TileScale
from train.errors import ImageFileError
from train.fitting.loading import TileLoader


def test_a_damaged_image_reaches_the_loop_as_the_one_message_that_it_is(
    toy_data: Path, tmp_path: Path
):
    data = shutil.copytree(toy_data, tmp_path / "data")
    tiles = read_tile_folder(data).tiles["training"]
    dataset = TileDataset(tiles, 5, TileScale(tile_size_px=64, mpp=0.5))
    tiles[1].image.write_bytes(tiles[1].image.read_bytes()[:500])
    loader = TileLoader(dataset, batch_size=len(dataset), num_workers=1)
    with raises(ImageFileError, "tile1.png") as found:
        next(iter(loader))
    assert "Traceback" not in str(found.value)
    assert multiprocessing.active_children() == []
