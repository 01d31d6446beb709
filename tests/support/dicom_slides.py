"""Whole slides in DICOM, small and written here: each level, the label and the overview a file."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

from tests.support.vendor_tiffs import TILE_PX, garish, shrunk

Pixels = NDArray[np.uint8]

_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate"),
    *("StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
_EMPTY_SEQUENCES = ("IssuerOfTheContainerIdentifierSequence", "ContainerTypeCodeSequence")
"""What every DICOM slide has, and what a segmentation of it copies."""
_SERIES = "1.2.826.0.1.3680043.8.498.1"


def write_dicom_slide(
    folder: Path,
    pixels: Pixels,
    *,
    mpp: tuple[float, float] = (0.5, 0.5),
    downsamples: Sequence[int] = (4,),
) -> Path:
    """Write a series into a folder, and return its first file: the label, as it happens.

    Args:
        folder: made where it is missing.
        pixels: (H, W, 3).
        mpp: um per pixel along x and y.
        downsamples: of the coarser levels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = [("LABEL", "NONE", garish(TILE_PX, TILE_PX), 16)]
    for factor in (1, *downsamples):
        images.append(
            ("VOLUME", "NONE" if factor == 1 else "RESAMPLED", shrunk(pixels, factor), factor)
        )
    images.append(("OVERVIEW", "NONE", garish(TILE_PX, TILE_PX), 16))
    paths = []
    for number, (flavour, derived, image, factor) in enumerate(images):
        dataset = _dataset(image, number, (mpp[0] * factor, mpp[1] * factor))
        first = "DERIVED" if derived == "RESAMPLED" else "ORIGINAL"
        dataset.ImageType = [first, "PRIMARY", flavour, derived]
        paths.append(folder / f"{number}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths[0]


def _dataset(image: Pixels, number: int, mpp: tuple[float, float]) -> Dataset:
    """A DICOM file of one image, without its kind."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{_SERIES}.{number}"
    dataset.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    dataset.SOPInstanceUID = f"{_SERIES}.{number}"
    dataset.SeriesInstanceUID = _SERIES
    dataset.StudyInstanceUID = f"{_SERIES}.0.1"
    dataset.FrameOfReferenceUID = f"{_SERIES}.0.2"
    dataset.PositionReferenceIndicator = "SLIDE_CORNER"
    dataset.Modality = "SM"
    for name in _EMPTY:
        setattr(dataset, name, "")
    dataset.ContainerIdentifier = "slide"
    for name in _EMPTY_SEQUENCES:
        setattr(dataset, name, [])
    specimen, origin = Dataset(), Dataset()
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "slide", f"{_SERIES}.0.3"
    specimen.IssuerOfTheSpecimenIdentifierSequence = specimen.SpecimenPreparationSequence = []
    dataset.SpecimenDescriptionSequence = [specimen]
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 20
    dataset.TotalPixelMatrixOriginSequence = [origin]
    dataset.ImageOrientationSlide = [0, 1, 0, 1, 0, 0]
    dataset.DimensionOrganizationType = "TILED_FULL"
    height, width = image.shape[:2]
    dataset.TotalPixelMatrixColumns, dataset.TotalPixelMatrixRows = width, height
    dataset.TotalPixelMatrixFocalPlanes = 1
    dataset.Rows = dataset.Columns = TILE_PX
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
    dataset.PhotometricInterpretation = "YBR_FULL_422"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [f"{side / 1000:.8f}" for side in mpp[::-1]]  # between rows first
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = _frames(image)
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = encapsulate(frames)
    return dataset


def _frames(image: Pixels) -> list[bytes]:
    """The tiles of an image as JPEGs, row by row; the last are filled up."""
    height, width = image.shape[:2]
    padded = np.pad(image, [(0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0)])
    frames = []
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            buffer = io.BytesIO()
            tile = np.ascontiguousarray(padded[top : top + TILE_PX, left : left + TILE_PX])
            Image.fromarray(tile).save(buffer, "JPEG", quality=97, subsampling=0)
            frames.append(buffer.getvalue())
    return frames
