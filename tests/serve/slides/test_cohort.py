from pathlib import Path

import pytest

from serve.slides.cohort import find_slides
from serve.slides.errors import CohortError
from tests.support.errors import raises


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_gives_its_slides_and_those_below(tmp_path: Path) -> None:
    touch(
        *(tmp_path / name for name in ("b.svs", "a.ndpi", "notes.txt", ".hidden.svs")),
        *(tmp_path / "below" / name for name in ("c.ome.tif", "d.mrxs")),
        tmp_path / "below" / "d" / "Data0001.dat",
        tmp_path / "series" / "1.dcm",
        tmp_path / "series" / "2.dcm",
        tmp_path / "e.zarr" / "zarr.json",
    )
    tasks, problems = find_slides([tmp_path])
    assert problems == []
    assert [task.name for task in tasks] == ["a", "b", "c", "d", "e", "series"]
    assert tasks[-1].path == tmp_path / "series"


def test_a_csv_says_what_is_special_about_a_slide(tmp_path: Path) -> None:
    touch(tmp_path / "slides" / "a.svs", tmp_path / "slides" / "b.svs")
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
        ("path,name\na.svs,../x\n", "line 2"),
        ("path\ngone.svs\n", "gone.svs"),
        ("", "none"),
    ],
)
def test_a_csv_that_cannot_be_used_is_told_by_its_line(
    content: str, told: str, tmp_path: Path
) -> None:
    touch(tmp_path / "a.svs")
    table = tmp_path / "cohort.csv"
    table.write_text(content)
    with raises(CohortError, told):
        find_slides([table])


def test_names_that_are_the_same_or_differ_by_case_are_told_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / "x" / "a.svs", tmp_path / "y" / "A.svs", tmp_path / "y" / "b.svs"]
    touch(*paths)
    tasks, problems = find_slides(paths)
    assert [task.name for task in tasks] == ["a", "b"]
    assert [problem.path for problem in problems] == [str(paths[1])]
    assert "a.svs" in problems[0].reason


def test_a_slide_that_is_named_twice_is_done_once(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs")
    tasks, problems = find_slides([tmp_path, tmp_path / "a.svs"])
    assert (len(tasks), problems) == (1, [])


def test_nothing_to_do_is_told(tmp_path: Path) -> None:
    with raises(CohortError, tmp_path):
        find_slides([tmp_path])
    with raises(CohortError, tmp_path / "gone"):
        find_slides([tmp_path / "gone"])
