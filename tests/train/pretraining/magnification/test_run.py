import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.errors import raises
from tests.support.tiny_pretraining import tiniest_pretraining
from train.errors import EncoderError, RunError, SourceError
from train.pretraining.encoder import create_encoder, write_encoder
from train.pretraining.magnification.evaluate import Evaluation
from train.pretraining.magnification.probe import CaseBootstrap
from train.pretraining.magnification.run import compare_encoders, open_encoder
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
