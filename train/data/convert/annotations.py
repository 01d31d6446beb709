"""Converts annotated slides or images to a data set in SAM-Path's layout.

SOURCE/NAME.svs            slides or images, whatever `serve.images.readers` reads
ANNOTATIONS/NAME.geojson   of the same name: QuPath, ASAP, ImageScope or Digital Slide Archive

Only what is annotated is cut: the regions of interest, else the boxes of all areas. Slides are read
by the code that serves them, at the tiles' um per pixel; areas are drawn at that scale.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from serve.contract.errors import FocalPathError as ServeError
from serve.images.mpp import contradiction
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import open_reader
from train.checked import CheckedSettings, Mpp, TestShare
from train.data.check import report
from train.data.convert.annotation_files import SUFFIXES, read_annotation_file
from train.data.convert.class_mapping import (
    IGNORE,
    ROI,
    UNLABELLED,
    ClassMapping,
    read_mapping,
    write_template,
)
from train.data.convert.drawing import Lost, drawing_of
from train.data.convert.layout import (
    TEST_FOLD,
    Region,
    TileSettings,
    assign_folds,
    draw_test_groups,
    write_dataset,
)
from train.data.convert.shapes import Annotation
from train.data.convert.source_files import find_images
from train.data.folds import tcga_patient
from train.data.scale import refuse_enlarging
from train.errors import AnnotationError, ImageFileError, ScaleError, SettingsError, SourceError
from train.files import refuse_existing

_MAPPING = ".mapping.json"
"""How the name of a mapping of labels ends, by default."""
_BEYOND = 0.05
"""Share of the slide's side by which an area may reach beyond it without a warning (our choice)."""
_SLIDES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".vms", ".vmu", ".bif"),
    *(".dcm", ".czi", ".zarr", ".png", ".jpg", ".jpeg", ".webp"),
)


@dataclass(frozen=True, kw_only=True)
class AnnotationSettings(CheckedSettings):
    """How annotated slides or images are prepared."""

    tiles: TileSettings = field(default_factory=TileSettings)
    mapping: Path | None = None
    """JSON that says what the labels mean; by default OUT.mapping.json. Where it
    does not exist, a template is written there and nothing else is done."""
    source_mpp: Mpp | None = None
    """um per pixel of the slides or images, where their files do not state it."""
    overlap: Literal["file", "area"] = "file"
    """Which of two overlapping areas wins: the later in the file, or the smaller."""
    patient_pattern: str = ""
    """Regular expression for the part of a slide's name that names the patient, whose slides share
    a fold; where it has groups in parentheses, these. By default TCGA's, else each slide is a
    patient."""
    test_share: TestShare = 0.2
    """Share of the patients that is for testing (our choice)."""

    def __post_init__(self) -> None:
        """Refuse a value out of its range, or a pattern that cannot be compiled."""
        super().__post_init__()
        try:
            re.compile(self.patient_pattern)
        except re.error as error:
            raise SettingsError(
                f"patient_pattern is {self.patient_pattern!r}, which is not a regular expression "
                f"({error}). Change --patient-pattern."
            ) from error


@dataclass(frozen=True, eq=False)
class _Slide:
    """A slide or image with its annotations, in pixels of its level 0."""

    name: str
    path: Path
    file: Path
    annotations: tuple[Annotation, ...]
    upright: bool
    """Whether they lie on the image as it is read, turned by its EXIF orientation."""


def prepare_annotations(
    source: Path, annotations: Path, out: Path, settings: AnnotationSettings
) -> None:
    """Convert annotated slides to SAM-Path's layout; print class shares and warnings.

    Everything is checked before anything is cut: labels, kinds, places and um per pixel.

    Raises:
        FocalPathError: a file is missing, damaged or of another form, a label is not mapped, an
            annotation has no area or lies outside its slide, or `out` exists.
    """
    refuse_existing(out)
    mapping_file = settings.mapping or out.with_name(f"{out.name}{_MAPPING}")
    slides, warnings = _find_slides(source, annotations, settings, mapping_file)
    found = [annotation for slide in slides for annotation in slide.annotations]
    if not mapping_file.exists():
        write_template(mapping_file, found)
        labels = ", ".join(sorted({annotation.label for annotation in found})) or "none"
        Console().print(
            f"wrote {escape(str(mapping_file))}, what the labels mean ({escape(labels)}). Edit it "
            "and repeat the command.",
            soft_wrap=True,
        )
        return
    mapping = read_mapping(mapping_file, [annotation.label for annotation in found])
    groups = {slide.name: _group(slide.name, settings) for slide in slides}
    test = draw_test_groups(groups.values(), settings.test_share, settings.tiles.seed)
    open_groups = Counter(group for group in groups.values() if group not in test)
    assign_folds(open_groups, settings.tiles.num_folds, settings.tiles.seed)  # refuses too few
    lost = Lost()
    fingerprints = {s.name: _check_slide(s, mapping, settings, lost) for s in slides}
    recipe = {
        "source": "annotations",
        **asdict(settings),
        "mapping": None,
        "labels": dict(mapping.labels),
    }
    regions = _regions(slides, fingerprints, groups, test, mapping, settings, lost)
    warnings += write_dataset(out, regions, len(slides), mapping.classes, settings.tiles, recipe)
    report(out, warnings + _doubtful_patients(slides, settings) + lost.warnings())


def _find_slides(
    source: Path, annotations: Path, settings: AnnotationSettings, mapping_file: Path
) -> tuple[list[_Slide], list[str]]:
    """Match slides and annotations by name, and read the annotations.

    Mappings of labels may lie beside the annotations.
    """
    images = find_images(source, _SLIDES)
    files = {
        name: path
        for name, path in find_images(annotations, SUFFIXES, "file of annotations").items()
        if not path.name.endswith(_MAPPING) and path.resolve() != mapping_file.resolve()
    }
    if missing := sorted(files.keys() - images.keys()):
        raise SourceError(
            f"{source} has no slide for {len(missing)} files of annotations, such as "
            f"{files[missing[0]].name}; expected a slide or image of the same name. Add it, or "
            "remove the annotations."
        )
    warnings = []
    if spare := sorted(images.keys() - files.keys()):
        warnings.append(
            f"{len(spare)} slides, such as {spare[0]}, have no annotations and were left out"
        )
    slides = []
    for name, file in files.items():
        found, file_format = read_annotation_file(file)
        if file_format.within_bounds:
            with _open(images[name], settings) as reader:
                found = [a.moved(reader.bounds.x, reader.bounds.y) for a in found]
        slides.append(_Slide(name, images[name], file, tuple(found), file_format.upright))
    return slides, warnings


def _open(path: Path, settings: AnnotationSettings) -> RegionReader:
    with _explained(path):
        reader = open_reader(path)
        if reader.mpp is not None or settings.source_mpp is None:
            return reader
        reader.close()
        return open_reader(path, mpp=settings.source_mpp)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except ServeError as error:
        raise ImageFileError(f"{path} cannot be read: {error}") from error


def _check_slide(
    slide: _Slide, mapping: ClassMapping, settings: AnnotationSettings, lost: Lost
) -> str:
    """Refuse what cannot be drawn correctly, before anything is written.

    Returns:
        The slide's fingerprint.
    """
    for annotation in slide.annotations:
        if not annotation.rings and mapping.labels[annotation.label] != IGNORE:
            raise AnnotationError(
                f"{slide.file}: {annotation.place}, labelled {annotation.label!r}, is a "
                f"{annotation.kind}, which has no area; expected closed areas. Remove it, or map "
                f"its label to {IGNORE}."
            )
    with _open(slide.path, settings) as reader:
        if reader.orientation != 1 and not slide.upright:
            raise ImageFileError(
                f"{slide.path} is turned by its EXIF orientation {reader.orientation}, which not "
                "all programs heed, so its annotations may lie elsewhere; expected an image "
                "without one. Save it as it was shown when it was annotated."
            )
        if reader.mpp is None:
            raise ScaleError(
                f"{slide.path}: the file states no believable um per pixel, which is needed to cut "
                f"tiles at {settings.tiles.mpp:g} um. Give it as --source-mpp."
            )
        if contradiction(reader.pixel_size, reader.mpp_source, settings.source_mpp):
            lost.other_mpp.append(f"{slide.path.name} ({reader.mpp:g} by its {reader.mpp_source})")
        refuse_enlarging(settings.tiles.mpp, reader.pixel_size, str(slide.path))
        width, height = reader.width_px, reader.height_px
        with _explained(slide.path):
            fingerprint = reader.fingerprint()
        has_roi = any(mapping.labels[a.label] == ROI for a in slide.annotations)
        if mapping.uncovered != UNLABELLED and not has_roi and reader.name != "picture":
            raise AnnotationError(
                f"{slide.file} has no region of interest, and uncovered pixels shall be "
                f"{mapping.uncovered}; that would be the whole slide. Draw one, or set uncovered "
                f"to {UNLABELLED}."
            )
    for annotation in slide.annotations:
        for ring in annotation.rings[:1]:
            left, top = ring.min(axis=0)
            right, bottom = ring.max(axis=0)
            if left >= width or top >= height or right <= 0 or bottom <= 0:
                raise AnnotationError(
                    f"{slide.file}: {annotation.place}, labelled {annotation.label!r}, lies at "
                    f"x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}, outside of its "
                    f"slide of {width} x {height} pixels. Is it of another slide?"
                )
            beyond = max(-left / width, -top / height, right / width - 1, bottom / height - 1)
            if beyond > _BEYOND:
                lost.beyond.append(f"{annotation.label!r}, {annotation.place} of {slide.file.name}")
    return fingerprint


def _regions(
    slides: Sequence[_Slide],
    fingerprints: Mapping[str, str],
    groups: Mapping[str, str],
    test: Set[str],
    mapping: ClassMapping,
    settings: AnnotationSettings,
    lost: Lost,
) -> Iterator[Region]:
    """Read one chunk after another; `lost` gets what nothing comes of."""
    for slide in slides:
        group = groups[slide.name]
        has_region = False
        with _open(slide.path, settings) as reader:
            mpp = settings.tiles.mpp
            drawing = drawing_of(
                slide.annotations,
                slide.file.name,
                reader,
                mapping,
                mpp,
                smaller_on_top=settings.overlap == "area",
            )
            for y, x, labels in drawing.draw(settings.tiles.tile_size_px, lost):
                has_region = True
                height, width = labels.shape
                with _explained(slide.path):
                    image = reader.read_um(y * mpp, x * mpp, height, width, mpp)
                name = slide.name if drawing.size == labels.shape else f"{slide.name}_{y}_{x}"
                yield Region(name, group, image, labels, TEST_FOLD if group in test else None)
            with _explained(slide.path):
                is_checked = reader.fingerprint() == fingerprints[slide.name]
        if not is_checked:
            raise ImageFileError(
                f"{slide.path} was replaced after it was checked. Repeat the command once nothing "
                "writes to it."
            )
        if not has_region:
            lost.slides.append(slide.name)


def _group(name: str, settings: AnnotationSettings) -> str:
    """A slide's patient: what the pattern finds, or its groups in parentheses; else the slide."""
    if not settings.patient_pattern:
        return tcga_patient(name) or name
    found = re.search(settings.patient_pattern, name)
    if found is None:
        return name
    return "-".join(filter(None, found.groups())) or found[0] or name


def _doubtful_patients(slides: Sequence[_Slide], settings: AnnotationSettings) -> list[str]:
    """Warn of slides whose patient the pattern does not find, or that may be of one patient."""
    if not settings.patient_pattern:
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for name in (slide.name for slide in slides if _group(slide.name, settings) == slide.name):
            alike[re.sub(r"[-_. ]+[^-_. ]*$", "", name)].append(name)
        shared = [names for names in alike.values() if len(names) > 1]
        if not shared or len(alike) == 1:  # all begin alike: that is no patient's name
            return []
        return [
            f"slides such as {shared[0][0]} and {shared[0][1]} count as two patients. If they are "
            "of one, say how names tell patients: --patient-pattern"
        ]
    names = [s.name for s in slides if not re.search(settings.patient_pattern, s.name)]
    if not names:
        return []
    return [
        f"{len(names)} slides, such as {names[0]}, do not fit the patient pattern "
        f"{settings.patient_pattern!r}, so each counts as a patient of its own"
    ]
