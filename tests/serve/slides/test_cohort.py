import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.images.readers.dicom import series_in, siblings_of
from serve.images.readers.errors import SlideFormatError
from serve.images.readers.openslide import OpenSlideReader
from serve.images.readers.registry import open_reader
from serve.service.slides.folder import SlideFolder
from serve.slides.cohort import RESULT_FILES, SlideTask, find_slides
from serve.slides.errors import CohortError
from tests.support.errors import raises
from tests.support.slides import write_dicom_head


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_gives_its_slides_and_those_below(tmp_path: Path) -> None:
    touch(
        *(tmp_path / name for name in ("B.SVS", "a.ndpi", "notes.txt", ".hidden.svs")),
        *(tmp_path / "below" / name for name in ("c.ome.tif", "d.mrxs")),
        *(tmp_path / "below" / "d" / name for name in ("Slidedat.ini", "label.jpg")),
        tmp_path / "e.zarr" / "zarr.json",
        tmp_path / "f.zarr" / ".zattrs",
    )
    write_dicom_head(tmp_path / "series" / "1.dcm", "1.2.5")
    write_dicom_head(tmp_path / "series" / "2.dcm", "1.2.5")
    tasks, problems = find_slides([tmp_path])
    assert problems == []
    assert [task.name for task in tasks] == ["B", "a", "c", "d", "e", "f", "series"]
    assert tasks[-1].path == tmp_path / "series"


def test_results_below_a_folder_of_slides_are_no_slides(tmp_path: Path) -> None:
    touch(
        tmp_path / "a.svs",
        tmp_path / "out" / "summary.csv",
        *(tmp_path / "out" / "a" / name for name in ("a.overview.png", "a.labels.ome.tif")),
        tmp_path / "out" / "a" / "a.ome.zarr" / "zarr.json",
        *(tmp_path / "out" / "a" / name for name in RESULT_FILES),
    )
    tasks, problems = find_slides([tmp_path])
    assert [task.name for task in tasks] == ["a"]
    assert problems == []
    assert [slide.file for slide in SlideFolder(tmp_path, tmp_path / "others").slides()] == [
        "a.svs"
    ]


def test_dicom_series_beside_other_slides_are_a_slide_each(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs", tmp_path / "broken.dcm")
    for name, series in (("x1", "1.1"), ("x2", "1.1"), ("y1", "1.2"), ("y2", "1.2")):
        write_dicom_head(tmp_path / f"{name}.dcm", series)
    write_dicom_head(tmp_path / "below" / "z.dcm", "1.1")
    tasks, problems = find_slides([tmp_path])
    assert problems == []
    assert [task.name for task in tasks] == ["a", "below", "broken", "x1", "y1"]
    assert siblings_of(tmp_path / "y2.dcm") == (tmp_path / "y1.dcm", tmp_path / "y2.dcm")
    with raises(SlideFormatError, "3"):
        OpenSlideReader(tmp_path)
    touch(tmp_path / "below" / "further" / "b.svs")
    tasks, _ = find_slides([tmp_path / "below"])
    assert [task.name for task in tasks] == ["b", "z"]


def deflated(content: bytes) -> bytes:
    """Its head cannot be read without the rest, which may be as large as it likes."""
    syntax = b"1.2.840.10008.1.2.1.99"
    found = content.replace(b"1.2.840.10008.1.2.1\0\x02", syntax + b"\x02")
    place = found.index(syntax)
    return found[: place - 2] + bytes([len(syntax), 0]) + found[place:]


def damaged(content: bytes) -> bytes:
    """A number of four bytes says that it has two."""
    assert content[132:140] == b"\2\0\0\0UL\4\0"
    return content[:138] + b"\2" + content[139:]


@pytest.mark.parametrize("change", [deflated, damaged])
def test_a_dicom_file_whose_head_is_not_read_is_alone(
    change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    for name in ("1", "2"):
        path = write_dicom_head(tmp_path / f"{name}.dcm", "1.1")
    path.write_bytes(change(path.read_bytes()))
    assert len(series_in(tmp_path)) == 2


def test_a_csv_says_what_is_special_about_a_slide(tmp_path: Path) -> None:
    touch(*(tmp_path / "slides" / f"{name}.svs" for name in "ab"), tmp_path / "masks" / "b.png")
    table = tmp_path / "cohort.csv"
    table.write_text(
        "\ufeffpath,name,mpp,tissue\nslides/a.svs,first,0.25,\nslides/b.svs,,,masks/b.png\n",
        encoding="utf-8",
    )
    tasks, _ = find_slides([table])
    assert [(task.name, task.mpp) for task in tasks] == [("first", 0.25), ("b", None)]
    assert tasks[0].path == tmp_path / "slides" / "a.svs"
    assert tasks[1].tissue == str(tmp_path / "masks" / "b.png")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("slide\na.svs\n", "slide"),
        ("path,magnification\na.svs,40\n", "magnification"),
        ("path,mpp\na.svs,big\n", "line 2"),
        *(
            (f"path,name\na.svs,{name}\n", "line 2")
            for name in ("../x", "x/y", ".x", "x\\y", "a:b")
        ),
        ("path,mpp\na.svs,nan\n", "line 2"),
        ("path,mpp\na.svs,-0.5\n", "0.05"),
        ("path\ngone.svs\n", "gone.svs"),
        ("path,reader\na.svs,opensl\n", "line 2"),
        ("path,tissue\na.svs,Auto\n", "line 2"),
        ("path,tissue\na.svs,.\n", "line 2"),
        ("path,tissue\na.svs,pipe.png\n", "line 2"),
        ("path\n" + "x" * 5000, "line 2"),
        ("path\na.svs\n\n" + "x" * 200_000, "line 4"),
        ("path\nward, 7.svs\n", "line 2"),
        ("path,\na.svs,0.5\n", "line 2"),
        ('path\n"a.svs\n', "line 2"),
        ("path,path\na.svs,b.svs\n", "2 columns called path"),
        ("path|mpp\na.svs|0.5\n", "path|mpp"),
        ("", "none"),
    ],
)
def test_a_csv_that_cannot_be_used_is_told_by_its_line(
    content: str, told: str, tmp_path: Path
) -> None:
    touch(tmp_path / "a.svs")
    os.mkfifo(tmp_path / "pipe.png")
    table = tmp_path / "cohort.csv"
    table.write_text(content)
    with raises(CohortError, told):
        find_slides([table])


def test_a_folder_that_may_not_be_looked_into_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.svs", tmp_path / "lost+found" / "b.svs", tmp_path / "z" / "c.svs")
    listed = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:  # root may look into every folder
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    tasks, problems = find_slides([tmp_path])
    assert [task.name for task in tasks] == ["a", "lost+found", "c"]
    assert not problems
    with pytest.raises(PermissionError):
        open_reader(tmp_path / "lost+found")


def test_a_pipe_is_no_csv(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with raises(CohortError, "pipe.csv"):
        find_slides([tmp_path / "pipe.csv"])


@pytest.mark.parametrize(
    ("one", "other"), [("a", "A"), ("Stra\u00dfe", "STRASSE"), ("\u00e9", "e\u0301")]
)
def test_names_that_some_system_takes_for_one_are_told_and_the_others_go_on(
    one: str, other: str, tmp_path: Path
) -> None:
    paths = [tmp_path / f"x/{one}.svs", tmp_path / f"y/{other}.svs", tmp_path / "y" / "b.svs"]
    touch(*paths)
    tasks, problems = find_slides(paths)
    assert [task.name for task in tasks] == [one, "b"]
    assert [problem.path for problem in problems] == [str(paths[1])]
    assert f"{one}.svs" in problems[0].reason


def test_a_slide_that_is_named_twice_is_done_once(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs")
    (tmp_path / "link").symlink_to(tmp_path)
    again = tmp_path / "a.svs", tmp_path / "link" / "a.svs"
    tasks, problems = find_slides([tmp_path, *again])
    assert (len(tasks), problems) == (1, [])


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffpath, mpp ,,\r\n a.svs ,,,\r\n\r\nb.svs,0.5\r\n".encode(),
        "path;mpp\r\na.svs;\r\n;\r\nb.svs;0,5\r\n".encode("utf-16"),
    ],
)
def test_a_csv_of_a_spreadsheet_may_have_empty_cells_and_rows(
    content: bytes, tmp_path: Path
) -> None:
    touch(tmp_path / "a.svs", tmp_path / "b.svs")
    table = tmp_path / "cohort.csv"
    table.write_bytes(content)
    tasks, _ = find_slides([table])
    assert [(task.name, task.mpp) for task in tasks] == [("a", None), ("b", 0.5)]


@pytest.mark.parametrize("written", ["ward\\Gr\u00f6\u00dfe.svs", "ward/Gro\u0308\u00dfe.svs"])
@pytest.mark.parametrize("stored", ["Gr\u00f6\u00dfe.svs", "Gro\u0308\u00dfe.svs"])
def test_a_csv_of_another_system_names_the_same_files(
    written: str, stored: str, tmp_path: Path
) -> None:
    touch(tmp_path / "ward" / stored)
    table = tmp_path / "cohort.csv"
    table.write_text(f"path,tissue\n{written},{written}\n", encoding="utf-8")
    (task,), _ = find_slides([table])
    assert task.path == tmp_path / "ward" / stored
    assert task.tissue == str(tmp_path / "ward" / stored)


def test_a_slide_that_is_listed_twice_with_other_options_is_told(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs")
    table = tmp_path / "cohort.csv"
    table.write_text("path,mpp\na.svs,0.5\na.svs,0.25\na.svs,0.5\n")
    tasks, (problem,) = find_slides([table])
    assert [task.mpp for task in tasks] == [0.5]
    assert "twice" in problem.reason


def test_other_processes_are_told_where_a_slide_and_its_mask_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for tissue, told in (("mask.png", str(tmp_path / "mask.png")), ("auto", "auto"), ("", "")):
        task = SlideTask(path=Path("a.svs"), tissue=tissue).absolute()
        assert (task.path, task.tissue) == (tmp_path / "a.svs", told)


def test_folders_that_are_linked_in_a_circle_are_looked_at_once(tmp_path: Path) -> None:
    touch(tmp_path / "ward" / "a.svs", tmp_path / "other" / "b.svs")
    for name in ("first", "second"):
        (tmp_path / "ward" / name).symlink_to(tmp_path)
    tasks, problems = find_slides([tmp_path])
    assert [task.name for task in tasks] == ["b", "a"]
    assert problems == []


@pytest.mark.parametrize(
    "name",
    [
        *(b"line\nfeed.svs", b"latin-\xfc.svs", b"x" * 220 + b".svs"),
        *("\xfc".encode() * 110 + b".svs", b"Summary.svs", b"run.svs"),
    ],
)
def test_a_file_whose_name_cannot_be_a_results_is_told(tmp_path: Path, name: bytes) -> None:
    touch(tmp_path / "a.svs", tmp_path / os.fsdecode(name))
    tasks, problems = find_slides([tmp_path])
    assert [task.name for task in tasks] == ["a"]
    assert len(problems) == 1


def test_nothing_to_do_is_told(tmp_path: Path) -> None:
    with raises(CohortError, tmp_path):
        find_slides([tmp_path])
    with raises(CohortError, tmp_path / "gone"):
        find_slides([tmp_path / "gone"])
