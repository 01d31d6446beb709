"""Brain tissue of the Brain Digital Slide Archive (BDSA): regions with annotation exports.

We know of no packaged release. The converter expects this layout (our choice):

SOURCE/images/NAME.png         RGB regions, also .tif, .tiff, .jpg, .jpeg
SOURCE/annotations/NAME.json   annotation export (see `train.data.convert.dsa_annotations`)
SOURCE/regions.csv             optional, one row per image, with the columns
    image        NAME (required)
    mpp          um per pixel of the image; default --source-mpp
    x, y         the image's top left corner in the slide, in slide pixels; default 0
    base_mpp     um per pixel of the slide, whose pixels the annotations use; default mpp
    group        patient or slide, whose regions share a fold; default NAME
    annotation   name of the export, which regions of a slide may share; default NAME
    fold         -1 test, 0 validation, others training; default drawn with --seed

Without regions.csv, each image counts as a slide of its own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from serve.contract.tables import named_file
from serve.images.mpp import MAX_MPP, MIN_MPP
from train.checked import CheckedSettings, Mpp, TestShare
from train.data.check import report
from train.data.convert.bdsa_rows import SUFFIXES, number_of, read_rows
from train.data.convert.dsa_annotations import read_export
from train.data.convert.layout import (
    TEST_FOLD,
    Region,
    TileSettings,
    draw_test_groups,
    resample_image,
    write_dataset,
)
from train.data.convert.shapes import UNNAMED, area_of, fill_shape, vanished
from train.data.convert.source_files import find_folder, find_images, read_region_picture
from train.data.scale import refuse_enlarging
from train.errors import AnnotationError, SettingsError, SourceError
from train.files import refuse_existing
from train.settings import LabelClass

CLASSES = (
    LabelClass(name="Background", color="#56b4e9"),
    LabelClass(name="Gray Matter", color="#d55e00"),
    LabelClass(name="White Matter", color="#f0e442"),
    LabelClass(name="Leptomeninges", color="#0072b2"),
    LabelClass(name="Superficial Cortex", color="#009e73"),
)
_BACKGROUND = 1


@dataclass(frozen=True, kw_only=True)
class BdsaSettings(CheckedSettings):
    """Settings of the BDSA converter: tiles of 1024 pixels at 0.25 um, as for BCSS (our choice)."""

    tiles: TileSettings = field(default_factory=TileSettings)
    source_mpp: Mpp | None = None
    """um per pixel of images for which regions.csv gives no mpp."""
    rename: tuple[str, ...] = ()
    """Meaning of other labels, such as "Grey=Gray Matter". "Artefact=unlabelled" draws unlabelled
    pixels; "ROI=ignore" draws nothing. Case, - and _ do not matter, and grey equals gray."""
    overlap: Literal["file", "area"] = "file"
    """Which of two overlapping elements wins: the later one in the file, or the smaller one."""
    uncovered: Literal["unlabelled", "background"] = "unlabelled"
    """Label of pixels outside all elements. Choose background only for fully annotated
    regions."""
    test_share: TestShare = 0.2
    """Share of the patients or slides drawn for testing if regions.csv gives no fold (our
    choice)."""


@dataclass(frozen=True)
class _Source:
    """A row of regions.csv with its defaults filled in."""

    name: str
    image: Path
    annotation: Path
    mpp: float
    base_mpp: float
    x: float
    y: float
    group: str
    fold: int | None


def prepare_bdsa(source: Path, out: Path, settings: BdsaSettings) -> None:
    """Convert regions and annotations to SAM-Path's layout; print class shares and warnings.

    Raises:
        FocalPathError: a file is missing, damaged or in another format, a label is unknown, or
            `out` exists.
    """
    refuse_existing(out)
    meanings = _label_meanings(settings.rename)
    sources = _draw_test_groups(_read_sources(source, settings), settings)
    warnings = _check_annotations(sources, meanings)
    if not (source / "regions.csv").is_file():
        warnings.append("no regions.csv found: each image counts as a slide of its own")
    recipe = {"source": "bdsa", **asdict(settings)}
    regions = _read_regions(sources, settings, meanings, warnings)
    left_out = write_dataset(out, regions, len(sources), CLASSES, settings.tiles, recipe)
    report(out, warnings + left_out)


def _read_sources(source: Path, settings: BdsaSettings) -> list[_Source]:
    images = find_images(find_folder(source, ("images",), "BDSA's region images"), SUFFIXES)
    annotations = find_folder(source, ("annotations",), "the annotation exports")
    rows = read_rows(source / "regions.csv", images)
    sources = []
    for name, image in images.items():
        try:
            sources.append(_fill_in(name, image, annotations, rows.get(name, {}), settings))
        except ValueError as error:
            raise SourceError(f"{source / 'regions.csv'}, image {name}: {error}") from error
    return sources


def _fill_in(
    name: str, image: Path, annotations: Path, row: Mapping[str, str], settings: BdsaSettings
) -> _Source:
    """Fill in the defaults of a row.

    Raises:
        ValueError: a value is missing or is not a number.
    """
    mpp = number_of(row, "mpp", settings.source_mpp)
    base_mpp = number_of(row, "base_mpp", mpp)
    if any(one is None or not MIN_MPP <= one <= MAX_MPP for one in (mpp, base_mpp)):
        raise ValueError(
            f"um per pixel is {mpp}, of the slide {base_mpp}, expected {MIN_MPP:g} to {MAX_MPP:g}; "
            "set the column mpp or --source-mpp"
        )
    assert mpp is not None
    assert base_mpp is not None
    refuse_enlarging(settings.tiles.mpp, mpp, str(image))
    stem = (row.get("annotation") or name).removesuffix(".json")
    annotation = named_file(annotations, f"{stem}.json")
    if not annotation.is_file():
        raise ValueError(f"{annotation} does not exist; add the export, or name it in annotation")
    fold = number_of(row, "fold", None)
    if fold is not None and not fold.is_integer():
        raise ValueError(f"fold is {fold:g}, expected a whole number")
    return _Source(
        name=name,
        image=image,
        annotation=annotation,
        mpp=mpp,
        base_mpp=base_mpp,
        x=number_of(row, "x", 0) or 0,
        y=number_of(row, "y", 0) or 0,
        group=row.get("group") or name,
        fold=None if fold is None else int(fold),
    )


def _draw_test_groups(sources: Sequence[_Source], settings: BdsaSettings) -> list[_Source]:
    """Draw groups for testing and set their fold."""
    groups = {source.group for source in sources if source.fold is None}
    test = draw_test_groups(groups, settings.test_share, settings.tiles.seed)
    return [
        replace(source, fold=TEST_FOLD) if source.fold is None and source.group in test else source
        for source in sources
    ]


def _normalised(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label).strip().casefold().replace("grey", "gray")


def _label_meanings(rename: Sequence[str]) -> dict[str, int | None]:
    """Map normalised labels to 0 (unlabelled), 1..C, or None (draw nothing).

    Raises:
        SettingsError: an entry does not read OLD=NEW, or NEW is unknown.
    """
    targets: dict[str, int | None] = {
        _normalised(entry.name): label for label, entry in enumerate(CLASSES, start=1)
    }
    meanings = dict(targets)
    targets |= {"unlabelled": 0, "ignore": None}
    renamed: dict[str, str] = {}
    for text in rename:
        old, equals, new = text.partition("=")
        if not equals or _normalised(new) not in targets:
            names = ", ".join(entry.name for entry in CLASSES)
            raise SettingsError(
                f"--rename has {text!r}; expected OLD=NEW, where NEW is one of {names}, "
                "unlabelled, ignore"
            )
        label = _normalised(old or UNNAMED)
        if renamed.setdefault(label, _normalised(new)) != _normalised(new):
            raise SettingsError(
                f"--rename gives {label!r} two meanings, {renamed[label]!r} and {new!r}; expected "
                "one. Remove one of them."
            )
        meanings[label] = targets[_normalised(new)]
    return meanings


def _check_annotations(sources: Sequence[_Source], meanings: Mapping[str, int | None]) -> list[str]:
    """Check every export once, before any image is read.

    Unknown labels are refused. Skipping an element would leave wrong labels where it should have
    covered others.
    """
    unknown: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for path in sorted({source.annotation for source in sources}):
        for found in read_export(path):
            if not found.rings:
                is_mistake = found.kind.startswith("closed")
                which = f", {found.label!r}, {found.place} of {path.name}" if is_mistake else ""
                others[f"{found.kind}{which}"] += 1
            elif _normalised(found.label) not in meanings:
                unknown[found.label] += 1
    if unknown:
        listed = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common())
        names = ", ".join(entry.name for entry in CLASSES)
        raise AnnotationError(
            f"the annotations have the unknown labels {listed}; expected {names}. Map each with "
            '--rename, such as --rename "Artefact=unlabelled" "ROI=ignore".'
        )
    if not others:
        return []
    listed = ", ".join(f"{kind} ({count})" for kind, count in others.most_common())
    return [f"elements without an area were left out: {listed}"]


def _read_regions(
    sources: Sequence[_Source],
    settings: BdsaSettings,
    meanings: Mapping[str, int | None],
    warnings: list[str],
) -> Iterator[Region]:
    """Yield the regions one by one; add hidden elements and empty regions to `warnings`."""
    missed, hidden = [], []
    for source in sources:
        original = read_region_picture(source.image).pixels
        image = resample_image(original, source.mpp / settings.tiles.mpp)
        shapes = [found for found in read_export(source.annotation) if found.rings]
        if settings.overlap == "area":
            shapes.sort(key=lambda shape: -area_of(shape.rings[0]))
        labels = np.zeros(image.shape[:2], np.uint8)
        if settings.uncovered == "background":
            labels[:] = _BACKGROUND
        # Computed from the sizes, because resampling rounds them to whole pixels.
        scale = (
            np.array(labels.shape[::-1]) / original.shape[1::-1] * (source.base_mpp / source.mpp)
        )
        drawn = []
        for shape in shapes:
            value = meanings[_normalised(shape.label)]
            rings = tuple((ring - [source.x, source.y]) * scale for ring in shape.rings)
            if value is not None and fill_shape(labels, rings, value):
                drawn.append((shape.label, value, rings))
        if not drawn:
            missed.append(source.name)
        hidden += [f"{name} in {source.name}" for name in vanished(drawn, labels)]
        yield Region(source.name, source.group, image, labels, source.fold)
    if hidden:
        warnings.append(
            f"{len(hidden)} elements, such as {hidden[0]}, are completely covered by later ones. "
            "To draw smaller elements on top, use --overlap area."
        )
    if missed:
        warnings.append(
            f"{len(missed)} regions, such as {missed[0]}, contain no annotated element. Check that "
            "x, y and base_mpp in regions.csv belong to the annotated slide."
        )
