from dataclasses import replace
from pathlib import Path

import pytest

from export.gate.model_card import write_model_card
from export.gate.schema import PARITY_FILE, ParityReport
from serve.contract.manifest import read_bundle
from train.model.checkpoint import CheckpointCard, TrainingData, read_card


def _card_of(bundle: Path, card: CheckpointCard, folder: Path) -> str:
    report = ParityReport.model_validate_json((bundle / PARITY_FILE).read_bytes())
    write_model_card(read_bundle(bundle), card, report, folder)
    return (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_card_names_the_data_that_the_model_was_trained_on(
    exported_bundle: Path, toy_run: Path, tmp_path: Path
) -> None:
    text = _card_of(exported_bundle, read_card(toy_run), tmp_path)
    assert "on the data set `data`: 8 training and 2 validation tiles." in text


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "Trained with the preset `bcss`; the checkpoint does not say on which data."),
        (
            TrainingData(name="ours", num_training_tiles=1200, num_validation_tiles=30),
            "Trained with the preset `bcss` on the data set `ours`: 1,200 training and 30 "
            "validation tiles.",
        ),
    ],
)
def test_the_card_claims_nothing_about_the_data_that_the_checkpoint_does_not_know(
    exported_bundle: Path,
    toy_run: Path,
    tmp_path: Path,
    data: TrainingData | None,
    sentence: str,
) -> None:
    card = read_card(toy_run)
    card = replace(card, settings=replace(card.settings, preset="bcss"), data=data)
    text = _card_of(exported_bundle, card, tmp_path)
    assert sentence in text
    assert "prepare" not in text


def test_the_card_says_how_many_tiles_the_gate_used_and_what_its_scores_are_against(
    exported_bundle: Path,
) -> None:
    text = (exported_bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "on 8 tiles (8 tiles of drawn tissue)." in text
    assert "Dice, IoU and recall are against the masks." in text
