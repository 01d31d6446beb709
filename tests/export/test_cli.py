import shutil
import signal
from pathlib import Path

import pytest

from export.__main__ import main
from export.tensorrt.plan import plan_for
from export.triton import publish
from serve.contract.manifest import TensorRTBuild, read_bundle, sha256_of
from tests.support.commands import failed_export
from tests.support.interrupts import wait_while_interrupted


def test_a_missing_checkpoint_is_one_error_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed_export(tmp_path / "no_run", "--out", tmp_path / "bundle") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: no checkpoint:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--opset", "19", "20 to 24"),
        ("--max-queries", "0", "at least 1"),
        ("--max-batch-size", "3000000000", "1 to 1024"),
        ("--scale-tiles", "-1", "at least 0"),
        ("--num-emulated-tiles", "-1", "at least 0"),
        ("--fp16-range-share", "1.5", "more than 0, at most 1"),
        ("--fp32-agreement", "nan", "0 to 1"),
        ("--half-iou-score-difference", "inf", "a finite number"),
    ],
)
def test_an_option_out_of_its_range_is_one_line_with_value_and_range(
    option: str, value: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed_export(tmp_path, "--out", tmp_path / "bundle", option, value) == 1
    found = float(value) if "." in value or not value.lstrip("-").isdigit() else int(value)
    assert capsys.readouterr().err == f"error: {option} is {found}; expected {expected}.\n"


def test_keeping_no_version_is_refused_before_the_export(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--out", tmp_path / "bundle", "--model-repository", tmp_path, "--keep", "0")
    assert failed_export(toy_run, *arguments) == 1
    assert "--keep is 0; expected at least 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_model_in_the_repository_is_found_before_the_export(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "models" / "segmenter" / "config.pbtxt"
    config.parent.mkdir(parents=True)
    config.write_text('backend: "python"')
    out = tmp_path / "bundle"
    assert failed_export(toy_run, "--out", out, "--model-repository", tmp_path / "models") == 1
    assert f"{config.parent} is of another model" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_one_error(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert failed_export(toy_run, "--out", tmp_path / "file" / "bundle") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_settings_are_flat_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert failed_export("--help") == 0
    shown = capsys.readouterr().out
    options = ("--fp32-islands", "--bf16", "--int8", "--half-agreement", "--keep", "--target")
    for option in (*options, "--positions", "--max-queries"):
        assert option in shown


@pytest.fixture
def _exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is there already: only what follows the export is looked at."""
    monkeypatch.setattr(
        "export.cli.write_bundle", lambda checkpoint, out, settings: read_bundle(out)
    )


@pytest.mark.usefixtures("_exported")
def test_export_publishes_for_the_target_and_keeps_so_many_versions(
    toy_bundle: Path, tmp_path: Path
) -> None:
    publish(toy_bundle, tmp_path)
    for version in ("2", "3"):
        (tmp_path / "segmenter" / version).mkdir()
    where = ["--out", str(toy_bundle), "--model-repository", str(tmp_path)]
    main(["checkpoint", *where, "--target", "onnxruntime", "--keep", "2"])
    names = sorted(path.name for path in (tmp_path / "segmenter").iterdir())
    assert names == ["3", "4", "config.pbtxt"]


def test_a_bundle_with_an_engine_is_published_by_a_command_of_its_own(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    (bundle / "model.plan").write_text("plan")
    manifest = read_bundle(bundle)
    plan = manifest.artefacts[0].model_copy(
        update={
            "file": "model.plan",
            "format": "tensorrt_plan",
            "sha256": sha256_of(bundle / "model.plan"),
            "tensorrt": TensorRTBuild(version="10.16.1.11", compute_capability="8.0"),
        }
    )
    plan_for(manifest, manifest.artefacts[0]).write(bundle)
    manifest.model_copy(update={"artefacts": (*manifest.artefacts, plan)}).write(bundle)
    repository = tmp_path / "models"
    arguments = ("--model-repository", str(repository), "--target", "tensorrt-a100", "--keep", "1")
    main(["publish", str(bundle), *arguments])
    assert (repository / "segmenter" / "1" / "model.plan").read_text() == "plan"
    said = capsys.readouterr().out
    assert f"{repository / 'segmenter' / '1'}: published for Triton" in said
    assert "was built with TensorRT 10.16.1.11 and loads in no other" in said


def test_an_export_for_tensorrt_is_refused_with_the_three_commands_that_lead_there(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, repository = tmp_path / "bundle", tmp_path / "models"
    arguments = ("--out", out, "--model-repository", repository, "--target", "tensorrt-a100")
    assert failed_export(toy_run, *arguments, "--keep", "3") == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"python -m export {toy_run} --out {out}",
        f"python -m export engine {out}",
        f"python -m export publish {out} --model-repository {repository} --target tensorrt-a100 "
        "--keep 3",
    ]
    assert list(tmp_path.iterdir()) == []


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_export_changes_nothing_and_says_so(
    toy_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("export.bundle.torch_answers", _interrupt)
    assert failed_export(toy_run, "--out", tmp_path / "bundle") == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was changed\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("_terminal")
def test_an_export_that_is_told_to_end_leaves_nothing(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr("export.bundle.torch_answers", lambda *_: signal.raise_signal(number))
    assert failed_export(toy_run, "--out", tmp_path / "bundle") == 128 + number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_exported")
def test_an_interrupted_publication_says_that_the_bundle_is_new_and_how_to_publish_it(
    toy_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("shutil.copyfile", _interrupt)
    assert failed_export("run", "--out", toy_bundle, "--model-repository", tmp_path) == 130
    assert capsys.readouterr().err == (
        f"error: interrupted; {toy_bundle} is the new bundle; it is not published: python -m "
        f"export publish {toy_bundle} --model-repository {tmp_path} --target onnxruntime\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_exported")
def test_an_interrupt_that_comes_too_late_says_that_the_version_is_published(
    toy_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rename = Path.rename

    def interrupt(source: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    assert failed_export("run", "--out", toy_bundle, "--model-repository", tmp_path) == 130
    version = tmp_path / "segmenter" / "1"
    assert f"{toy_bundle} is the new bundle; {version} is published" in capsys.readouterr().err
    assert (version / "model.onnx").is_file()
    assert (tmp_path / "segmenter" / "config.pbtxt").is_file()


def test_ctrl_c_ends_every_wait_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.cli.Engine.run", lambda _: wait_while_interrupted())
    assert failed_export("engine", "bundle") == 130


def test_an_interrupt_while_the_options_are_read_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tyro.cli", lambda *arguments, **settings: _interrupt())
    assert failed_export("run", "--out", "bundle") == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was changed\n"
