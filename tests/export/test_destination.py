import json
import shutil
from pathlib import Path

import pytest

from export.destination import bundle_destination, check_repository
from export.errors import DestinationError
from tests.support.errors import raises


def _run(folder: Path) -> Path:
    """A folder as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    (folder / "model.json").write_text("{}")
    return folder


def _refused(out: Path, *values: object, **needed: Path) -> None:
    before = sorted(out.parent.rglob("*"))
    with raises(DestinationError, out, *values):
        bundle_destination(out, needed)
    assert sorted(out.parent.rglob("*")) == before


def test_a_bundle_may_go_to_a_new_folder_an_empty_one_and_in_place_of_a_bundle(
    toy_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(toy_bundle, tmp_path / "bundle")
    for name in ("new", "empty", "bundle"):
        assert bundle_destination(tmp_path / name, {}) == tmp_path / name


def test_a_bundle_of_another_version_of_focalpath_may_be_replaced(tmp_path: Path) -> None:
    content = {"schema_version": 99, "artefacts": [{"other": 1}]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert bundle_destination(tmp_path, {}) == tmp_path


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "mapping.json", "slides/"])
def test_files_of_the_users_in_a_bundle_are_not_deleted(
    name: str, toy_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    for ours in (
        "model.plan",
        "timing.cache",
        "engine_report.json",
        "parity_fp16.png",
        ".DS_Store",
    ):
        (bundle / ours).touch()
    assert bundle_destination(bundle, {}) == bundle
    (bundle / name).mkdir() if name.endswith("/") else (bundle / name).touch()
    with raises(DestinationError, name.rstrip("/")):
        bundle_destination(bundle, {})


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "not JSON"])
def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, manifest: str | None) -> None:
    run = _run(tmp_path / "run")
    if manifest is not None:
        (run / "manifest.json").write_text(manifest)
    _refused(run, "model.json")


def test_the_checkpoint_itself_is_refused_as_a_folder_and_as_a_file(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    for checkpoint in (run, run / "model.safetensors"):
        _refused(run, "checkpoint", checkpoint, checkpoint=checkpoint)


def test_a_bundle_that_contains_the_data_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    (bundle / "data").mkdir()
    _refused(bundle, "data", bundle / "data", data=bundle / "data")


def test_a_bundle_inside_the_checkpoints_folder_is_harmless(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    assert bundle_destination(run / "bundle", {"the checkpoint": run}) == run / "bundle"


def test_the_current_directory_is_refused(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    monkeypatch.chdir(bundle)
    _refused(Path(), "the current directory", bundle)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    _refused(tmp_path / "file", "expected a folder")


def test_links_are_followed_to_the_bundle_behind_them(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    (tmp_path / "current").symlink_to(bundle)
    assert bundle_destination(tmp_path / "current", {}) == bundle


def test_links_to_what_is_needed_are_followed(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    _refused(tmp_path / "link", run, "checkpoint", checkpoint=run)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    _refused(tmp_path / "a", "expected a folder")


def test_only_a_report_may_be_where_the_report_of_a_refusal_goes(tmp_path: Path) -> None:
    refused = tmp_path / "bundle-refused"
    refused.mkdir()
    (refused / "parity.json").write_text("{}")
    bundle_destination(tmp_path / "bundle", {})
    (refused / "notes.txt").write_text("mine")
    with raises(DestinationError, refused):
        bundle_destination(tmp_path / "bundle", {})


def test_the_model_repository_is_a_folder_and_not_around_the_bundle(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    check_repository(repository, tmp_path / "bundle")
    with raises(DestinationError, repository, repository / "bundle"):
        check_repository(repository, repository / "bundle")
    repository.write_text("text")
    with raises(DestinationError, repository, "expected a folder"):
        check_repository(repository, tmp_path / "bundle")
