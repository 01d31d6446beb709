"""Writes whole images and their label maps as a data set in SAM-Path's layout, uncut.

Training cuts them itself (see `train.data.scale`), so nothing is lost to tiles that were cut once.
Folds are by group, the patient or case; `folds.csv` says which.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.progress import track

from serve.images.colors import to_rgb
from train.checked import CheckedSettings, NumFolds, Seed, TestShare
from train.data.convert.layout import TEST_FOLD, assign_folds, draw_test_groups
from train.data.convert.source_files import refuse_other_size, refuse_turned
from train.data.folder import IMAGE_SUFFIXES
from train.data.images import read_picture
from train.data.leaks import straddling
from train.data.writing import whole_dataset, write_description
from train.errors import ImageFileError
from train.settings import LabelClass

VALIDATION_FOLD = 0


@dataclass(frozen=True, kw_only=True)
class FoldSettings(CheckedSettings):
    """How images are sorted into folds."""

    parts: Literal["patient", "official"] = "patient"
    """patient: all images of a patient share a fold, drawn by --seed; official: the parts as they
    were published, even where a patient is in several."""
    num_folds: NumFolds = 5
    """Folds of the images that are not for testing; fold 0 is validation, the others training."""
    test_share: TestShare = 0.2
    """Share of the patients that is for testing, where folds are drawn (our choice)."""
    seed: Seed = 0
    """Seed of the draw."""


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """An image of a published data set."""

    name: str
    path: Path
    group: str
    """Patient or case."""
    part: str
    """The official part: training, validation or test."""
    mpp: float
    read_labels: Callable[[], NDArray[np.uint8]]
    """Reads its labels, (H, W) uint8."""


def write_images(
    out: Path,
    images: Sequence[SourceImage],
    classes: Sequence[LabelClass],
    mpp: float,
    settings: FoldSettings,
    recipe: Mapping[str, Any],
) -> list[str]:
    """Write a data set whole or not at all.

    Args:
        out: Where to; must not hold anything.
        images: What to write.
        classes: Names and colours of labels 1..C.
        mpp: um per pixel of most images.
        settings: How to sort into folds.
        recipe: What settings.json says.

    Returns:
        Warnings about the folds.

    Raises:
        FocalPathError: an image or mask is damaged, of another size or turned by EXIF, or there are
            too few groups.
    """
    folds = folds_of(images, settings)
    with whole_dataset(out) as partial:
        for image in track(images, "Writing images"):
            _write_pair(partial, image)
        write_description(
            partial,
            ("img_id", "fold", "group", "mpp"),
            [(i.name, folds[i.name], i.group, f"{i.mpp:.6g}") for i in images],
            mpp=mpp,
            classes=classes,
            recipe=recipe,
        )
    if settings.parts != "official":
        return []
    mixed = straddling("official parts", sorted((image.group, image.part) for image in images))
    return [f"{warning}. --parts patient draws folds by patient" for warning in mixed]


def folds_of(images: Sequence[SourceImage], settings: FoldSettings) -> dict[str, int]:
    """The fold of each image by its name: `TEST_FOLD`, `VALIDATION_FOLD`, or one for training.

    Raises:
        SourceError: there are too few groups.
    """
    official = settings.parts == "official"
    fixed = {"test": TEST_FOLD, "validation": VALIDATION_FOLD}
    parts = {image.part for image in images}
    if official and "validation" in parts:
        return {image.name: fixed.get(image.part, 1) for image in images}
    open_images = [image for image in images if not (official and image.part == "test")]
    test_groups: set[str] = set()
    if not official:
        groups = {image.group for image in open_images}
        test_groups = draw_test_groups(groups, settings.test_share, settings.seed)
    sizes = Counter(image.group for image in open_images if image.group not in test_groups)
    drawn = assign_folds(sizes, settings.num_folds, settings.seed)
    return {
        image.name: TEST_FOLD
        if image.group in test_groups or (official and image.part == "test")
        else drawn[image.group]
        for image in images
    }


def _write_pair(folder: Path, image: SourceImage) -> None:
    """Write an image as it is where training reads its format, else (BMP) as PNG."""
    labels = image.read_labels()
    suffix = image.path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        picture = read_picture(image.path)
        refuse_turned(image.path, picture)
        refuse_other_size(image.path, picture.pixels, labels)
        shutil.copyfile(image.path, folder / "img" / f"{image.name}{suffix}")
    else:
        pixels = _read_bmp(image.path)
        refuse_other_size(image.path, pixels, labels)
        Image.fromarray(pixels).save(folder / "img" / f"{image.name}.png", compress_level=3)
    Image.fromarray(labels).save(folder / "mask" / f"{image.name}.png")


def _read_bmp(path: Path) -> NDArray[np.uint8]:
    """Read a BMP, which serving does not: (H, W, 3) uint8 RGB.

    Raises:
        ImageFileError: it cannot be read.
    """
    try:
        with Image.open(path, formats=("BMP",)) as image:
            image.load()
            return np.asarray(to_rgb(image)[0])
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageFileError(
            f"{path} cannot be read as a BMP ({error}). Copy or download it again, or remove it."
        ) from error
