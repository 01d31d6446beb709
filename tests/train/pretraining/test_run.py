import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import train.pretraining.run
from tests.support.commands import run_train
from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.tiny_pretraining import tiny_pretraining
from train.errors import (
    CollapseError,
    DestinationError,
    EncoderError,
    FocalPathError,
    RunError,
    SettingsError,
    SourceError,
    WeightsError,
)
from train.pretraining.run import pretrain
from train.pretraining.settings import ViewSettings
from train.pretraining.speed import measure_speed
from train.pretraining.task import PretrainTask
from train.pretraining.views import ViewDataset, ViewSample


@pytest.fixture(scope="module")
def run(drawn_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain(tiny_pretraining(), drawn_slides, folder)
    return folder


def test_a_run_writes_an_encoder_that_timm_opens_in_one_line(run: Path) -> None:
    encoder = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
    assert encoder(torch.zeros(1, 3, 48, 48)).shape == (1, 32)
    config = json.loads((run / "encoder" / "config.json").read_text())
    assert "augreg" not in json.dumps(config)
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]


def test_a_run_records_that_it_has_seen_training_slides_alone(
    drawn_slides: Path, run: Path
) -> None:
    with (drawn_slides / "folds.csv").open(newline="") as file:
        folds = {row["img_id"]: row["fold"] for row in csv.DictReader(file)}
    seen = json.loads((run / "pretrain.json").read_text())["slides"]
    assert seen == [name for name, fold in folds.items() if fold == "1"]
    assert len(seen) == 2


def test_a_run_that_ended_while_this_one_started_is_kept(
    drawn_slides: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "run"
    before_call(
        monkeypatch,
        train.pretraining.run,
        "_trainer",
        lambda: shutil.copytree(run, mine, dirs_exist_ok=True),
    )
    with raises(DestinationError, mine, "--overwrite"):
        pretrain(tiny_pretraining(), drawn_slides, mine)
    assert _files(mine) == _files(run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_later_process_of_another_pretraining_takes_nothing_away(
    drawn_slides: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """As torchrun and srun start it beside the first, which finds that the folder is taken."""
    mine = tmp_path / "run"
    copy = partial(shutil.copytree, run, mine, dirs_exist_ok=True)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    later = SimpleNamespace(is_global_zero=False, global_rank=1, world_size=2, fit=stopped)
    monkeypatch.setattr(train.pretraining.run, "_trainer", lambda *_: later)
    before_call(monkeypatch, train.pretraining.run, "_trainer", copy)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny_pretraining(), drawn_slides, mine, overwrite=overwrite)
    assert _files(mine) == _files(run)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_a_loading_process_meets_is_the_one_message_that_it_is(
    drawn_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> ViewSample:
        raise SourceError("slide0 has no place")

    monkeypatch.setattr(ViewDataset, "__getitem__", refuse)
    with raises(SourceError, "slide0 has no place") as found:
        pretrain(tiny_pretraining(num_workers=1), drawn_slides, tmp_path / "run")
    assert "Traceback" not in str(found.value)


def test_metrics_tell_every_term_and_the_signs_of_collapse(run: Path) -> None:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    terms = {"context", "alignment", "ibot", "spread", "entropy_of_mean", "mean_entropy", "rank"}
    assert all(float(rows[-1][name]) == float(rows[-1][name]) for name in terms)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    drawn_slides: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PretrainTask.training_step

    def interrupt(task: PretrainTask, batch: ViewSample, batch_index: int) -> torch.Tensor:
        if task.global_step == 3:
            raise RuntimeError("power cut")
        return step(task, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTask, "training_step", interrupt)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(tiny_pretraining(), drawn_slides, tmp_path / "run")
    pretrain(tiny_pretraining(), drawn_slides, tmp_path / "run", resume=True)
    found, expected = (
        load_file(folder / "encoder" / "model.safetensors") for folder in (tmp_path / "run", run)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_the_same_run_is_resumed(drawn_slides: Path, run: Path) -> None:
    with raises(RunError, "batch_size 4 -> 2"):
        pretrain(tiny_pretraining(batch_size=2), drawn_slides, run, resume=True)


def test_an_encoder_is_replaced_only_on_request(drawn_slides: Path, run: Path) -> None:
    with raises(DestinationError, run, "--overwrite"):
        pretrain(tiny_pretraining(), drawn_slides, run)


def test_an_interrupted_run_is_not_started_over_without_a_word(
    drawn_slides: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copy(run / "last.ckpt", tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    with raises(DestinationError, "last.ckpt", "--resume", "--overwrite"):
        pretrain(tiny_pretraining(), drawn_slides, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("encoder", "views", "kind", "named"),
    [
        ("vit_small_patch16_224", {"view_px": 50}, SettingsError, ["view_px is 50", "48"]),
        ("vit_small_patch16_224", {"local_px": 40}, SettingsError, ["local_px is 40", "32"]),
        ("vit_small_patch14_dinov2", {"view_px": 56}, SettingsError, ["local_px is 32", "28"]),
        ("vit_small_patch32_224", {}, EncoderError, ["32 pixels", "14 or 16"]),
        ("vit_base_patch16_siglip_224", {}, EncoderError, ["class token"]),
        ("vit_medium_patch16_gap_240", {}, EncoderError, ["class token"]),
        ("eva02_tiny_patch14_224", {"view_px": 56}, EncoderError, ["Eva"]),
        ("resnet50", {}, EncoderError, ["plain vision transformer"]),
    ],
)
def test_encoders_and_views_that_cannot_be_pretrained_are_refused_before_anything_is_written(
    drawn_slides: Path,
    tmp_path: Path,
    encoder: str,
    views: dict[str, int],
    kind: type[FocalPathError],
    named: list[str],
) -> None:
    tiny = tiny_pretraining()
    settings = replace(
        tiny,
        encoder=replace(tiny.encoder, encoder=encoder),
        views=replace(tiny.views, **views),  # type: ignore[arg-type]
    )
    with raises(kind, *named):
        pretrain(settings, drawn_slides, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_gradient_reaches_the_teacher_which_follows_the_student() -> None:
    task = PretrainTask(tiny_pretraining())
    assert not any(p.requires_grad for p in task.teacher.parameters())
    pairs = zip(task.teacher.parameters(), task.student.parameters(), strict=True)
    assert all(torch.equal(teacher, student) for teacher, student in pairs)


def test_a_step_moves_each_centre_once_by_the_mean_of_all_that_its_head_said(
    drawn_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[torch.Tensor] = []
    build, tasks = PretrainTask.__init__, []

    def recorded(task: PretrainTask, settings: Any) -> None:
        build(task, settings)
        tasks.append(task)
        task.teacher.cls_head.register_forward_hook(lambda *call: said.append(call[2].detach()))

    monkeypatch.setattr(PretrainTask, "__init__", recorded)
    pretrain(tiny_pretraining(steps=1, steps_per_epoch=1), drawn_slides, tmp_path / "run")
    (task,) = tasks
    (of_both_views,) = said  # 2 coarse views of 4 samples
    assert of_both_views.shape == (8, 32)
    expected = 0.1 * of_both_views.mean(dim=0)  # DINO's c <- 0.9 c + 0.1 mean, from 0
    assert torch.allclose(task.cls_centers.center[0], expected, atol=1e-6)
    assert not task.cls_centers.center[1:].any()
    assert all(scale.any() for scale in task.dense_centers.center)


def test_a_run_starts_from_published_weights_and_their_normalisation(
    run: Path, tmp_path: Path
) -> None:
    start = tmp_path / "encoder"
    shutil.copytree(run / "encoder", start)
    config = json.loads((start / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.7, 0.5, 0.6]
    (start / "config.json").write_text(json.dumps(config))
    encoder = replace(tiny_pretraining().encoder, init_weights=str(start))
    task = PretrainTask(replace(tiny_pretraining(), encoder=encoder))
    expected = load_file(start / "model.safetensors")
    for branch in (task.student, task.teacher):
        found = branch.encoder.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert branch.encoder.pretrained_cfg["mean"] == (0.7, 0.5, 0.6)
    with raises(WeightsError, "model.safetensors", "blocks.2"):
        PretrainTask(replace(tiny_pretraining(), encoder=replace(encoder, depth=3)))


@pytest.mark.slow
def test_half_precision_trains_on_a_cpu_and_hands_on_float32(
    drawn_slides: Path, run: Path, tmp_path: Path
) -> None:
    encoder = pretrain(tiny_pretraining(precision="bf16-mixed"), drawn_slides, tmp_path / "run")
    found, expected = (load_file(f / "model.safetensors") for f in (encoder, run / "encoder"))
    assert all(value.dtype == torch.float32 for value in found.values())
    distances = [(found[name] - expected[name]).abs().max().item() for name in expected]
    assert 0 < max(distances) < 0.05  # other roundings, the same training
    assert _losses(tmp_path / "run") == pytest.approx(_losses(run), rel=0.01)


def _losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_reading_and_training_are_timed_apart_and_nothing_is_written(
    drawn_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    now = 0.0

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*arguments)

        return timed

    clock = SimpleNamespace(perf_counter=lambda: now)
    for module in ("train.fitting.timing", "train.pretraining.speed"):
        monkeypatch.setattr(f"{module}.time", clock)
    getitem, step = ViewDataset.__getitem__, PretrainTask.training_step
    monkeypatch.setattr(ViewDataset, "__getitem__", taking(0.25, getitem))
    monkeypatch.setattr(PretrainTask, "training_step", taking(2.0, step))
    speed = measure_speed(tiny_pretraining(), drawn_slides, num_steps=2)
    assert (speed.load_s, speed.step_s) == (speed.batch_size * 0.25, 2.0)
    assert "2.0 times" in speed.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "told"), [(("--measure-steps", 0), "is 0"), (("--measure-steps", 2), "no line for 2")]
)
def test_speed_is_measured_of_some_steps_and_of_the_slides_of_the_given_folds(
    drawn_slides: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[object, ...],
    told: str,
) -> None:
    folds = tmp_path / "folds.csv"
    folds.write_text("img_id,fold\nslide_0000,1\n")
    with pytest.raises(SystemExit) as end:
        run_train(
            "pretrain", "synthetic", "--data", drawn_slides, "--out", "run", "--folds", folds, *more
        )
    assert told in str(end.value.code)


def test_a_collapsed_run_ends_with_an_error_and_keeps_the_checkpoint_before(
    drawn_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.pretraining.task.LEAST_ENTROPY", 1.1)
    with raises(CollapseError, "2 steps"):
        pretrain(
            tiny_pretraining(warmup_share=0.5, collapse_patience=2), drawn_slides, tmp_path / "run"
        )
    assert (tmp_path / "run" / "last.ckpt").is_file()
    assert not (tmp_path / "run" / "encoder").exists()


def test_slides_that_cannot_show_the_views_are_refused_before_anything_is_written(
    drawn_slides: Path, tmp_path: Path
) -> None:
    large = replace(tiny_pretraining(), views=ViewSettings(view_px=96, num_local=0))
    with raises(SourceError, "128 um"):
        pretrain(large, drawn_slides, tmp_path / "run")
    assert not (tmp_path / "run").exists()
