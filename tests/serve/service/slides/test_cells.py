import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from serve.contract.errors import NotFoundError
from serve.service.slides.cells import cells_npz, cells_png
from serve.slides.store import create_array
from tests.support.errors import raises


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("result") / "slide.ome.zarr"
    group = zarr.open_group(store, mode="w", zarr_format=3)
    for name in ("labels/classes/0", "0"):
        create_array(group, name, (64, 64), 64)[:] = np.eye(64, dtype=np.uint8)
    return store


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / written.name))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(bytes(20))])
@pytest.mark.parametrize("file", ["labels/classes/0/c/0/0", "labels/classes/0/zarr.json"])
def test_a_damaged_tile_is_an_error_that_says_what_to_do(
    file: str, damage: Callable[[Path], None], store: Path
) -> None:
    damage(store / file)
    for read in (cells_npz, lambda *place: cells_png(*place, colors=["#ff0000"], shown=[1])):
        with raises(NotFoundError, store.name, code="result_damaged"):
            read(store, 0, 0, 0)


@pytest.mark.parametrize("place", [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -1, 0)])
def test_a_tile_that_is_not_there_is_no_damage(place: tuple[int, int, int], store: Path) -> None:
    with raises(NotFoundError, code="not_found"):
        cells_npz(store, *place)
    found = np.load(io.BytesIO(cells_npz(store, 0, 0, 0)))
    assert np.array_equal(found["labels"], np.eye(64))
