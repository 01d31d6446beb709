import csv
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.errors import raises
from tests.support.tiny_pretraining import tiniest_pretraining
from train.data.folder import Split
from train.errors import EncoderError, RunError, SettingsError, SourceError
from train.pretraining.encoder import create_encoder, write_encoder
from train.pretraining.footprints import Footprint
from train.pretraining.magnification.evaluate import Evaluation
from train.pretraining.magnification.probe import CaseBootstrap
from train.pretraining.magnification.run import (
    check_study,
    compare_encoders,
    named_folders,
    open_encoder,
)
from train.pretraining.magnification.segmentation import require_patches
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.magnification.study import METHODS, pretrain_methods, student_tokens
from train.pretraining.settings import synthetic

TINY = tiniest_pretraining()
SETTINGS = EvaluationSettings(tile_px=32, purity=0.3, tiles_per_slide=8)


def test_an_encoder_of_other_settings_is_not_taken_into_a_study(
    labelled_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain_methods(TINY, labelled_slides, tmp_path, ["mad"], num_seeds=1)
    monkeypatch.setattr(f"{pretrain_methods.__module__}.pretrain", None)  # none is trained again
    workers = replace(TINY, schedule=replace(TINY.schedule, num_workers=7))
    pretrain_methods(workers, labelled_slides, tmp_path, ["mad"], num_seeds=1)
    longer = replace(TINY, schedule=replace(TINY.schedule, steps=4))
    with raises(RunError, tmp_path / "encoders" / "mad" / "seed0", "steps 2 -> 4"):
        pretrain_methods(longer, labelled_slides, tmp_path, ["mad"], num_seeds=1)
    wider = replace(TINY, views=replace(TINY.views, scale_jitter=0.1))
    with raises(RunError, "scale_jitter 0.2 -> 0.1"):
        pretrain_methods(wider, labelled_slides, tmp_path, ["mad"], num_seeds=1)


def test_an_encoder_that_has_seen_slides_for_testing_is_not_taken_into_a_study(
    labelled_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain_methods(TINY, labelled_slides, tmp_path, ["mad"], num_seeds=1)
    monkeypatch.setattr(f"{pretrain_methods.__module__}.pretrain", None)  # none is trained again
    other = Path(shutil.copytree(labelled_slides, tmp_path / "other"))
    folds = (other / "folds.csv").read_text().splitlines()
    swapped = [{"1": "-1", "-1": "1"}.get(fold, fold) for fold in _column(folds, "fold")]
    _set_column(folds, "fold", swapped)
    (other / "folds.csv").write_text("\n".join(folds) + "\n")
    with raises(RunError, tmp_path / "encoders" / "mad" / "seed0", "2 slides", "not for training"):
        pretrain_methods(TINY, other, tmp_path, ["mad"], num_seeds=1)


def _column(lines: list[str], name: str) -> list[str]:
    return [line.split(",")[lines[0].split(",").index(name)] for line in lines]


def _set_column(lines: list[str], name: str, values: list[str]) -> None:
    at = lines[0].split(",").index(name)
    for number, value in enumerate(values):
        cells = lines[number].split(",")
        lines[number] = ",".join([*cells[:at], value, *cells[at + 1 :]])


@pytest.mark.parametrize(
    ("methods", "num_seeds", "named"),
    [(["mad", "mad"], 1, "--methods"), (["mad"], 0, "--seeds"), (["mad"], -1, "--seeds")],
)
def test_a_study_counts_no_encoder_twice_and_needs_one(
    labelled_slides: Path, tmp_path: Path, methods: list[str], num_seeds: int, named: str
) -> None:
    with raises(SettingsError, named):
        pretrain_methods(TINY, labelled_slides, tmp_path, methods, num_seeds)


@pytest.mark.parametrize("text", ["mad=x", "random=x", "=x", "mine=", "mine", "../a=x", "..=x"])
def test_an_encoder_that_is_given_has_a_name_of_its_own(text: str) -> None:
    with raises(SettingsError, repr(text)):
        named_folders(["mine=a", text], ["mad"])


def test_what_an_evaluation_lacks_is_told_before_encoders_are_trained(
    labelled_slides: Path, tmp_path: Path
) -> None:
    with raises(EncoderError, "config.json"):
        check_study({"mine": [tmp_path]}, TINY, labelled_slides, SETTINGS)
    with raises(SourceError, "--purity"):
        check_study({}, TINY, labelled_slides, replace(SETTINGS, tile_px=96, purity=1.0))
    for patch in (14, 16):
        of_patch = replace(
            TINY,
            views=replace(TINY.views, view_px=112, local_px=112),
            encoder=replace(TINY.encoder, encoder=f"vit_small_patch{patch}_dinov2")
            if patch == 14
            else TINY.encoder,
        )
        write_encoder(create_encoder(of_patch), tmp_path / str(patch), of_patch, "")
    wide = {"mine": [tmp_path / "16"], "other": [tmp_path / "14"]}
    with raises(SettingsError, "other", "14 pixels", "--patch-px"):
        check_study(wide, TINY, labelled_slides, SETTINGS)


def _slides(classes: dict[Split, list[int]]) -> Any:
    """Slides of one label each, and a square of every one of them."""
    flat = [label for labels in classes.values() for label in labels]
    squares: dict[Split, list[Any]] = {}
    for split, labels in classes.items():
        start = sum(map(len, squares.values()))
        squares[split] = [(start + i, Footprint(0, 0, 32)) for i in range(len(labels))]
    slides = SimpleNamespace(
        classes=("a", "b"),
        read_labels=lambda slide: (np.full((32, 32), flat[slide], np.uint8), 1.0),
    )
    return slides, squares


@pytest.mark.parametrize(
    ("training", "validation", "test", "named"),
    [
        ([1, 1], [1, 2], [1, 2], ["training", "1 classes"]),
        ([], [1], [1], ["training", "0 squares"]),
        ([1, 2], [0], [1], ["validation", "0 classes"]),
        ([1, 2], [], [1], ["validation", "0 squares"]),
        ([1, 2], [1], [], ["test", "0 squares"]),
        ([1, 2], [1], [0], []),
    ],
)
def test_squares_that_no_head_can_be_fitted_on_are_refused(
    training: list[int], validation: list[int], test: list[int], named: list[str]
) -> None:
    slides, squares = _slides({"training": training, "validation": validation, "test": test})
    with raises(SourceError, *named) if named else nullcontext():
        require_patches(slides, squares, 2)


@pytest.mark.slow
def test_a_study_pretrains_each_method_once_and_reports_beside_the_untrained_encoder(
    labelled_slides: Path, tmp_path: Path
) -> None:
    encoders = pretrain_methods(TINY, labelled_slides, tmp_path, ["mad"], num_seeds=1)
    written = encoders["mad"][0].stat().st_mtime_ns
    assert pretrain_methods(TINY, labelled_slides, tmp_path, ["mad"], 1)["mad"] == encoders["mad"]
    assert encoders["mad"][0].stat().st_mtime_ns == written
    readme = compare_encoders(encoders, TINY, labelled_slides, tmp_path / "report", SETTINGS)
    text = readme.read_text()
    assert "| random" in text
    assert "| mad" in text
    assert "## Differences" in text
    with (tmp_path / "report" / "probes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["encoder"] for row in rows} == {"random", "mad"}
    assert len(rows) == 2 * 2 * 2 * 9  # encoders, colours, rules, pairs of scales
    assert (tmp_path / "report" / "retention.png").stat().st_size > 1000


def test_what_was_measured_is_kept_for_the_same_encoder_and_tiles_alone(
    labelled_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, same_field=False)
    first = compare_encoders({}, TINY, labelled_slides, tmp_path / "report", settings).read_text()
    measured = []
    monkeypatch.setattr(Evaluation, "measure", lambda *given: measured.append(given))
    assert (
        compare_encoders({}, TINY, labelled_slides, tmp_path / "report", settings).read_text()
        == first
    )
    assert not measured
    (kept,) = (tmp_path / "measured").rglob("*.json")
    content = json.loads(kept.read_text())
    for damage in ({"probes": {}, "retrieval": 3}, {"probes": {"as is": {"matrix": {}}}}):
        kept.write_text(json.dumps(content | damage))
        with pytest.raises(TypeError):  # the patched measure gives nothing to report
            compare_encoders({}, TINY, labelled_slides, tmp_path / "report", settings)
        assert measured.pop(), "what is damaged is measured again"
    other = replace(TINY, encoder=replace(TINY.encoder, depth=2))
    for changed in ((other, settings), (TINY, replace(settings, tiles_per_slide=7))):
        with pytest.raises(TypeError):  # the patched measure gives nothing to report
            compare_encoders({}, changed[0], labelled_slides, tmp_path / "report", changed[1])
    assert len(measured) == 2


def test_retrieval_takes_each_scales_mean_off() -> None:
    """What a scale adds to all embeddings does not hide the places; its test tiles tell nothing."""
    rng = np.random.default_rng(0)
    gallery, far = rng.normal(size=(2, 12, 16)).astype(np.float32)
    shift = np.float32(50) * rng.normal(size=16).astype(np.float32)
    places = {
        "test": (gallery + shift, gallery),
        "training": (far - far.mean(0) + shift, far - far.mean(0)),
    }
    evaluation: Any = object.__new__(Evaluation)
    evaluation._places_cases = np.array([f"case{i % 4}" for i in range(12)])
    evaluation.bootstrap = CaseBootstrap(evaluation._places_cases)
    evaluation._places = lambda encoder, split, color: places[split]
    assert evaluation._retrieve(None, "as is").recall_at_1 == 1


def test_methods_train_on_as_many_student_tokens() -> None:
    base = synthetic()
    totals = {}
    for name, method in METHODS.items():
        settings = method.settings(base, seed=0)
        totals[name] = settings.schedule.steps * student_tokens(settings)
    reference = base.schedule.steps * student_tokens(base)
    assert all(total == pytest.approx(reference, rel=0.05) for total in totals.values())


def test_slides_with_too_few_labelled_tiles_are_refused(
    labelled_slides: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, tile_px=96, purity=1.0)
    with raises(SourceError, "--purity"):
        compare_encoders({}, TINY, labelled_slides, tmp_path, settings)


def test_a_folder_that_is_no_encoder_is_refused(labelled_slides: Path, tmp_path: Path) -> None:
    with raises(EncoderError, "config.json"):
        compare_encoders({"mine": [tmp_path]}, TINY, labelled_slides, tmp_path / "r", SETTINGS)


def test_an_encoder_whose_config_contradicts_its_weights_is_refused(tmp_path: Path) -> None:
    write_encoder(create_encoder(TINY), tmp_path, TINY, "")
    assert open_encoder(tmp_path).embed_dim == 16  # type: ignore[union-attr]
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(EncoderError, tmp_path, "contradict"):
        open_encoder(tmp_path)
