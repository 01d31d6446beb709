import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.errors import raises
from train.data.synthetic.slides import SlideSettings, write_slides
from train.errors import EncoderError, RunError, SourceError
from train.pretraining.encoder import create_encoder, write_encoder
from train.pretraining.magnification.evaluate import Evaluation
from train.pretraining.magnification.probe import CaseBootstrap
from train.pretraining.magnification.run import compare_encoders, open_encoder
from train.pretraining.magnification.settings import EvaluationSettings
from train.pretraining.magnification.study import METHODS, pretrain_methods, student_tokens
from train.pretraining.settings import PretrainSettings, ViewSettings, synthetic


def _tiny() -> PretrainSettings:
    base = synthetic()
    return replace(
        base,
        views=ViewSettings(view_px=32, num_local=0, local_px=32),
        distillation=replace(base.distillation, prototypes=16, head_hidden=16, head_bottleneck=8),
        encoder=replace(base.encoder, depth=1, embed_dim=16, num_heads=1),
        schedule=replace(base.schedule, steps=2, steps_per_epoch=1, batch_size=2),
    )


SETTINGS = EvaluationSettings(tile_px=32, purity=0.3, tiles_per_slide=8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "data"
    settings = SlideSettings(num_train=2, num_validation=2, num_test=2, side_um=100.0)
    write_slides(folder, settings)
    return folder


def test_an_encoder_of_other_settings_is_not_taken_into_a_study(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain_methods(_tiny(), slides, tmp_path, ["mad"], num_seeds=1)
    monkeypatch.setattr(f"{pretrain_methods.__module__}.pretrain", None)  # none is trained again
    workers = replace(_tiny(), schedule=replace(_tiny().schedule, num_workers=7))
    pretrain_methods(workers, slides, tmp_path, ["mad"], num_seeds=1)
    longer = replace(_tiny(), schedule=replace(_tiny().schedule, steps=4))
    with raises(RunError, tmp_path / "encoders" / "mad" / "seed0", "steps 2 -> 4"):
        pretrain_methods(longer, slides, tmp_path, ["mad"], num_seeds=1)
    wider = replace(_tiny(), views=replace(_tiny().views, scale_jitter=0.1))
    with raises(RunError, "scale_jitter 0.2 -> 0.1"):
        pretrain_methods(wider, slides, tmp_path, ["mad"], num_seeds=1)


@pytest.mark.slow
def test_a_study_pretrains_each_method_once_and_reports_beside_the_untrained_encoder(
    slides: Path, tmp_path: Path
) -> None:
    encoders = pretrain_methods(_tiny(), slides, tmp_path, ["mad"], num_seeds=1)
    written = encoders["mad"][0].stat().st_mtime_ns
    assert pretrain_methods(_tiny(), slides, tmp_path, ["mad"], 1)["mad"] == encoders["mad"]
    assert encoders["mad"][0].stat().st_mtime_ns == written
    readme = compare_encoders(encoders, _tiny(), slides, tmp_path / "report", SETTINGS)
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
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, same_field=False)
    first = compare_encoders({}, _tiny(), slides, tmp_path / "report", settings).read_text()
    measured = []
    monkeypatch.setattr(Evaluation, "measure", lambda *given: measured.append(given))
    assert compare_encoders({}, _tiny(), slides, tmp_path / "report", settings).read_text() == first
    assert not measured
    other = replace(_tiny(), encoder=replace(_tiny().encoder, depth=2))
    for changed in ((other, settings), (_tiny(), replace(settings, tiles_per_slide=7))):
        with pytest.raises(TypeError):  # the patched measure gives nothing to report
            compare_encoders({}, changed[0], slides, tmp_path / "report", changed[1])
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


def test_slides_with_too_few_labelled_tiles_are_refused(slides: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tile_px=96, purity=1.0)
    with raises(SourceError, "--purity"):
        compare_encoders({}, _tiny(), slides, tmp_path, settings)


def test_a_folder_that_is_no_encoder_is_refused(slides: Path, tmp_path: Path) -> None:
    with raises(EncoderError, "config.json"):
        compare_encoders({"mine": [tmp_path]}, _tiny(), slides, tmp_path / "r", SETTINGS)


def test_an_encoder_whose_config_contradicts_its_weights_is_refused(tmp_path: Path) -> None:
    write_encoder(create_encoder(_tiny()), tmp_path, _tiny(), "")
    assert open_encoder(tmp_path).embed_dim == 16  # type: ignore[union-attr]
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(EncoderError, tmp_path, "contradict"):
        open_encoder(tmp_path)
