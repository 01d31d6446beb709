from dataclasses import replace
from pathlib import Path

import pytest

from export.gate.model_card import write_model_card
from export.gate.schema import PARITY_FILE, ParityReport
from serve.contract.manifest import read_bundle
from train.model.checkpoint import CheckpointCard, WeightsOrigin, read_card


def _card_of(bundle: Path, card: CheckpointCard, folder: Path) -> str:
    report = ParityReport.model_validate_json((bundle / PARITY_FILE).read_bytes())
    write_model_card(read_bundle(bundle), card, report, folder)
    return (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_card_names_the_data_that_the_model_was_trained_on(
    exported_bundle: Path, toy_run: Path, tmp_path: Path
) -> None:
    text = _card_of(exported_bundle, read_card(toy_run), tmp_path)
    assert "on the data set `data`: 8 training and 2 validation tiles." in text


@pytest.mark.parametrize("preset", ["synthetic", "bcss", "crag"])
def test_the_presets_name_decides_nothing_of_what_the_card_says_of_the_data(
    exported_bundle: Path, toy_run: Path, tmp_path: Path, preset: str
) -> None:
    card = read_card(toy_run)
    unknown = replace(card, settings=replace(card.settings, preset=preset), data=None)
    text = _card_of(exported_bundle, unknown, tmp_path)
    assert preset not in text.replace("train prepare synthetic", "")
    assert "does not say on which data" in text


def test_an_imported_models_card_says_who_trained_it_and_names_all_terms(
    exported_bundle: Path, toy_run: Path, tmp_path: Path
) -> None:
    card = replace(
        read_card(toy_run),
        imported_from="SAM-Path",
        origins=(
            WeightsOrigin(
                part="image encoder and decoder",
                name="SAM vit_b",
                file="crag.ckpt",
                licence="Apache-2.0",
            ),
            WeightsOrigin(
                part="pathology encoder",
                name="HIPT ViT-S/16",
                file="crag.ckpt",
                licence="Apache-2.0 with the Commons Clause",
            ),
        ),
        class_attention_bias=(0.0,) * 5,
        pixel_frequencies=None,
        metrics={},
    )
    text = _card_of(exported_bundle, card, tmp_path)
    assert "FocalPath did not train this model" in text
    assert "SAM vit_b, `crag.ckpt`. Its terms: Apache-2.0\n" in text
    assert "Commons Clause" in text
    assert "has no scores" in text
    for untrue in ("no published weights", "best mean validation Dice", "Focal", "2604.13479"):
        assert untrue not in text.replace("FocalPath", ""), untrue


def test_a_head_that_was_not_trained_and_a_missing_engine_are_limits(
    exported_bundle: Path, toy_run: Path, tmp_path: Path
) -> None:
    report = ParityReport.model_validate_json((exported_bundle / PARITY_FILE).read_bytes())
    note = "SAM-Path resized images in its own way."
    limits = {"predicts_iou": False, "label_note": note}
    manifest = read_bundle(exported_bundle).model_copy(update=limits)
    obstacles = ("Resize_1: Resize with antialias = 1",)
    write_model_card(manifest, read_card(toy_run), report, tmp_path, engine_obstacles=obstacles)
    text = (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "IoU head was not trained" in text
    assert f"- {note}\n" in text
    assert obstacles[0] in text


def test_the_card_says_how_many_tiles_the_gate_used_and_what_its_scores_are_against(
    exported_bundle: Path,
) -> None:
    text = (exported_bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "on 8 tiles (8 tiles of drawn tissue)." in text
    assert "Dice, IoU and recall are against the masks." in text
