"""The labels as a DICOM Segmentation (LABELMAP), tiled as whole slides are, through highdicom.

Where the slide is DICOM, the segmentation refers to its level 0 and shares its frame of reference,
patient and study. In that frame the slide has the um per pixel that its file states, so the
segmentation has them, too, whatever was given. Elsewhere it stands alone, with the slide's name as
the container's identifier; all segmentations of a slide then share a study and a frame of
reference, too.
"""

import datetime
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    RLELossless,
    VLWholeSlideMicroscopyImageStorage,
)

from serve.contract.extras import how_to_install
from serve.images.readers.dicom import series_in, siblings_of
from serve.images.readers.errors import ReaderMissingError
from serve.images.readers.slide_files import is_dicom
from serve.slides.errors import OutputError
from serve.slides.outputs.format import SlideFormat, SlideResult

_MOST_CELLS = 600_000_000
"""highdicom holds the map in memory. A larger slide is written from a coarser level."""
_UM_PER_MM = 1000.0
_SCHEME = "99FOCALPATH"


def write_dicom_seg(result: SlideResult, path: Path) -> None:
    """Write the labels of the finest level that fits into memory.

    Raises:
        ReaderMissingError: highdicom is not installed.
        OutputError: highdicom does not take the slide's own DICOM files.
    """
    highdicom = _highdicom()
    level = 0
    while np.prod(result.labels(level).shape) > _MOST_CELLS:
        level += 1
    source = _source(result)
    pixels = np.asarray(result.labels(level)[:])[None]
    sides = _pixel_mm(result, source)
    mm = [
        side * step * 2**level
        for side, step in zip(sides, result.plan.level0_px_per_cell, strict=True)
    ]
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=[source],
            pixel_array=pixels,
            segmentation_type=highdicom.seg.SegmentationTypeValues.LABELMAP,
            segment_descriptions=_segments(result, highdicom),
            series_instance_uid=_uid(result, "series"),
            series_number=1,
            sop_instance_uid=_uid(result, "instance"),
            instance_number=1,
            manufacturer="FocalPath",
            manufacturer_model_name=_text(result.plan.model.name),
            software_versions=_text(result.plan.model.version),
            device_serial_number=result.plan.model.checkpoint_sha256[:16],
            transfer_syntax_uid=RLELossless,
            pixel_measures=highdicom.PixelMeasuresSequence(pixel_spacing=mm, slice_thickness=0.001),
            plane_positions=[_position(result, source, highdicom)],
            tile_pixel_array=True,
            tile_size=(512, 512),
            dimension_organization_type="TILED_FULL",
            omit_empty_frames=False,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{result.name}: highdicom {highdicom.__version__} cannot write the segmentation: "
            f"{error}. Leave out the format dicom-seg."
        ) from error
    _make_repeatable(segmentation, result)
    segmentation.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: names of classes have any letters
    segmentation.save_as(path, enforce_file_format=True)


def _highdicom() -> Any:
    """The module `highdicom`, which has an extra of its own."""
    try:
        import highdicom
    except ModuleNotFoundError as error:
        raise ReaderMissingError(
            f"DICOM SEG needs {error.name}, which is not installed: {how_to_install('dicom')}."
        ) from error
    return highdicom


def _source(result: SlideResult) -> Any:
    """The data set of the slide's level 0, or one that stands for a slide that is not DICOM."""
    path = Path(result.plan.slide.path)
    if path.is_dir() or is_dicom(path):
        files = siblings_of(path) if path.is_file() else [f for s in series_in(path) for f in s]
        found = [dcmread(file, stop_before_pixels=True) for file in files]
        size = result.plan.slide.height_px, result.plan.slide.width_px
        names = "TotalPixelMatrixRows", "TotalPixelMatrixColumns"
        for dataset in found:
            if tuple(map(dataset.get, names)) == size:
                return dataset
    return _stand_in(result)


def _stand_in(result: SlideResult) -> Any:
    """What highdicom copies a slide's identity from, for a slide that is not DICOM."""
    slide = result.plan.slide
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    dataset.SOPInstanceUID = _slide_uid(result, "slide")
    dataset.StudyInstanceUID = _slide_uid(result, "study")
    dataset.SeriesInstanceUID = _slide_uid(result, "slide series")
    dataset.FrameOfReferenceUID = _slide_uid(result, "frame of reference")
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID"):
        setattr(dataset, name, "")
    for name in ("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"):
        setattr(dataset, name, "")
    dataset.PositionReferenceIndicator = "SLIDE_CORNER"
    dataset.Modality = "SM"
    dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    dataset.ContainerIdentifier = _text(result.name)
    dataset.IssuerOfTheContainerIdentifierSequence = []
    dataset.ContainerTypeCodeSequence = []
    dataset.SpecimenDescriptionSequence = [_specimen(result)]
    dataset.Rows = dataset.Columns = 512
    dataset.NumberOfFrames = 1
    dataset.TotalPixelMatrixRows = slide.height_px
    dataset.TotalPixelMatrixColumns = slide.width_px
    dataset.ImageOrientationSlide = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    corner = Dataset()
    corner.XOffsetInSlideCoordinateSystem = corner.YOffsetInSlideCoordinateSystem = 0.0
    dataset.TotalPixelMatrixOriginSequence = [corner]
    dataset.DimensionOrganizationType = "TILED_FULL"
    measures = Dataset()
    measures.PixelSpacing = [slide.pixel_size.y / _UM_PER_MM, slide.pixel_size.x / _UM_PER_MM]
    measures.SliceThickness = 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    return dataset


def _specimen(result: SlideResult) -> Any:
    specimen = Dataset()
    specimen.SpecimenIdentifier = _text(result.name)
    specimen.SpecimenUID = _slide_uid(result, "specimen")
    specimen.IssuerOfTheSpecimenIdentifierSequence = []
    specimen.SpecimenPreparationSequence = []
    return specimen


def _text(name: str) -> str:
    """A name as a value of DICOM: 64 characters, no backslash, which separates values."""
    printable = "".join(one if one.isprintable() else " " for one in name.replace("\\", "/"))
    return printable[:64]


def _segments(result: SlideResult, highdicom: Any) -> list[Any]:
    """One segment per class, with its colour; classes have codes of our own."""
    from pydicom.sr.codedict import codes  # 50 ms that other formats do not need

    tissue = codes.SCT.Tissue
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=_text(result.plan.model.name),
        version=_text(result.plan.model.version),
        family=codes.DCM.ArtificialIntelligence,
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=label,
            segment_label=_text(entry.name),
            segmented_property_category=tissue,
            segmented_property_type=highdicom.sr.CodedConcept(
                value=str(label), scheme_designator=_SCHEME, meaning=_text(entry.name)
            ),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            display_color=highdicom.color.CIELabColor.from_rgb(*entry.rgb),
        )
        for label, entry in enumerate(result.plan.model.classes, start=1)
    ]


def _pixel_mm(result: SlideResult, source: Any) -> tuple[float, float]:
    """Height and width of a pixel of level 0, as the source has it in its frame of reference."""
    try:
        measures = source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        y, x = map(float, measures.PixelSpacing)
    except (AttributeError, LookupError, TypeError, ValueError):  # it does not say
        size = result.plan.slide.pixel_size
        y, x = size.y / _UM_PER_MM, size.x / _UM_PER_MM
    return y, x


def _position(result: SlideResult, source: Any, highdicom: Any) -> Any:
    """Where the map's corner lies on the slide, in mm."""
    origin = source.TotalPixelMatrixOriginSequence[0]
    orientation = [float(value) for value in source.ImageOrientationSlide]
    sides = _pixel_mm(result, source)
    y, x = (start * side for start, side in zip(result.plan.origin_px, sides, strict=True))
    row, column = np.array(orientation[:3]), np.array(orientation[3:])  # along x, along y
    place = row * x + column * y
    return highdicom.PlanePositionSequence(
        coordinate_system="SLIDE",
        image_position=(
            float(origin.XOffsetInSlideCoordinateSystem) + place[0],
            float(origin.YOffsetInSlideCoordinateSystem) + place[1],
            0.0,
        ),
        pixel_matrix_position=(1, 1),
    )


def _make_repeatable(segmentation: Any, result: SlideResult) -> None:
    """Date the file as the slide is dated and name its parts by the plan: not by this writing."""
    made = datetime.datetime.fromtimestamp(
        Path(result.plan.slide.path).stat().st_mtime, datetime.UTC
    )
    for element in segmentation.iterall():
        match element.keyword:
            case "ContentDate" | "InstanceCreationDate" | "SeriesDate":
                element.value = made.strftime("%Y%m%d")
            case "ContentTime" | "InstanceCreationTime" | "SeriesTime":
                element.value = made.strftime("%H%M%S")
            case "ContributionDateTime":
                element.value = made.strftime("%Y%m%d%H%M%S")
            case "DimensionOrganizationUID":
                element.value = _uid(result, "dimensions")


def _uid(result: SlideResult, kind: str) -> str:
    """A UID that follows from the result alone."""
    return _derived_uid(result.plan.key, kind)


def _slide_uid(result: SlideResult, kind: str) -> str:
    """A UID that follows from the slide alone: the results of all models lie over each other."""
    slide = result.plan.slide
    return _derived_uid(f"{slide.fingerprint} {slide.pixel_size}", kind)


def _derived_uid(of: str, kind: str) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, f'{of} {kind}').int}"


DICOM_SEG = SlideFormat(
    name="dicom-seg",
    title="DICOM SEG",
    description="the labels as a DICOM Segmentation (LABELMAP) of the slide",
    file="{name}.seg.dcm",
    media_type="application/dicom",
    write=write_dicom_seg,
)
