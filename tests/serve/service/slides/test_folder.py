"""Slides of several files in the service's folder."""

import os
import shutil
from pathlib import Path

import pytest

from serve.images.readers.errors import SlideFormatError
from serve.service.slides import folder as folder_module
from serve.service.slides.folder import SlideFile, SlideFolder, SlidesAwayError
from serve.service.slides.reading import OpenSlides
from tests.support.coordinates import coordinate_colors
from tests.support.dicom_slides import write_dicom_slide
from tests.support.errors import raises
from tests.support.hamamatsu import write_vms
from tests.support.meanwhile import before_call
from tests.support.slides import tissue_pixels, write_aperio, write_dicom_head
from tests.support.vendors import VENDORS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a MIRAX and a VMS slide; beside it is a picture that it must not show."""
    root = tmp_path / "slides"
    (root / "below").mkdir(parents=True)
    VENDORS["mirax"].make(root)
    (root / "m" / "preview.png").touch()
    write_vms(root / "below" / "h.vms", coordinate_colors(256, 256), grid=(1, 1))
    shutil.copyfile(root / "below" / "h.jpg", tmp_path / "secret.jpg")
    return root


def listed(folder: Path) -> dict[str, SlideFile]:
    slides = SlideFolder(folder, folder.parent / "out").slides()
    return {slide.file: slide for slide in slides}


def opened(folder: Path, file: str) -> None:
    slides = OpenSlides()
    slides.get({"path": str(folder / file), "version": "1", "root": str(folder)}).close()


def test_slides_of_several_files_are_listed_once_with_all_their_bytes(folder: Path) -> None:
    found = listed(folder)
    assert list(found) == ["below/h.vms", "m.mrxs"]
    sizes = [file.stat().st_size for file in (folder / "below").iterdir()]
    assert found["below/h.vms"].num_bytes == sum(sizes)
    for file in found:
        opened(folder, file)


@pytest.mark.parametrize(
    ("file", "part"), [("m.mrxs", "m/Data0000.dat"), ("below/h.vms", "below/h.jpg")]
)
def test_a_slide_has_another_version_when_a_file_beside_it_changes(
    file: str, part: str, folder: Path
) -> None:
    before = listed(folder)[file].version
    os.utime(folder / part, ns=(1, 1))
    assert listed(folder)[file].version != before


def test_a_slide_of_another_version_is_opened_anew(tmp_path: Path) -> None:
    slides, path = OpenSlides(), tmp_path / "case.svs"
    for version, width in (("1", 300), ("2", 400)):
        path.unlink(missing_ok=True)
        write_aperio(path, tissue_pixels(300, width))
        place = {"path": str(path), "version": version, "root": str(tmp_path)}
        assert slides.get(place).width_px == width
    for version in ("1", "2"):
        slides.close({**place, "version": version})


@pytest.mark.parametrize("folders", ["one series", "two series"])
def test_a_slide_of_dicom_is_another_when_any_file_of_it_changes_or_comes(
    folders: str, tmp_path: Path
) -> None:
    place = tmp_path / "slides" / "study"
    write_dicom_slide(place, coordinate_colors(256, 256))
    if folders == "two series":
        write_dicom_head(place / "z.dcm", "1.2.3.4")
    finest = place / "1.dcm"
    finest.rename(tmp_path / "late.dcm")
    slides = SlideFolder(tmp_path / "slides", tmp_path / "out")
    before = slides.slides()[0]
    finest.write_bytes((tmp_path / "late.dcm").read_bytes())
    come = slides.find(before.id)
    finest.write_bytes(finest.read_bytes() + b"\0")  # into the file that is there
    changed = slides.find(before.id)
    assert len({before.version, come.version, changed.version}) == 3
    assert changed.version == slides.slides()[0].version
    if folders == "two series":
        series = [file for file in place.iterdir() if file.name != "z.dcm"]
        assert changed.num_bytes == sum(file.stat().st_size for file in series)


def test_a_folder_that_is_away_is_not_taken_for_an_empty_one(folder: Path) -> None:
    slides = SlideFolder(folder, folder.parent / "out")
    (first, *_) = slides.slides()
    folder.rename(folder.with_name("away"))
    for look in (slides.slides, lambda: slides.find(first.id)):
        with raises(SlidesAwayError):
            look()


@pytest.mark.parametrize("how", ["link", "name"])
@pytest.mark.parametrize(
    ("file", "part", "text"),
    [
        ("m.mrxs", "m/Data0000.dat", "m/Slidedat.ini"),
        ("below/h.vms", "below/h.jpg", "below/h.vms"),
    ],
)
def test_no_file_of_a_slide_is_read_from_outside_of_the_folder(
    how: str, file: str, part: str, text: str, folder: Path
) -> None:
    secret = folder.parent / "secret.jpg"
    shutil.move(folder / part, secret)
    if how == "link":
        (folder / part).symlink_to(secret)
    else:
        content = (folder / text).read_text()
        assert Path(part).name in content
        (folder / text).write_text(content.replace(Path(part).name, "../../secret.jpg"))
    with raises(SlideFormatError, Path(file).name, "outside"):
        opened(folder, file)


def test_a_slower_listing_does_not_replace_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = SlideFolder(tmp_path, tmp_path / "out")
    found: list[SlideFile] = []

    def look_later() -> None:
        write_aperio(tmp_path / "new.svs", tissue_pixels(64, 64))
        found.extend(slides.slides())

    before_call(monkeypatch, folder_module, "_named", look_later)
    assert slides.slides() == []
    assert slides.find(found[0].id) == found[0]
