from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.errors import raises
from train.config import read_settings, write_settings
from train.errors import SettingsError
from train.presets import PRESETS, synthetic


def test_written_settings_read_back_the_same(tmp_path: Path):
    write_settings(tmp_path / "run.yaml", synthetic())
    assert read_settings(tmp_path / "run.yaml") == synthetic()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_file_leaves_out_is_the_presets(preset: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(f"preset: {preset}\noptimization:\n  epochs: 77\n", encoding="utf-8-sig")
    expected = PRESETS[preset]()
    changed = replace(expected.optimization, epochs=77)
    assert read_settings(path) == replace(expected, optimization=changed)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("3", "the file is 3; expected names with a value each"),
        ("model: {}", "preset is missing"),
        ("preset: none", "preset is none"),
        ("preset: bcss\noptimization: 4", "optimization is 4; expected names with a value each"),
        ("preset: bcss\noptimization: {epochs: many}", "epochs is 'many'; expected a whole number"),
        ("preset: bcss\noptimization: {epochs: 0}", "epochs is 0; expected at least 1"),
        (
            "preset: bcss\noptimization: {precision: half}",
            "precision is 'half'; expected '32-true'",
        ),
        ("preset: bcss\noptimisation: {}", "there is no setting optimisation"),
        ("preset: bcss\nepochs: 3", "Is optimization.epochs meant"),
        ("preset: bcss\noptimization: {epochs: 3, epochs: 4}", "'epochs' is there twice"),
        ("preset: bcss\npreset: small", "'preset' is there twice"),
        ("preset: [", "cannot be read as settings"),
        ("preset: bcss\nmodel: {tile_size: 64}", "there is no setting model.tile_size"),
        ("preset: bcss\nruntime: {embedding_cache: here}", "run.yaml: --embedding-cache"),
    ],
)
def test_a_file_of_settings_that_is_wrong_is_refused_in_one_line(
    text: str, problem: str, tmp_path: Path
):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with raises(SettingsError, path, problem) as refused:
        read_settings(path)
    assert "\n" not in str(refused.value)
