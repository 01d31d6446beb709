import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from tests.support.toy_data import toy_settings
from train.model.encoder_kinds import ENCODER_KINDS, with_kind_written_out
from train.settings import ModelSettings

DOCS = Path(__file__).parents[3] / "docs" / "encoders.md"


@pytest.mark.parametrize("kind", sorted(ENCODER_KINDS))
def test_every_short_name_is_in_the_table_of_the_docs(kind: str):
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{kind}` |")]
    assert len(rows) == 1
    entry = ENCODER_KINDS[kind]
    for fact in (entry.title, f"`{entry.architecture}`", entry.licence, entry.source):
        assert fact in rows[0]


@pytest.mark.parametrize("kind", sorted(ENCODER_KINDS))
def test_the_table_says_patch_registers_and_mlp_as_timm_builds_them(kind: str):
    entry = ENCODER_KINDS[kind]
    args = {name: value for name, value in entry.args.items() if name != "mlp_layer"}
    with torch.device("meta"):
        vit = timm.create_model(entry.architecture, num_classes=0, **{**args, "depth": 1})
    is_gated = "mlp_layer" in entry.args or "Glu" in type(vit.blocks[0].mlp).__name__
    facts = f"{vit.patch_embed.patch_size[0]}, {vit.num_reg_tokens}, " + (
        "SwiGLU" if is_gated else "plain"
    )
    assert re.search(rf"^\| `{kind}` \|.*\| {facts} \|", DOCS.read_text(), re.MULTILINE)


def test_a_short_name_is_written_out_into_the_settings():
    model = with_kind_written_out(ModelSettings(pathology_encoder="h-optimus-0"))
    assert model.pathology_mean == (0.707223, 0.578729, 0.703617)
    assert model.pathology_args["init_values"] == 1e-5
    assert model.pathology_positions == "timm"
    assert with_kind_written_out(model) == model


def test_what_the_settings_say_goes_before_the_short_name():
    model = replace(
        toy_settings().model,
        pathology_encoder="hipt",
        pathology_mean=(0.1, 0.2, 0.3),
        pathology_positions="timm",
    )
    written = with_kind_written_out(model)
    assert written.pathology_mean == (0.1, 0.2, 0.3)
    assert written.pathology_std == (0.5, 0.5, 0.5)
    assert written.pathology_positions == "timm"
