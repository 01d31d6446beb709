import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.errors import raises
from tests.support.pictures import png_chunk
from tests.support.published_data import SIDE, write_bcss, write_crag
from train.data.convert import source_files
from train.data.convert.bcss import BcssSettings, prepare_bcss
from train.data.convert.crag import CragSettings, prepare_crag
from train.data.convert.layout import TileSettings
from train.data.convert.source_files import read_glands, read_numbers, read_region_picture
from train.data.images import read_image
from train.data.masks import read_mask
from train.errors import ImageFileError, MaskError

NUMBERS = np.array([[0, 1], [1, 3]], np.uint8)
TILES = TileSettings(tile_size_px=SIDE, num_folds=2)


def grey_png(values: np.ndarray, bits: int, height: int | None = None) -> bytes:
    """A grey PNG of few bits, which Pillow does not write, or of another height than it says."""
    size = (values.shape[1], height or len(values))
    header = b"".join(side.to_bytes(4, "big") for side in size) + bytes([bits, 0, 0, 0, 0])
    places = (values[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(values), -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(places, axis=1))
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_those_of_the_mask_whatever_its_bits(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(grey_png(NUMBERS, bits))
    assert read_numbers(path, "numbers").tolist() == NUMBERS.tolist()


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_numbers_may_be_large(mode: str, tmp_path: Path) -> None:
    kind = {"I;16": np.uint16, "I": np.int32}[mode]
    Image.fromarray(NUMBERS.astype(kind) * 300).save(tmp_path / "mask.tif")
    assert read_numbers(tmp_path / "mask.tif", "numbers").max() == 900


def test_a_palette_of_greys_is_read_by_its_greys(tmp_path: Path) -> None:
    indices = np.array([[2, 0], [0, 1]], np.uint8)  # programs that make files smaller reorder them
    image = Image.fromarray(indices).convert("P")
    image.putpalette([1, 1, 1, 3, 3, 3, 0, 0, 0])
    image.save(tmp_path / "mask.png")
    assert read_numbers(tmp_path / "mask.png", "numbers").tolist() == NUMBERS.tolist()
    assert read_glands(tmp_path / "mask.png").tolist() == [[1, 2], [2, 2]]


def test_a_mask_without_its_last_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(grey_png(NUMBERS, 8, height=9))
    with raises(MaskError, "mask.png", "last row"):
        read_numbers(tmp_path / "mask.png", "numbers")


def test_bcss_of_few_bits_has_its_classes(tmp_path: Path) -> None:
    write_bcss(tmp_path / "in", ["TCGA-A1-A0SK", "TCGA-A2-A04P"])
    for path in (tmp_path / "in" / "masks").iterdir():
        path.write_bytes(grey_png(np.ones((SIDE, SIDE), np.uint8), 4))
    prepare_bcss(tmp_path / "in", tmp_path / "out", BcssSettings(tiles=TILES))
    assert all((read_mask(p, 5) == 1).all() for p in (tmp_path / "out" / "mask").iterdir())


@pytest.mark.parametrize("orientation", [3, 6])
def test_regions_are_upright(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "region.png"
    image = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    image.getexif()[0x0112] = orientation
    image.save(path, exif=image.getexif())
    picture = read_region_picture(path)
    assert picture.orientation == orientation
    assert np.array_equal(picture.pixels, read_image(path))


def test_a_region_that_is_turned_over_its_mask_is_refused(tmp_path: Path) -> None:
    write_crag(tmp_path / "in")
    path = tmp_path / "in" / "train" / "Images" / "train_2.png"
    with Image.open(path) as image:
        image.getexif()[0x0112] = 3
        image.save(path, exif=image.getexif())
    with raises(ImageFileError, "train_2.png", "orientation 3"):
        prepare_crag(tmp_path / "in", tmp_path / "out", CragSettings(tiles=TILES))
    assert not (tmp_path / "out").exists()


def test_regions_without_their_last_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "region.png").write_bytes(grey_png(NUMBERS, 8, height=9))
    with raises(ImageFileError, "region.png", "last row"):
        read_region_picture(tmp_path / "region.png")


def test_regions_beyond_pillows_bomb_limit_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_region_picture(tmp_path / "large.png").pixels.shape == (64, 64, 3)
        assert read_numbers(tmp_path / "large.png", "numbers").shape == (64, 64)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_regions_beyond_our_own_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (1200, 1000)).save(tmp_path / "large.png")
    monkeypatch.setattr(source_files, "MAX_REGION_MEGAPIXELS", 1)
    with raises(ImageFileError, "1200 x 1000", "1000000"):
        read_region_picture(tmp_path / "large.png")
