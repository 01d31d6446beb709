"""GlaS, "Gland Segmentation in Colon Histology Images": 165 images of 16 patients.

Sirinukunwattana et al. 2017, "Gland segmentation in colon histology images: The GlaS challenge
contest", Medical Image Analysis, arXiv 1603.00275; research only. Files as published:

SOURCE/train_N.bmp, testA_N.bmp, testB_N.bmp   RGB, mostly 775 x 522 at 0.62 um per pixel
SOURCE/..._anno.bmp                            one channel: 0, or the number of a gland
SOURCE/Grade.csv                               name, patient ID, grade: benign or malignant

The images are of 20x slides at 0.62005 um per pixel, as the paper says; the files do not state it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from serve.contract.tables import TableError, read_table
from train.checked import CheckedSettings, Mpp
from train.data.check import report
from train.data.convert.images import FoldSettings, SourceImage, write_images
from train.data.convert.source_files import find_images, read_glands
from train.errors import SourceError
from train.files import refuse_existing
from train.settings import LabelClass

_NON_GLAND = LabelClass(name="Non-gland", color="#56b4e9")
_TWO_CLASSES = (_NON_GLAND, LabelClass(name="Gland", color="#d55e00"))
_THREE_CLASSES = (
    _NON_GLAND,
    LabelClass(name="Benign gland", color="#009e73"),
    LabelClass(name="Malignant gland", color="#d55e00"),
)
_GRADES = {"benign": 2, "malignant": 3}


@dataclass(frozen=True, kw_only=True)
class GlasSettings(CheckedSettings):
    """How GlaS is prepared."""

    folds: FoldSettings = field(default_factory=FoldSettings)
    classes: Literal["gland", "grade"] = "gland"
    """gland: glands against the rest; grade: benign and malignant glands, by the image's grade."""
    source_mpp: Mpp = 0.62
    """um per pixel of the images."""


class _Case(NamedTuple):
    patient: str
    grade: str


def prepare_glas(source: Path, out: Path, settings: GlasSettings) -> None:
    """Convert the published files to SAM-Path's layout; print class shares and warnings.

    Raises:
        FocalPathError: a file is missing, damaged or in another format, or `out` exists.
    """
    refuse_existing(out)
    files = find_images(source, (".bmp", ".png", ".tif"))
    cases = _read_grades(source / "Grade.csv")
    images = []
    for name, path in files.items():
        if name.endswith("_anno"):
            continue
        if f"{name}_anno" not in files:
            raise SourceError(
                f"{source} lacks {name}_anno{path.suffix}, the mask of {path.name}; expected one "
                "for each image. Download the missing files."
            )
        if name not in cases:
            raise SourceError(
                f"{source / 'Grade.csv'} has no row for {name}; expected one for each image. "
                "Download it again."
            )
        case = cases[name]
        gland = _GRADES[case.grade] if settings.classes == "grade" else 2
        images.append(
            SourceImage(
                name=name,
                path=path,
                group=case.patient,
                part="training" if name.startswith("train") else "test",
                mpp=settings.source_mpp,
                read_labels=partial(read_glands, files[f"{name}_anno"], gland),
            )
        )
    classes = _THREE_CLASSES if settings.classes == "grade" else _TWO_CLASSES
    recipe = {"source": "glas", **asdict(settings)}
    report(out, write_images(out, images, classes, settings.source_mpp, settings.folds, recipe))


def _read_grades(path: Path) -> Mapping[str, _Case]:
    """Patient and grade by image; the published header has spaces after its commas."""
    try:
        rows = list(read_table(path).records())
    except (OSError, TableError) as error:
        raise SourceError(
            f"{path} cannot be read ({error}); expected GlaS's table of patients and grades, with "
            "the columns name, patient ID, grade (GlaS)"
        ) from error
    cases: dict[str, _Case] = {}
    for number, row in rows:
        values = {name.lower(): cell for name, cell in row.items()}
        grade = next((v.lower() for k, v in values.items() if k.startswith("grade (glas")), None)
        if not values.get("name") or not values.get("patient id") or grade not in _GRADES:
            raise SourceError(
                f"{path}, line {number}: found {values}; expected name, patient ID and "
                f"grade (GlaS), {' or '.join(_GRADES)}"
            )
        case = _Case(values["patient id"], grade)
        if cases.setdefault(values["name"], case) != case:
            raise SourceError(
                f"{path}, line {number}: {values['name']} is there twice, with other content; "
                "expected one row per image. Download it again."
            )
    return cases
