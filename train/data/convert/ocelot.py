"""OCELOT 2023: patches of six organs from TCGA slides, with tissue masks.

Ryu et al. 2023, "OCELOT: Overlapped Cell on Tissue Dataset for Histopathology", CVPR, arXiv
2303.13110; CC BY-NC 4.0. Files as published:

SOURCE/metadata.json                            slide, um per pixel, organ, part of each pair
SOURCE/images/{train,val,test}/tissue/NNN.jpg   RGB, 1024 x 1024, about 0.778 um per pixel
SOURCE/annotations/.../tissue/NNN.png           1 background, 2 cancer area, 255 unknown

The cell patches and their points are not used: they have no masks. The patient is the TCGA case,
the first 12 characters of a slide's name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.contract.json_text import parse_json
from serve.images.mpp import MAX_MPP, MIN_MPP
from train.checked import CheckedSettings
from train.data.check import report
from train.data.convert.images import FoldSettings, SourceImage, write_images
from train.data.masks import read_mask
from train.errors import SourceError
from train.files import refuse_existing
from train.settings import LabelClass

CLASSES = (
    LabelClass(name="Background", color="#56b4e9"),
    LabelClass(name="Cancer area", color="#d55e00"),
)
_PARTS = {"train": "training", "val": "validation", "test": "test"}
_CASE_LETTERS = 12


@dataclass(frozen=True, kw_only=True)
class OcelotSettings(CheckedSettings):
    """How OCELOT is prepared."""

    folds: FoldSettings = field(default_factory=FoldSettings)


def prepare_ocelot(source: Path, out: Path, settings: OcelotSettings) -> None:
    """Convert the published files to SAM-Path's layout; print class shares and warnings.

    Raises:
        FocalPathError: a file is missing, damaged or in another format, or `out` exists.
    """
    refuse_existing(out)
    images, missing = find_images(source)
    warnings = []
    if missing:
        warnings.append(
            f"{len(missing)} of the pairs in metadata.json have no tissue image and mask here, "
            f"such as {missing[0]}: they were left out"
        )
    mpp = median(image.mpp for image in images)
    recipe = {"source": "ocelot", **asdict(settings)}
    warnings += write_images(out, images, CLASSES, round(mpp, 6), settings.folds, recipe)
    report(out, warnings)


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The published pairs by name.

    Raises:
        SourceError: the file is missing or in another format.
    """
    try:
        pairs: Mapping[str, Any] = parse_json(path.read_text(encoding="utf-8-sig"))["sample_pairs"]
        return dict(pairs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} is not OCELOT's metadata ({error!r}); expected JSON with sample_pairs. Give "
            "the folder that holds metadata.json, images/ and annotations/."
        ) from error


def find_images(source: Path) -> tuple[list[SourceImage], list[str]]:
    """The pairs whose tissue image and mask are here, and the names of the others.

    Pretraining asks here, too: folds are drawn from these images, and a case that is for testing
    must be so everywhere (see `train.data.convert.images.folds_of`).

    Raises:
        SourceError: the metadata is in another format, or there is no such pair.
    """
    images, missing = [], []
    for name, pair in sorted(read_metadata(source / "metadata.json").items()):
        try:
            part, slide = str(pair["subset"]), str(pair["slide_name"])
            mpp = float(pair["tissue"]["resized_mpp_x"])
            if not MIN_MPP <= mpp <= MAX_MPP:
                raise ValueError(f"{mpp} um per pixel")
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"{source / 'metadata.json'}, pair {name}: {error!r} is not as published; expected "
                "subset, slide_name and tissue.resized_mpp_x. Download it again."
            ) from error
        image = source / "images" / part / "tissue" / f"{name}.jpg"
        mask = source / "annotations" / part / "tissue" / f"{name}.png"
        if not (image.is_file() and mask.is_file()):
            missing.append(name)
            continue
        images.append(
            SourceImage(
                name=name,
                path=image,
                group=slide[:_CASE_LETTERS],
                part=_PARTS.get(part, part),
                mpp=mpp,
                read_labels=partial(_read_labels, mask),
            )
        )
    if not images:
        raise SourceError(
            f"{source} has no tissue image with its mask; expected images/train/tissue/NNN.jpg and "
            "annotations/train/tissue/NNN.png. Give the folder of the published files."
        )
    return images, missing


def _read_labels(path: Path) -> NDArray[np.uint8]:
    return read_mask(path, len(CLASSES))
