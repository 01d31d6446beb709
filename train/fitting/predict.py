"""Writes masks and overlays of any images, straight from a checkpoint.

OUT/masks/NAME.png      labels 1..C, shown in the classes' colours
OUT/overlays/NAME.png   the image with the classes' colours over it
OUT/areas.csv           size, um per pixel and each class's area of every image

The labels are those that the served model gives: same scale, tiles and blend.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, track

from serve.contract.errors import FocalPathError as ServeError
from serve.contract.tables import is_text
from serve.images.decode import read_picture
from serve.images.mpp import (
    ASSUMED,
    FROM_REQUEST,
    UNKNOWN,
    Mpp,
    MppSource,
    check_mpp,
    contradiction,
    sides_of,
)
from train.console import warn
from train.data.dataset import see_image
from train.data.folder import IMAGE_SUFFIXES
from train.data.images import refuse_unequal_sides
from train.data.scale import refuse_enlarging
from train.errors import ImageFileError, ScaleError, SourceError
from train.files import refuse_existing, whole_folder
from train.fitting.evaluation import label_images, scale_of, segment_on_device
from train.model.checkpoint import CheckpointCard, load_checkpoint
from train.settings import LabelClass

_OPACITY = 0.4
"""Of the classes' colours in an overlay (our choice)."""


class _Read(NamedTuple):
    """An image as it was read."""

    pixels: NDArray[np.uint8]
    mpp: Mpp | None
    mpp_source: MppSource
    contradiction: tuple[str, ...]
    """That the um per pixel that was given is another than the file's."""


def predict_images(
    checkpoint: Path, images: Path, out: Path, *, mpp: float | None = None, tta: bool = False
) -> None:
    """Segment an image, or all images of a folder, of any size.

    Args:
        checkpoint: A run's folder or its weights.
        images: An image or a folder of images.
        out: The folder to write, whole or not at all.
        mpp: um per pixel of the images; None takes the files', else the model's as an assumption.
        tta: Average over the flips and quarter turns of each tile.

    Raises:
        SourceError: there is no image, or two of one name.
        ImageFileError: an image is damaged.
        CheckpointError: the checkpoint is missing or damaged.
        DestinationError: `out` holds something.
        ScaleError: `mpp` is absurd, or an image is too coarse for the model.
    """
    paths = _find(images)
    refuse_existing(out)
    segmenter, card = load_checkpoint(checkpoint)
    if mpp is not None:
        try:
            check_mpp(mpp)
        except ServeError as error:
            raise ScaleError(str(error)) from error
    # All are read before hours of work that one of them would end.
    with Progress(transient=True) as progress:  # which ends with an error, too
        checking = progress.track(paths, description="Checking images")
        others = [path.name for path in checking if _read(path, card, mpp).contradiction]
    segment, scale = segment_on_device(segmenter, card), scale_of(card)
    batch_size = card.settings.optimization.batch_size
    assumed = []
    with whole_folder(out) as partial:
        for folder in ("masks", "overlays"):
            (partial / folder).mkdir()
        with (partial / "areas.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            names = [entry.name for entry in card.classes]
            unit = [f"{name}_share" for name in names] + [f"{name}_mm2" for name in names]
            rows.writerow(["image", "height", "width", "mpp", "mpp_source", *unit])
            for path in track(paths, "Segmenting"):
                image = _read(path, card, mpp)
                sample = see_image(path.stem, image.pixels, image.mpp, scale)
                (found,) = label_images(segment, [sample], batch_size, tta=tta)
                labels = found.numpy().astype(np.uint8)  # (H, W), 1..C
                _save(partial, path.stem, image.pixels, labels, card.classes)
                rows.writerow([path.stem, *_numbers(image, labels, len(names))])
                if image.mpp_source == ASSUMED:
                    assumed.append(path.name)
    _warn(card, others, assumed)
    Console().print(f"wrote {escape(str(out))}: {len(paths)} images", soft_wrap=True)


def _warn(card: CheckpointCard, others: Sequence[str], assumed: Sequence[str]) -> None:
    """Warn of images that state another um per pixel than is given, or none."""
    if others:
        warn(
            f"{len(others)} images, such as {others[0]}, state another um per pixel than --mpp, "
            "which counts."
        )
    if assumed:
        warn(
            f"{len(assumed)} images, such as {assumed[0]}, do not state their um per pixel: the "
            f"model's, {card.input_mpp:g}, is assumed. Give it as --mpp."
        )


def _find(images: Path) -> Sequence[Path]:
    found = [images] if images.is_file() else []
    if images.is_dir():
        found = sorted(
            path
            for path in images.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not path.name.startswith(".")
            and not path.is_dir()
        )
    if not found:
        raise SourceError(
            f"{images} has no image; expected a file or a folder of {', '.join(IMAGE_SUFFIXES)}"
        )
    if unfit := [path for path in found if not is_text(path)]:
        raise SourceError(
            f"{str(unfit[0])!a} is not in UTF-8, so it cannot be written into areas.csv. Rename it."
        )
    stems = [path.stem for path in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise SourceError(
            f"{images} has {stems.count(twice[0])} images called {twice[0]}; expected one, as "
            "masks are named after them. Rename the others."
        )
    return found


def _read(path: Path, card: CheckpointCard, given: float | None) -> _Read:
    """An image's pixels, its um per pixel, and where that is from."""
    try:
        picture = read_picture(path)
    except ServeError as error:
        raise ImageFileError(str(error)) from error
    mpp: Mpp | None = given
    source = FROM_REQUEST
    if given is None:
        mpp, source = picture.pixel_size, picture.mpp_source
        if picture.pixel_size is not None:
            refuse_unequal_sides(picture.pixel_size, f"{path}: its {source}", "Give it as --mpp.")
    if mpp is None:
        mpp, source = card.input_mpp, UNKNOWN if card.mpp is None else ASSUMED
    if not card.settings.model.squeeze:
        refuse_enlarging(card.input_mpp, mpp, str(path))
    other = contradiction(picture.pixel_size, picture.mpp_source, given)
    return _Read(picture.pixels, mpp, source, other)


def _numbers(image: _Read, labels: NDArray[np.uint8], num_classes: int) -> list[object]:
    """An image's row of areas.csv, without its name."""
    pixels = np.bincount(labels.ravel(), minlength=1 + num_classes)[1:]
    mpp = None if image.mpp is None else sides_of(image.mpp).mean
    is_known = mpp is not None and image.mpp_source not in (ASSUMED, UNKNOWN)
    areas = pixels * (mpp or 0) ** 2 / 1e6
    return [
        *labels.shape,
        "" if mpp is None else f"{mpp:g}",
        image.mpp_source,
        *(f"{share:.6f}" for share in pixels / labels.size),
        *(f"{area:.6g}" if is_known else "" for area in areas),
    ]


def _save(
    folder: Path,
    name: str,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    classes: Sequence[LabelClass],
) -> None:
    colors = [(255, 255, 255), *(ImageColor.getrgb(entry.color)[:3] for entry in classes)]
    mask = Image.fromarray(labels, mode="P")
    mask.putpalette([value for color in colors for value in color])
    mask.save(folder / "masks" / f"{name}.png")
    painted = Image.fromarray(np.array(colors, np.uint8)[labels])
    overlay = Image.blend(Image.fromarray(pixels), painted, _OPACITY)
    overlay.save(folder / "overlays" / f"{name}.png")
