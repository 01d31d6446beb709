"""An encoder that was pretrained across magnifications, from slides to a bundle."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from export.bundle import write_bundle
from export.precision.artefacts import PrecisionSettings
from export.settings import BundleSettings
from serve.contract.manifest import read_bundle
from tests.support.tiny_pretraining import tiniest_pretraining
from tests.support.toy_data import toy_settings
from train.fitting.run import fit
from train.model.checkpoint import load_checkpoint
from train.presets import synthetic as synthetic_model
from train.pretraining.run import pretrain
from train.settings import Settings, WeightsSettings

pytestmark = pytest.mark.slow

WIDTH, DEPTH = 48, 2


@pytest.fixture(scope="module")
def encoder(drawn_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of MAD, with all that a segmenter has to be told: width, depth, LayerScale."""
    tiny = tiniest_pretraining(view_px=48, width=WIDTH)
    deep = replace(tiny.encoder, depth=DEPTH, num_heads=3, drop_path=0.0, layer_scale=True)
    return pretrain(replace(tiny, encoder=deep), drawn_slides, tmp_path_factory.mktemp("mad"))


def test_timm_opens_it_in_one_line_at_any_size(encoder: Path) -> None:
    vit = timm.create_model(f"local-dir:{encoder}", pretrained=True)
    expected = load_file(encoder / "model.safetensors")
    assert all(torch.equal(vit.state_dict()[name], value) for name, value in expected.items())
    assert vit.forward_features(torch.zeros(1, 3, 96, 96)).shape == (1, 1 + 36, WIDTH)


def _settings(encoder: Path) -> Settings:
    """The toy's, but for the pathology encoder, of which nothing is said: the folder says it."""
    toy, defaults = toy_settings(), synthetic_model().model
    model = replace(
        toy.model,
        pathology_encoder=defaults.pathology_encoder,
        pathology_encoder_depth=defaults.pathology_encoder_depth,
    )
    return replace(
        toy,
        model=model,
        weights=WeightsSettings(pathology_weights=str(encoder)),
        optimization=replace(toy.optimization, epochs=1),
    )


def test_a_segmenter_takes_it_and_passes_the_gate(
    encoder: Path, toy_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fit(_settings(encoder), toy_data, run)
    segmenter, card = load_checkpoint(run)
    vit = segmenter.pathology_encoder.vit
    assert (len(vit.blocks), vit.embed_dim) == (DEPTH, WIDTH)
    assert card.settings.model.pathology_mean == (0.5, 0.5, 0.5)
    started_from = [origin for origin in card.origins if origin.part == "pathology encoder"]
    assert started_from[0].file == "model.safetensors"
    only = BundleSettings(num_parity_tiles=2, precision=PrecisionSettings(fp16=False))
    write_bundle(run, tmp_path / "bundle", only)
    manifest = read_bundle(tmp_path / "bundle")
    assert manifest.artefacts[0].parity.label_agreement >= 0.9999
    assert manifest.scale_certificate is not None
