"""BCSS, "Breast Cancer Semantic Segmentation": 151 regions, each from its own TCGA slide.

Amgad et al. 2019, "Structured crowdsourcing enables convolutional segmentation of histology
images", Bioinformatics, doi 10.1093/bioinformatics/btz083. The repository PathologyDataScience/BCSS
describes the files:

SOURCE/rgbs_colorNormalized/NAME.png   RGB regions; the download script calls the folder images/
SOURCE/masks/NAME.png                  8 bits, one code of `CODES` per pixel
SOURCE/meta/gtruth_codes.tsv           the codes; optional, checked if present

An example of NAME is TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.

The institutes E2, EW, GM, LL, OL and S3 provide the test tiles, as in the authors' baseline and in
SAM-Path (arXiv 2307.09570). Tile IDs and positions are SAM-Path's. Its folds mix overlapping tiles
of one slide between training and validation. Our folds are by patient instead.
"""

import csv
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.images.mpp import MAX_MPP, MIN_MPP
from train.checked import CheckedSettings, Mpp
from train.data.check import report
from train.data.convert.layout import TileSettings, read_region, write_dataset
from train.data.convert.source_files import find_folder, find_images, read_numbers
from train.data.scale import refuse_enlarging
from train.data.synthetic import tissue
from train.errors import MaskError, ScaleError, SourceError
from train.files import refuse_existing

CLASSES = tissue.CLASSES
UNLABELLED, TUMOR, STROMA, INFLAMMATORY, NECROSIS, OTHER = range(6)

CODES = {
    "outside_roi": (0, UNLABELLED),
    "tumor": (1, TUMOR),
    "stroma": (2, STROMA),
    "lymphocytic_infiltrate": (3, INFLAMMATORY),
    "necrosis_or_debris": (4, NECROSIS),
    "glandular_secretions": (5, OTHER),
    "blood": (6, OTHER),
    "exclude": (7, UNLABELLED),
    "metaplasia_NOS": (8, OTHER),
    "fat": (9, OTHER),
    "plasma_cells": (10, INFLAMMATORY),
    "other_immune_infiltrate": (11, INFLAMMATORY),
    "mucoid_material": (12, OTHER),
    "normal_acinus_or_duct": (13, OTHER),
    "lymphatics": (14, OTHER),
    "undetermined": (15, OTHER),
    "nerve": (16, OTHER),
    "skin_adnexa": (17, OTHER),
    "blood_vessel": (18, OTHER),
    "angioinvasion": (19, TUMOR),
    "dcis": (20, TUMOR),
    "other": (21, OTHER),
}
"""Each published label with its code in the masks and our label."""

_NAME = re.compile(
    r"(?P<patient>TCGA-(?P<institute>\w{2})-\w{4})-.*?(?:_MPP-(?P<mpp>\d+(?:\.\d+)?))?"
)


@dataclass(frozen=True, kw_only=True)
class BcssSettings(CheckedSettings):
    """Settings of the BCSS converter."""

    tiles: TileSettings = field(default_factory=TileSettings)
    source_mpp: Mpp | None = None
    """um per pixel of region images whose names lack MPP-..."""
    test_institutes: tuple[str, ...] = ("E2", "EW", "GM", "LL", "OL", "S3")
    """TCGA tissue source sites whose slides form the test set, as published by default."""


def prepare_bcss(source: Path, out: Path, settings: BcssSettings) -> None:
    """Convert the published files to SAM-Path's layout; print class shares and warnings.

    Pixels with a code that is not in `CODES` become unlabelled. A warning lists them.

    Raises:
        FocalPathError: a file is missing, damaged or in another format, or `out` exists.
    """
    refuse_existing(out)
    pairs = _find_pairs(source)
    sources = [(image, mask, _parse_name(image, settings)) for image, mask in pairs]
    unknown: dict[Path, Counter[int]] = {}
    recipe = {"source": "bcss", **asdict(settings)}
    regions = (
        read_region(
            image.stem,
            name.patient,
            image,
            mask,
            partial(_read_labels, unknown=unknown),
            name.mpp / settings.tiles.mpp,
            is_test=name.institute in settings.test_institutes,
        )
        for image, mask, name in sources
    )
    warnings = write_dataset(out, regions, len(sources), CLASSES, settings.tiles, recipe)
    report(out, _mpp_warnings(sources, settings) + _code_warnings(unknown) + warnings)


@dataclass(frozen=True)
class _Name:
    patient: str
    institute: str
    mpp: float


def _parse_name(path: Path, settings: BcssSettings) -> _Name:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        raise SourceError(
            f"{path} does not have a BCSS file name; expected one such as "
            "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500.png, which names the patient and "
            "the resolution. Restore the published name."
        )
    mpp = float(match["mpp"]) if match["mpp"] else settings.source_mpp
    if not mpp:
        raise ScaleError(
            f"{path.name} names no resolution; expected a part such as MPP-0.2500. "
            "Give the resolution with --source-mpp."
        )
    if not MIN_MPP <= mpp <= MAX_MPP:
        raise ScaleError(
            f"{path.name} names {mpp:g} um per pixel; expected {MIN_MPP:g} to {MAX_MPP:g}. Restore "
            "the published name."
        )
    refuse_enlarging(settings.tiles.mpp, mpp, path.name)
    return _Name(match["patient"], match["institute"], mpp)


def _find_pairs(source: Path) -> list[tuple[Path, Path]]:
    """Pair the region images with their masks; check that none lacks its partner."""
    images = find_images(
        find_folder(source, ("rgbs_colorNormalized", "images"), "BCSS's region images")
    )
    masks = find_images(find_folder(source, ("masks",), "BCSS's masks"))
    for missing, where in (
        (images.keys() - masks.keys(), "masks"),
        (masks.keys() - images.keys(), next(iter(images.values())).parent.name),
    ):
        if missing:
            raise SourceError(
                f"{source / where} lacks {len(missing)} of the regions, such as "
                f"{min(missing)}.png; expected an image and a mask of the same name for each. "
                "Download the missing files, or remove their partners."
            )
    codes = source / "meta" / "gtruth_codes.tsv"
    if codes.is_file():
        _check_codes(codes)
    return [(image, masks[name]) for name, image in images.items()]


def _check_codes(path: Path) -> None:
    """Refuse masks of a release whose codes have other meanings."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t")
            found = {row["label"]: int(row["GT_code"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be read ({error!r}); expected tab-separated columns label and "
            "GT_code. Download it again."
        ) from error
    for label, code in found.items():
        expected = CODES.get(label, (None,))[0]
        if code != expected:
            raise SourceError(
                f"{path} gives {label!r} the code {code}, expected {expected}: the masks belong to "
                "an unknown release. Download BCSS's masks with 22 codes."
            )


def _read_labels(path: Path, unknown: dict[Path, Counter[int]]) -> NDArray[np.uint8]:
    """Read codes as labels, (H, W) uint8; count the pixels of unknown codes in `unknown`."""
    codes = read_numbers(path, "one channel with the codes 0 to 21")
    if codes.dtype != np.uint8:
        raise MaskError(
            f"{path} has {codes.itemsize * 8} bits; expected 8, with the codes 0 to 21. Download "
            "BCSS's masks again."
        )
    table = np.zeros(256, np.uint8)
    for code, label in CODES.values():
        table[code] = label
    counts = np.bincount(codes.ravel(), minlength=256)
    if counts[len(CODES) :].any():
        unknown[path] = Counter({code: int(counts[code]) for code in range(len(CODES), 256)})
    return np.asarray(table[codes])


def _code_warnings(unknown: dict[Path, Counter[int]]) -> list[str]:
    if not unknown:
        return []
    codes = sum(unknown.values(), Counter())
    listed = ", ".join(f"{code} ({codes[code]} pixels)" for code in sorted(codes))
    return [
        f"{len(unknown)} masks, such as {min(unknown).name}, hold codes that BCSS does not "
        f"define: {listed}; expected 0 to {len(CODES) - 1}. These pixels became unlabelled."
    ]


def _mpp_warnings(sources: list[tuple[Path, Path, _Name]], settings: BcssSettings) -> list[str]:
    coarse = [image.name for image, _, name in sources if name.mpp > 1.5 * settings.tiles.mpp]
    if not coarse:
        return []
    return [
        f"{len(coarse)} regions, such as {coarse[0]}, were enlarged more than 1.5 times to reach "
        f"{settings.tiles.mpp} um per pixel: this adds no detail to their tiles"
    ]
