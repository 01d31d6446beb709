import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    SegmentationStorage,
)

from serve.images.readers.dicom import check_files, series_in, siblings_of
from serve.images.readers.errors import SlideError, SlideFormatError
from serve.images.readers.registry import open_reader
from serve.images.readers.slide_files import files_of, is_folder_of_mirax, parts_in
from serve.slides.cohort import find_slides, name_of
from tests.support.coordinates import coordinate_colors
from tests.support.dicom_slides import write_dicom_slide
from tests.support.errors import raises
from tests.support.hamamatsu import write_vms
from tests.support.slides import write_aperio
from tests.support.vendors import VENDORS


def vms(folder: Path) -> Path:
    return write_vms(folder / "h.vms", coordinate_colors(256, 256), grid=(1, 2))


def mirax(folder: Path) -> Path:
    return VENDORS["mirax"].make(folder)


KINDS = pytest.mark.parametrize(
    ("make", "data"), [(vms, "h(1,0).jpg"), (mirax, "m/Data0000.dat")], ids=["vms", "mirax"]
)


def dicom(folder: Path) -> Path:
    return write_dicom_slide(folder, coordinate_colors(100, 100))


def dicom_folder(folder: Path) -> Path:
    return dicom(folder / "series").parent


def dicom_without_suffix(folder: Path) -> Path:
    return renamed(dicom_folder(folder), "1.2.840.{}") / "1.2.840.1"


def renamed(series: Path, pattern: str) -> Path:
    """Call the files of a DICOM series otherwise."""
    for file in series.iterdir():
        file.rename(series / pattern.format(file.stem))
    return series


def test_a_slide_is_all_of_its_files(tmp_path: Path) -> None:
    names = ["h.vms", "h(1,0).jpg", "h.jpg", "h_macro.jpg", "h_map2.jpg"]
    assert [file.name for file in files_of(vms(tmp_path))] == names
    names = ["m.mrxs", "Data0000.dat", "Index.dat", "Slidedat.ini"]
    assert [file.name for file in files_of(mirax(tmp_path))] == names
    assert is_folder_of_mirax(tmp_path / "m")
    assert {file.name for file in parts_in(tmp_path)} == {
        *("h(1,0).jpg", "h.jpg", "h_macro.jpg", "h_map2.jpg")
    }


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (vms, "h(1,0).jpg"),
        (mirax, "m/Data0000.dat"),
        (dicom, "2.dcm"),
        (dicom_folder, "series/2.dcm"),
        (dicom_without_suffix, "series/1.2.840.2"),
    ],
)
def test_a_slide_is_another_when_a_file_beside_it_changes(
    make: Callable[[Path], Path], data: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with open_reader(path) as slide:
        before = slide.fingerprint()
        slide.check_unchanged()
        content = bytearray((tmp_path / data).read_bytes())
        content[-20] ^= 1
        (tmp_path / data).write_bytes(content)
        with raises(SlideError, path.name):
            slide.check_unchanged()
        with raises(SlideError, path.name):  # it would be that of the new one
            slide.fingerprint()
    with open_reader(path) as slide:
        assert slide.fingerprint() != before


PLACES = ((65, 65), (65, 1), (1, 65), (1, 1))
"""Of the tiles of a level of 100 x 100 px, from the last to the first."""


def frame_at(row: int, column: int) -> Dataset:
    place, frame = Dataset(), Dataset()
    place.RowPositionInTotalImagePixelMatrix = row
    place.ColumnPositionInTotalImagePixelMatrix = column
    frame.PlanePositionSlideSequence = [place]
    return frame


@KINDS
def test_files_that_were_not_copied_are_named(
    make: Callable[[Path], Path], data: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    (tmp_path / data).unlink()
    for reader in (None, "openslide"):
        with raises(SlideFormatError, path.name, data):
            open_reader(path, reader)


def test_a_mirax_file_without_its_folder_is_named(tmp_path: Path) -> None:
    path = mirax(tmp_path)
    shutil.rmtree(tmp_path / "m")
    with raises(SlideFormatError, "m.mrxs", "m/Slidedat.ini"):
        open_reader(path)


def test_files_that_no_reader_needs_may_be_missing(tmp_path: Path) -> None:
    path = vms(tmp_path)
    text = path.read_text()
    path.write_text(f"{text}OptimisationFile=gone.opt\nImageFile(1,0,0)=other_plane.jpg\n")
    with open_reader(path) as slide:
        assert slide.read(0, 0, 0, 50, 50).std() > 10
        slide.check_unchanged()


@pytest.mark.parametrize("text", ["", "[Virtual Microscope Specimen]\nImageFile=\0\n", "\xff"])
def test_a_text_that_names_nothing_is_no_slide(text: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.vms"
    path.write_text(text, encoding="latin-1")
    with raises(SlideFormatError, path.name):
        open_reader(path)


@pytest.mark.parametrize("pattern", ["{}.dcm", "{}.DCM", "IM{}", "1.2.840.{}", "{}.img"])
@pytest.mark.parametrize("place", [2**31 - 1, 0])
def test_a_dicom_file_with_a_damaged_table_of_frames_is_refused(
    place: int, pattern: str, tmp_path: Path
) -> None:
    """OpenSlide 4.0.1 crashes where frames lie beyond the end, or do not follow each other."""
    renamed(dicom(tmp_path).parent, pattern)
    path, level = (tmp_path / pattern.format(number) for number in (2, 1))
    content = bytearray(level.read_bytes())
    table = content.index(bytes.fromhex("e07f1000")) + 12 + 8
    content[table + 4 : table + 8] = place.to_bytes(4, "little")
    level.write_bytes(content)
    with raises(SlideFormatError, level.name, str(len(content))):
        open_reader(path)


def test_a_dicom_slide_may_have_a_table_of_frames_beyond_4_gib(tmp_path: Path) -> None:
    path, level = dicom(tmp_path), tmp_path / "1.dcm"
    dataset = pydicom.dcmread(level)
    frames = generate_frames(dataset.PixelData, number_of_frames=dataset.NumberOfFrames)
    dataset.PixelData, table, lengths = encapsulate_extended(list(frames))
    dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = table, lengths
    dataset.save_as(level, enforce_file_format=True)
    with open_reader(path) as slide:
        found = slide.read(0, 0, 0, 100, 100).astype(int)
        assert np.abs(found - coordinate_colors(100, 100)).max() < 12
    content = level.read_bytes()
    beyond = len(content) - 1  # counted from the first frame
    for number, (index, place) in enumerate(((1, 0), (1, 2**33), (3, beyond))):
        places = [*struct.unpack("<4Q", table)]
        places[index] = place
        level.write_bytes(content.replace(table, struct.pack("<4Q", *places)))
        os.utime(level, (number, number))  # else what was found before may still hold
        with raises(SlideFormatError, level.name, "table of 4 frames"):
            open_reader(path)


def test_files_that_do_not_say_of_which_series_they_are_are_looked_at(tmp_path: Path) -> None:
    """OpenSlide opens all files of a folder, and crashes on what is damaged."""
    path, level = dicom(tmp_path), tmp_path / "1.dcm"
    for file in (level, tmp_path / "2.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID = ""
        dataset.save_as(file, enforce_file_format=True)
    assert siblings_of(level) == (level,)
    assert [len(files) for files in series_in(tmp_path)] == [2, 1, 1]
    content = bytearray(level.read_bytes())
    table = content.index(bytes.fromhex("e07f1000")) + 12 + 8
    content[table + 4 : table + 8] = bytes(4)
    level.write_bytes(content)
    with raises(SlideFormatError, level.name, "table of 4 frames"):
        open_reader(path)


def test_pixels_that_are_not_compressed_are_no_table_of_frames(tmp_path: Path) -> None:
    path, level = dicom(tmp_path), tmp_path / "1.dcm"
    dataset = pydicom.dcmread(level)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PhotometricInterpretation = "RGB"
    dataset.PixelData = b"\7" * (dataset.NumberOfFrames * dataset.Rows * dataset.Columns * 3)
    dataset.save_as(level, enforce_file_format=True)
    check_files(path)


def test_a_deflated_dicom_file_beside_a_slide_is_not_unpacked(tmp_path: Path) -> None:
    path = dicom(tmp_path)
    other = pydicom.dcmread(tmp_path / "1.dcm")
    other.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    other.PixelData = bytes(2**25)
    other.save_as(tmp_path / "packed.dcm", enforce_file_format=True)
    tracemalloc.start()
    try:
        check_files(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pattern", ["{}.DCM", "{}.dicom", "IM{}", "1.2.840.{}"])
def test_dicom_files_are_known_whatever_they_are_called(pattern: str, tmp_path: Path) -> None:
    series = renamed(dicom_folder(tmp_path), pattern)
    (series / "README").write_text("no image")
    assert [task.path for task in find_slides([tmp_path])[0]] == [series]
    with open_reader(series) as slide:
        assert len(slide.levels) == 2
    write_aperio(series / "other.svs", coordinate_colors(64, 64))
    tasks, problems = find_slides([tmp_path])
    assert [task.path.name for task in tasks] == [pattern.format(0), "other.svs"]
    assert not problems


def test_the_name_of_a_file_without_a_suffix_is_whole(tmp_path: Path) -> None:
    names = ("1.2.840.1", "1.2.840.2", "a.b.svs")
    assert [name_of(tmp_path / name) for name in names] == ["1.2.840.1", "1.2.840.2", "a.b"]


def test_other_dicom_files_beside_a_slide_are_no_slides(tmp_path: Path) -> None:
    series = dicom_folder(tmp_path)
    other = pydicom.dcmread(series / "0.dcm")
    other.file_meta.MediaStorageSOPClassUID = other.SOPClassUID = SegmentationStorage
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    other.SeriesInstanceUID = "1.2.4"
    other.save_as(series / "map.seg.dcm", enforce_file_format=True)
    with open_reader(series) as slide:
        assert len(slide.levels) == 2


@pytest.mark.parametrize("name", ["pipe.dcm", "pipe.txt"])
def test_a_pipe_beside_a_dicom_slide_is_refused(name: str, tmp_path: Path) -> None:
    """OpenSlide looks into every file of the folder, and would wait for ever."""
    path = dicom(tmp_path)
    os.mkfifo(tmp_path / name)
    with raises(SlideFormatError, name):
        open_reader(path)


@pytest.mark.parametrize(("num_planes", "told"), [(0, "damaged"), (1, ""), (2, "8 frames for 4")])
def test_frames_that_say_where_they_lie_are_read_there(
    num_planes: int, told: str, tmp_path: Path
) -> None:
    path = dicom(tmp_path)
    level = pydicom.dcmread(tmp_path / "1.dcm")
    frames = list(generate_frames(level.PixelData, number_of_frames=level.NumberOfFrames))
    level.DimensionOrganizationType = "TILED_SPARSE"
    level.NumberOfFrames = len(frames) * max(num_planes, 1)
    level.PixelData = encapsulate(frames[::-1] * max(num_planes, 1))
    if num_planes:
        level.PerFrameFunctionalGroupsSequence = [frame_at(*at) for at in PLACES] * num_planes
    level.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    if told:
        with raises(SlideFormatError, "1.dcm", told):
            open_reader(path)
    else:
        with open_reader(path) as slide:
            found = slide.read(0, 0, 0, 100, 100).astype(int)
        assert np.abs(found - coordinate_colors(100, 100)).max() < 12
