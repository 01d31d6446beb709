import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve.images.readers.errors import SlideReadError
from tests.support.commands import run_train
from tests.support.toy_data import changed, toy_settings
from train.commands.comparison import Compare
from train.commands.fitting import Fit
from train.config import write_settings
from train.data.convert.registry import CONVERTERS, Converter
from train.model.class_bias import STRATEGIES, BiasStrategy


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    stripes: int = 3
    """How many stripes."""


@pytest.fixture
def toy_converter(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Register a converter of two inputs; what it is called with."""
    calls: list[tuple[object, ...]] = []
    converter = Converter(
        name="toy",
        help="Convert toys.",
        inputs={"slides": "Where the slides are.", "annotations": "Where the annotations are."},
        settings=ToySettings,
        convert=lambda *arguments: calls.append(arguments),
    )
    monkeypatch.setitem(CONVERTERS, "toy", converter)
    return calls


def test_a_registered_converter_is_a_command(
    toy_converter: list[tuple[object, ...]],
    capsys: pytest.CaptureFixture[str],
):
    run_train("prepare", "toy", "in", "notes", "out", "--stripes", "5")
    assert toy_converter == [(Path("in"), Path("notes"), Path("out"), ToySettings(stripes=5))]
    with pytest.raises(SystemExit):
        run_train("prepare", "--help")
    assert "Convert toys." in capsys.readouterr().out


@pytest.fixture
def toy_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = BiasStrategy(
        name="toy", title="Toy bias", help="Half for every class.", initial=lambda *_: None
    )
    monkeypatch.setitem(STRATEGIES, "toy", strategy)


@pytest.mark.usefixtures("toy_strategy")
def test_a_registered_strategy_is_a_bias_and_a_row_of_the_comparison(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found: list[Compare | Fit] = []
    for command in (Compare, Fit):
        monkeypatch.setattr(command, "run", lambda self: found.append(self))
    places = ("--data", "data", "--out", "out")
    run_train("fit", "synthetic", *places, "--bias", "toy")
    run_train("compare", "synthetic", *places, "--rows", "toy")
    fit, compare = found
    assert fit.settings.model.bias == "toy"
    assert compare.rows == ("toy",)
    with pytest.raises(SystemExit):
        run_train("fit", "--help")
    assert "toy: Half for every class." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            PermissionError(13, "Permission denied", "data"),
            "data cannot be used: Permission denied.",
        ),
        (SlideReadError("a.svs cannot be read"), "a.svs cannot be read"),
    ],
)
def test_what_the_system_or_servings_code_refuses_is_one_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("train.commands.data.report", refuse)
    with pytest.raises(SystemExit) as ended:
        run_train("check", "data")
    assert str(ended.value).startswith(f"error: {told}")


def test_an_interrupt_while_the_options_are_read_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("tyro.cli", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        run_train("check", "data")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; repeat the command\n"


@pytest.mark.parametrize("error", [SystemExit(1), RuntimeError("DataLoader worker is killed")])
def test_what_goes_wrong_while_an_interrupt_is_handled_is_told_as_the_interrupt(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise error

    monkeypatch.setattr("train.commands.data.report", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_train("check", "data")
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "interrupted; repeat the command\n"


def test_an_error_without_an_interrupt_is_not_told_as_one(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("train.commands.data.report", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_train("check", "data")


def test_an_unknown_bias_or_row_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]):
    places = ("--data", "data", "--out", "out")
    for arguments in (("fit", "synthetic", "--bias"), ("compare", "synthetic", "--rows")):
        with pytest.raises(SystemExit) as caught:
            run_train(*arguments, "dfaa", *places)
        assert caught.value.code == 2
        assert "dfa_heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ("fit synthetic --epochs 0", "--epochs is 0; expected at least 1."),
        (
            "fit synthetic --bias-epsilon 0",
            "--bias-epsilon is 0.0; expected more than 0, at most 1.",
        ),
        ("compare synthetic --focal-weight 2", "--focal-weight is 2.0; expected 0 to 1."),
        (
            "fit bcss --decoder-dim 100",
            "--decoder-dim is 100; expected more than 0, a multiple of 16.",
        ),
        ("pretrain synthetic --steps 0", "--steps is 0; expected at least 1."),
        ("pretrain synthetic --local-px 999", "local_px is 999; expected at most --view-px (96)"),
        ("magnification synthetic --purity 3", "--purity is 3.0; expected more than 0, at most 1."),
    ],
)
def test_an_option_out_of_its_range_is_one_line_with_value_and_range(arguments: str, refused: str):
    with pytest.raises(SystemExit) as caught:
        run_train(*arguments.split(), "--data", "data", "--out", "out")
    message = str(caught.value)
    assert message.startswith("error: ")
    assert refused in message
    assert "\n" not in message


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_run_starts_from_a_config_file_and_options_change_it(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    found: list[Compare | Fit] = []
    for kind in (Compare, Fit):
        monkeypatch.setattr(kind, "run", lambda self: found.append(self))
    settings = toy_settings(weights={"sam_weights": "sam.pth"})
    write_settings(tmp_path / "run.yaml", settings)
    places = ("--data", "data", "--out", "out")
    run_train(command, "--config", str(tmp_path / "run.yaml"), *places, "--epochs", "9")
    (started,) = found
    assert started.settings == changed(settings, optimization={"epochs": 9})


def test_a_config_file_that_cannot_be_is_one_line(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("preset: bcss\nmodel: {tile_size: 64}")
    with pytest.raises(SystemExit) as caught:
        run_train("fit", "--config", tmp_path / "run.yaml")
    assert str(caught.value).startswith("error: ")
    assert "tile_size" in str(caught.value)
