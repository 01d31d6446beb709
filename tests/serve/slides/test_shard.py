import errno
import os
import threading
from pathlib import Path

import pytest

from serve.contract.errors import SettingsError
from serve.slides.cohort import SlideTask
from serve.slides.commands import verify
from serve.slides.local import ran_on
from serve.slides.lock import SlideBusyError, slide_lock
from serve.slides.shard import Shard, write_list
from serve.slides.status import read_status
from serve.slides.summary_csv import refuse_other_summary, write_cohort_csv
from tests.support.errors import raises


def tasks(*names: str) -> list[SlideTask]:
    return [SlideTask(path=Path(f"{name}.svs"), name=name) for name in names]


@pytest.mark.parametrize("text", ["3", "3/", "/8", "8/8", "9/8", "0/0", "-1/8", "1.5/8", "a/b"])
def test_what_is_no_shard_is_told(text: str) -> None:
    with raises(SettingsError, text, code="setting_invalid"):
        Shard.parse(text)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 30])
def test_every_slide_belongs_to_exactly_one_shard_whatever_the_order_of_the_list(
    count: int,
) -> None:
    names = [f"slide{number}" for number in range(20)]
    given = tasks(*names)
    parts = [Shard.parse(f"{index}/{count}").of(given) for index in range(count)]
    assert sorted(task.name for part in parts for task in part) == sorted(names)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == [Shard(index, count).of(given[::-1]) for index in range(count)]


def test_status_names_the_slides_that_no_shard_has_begun(tmp_path: Path) -> None:
    write_list(tmp_path, tasks("b", "a"))
    assert [(slide.name, slide.state) for slide in read_status(tmp_path)] == [
        ("a", "waiting"),
        ("b", "waiting"),
    ]


@pytest.mark.parametrize("content", [b"", b'["a", ', b'{"a": 1}', b"[1]", b"[null]", b"\xff\xfe"])
def test_a_list_of_slides_that_a_power_failure_cut_off_ends_no_status(
    content: bytes, tmp_path: Path
) -> None:
    write_list(tmp_path, tasks("a"))
    (tmp_path / ".work" / ".slides.json").write_bytes(content)
    assert read_status(tmp_path) == []


def test_who_may_only_read_sees_which_slides_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("running", "stopped"):
        (tmp_path / ".work" / name).mkdir(parents=True)
    lock, stale = (tmp_path / ".work" / f"{name}.lock" for name in ("running", "stopped"))
    stale.touch()
    with slide_lock(lock):
        with monkeypatch.context() as patched:
            for name in ("open", "unlink"):
                patched.setattr(os, name, refuse)
            states = {slide.name: slide.state for slide in read_status(tmp_path)}
        with pytest.raises(SlideBusyError), slide_lock(lock):
            pass
    assert states == {"running": "running", "stopped": "stopped"}
    assert stale.exists()


def refuse(*arguments: object, **options: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_the_csv_is_right_when_a_slide_appears_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that writes last may have looked before another one had published."""
    looks = iter([b"a\n", b"a\nb\n", b"a\nb\n"])
    monkeypatch.setattr("serve.slides.summary_csv.cohort_csv", lambda out: next(looks))
    write_cohort_csv(tmp_path)
    assert (tmp_path / "summary.csv").read_bytes() == b"a\nb\n"


def test_runs_that_end_at_once_do_not_harm_each_others_csv(tmp_path: Path) -> None:
    failed = []

    def write() -> None:
        try:
            for _ in range(30):
                write_cohort_csv(tmp_path)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_may_not_be_entered_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir(mode=0)
    write_cohort_csv(tmp_path)
    assert (read_status(tmp_path), ran_on(tmp_path)) == ([], None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_result_that_its_owner_does_not_share_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_list(tmp_path, tasks("closed", "next"))
    (tmp_path / "closed").mkdir(mode=0)
    closed, following = read_status(tmp_path)
    assert (closed.state, following.state) == ("failed", "waiting")
    assert "Permission denied" in closed.reason
    assert "--overwrite" not in closed.reason
    assert verify(tmp_path) == 1
    assert closed.reason in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_summary_that_may_not_be_read_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").touch(mode=0)
    with raises(PermissionError, "summary.csv"):
        refuse_other_summary(tmp_path)
