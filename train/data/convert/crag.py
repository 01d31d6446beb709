"""CRAG, "Colorectal Adenocarcinoma Gland": 173 training and 40 test images at 20x.

Graham et al. 2019, "MILD-Net: Minimal information loss dilated network for gland instance
segmentation in colon histology images", Medical Image Analysis, arXiv 1806.01963. The published
files:

SOURCE/train/Images/train_N.png       RGB, about 1512 x 1516
SOURCE/train/Annotation/train_N.png   one channel: 0 or a gland's number
SOURCE/valid/...                      the 40 test images, test_N.png, in the same form

Annotations and test are accepted as folder names, too. Pixels above 0 become Gland, all others
Non-gland. The release does not say which slide an image comes from, so folds are by image.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from train.checked import CheckedSettings, Mpp
from train.data.check import report
from train.data.convert.layout import TileSettings, read_region, write_dataset
from train.data.convert.source_files import find_folder, find_images, read_glands
from train.data.scale import refuse_enlarging
from train.errors import SourceError
from train.files import refuse_existing
from train.presets import CRAG_MPP
from train.settings import LabelClass

CLASSES = (
    LabelClass(name="Non-gland", color="#009e73"),
    LabelClass(name="Gland", color="#d55e00"),
)


def _tiles() -> TileSettings:
    return TileSettings(tile_size_px=1536, mpp=CRAG_MPP)


@dataclass(frozen=True, kw_only=True)
class CragSettings(CheckedSettings):
    """Settings of the CRAG converter. A tile of 1536 x 1536 pixels holds a whole padded image."""

    tiles: TileSettings = field(default_factory=_tiles)
    source_mpp: Mpp = CRAG_MPP
    """um per pixel of the images. The files do not record it."""


def prepare_crag(source: Path, out: Path, settings: CragSettings) -> None:
    """Convert the published files to SAM-Path's layout; print class shares and warnings.

    Raises:
        FocalPathError: a file is missing, damaged or in another format, or `out` exists.
    """
    refuse_existing(out)
    warnings = ["CRAG does not say which slide an image comes from, so folds are by image"]
    sources: list[tuple[str, Path, Path]] = []
    for split, folders in (("train", ("train",)), ("test", ("valid", "test"))):
        folder = find_folder(source, folders, f"CRAG's {split} images")
        sources += _find_pairs(folder, split, warnings)
    recipe = {"source": "crag", **asdict(settings)}
    refuse_enlarging(settings.tiles.mpp, settings.source_mpp, "CRAG's images")
    scale = settings.source_mpp / settings.tiles.mpp
    regions = (
        read_region(name, name, image, mask, read_glands, scale, is_test=name.startswith("test_"))
        for name, image, mask in sources
    )
    warnings += write_dataset(out, regions, len(sources), CLASSES, settings.tiles, recipe)
    report(out, warnings)


def _find_pairs(folder: Path, split: str, warnings: list[str]) -> list[tuple[str, Path, Path]]:
    """List (name, image, mask) of a split. Names begin with the split, as in SAM-Path."""
    images = find_images(find_folder(folder, ("Images",), "CRAG's images"))
    masks = find_images(find_folder(folder, ("Annotation", "Annotations"), "CRAG's instance masks"))
    missing = images.keys() - masks.keys()
    if missing:
        raise SourceError(
            f"{next(iter(masks.values())).parent} lacks {len(missing)} masks, such as "
            f"{min(missing)}.png; expected one for each image. Download the missing files."
        )
    if spare := masks.keys() - images.keys():
        warnings.append(
            f"{len(spare)} masks in {folder}, such as {min(spare)}.png, have no image and were "
            "left out; CRAG's first version has five such masks"
        )
    return [
        (name if name.startswith(f"{split}_") else f"{split}_{name}", image, masks[name])
        for name, image in images.items()
    ]
