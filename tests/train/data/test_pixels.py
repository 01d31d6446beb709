"""Data sets as people have them: `fit` and `train check` agree on every case, before training."""

import codecs
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train.data.pixels
from tests.support.errors import raises
from tests.support.pictures import blobs, encoded
from tests.support.toy_data import toy_settings
from train.commands.data import Check
from train.data.folder import Tile, read_tile_folder
from train.data.images import read_image
from train.data.pixels import read_labels, require_trainable
from train.errors import DatasetError, FocalPathError, ImageFileError, MaskError
from train.fitting.run import fit

SIDE = 16
LABELS = np.ones((SIDE, SIDE), np.uint8)
LABELS[SIDE // 2 :] = 2
IMAGE = blobs(SIDE, SIDE)
CLASSES = [{"name": "Tumor", "color": "#d55e00"}, {"name": "Stroma", "color": "#009e73"}]
FOLDS = "img_id,fold\na,1\nb,0\nc,-1\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images, one for each split."""
    root = tmp_path / "data"
    for folder in ("img", "mask"):
        (root / folder).mkdir(parents=True)
    for name in "abc":
        (root / "img" / f"{name}.png").write_bytes(encoded(IMAGE))
        (root / "mask" / f"{name}.png").write_bytes(encoded(LABELS))
    (root / "folds.csv").write_text(FOLDS)
    describe(root)
    return root


def describe(root: Path, **more: object) -> None:
    (root / "dataset.json").write_text(json.dumps({"mpp": 0.5, "classes": CLASSES} | more))


def put(root: Path, name: str, content: bytes) -> None:
    """Write a file of the data set in place of the one of the same stem."""
    path = root / name
    for old in path.parent.glob(f"{path.stem}.*"):
        old.unlink()
    path.write_bytes(content)


def turned(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels, kind, exif=exif.tobytes())


def long(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, pixels])


ACCEPTED: dict[str, Callable[[Path], None]] = {
    "byte-order mark": lambda root: put(root, "folds.csv", codecs.BOM_UTF8 + FOLDS.encode()),
    "semicolons": lambda root: put(root, "folds.csv", FOLDS.replace(",", ";").encode()),
    "UTF-16 with tabs": lambda root: put(
        root, "folds.csv", FOLDS.replace(",", "\t").encode("utf-16")
    ),
    "UTF-16 big-endian": lambda root: put(
        root, "folds.csv", codecs.BOM_UTF16_BE + FOLDS.encode("utf-16-be")
    ),
    "spaces in the header": lambda root: put(
        root, "folds.csv", FOLDS.replace("img_id,fold", "img_id, fold").encode()
    ),
    "upper case": lambda root: put(root, "img/a.JPG", encoded(IMAGE, "JPEG")),
    "TIFF": lambda root: put(root, "img/a.tif", encoded(IMAGE, "TIFF")),
    "TIFF mask": lambda root: put(root, "mask/a.TIF", encoded(LABELS, "TIFF")),
    "alpha": lambda root: put(root, "img/a.png", encoded(np.dstack([IMAGE, IMAGE[..., :1]]))),
    "turned image": lambda root: (
        put(root, "img/a.jpg", turned(long(IMAGE), "JPEG")),
        put(root, "mask/a.png", encoded(np.rot90(long(LABELS), -1))),
    )[0],
    "turned image and mask": lambda root: (
        put(root, "img/a.jpg", turned(long(IMAGE), "JPEG")),
        put(root, "mask/a.png", turned(long(LABELS))),
    )[0],
    "turned image, mask as stored": lambda root: (
        put(root, "img/a.jpg", turned(long(IMAGE), "JPEG")),
        put(root, "mask/a.png", encoded(long(LABELS))),
    )[0],
    "turned square, said to be stored": lambda root: (
        put(root, "img/a.jpg", turned(IMAGE, "JPEG")),
        describe(root, mask_orientation="stored"),
    )[1],
    "16-bit mask": lambda root: put(root, "mask/a.png", encoded(LABELS.astype(np.uint16))),
    "0 and 1 with a table": lambda root: (
        [put(root, f"mask/{name}.png", encoded(LABELS - 1)) for name in "abc"],
        describe(root, mask_values={"0": "Tumor", "1": "Stroma"}),
    )[1],
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_people_have_is_accepted(case: str, data: Path) -> None:
    ACCEPTED[case](data)
    Check(data=data).run()


@pytest.mark.parametrize(
    "looks",
    [lambda data: require_trainable(read_tile_folder(data)), lambda data: Check(data=data).run()],
)
def test_each_mask_is_decoded_once_whatever_is_asked(
    data: Path, monkeypatch: pytest.MonkeyPatch, looks: Callable[[Path], object]
) -> None:
    read: list[str] = []

    def spy(tile: Tile, num_classes: int) -> np.ndarray:
        read.append(tile.tile_id)
        return read_labels(tile, num_classes)

    monkeypatch.setattr(train.data.pixels, "read_labels", spy)
    looks(data)
    assert sorted(read) == ["a", "b", "c"]


def test_names_with_spaces_and_umlauts_are_found(data: Path) -> None:
    for folder in ("img", "mask"):
        (data / folder / "a.png").rename(data / folder / "Gewebe Nr. 1 a\u0308.png")
    put(data, "folds.csv", FOLDS.replace("a,1", "Gewebe Nr. 1 \u00e4,1").encode())
    require_trainable(read_tile_folder(data))


def truncated(root: Path, name: str) -> None:
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])


REFUSED: dict[str, tuple[Callable[[Path], object], type[FocalPathError], str]] = {
    "truncated image": (lambda root: truncated(root, "img/a.png"), ImageFileError, "a.png"),
    "truncated test image": (lambda root: truncated(root, "img/c.png"), ImageFileError, "c.png"),
    "truncated mask": (lambda root: truncated(root, "mask/b.png"), MaskError, "b.png"),
    "16-bit image": (
        lambda root: put(root, "img/a.png", encoded(IMAGE[..., 0].astype(np.uint16) * 256)),
        ImageFileError,
        "16 bits",
    ),
    "another size": (
        lambda root: put(root, "mask/a.png", encoded(long(LABELS))),
        MaskError,
        "16 x 32",
    ),
    "turned square, mask without orientation": (
        lambda root: put(root, "img/a.jpg", turned(IMAGE, "JPEG")),
        MaskError,
        '"mask_orientation"',
    ),
    "unknown label": (
        lambda root: put(root, "mask/c.png", encoded(LABELS + 1)),
        MaskError,
        "label 3",
    ),
    "JPEG mask": (
        lambda root: put(root, "mask/a.jpg", encoded(LABELS, "JPEG")),
        DatasetError,
        "a.jpg is a JPEG",
    ),
    "0 and 1": (
        lambda root: [put(root, f"mask/{name}.png", encoded(LABELS - 1)) for name in "abc"],
        DatasetError,
        '"mask_values": {"0": "Tumor", "1": "Stroma"}',
    ),
    "0 and 255": (
        lambda root: [put(root, f"mask/{n}.png", encoded((LABELS - 1) * 255)) for n in "abc"],
        DatasetError,
        '"mask_values": {"0": "Tumor", "255": "Stroma"}',
    ),
    "nothing to validate on": (
        lambda root: put(root, "mask/b.png", encoded(LABELS * 0)),
        DatasetError,
        "validation",
    ),
    "a table of other classes": (
        lambda root: describe(root, mask_colors={"#ff0000": "Bone"}),
        DatasetError,
        "'Bone'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_and_fit_refuse_the_same_with_the_same_words(
    case: str, data: Path, tmp_path: Path
) -> None:
    damage, kind, found = REFUSED[case]
    damage(data)
    with raises(kind, found) as by_check:
        Check(data=data).run()
    with raises(kind) as by_fit:
        fit(toy_settings(), data, tmp_path / "run")
    assert str(by_check.value) == str(by_fit.value)
    assert not (tmp_path / "run").exists()


def test_all_damaged_files_of_a_split_are_told_at_once(data: Path) -> None:
    put(data, "folds.csv", FOLDS.replace("b,0", "b,1").encode())
    for name in "ab":
        truncated(data, f"img/{name}.png")
    with raises(ImageFileError, "2 of 2 training") as raised:
        require_trainable(read_tile_folder(data))
    assert all(f"{name}.png" in str(raised.value) for name in "ab")


def test_an_image_is_read_as_serving_reads_it(data: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "WEBP", lossless=True, exif=Image.Exif().tobytes())
    put(data, "img/a.webp", buffer.getvalue())
    assert np.array_equal(read_image(data / "img" / "a.webp"), IMAGE)


def test_a_file_that_states_another_mpp_is_warned_about(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(data, "img/a.png", encoded(IMAGE, dpi=(101_600, 101_600)))
    Check(data=data).run()
    printed = capsys.readouterr().out
    assert "a.png (0.25, by its PNG density)" in printed
    assert "0.5" in printed


def test_a_strict_check_fails_on_warnings(data: Path) -> None:
    describe(data, mpp=None)
    Check(data=data).run()
    with raises(DatasetError, data, "--strict"):
        Check(data=data, strict=True).run()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
def test_a_mask_drawn_on_the_stored_pixels_is_turned_with_its_image(
    orientation: int, side: int, data: Path
) -> None:
    """The mask is the image's own brightness, so that they can be compared."""
    labels = np.random.default_rng(0).integers(1, 3, (SIDE, side)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(data, "img/a.png", encoded(np.dstack([labels * 100] * 3), exif=exif.tobytes()))
    put(data, "mask/a.png", encoded(labels))
    describe(data, mask_orientation="stored")
    tile = read_tile_folder(data).tiles["training"][0]
    assert np.array_equal(read_labels(tile, 2), read_image(tile.image)[..., 0] // 100)
    if orientation in (5, 6, 7, 8) and side != SIDE:  # the size says it alone
        describe(data)
        tile = read_tile_folder(data).tiles["training"][0]
        assert np.array_equal(read_labels(tile, 2), read_image(tile.image)[..., 0] // 100)
