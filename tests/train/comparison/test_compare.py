import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train.comparison.run
from tests.support.errors import raises
from tests.support.toy_data import toy_settings
from train.cli import main
from train.comparison.compare import Comparison, choose_panels, compare, data_fingerprint
from train.comparison.inputs import Inputs, changes, inputs_of
from train.comparison.methods import BASELINE, UNET, RowName, all_rows, choose_rows, paper_rows
from train.comparison.report import write_report
from train.comparison.run import RowRun
from train.comparison.tables import published_scores
from train.data.folder import read_tile_folder
from train.data.pixels import class_frequencies
from train.errors import DatasetError, RunError, SettingsError
from train.fitting.run import fit
from train.fitting.scores import evaluate
from train.fitting.task import SegmentationTask, named_scores
from train.metrics import class_scores, image_confusion
from train.model.checkpoint import load_checkpoint, read_card, save_checkpoint
from train.model.class_bias import ClassStatistics, difficulty_bias
from train.model.weight_files import weights_sha256
from train.presets import bcss
from train.settings import RuntimeSettings, Settings, WeightsSettings

ROWS: tuple[RowName, ...] = ("hcfa",)
"""The baseline comes along."""


def short_settings() -> Settings:
    settings = toy_settings()
    return replace(settings, optimization=replace(settings.optimization, epochs=1))


@pytest.fixture(scope="module")
def finished(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Baseline and HCFA, one seed, one epoch."""
    out = tmp_path_factory.mktemp("compare") / "out"
    compare(short_settings(), toy_data, out, num_seeds=1, rows=ROWS)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison that a test may spoil."""
    return copytree(finished, tmp_path / "out")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The runs that are trained from now on, and whether they are resumed."""
    runs: list[tuple[str, bool]] = []

    def spy(settings: Settings, data: Path, run: Path, **options: object) -> object:
        runs.append((run.parent.name, bool(options["resume"])))
        return fit(settings, data, run, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(train.comparison.run, "fit", spy)
    return runs


def run_again(out: Path, data: Path, settings: Settings | None = None) -> Comparison:
    return compare(settings or short_settings(), data, out, num_seeds=1, rows=ROWS)


# Rows


def test_the_rows_are_those_of_table_1_and_the_ablation(toy_data: Path):
    settings = replace(toy_settings(), preset="bcss")
    comparison = Comparison(
        settings=settings,
        data=read_tile_folder(toy_data),
        fingerprint="",
        rows=choose_rows(paper_rows()),
        seeds=(0,),
        results={},
        panels=(),
    )
    published = {name for _, name, _ in published_scores(comparison)}
    assert published == {"base_without_focal", "base_with_focal", "cffa", "hcfa", "dfa"}
    ablation = [row for row in comparison.rows if row.is_ablation]
    assert [(row.bias, row.changes["bias"]) for row in ablation] == [
        ("dfa", {"bias_init": "cold"}),
        ("dfa", {"bias_frozen": True}),
    ]


OF_THE_PAPERS_MODEL = [row for row in all_rows().values() if row.name != UNET.name]


@pytest.mark.parametrize("row", OF_THE_PAPERS_MODEL, ids=lambda row: row.name)
def test_a_row_changes_nothing_but_bias_focal_loss_and_seed(row):
    shared = toy_settings()
    settings = row.settings(shared, 5)
    assert settings.optimization.seed == 5
    for section, values in row.changes.items():
        for name, value in values.items():
            assert getattr(getattr(settings, section), name) == value
    image_encoder = row.changed("model", "image_encoder") or shared.model.image_encoder
    assert settings.model == replace(shared.model, bias=row.bias, image_encoder=image_encoder)
    restored = replace(
        settings,
        model=shared.model,
        bias=shared.bias,
        loss=replace(settings.loss, focal=True),
        optimization=replace(
            settings.optimization, seed=0, learning_rate=shared.optimization.learning_rate
        ),
    )
    assert restored == shared


def test_another_small_encoder_is_no_row_of_a_preset_with_sams(toy_data: Path, tmp_path: Path):
    with raises(SettingsError, "--rows", "encoder_tiny_conv", "vit_b"):
        compare(bcss(), toy_data, tmp_path, rows=("encoder_tiny_conv",))


def test_the_unet_trains_as_the_baseline_does():
    shared = toy_settings()
    unet, baseline = UNET.settings(shared, 5), BASELINE.settings(shared, 5)
    for group in ("augmentation", "bias"):
        assert getattr(unet, group) == getattr(baseline, group)
    rate = baseline.optimization.learning_rate
    assert replace(unet.optimization, learning_rate=rate) == baseline.optimization
    assert replace(unet.loss, iou_weight=baseline.loss.iou_weight) == baseline.loss
    assert unet.model.tile_size_px == baseline.model.tile_size_px
    assert UNET.name not in paper_rows()


@pytest.mark.slow
def test_the_unet_is_a_row_and_a_report_can_leave_out_pictures(
    finished: Path, toy_data: Path, tmp_path: Path
):
    out = copytree(finished, tmp_path / "out")
    comparison = compare(
        short_settings(), toy_data, out, num_seeds=1, rows=(UNET.name,), with_pictures=False
    )
    (result,) = comparison.of(UNET.name)
    assert [entry.change for entry in result.leverage] == ["as trained"]
    report = write_report(comparison, tmp_path / "report")
    assert "U-Net" in report.read_text(encoding="utf-8")
    assert not list(report.parent.glob("figure4*"))
    assert "figure4" not in report.read_text(encoding="utf-8")


def test_hcfa_starts_from_the_dice_of_the_baseline(finished: Path, toy_data: Path):
    baseline = read_card(finished / "runs" / BASELINE.name / "seed0")
    hcfa = read_card(finished / "runs" / "hcfa" / "seed0")
    dice = torch.tensor([baseline.metrics[f"dice/{entry.name}"] for entry in baseline.classes])
    frequencies = class_frequencies(read_tile_folder(toy_data))
    expected = difficulty_bias(hcfa.settings.bias, ClassStatistics(frequencies, dice))
    assert hcfa.class_attention_bias == pytest.approx(expected.tolist(), abs=1e-6)


# What is trained again


def test_a_finished_row_tells_what_its_bias_does(out: Path, toy_data: Path):
    leverage = run_again(out, toy_data).results["hcfa", 0].leverage
    assert leverage[0].change == "as trained"
    assert {"bias removed", "bias inverted"} < {entry.change for entry in leverage}
    assert len(leverage[0].dice_changes) == 5


def test_a_finished_row_is_not_trained_again(
    out: Path, toy_data: Path, trained: list[tuple[str, bool]]
):
    before = (out / "runs" / "hcfa" / "seed0" / "row.json").read_bytes()
    comparison = run_again(out, toy_data)
    assert not trained
    assert (out / "runs" / "hcfa" / "seed0" / "row.json").read_bytes() == before
    assert comparison.results["hcfa", 0].train_seconds > 0


@pytest.mark.slow
def test_a_changed_setting_trains_every_row_again(
    out: Path, toy_data: Path, trained: list[tuple[str, bool]], capsys: pytest.CaptureFixture[str]
):
    settings = short_settings()
    changed = replace(settings, loss=replace(settings.loss, focal_gamma=1.0))
    run_again(out, toy_data, changed)
    assert trained == [(BASELINE.name, False), ("hcfa", False)]
    text = capsys.readouterr().out
    assert "focal_gamma 2.0 -> 1.0" in text
    assert "(finished)" not in text
    (aside,) = (out / "runs" / "hcfa").glob("seed0.before-*")
    assert (aside / "model.safetensors").is_file()


def test_weights_count_by_their_content_and_other_paths_not_at_all(tmp_path: Path):
    first, second = tmp_path / "here.pth", tmp_path / "there.pth"
    torch.save({"weight": torch.zeros(2)}, first)

    def inputs(weights: Path, **runtime: object) -> Inputs:
        settings = replace(
            short_settings(),
            weights=WeightsSettings(pathology_weights=str(weights), random_encoders=True),
            runtime=RuntimeSettings(**runtime),  # type: ignore[arg-type]
        )
        return inputs_of(settings, "fingerprint", None)

    before = inputs(first)
    first.rename(second)
    assert changes(before, inputs(second, compile=True), "synthetic") == []
    torch.save({"weight": torch.ones(2)}, first)
    weights_sha256.cache_clear()
    (change,) = changes(before, inputs(first), "synthetic")
    assert change.startswith("pathology_weights ")


def test_a_row_is_not_done_whose_start_was_replaced_while_it_was_trained(
    toy_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    earlier = copytree(toy_run, tmp_path / "earlier")
    settings = replace(short_settings(), weights=WeightsSettings(from_run=str(earlier)))
    trained: list[str] = []

    def fit_and_replace(settings: Settings, data: Path, run: Path, **_: object) -> None:
        copytree(toy_run, run, dirs_exist_ok=True)
        trained.append(run.parent.name)
        segmenter, card = load_checkpoint(earlier)
        next(segmenter.parameters()).data += 1
        save_checkpoint(earlier, segmenter, card)

    monkeypatch.setattr(train.comparison.run, "fit", fit_and_replace)
    with raises(RunError, BASELINE.name, "was replaced while it was trained", "from_run"):
        compare(settings, toy_data, tmp_path / "out", num_seeds=1, rows=ROWS)
    assert trained == [BASELINE.name]
    run = RowRun(BASELINE, 0, settings, tmp_path / "out" / "runs", "")
    assert run.marker["stage"] == "training"


def changes_of_hcfa(out: Path, data: Path) -> list[str]:
    """What its finished run no longer agrees with."""
    row = all_rows()["hcfa"]
    fingerprint = data_fingerprint(read_tile_folder(data))
    return RowRun(row, 0, row.settings(short_settings(), 0), out / "runs", fingerprint).changes


def test_other_data_or_another_baseline_is_another_input(out: Path, toy_data: Path, tmp_path: Path):
    assert changes_of_hcfa(out, toy_data) == []
    data = copytree(toy_data, tmp_path / "data")
    with Image.open(data / "img" / "tile3.png") as image:
        changed = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    changed.save(data / "img" / "tile3.png")
    assert changes_of_hcfa(out, data) == ["data_sha256"]
    card = out / "runs" / BASELINE.name / "seed0" / "model.json"
    content = json.loads(card.read_text())
    content["metrics"]["dice/Tumor"] = 0.99
    card.write_text(json.dumps(content))
    (change,) = changes_of_hcfa(out, toy_data)
    assert change.startswith("baseline_dice ")


def test_a_row_of_a_former_version_is_not_trained_again_for_settings_that_came_or_went(
    out: Path, toy_data: Path, trained: list[tuple[str, bool]]
):
    for marker in (out / "runs").glob("*/seed0/row.json"):
        content = json.loads(marker.read_text())
        settings = content["inputs"]["settings"]
        settings["runtime"] |= {"embedding_cache": "cache", "compile": True}
        del settings["model"]["pathology_layer_scale"], settings["loss"]["focal_gamma"]
        marker.write_text(json.dumps(content))
    run_again(out, toy_data)
    assert not trained


_OTHER_PROCESS = """
import sys
from filelock import FileLock

with FileLock(sys.argv[1], blocking=False):
    print("free", flush=True)
    sys.stdin.readline()
    raise SystemExit
"""


@pytest.fixture
def other_process() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a process that holds a lock until it gets a line."""
    started = []

    def start(lock: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _OTHER_PROCESS, str(lock)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "free\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def before_waiting(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have `act` called before `compare` waits for a run of another process."""
    lock = RowRun.lock

    def act_and_lock(run: RowRun, *, wait: bool) -> AbstractContextManager[bool]:
        if wait:
            act()
        return lock(run, wait=wait)

    monkeypatch.setattr(RowRun, "lock", act_and_lock)


@pytest.mark.slow
def test_a_run_that_another_process_is_at_is_left_to_it_and_taken_over_when_that_dies(
    toy_data: Path,
    tmp_path: Path,
    trained: list[tuple[str, bool]],
    other_process: Callable[[Path], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    runs = tmp_path / "out" / "runs"
    process = other_process(runs / "hcfa" / ".seed0.lock")

    def kill() -> None:
        assert trained == [(BASELINE.name, False)]
        process.kill()

    before_waiting(monkeypatch, kill)
    comparison = run_again(tmp_path / "out", toy_data)
    assert trained == [(BASELINE.name, False), ("hcfa", False)]
    assert set(comparison.results) == {(BASELINE.name, 0), ("hcfa", 0)}
    assert "HCFA, seed 0: another process is training this row" in capsys.readouterr().out


@pytest.mark.slow
def test_hcfa_is_left_until_the_baseline_that_another_process_trains_is_there(
    toy_data: Path,
    tmp_path: Path,
    trained: list[tuple[str, bool]],
    other_process: Callable[[Path], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
):
    process = other_process(tmp_path / "out" / "runs" / BASELINE.name / ".seed0.lock")
    before_waiting(monkeypatch, process.kill)
    run_again(tmp_path / "out", toy_data)
    assert trained == [(BASELINE.name, False), ("hcfa", False)]


@pytest.mark.slow
def test_an_interrupted_row_is_resumed_and_its_time_counts(
    toy_data: Path, tmp_path: Path, trained: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
):
    class Interrupted(Exception):
        pass

    def interrupt(task: SegmentationTask) -> None:
        if task.current_epoch == 1:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_epoch_end", interrupt, raising=False)
        with pytest.raises(Interrupted):
            run_again(tmp_path / "out", toy_data, toy_settings())
    marker = tmp_path / "out" / "runs" / BASELINE.name / "seed0" / "row.json"
    content = json.loads(marker.read_text())
    assert content["stage"] == "training"
    marker.write_text(json.dumps({**content, "train_seconds": 1000.0}))
    comparison = run_again(tmp_path / "out", toy_data, toy_settings())
    assert trained == [(BASELINE.name, False), (BASELINE.name, True), ("hcfa", False)]
    assert comparison.results[BASELINE.name, 0].train_seconds > 1000


@pytest.mark.slow
def test_the_time_of_a_row_is_right_where_the_clock_is_set_back(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = count(2_000_000_000, -3600)
    clock = SimpleNamespace(**{**vars(time), "time": lambda: next(now)})
    monkeypatch.setattr(train.comparison.run, "time", clock)
    comparison = run_again(tmp_path / "out", toy_data, toy_settings())
    assert all(0 < result.train_seconds < 3600 for result in comparison.results.values())


def test_a_row_that_was_stopped_before_its_scores_is_only_scored(
    out: Path, toy_data: Path, trained: list[tuple[str, bool]]
):
    scores = out / "runs" / "hcfa" / "seed0" / "test.npz"
    before = np.load(scores)["confusion"]
    scores.unlink()
    comparison = run_again(out, toy_data)
    assert not trained
    assert np.array_equal(comparison.results["hcfa", 0].confusion, before)


# Scores


def test_the_tiles_confusions_add_up_to_what_evaluate_scores(finished: Path, toy_data: Path):
    run = finished / "runs" / "hcfa" / "seed0"
    segmenter, card = load_checkpoint(run)
    with np.load(run / "test.npz") as scores:
        assert list(scores["tile_ids"]) == ["tile10", "tile11"]
        pooled = torch.from_numpy(scores["confusion"].sum(axis=0))
    expected = evaluate(segmenter, card, toy_data, "test")
    found = named_scores(class_scores(pooled), card.classes)
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_unlabelled_pixels_count_in_no_cell():
    predicted = torch.tensor([[1, 2, 2], [1, 1, 3]])
    labels = torch.tensor([[1, 2, 1], [0, 3, 0]])
    assert image_confusion(predicted, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_the_panels_are_the_predicted_labels(finished: Path, toy_data: Path):
    run = finished / "runs" / "hcfa" / "seed0"
    with np.load(run / "test.npz") as scores:
        counts = dict(zip(scores["tile_ids"].tolist(), scores["confusion"], strict=True))
    for tile in choose_panels(read_tile_folder(toy_data)):
        with Image.open(run / "panels" / f"{tile.tile_id}.png") as panel:
            predicted = torch.from_numpy(np.asarray(panel).copy()).long()
        with Image.open(tile.mask) as mask:
            labels = torch.from_numpy(np.asarray(mask).copy()).long()
        assert np.array_equal(image_confusion(predicted, labels, 5), counts[tile.tile_id])


def test_panels_show_the_test_tiles_with_the_most_classes(toy_data: Path, tmp_path: Path):
    data = copytree(toy_data, tmp_path / "data")
    folder = read_tile_folder(data)
    first, second = folder.tiles["test"]
    mask = np.ones((64, 64), np.uint8)
    mask[0, :4] = [2, 3, 4, 5]  # each less than the share that counts
    Image.fromarray(mask).save(first.mask)
    mask[:32] = 2
    Image.fromarray(mask).save(second.mask)
    assert [tile.tile_id for tile in choose_panels(folder)] == [second.tile_id, first.tile_id]


# Mistakes


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ({"model": {"bias": "cffa"}}, {}, ("cffa", "--bias", "--rows")),
        ({"loss": {"focal": False}}, {}, ("--no-focal", "--rows")),
        ({"runtime": {"devices": 2}}, {}, ("2 devices", "--out")),
        ({}, {"num_seeds": 0}, ("--seeds is 0",)),
        ({}, {"rows": ("dfaa",)}, ("dfaa", "dfa_masks")),
    ],
    ids=["bias", "focal", "devices", "no seed", "unknown row"],
)
def test_what_does_not_fit_a_comparison_is_refused(
    change: dict[str, dict[str, object]],
    options: dict[str, Any],
    named: tuple[str, ...],
    toy_data: Path,
    tmp_path: Path,
):
    settings = short_settings()
    groups = {name: replace(getattr(settings, name), **values) for name, values in change.items()}
    with raises(SettingsError, *named):
        compare(replace(settings, **groups), toy_data, tmp_path, **options)


def test_data_without_test_tiles_is_refused_before_training(
    toy_data: Path, tmp_path: Path, trained: list[tuple[str, bool]]
):
    data = copytree(toy_data, tmp_path / "data")
    folds = data / "folds.csv"
    folds.write_text(folds.read_text().replace(",-1", ",1"))
    with raises(DatasetError, "no test tile"):
        run_again(tmp_path / "out", data)
    assert not trained


# The command


@pytest.mark.slow
def test_the_command_trains_and_reports(
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    flags = "--rows dfa --seeds 1 --epochs 1 --batch-size 4 --tile-size-px 64 --decoder-dim 32"
    arguments = ["compare", "synthetic", "--data", str(toy_data), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, *flags.split()])
    main()
    text = capsys.readouterr().out
    assert "Run 2 of 2: DFA, seed 0" in text
    assert "left" in text
    report = (tmp_path / "out" / "report" / "README.md").read_text(encoding="utf-8")
    assert "2 rows, seed 0" in report
    assert "Fig. 4" in report
