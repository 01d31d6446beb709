import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.images.readers.errors import SlideError, SlideFormatError
from serve.images.readers.registry import open_reader
from serve.images.readers.slide_files import files_of, is_folder_of_mirax, parts_in
from tests.support.coordinates import coordinate_colors
from tests.support.dicom_slides import write_dicom_slide
from tests.support.errors import raises
from tests.support.hamamatsu import write_vms
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
        assert slide.fingerprint() != before


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


@pytest.mark.parametrize("place", [2**31 - 1, 0])
def test_a_dicom_file_with_a_damaged_table_of_frames_is_refused(place: int, tmp_path: Path) -> None:
    """OpenSlide 4.0.1 crashes where frames lie beyond the end, or do not follow each other."""
    path = dicom(tmp_path)
    level = tmp_path / "1.dcm"
    content = bytearray(level.read_bytes())
    table = content.index(bytes.fromhex("e07f1000")) + 12 + 8
    content[table + 4 : table + 8] = place.to_bytes(4, "little")
    level.write_bytes(content)
    with raises(SlideFormatError, "1.dcm", str(len(content))):
        open_reader(path)
