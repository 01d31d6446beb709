"""Slides of several files in the service's folder."""

import os
import shutil
from pathlib import Path

import pytest

from serve.images.readers.errors import SlideFormatError
from serve.service.slides.folder import SlideFile, SlideFolder, SlidesAwayError
from serve.service.slides.reading import OpenSlides
from tests.support.coordinates import coordinate_colors
from tests.support.errors import raises
from tests.support.hamamatsu import write_vms
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
