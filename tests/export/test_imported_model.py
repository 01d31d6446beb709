"""A SAM-Path checkpoint, imported, exported and served: its labels are SAM-Path's own."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from export.bundle import write_bundle
from export.precision.artefacts import PrecisionSettings
from export.settings import BundleSettings
from serve.service.endpoints import build_app
from serve.settings import ServeSettings
from tests.support.pictures import encoded
from tests.support.sam_path_oracle import random_sam_path
from tests.support.toy_data import toy_settings
from train.fitting.import_sampath import import_sampath
from train.presets import CRAG_MPP

pytestmark = pytest.mark.slow


def test_a_served_model_of_larger_images_gives_all_labels_of_sam_path(tmp_path: Path):
    """As CRAG's: images of 1.5 tiles, which SAM-Path resizes in float without antialiasing."""
    theirs = random_sam_path(2)
    torch.save(theirs.checkpoint(), tmp_path / "sampath.ckpt")
    model = replace(toy_settings().model, mpp=1.5 * CRAG_MPP)
    settings = replace(toy_settings(), preset="crag", model=model)
    import_sampath(tmp_path / "sampath.ckpt", tmp_path / "run", settings)
    bundle = tmp_path / "bundle"
    manifest = write_bundle(
        tmp_path / "run",
        bundle,
        BundleSettings(precision=PrecisionSettings(fp16=False), num_parity_tiles=2),
    )
    assert (manifest.tile_size_px, manifest.mpp) == (96, pytest.approx(CRAG_MPP))
    app = build_app(ServeSettings(bundle=bundle, provider="cpu", threads=1))
    coarse = np.random.default_rng(3).integers(0, 256, (19, 19, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC))
    expected = theirs.label(torch.from_numpy(image.copy())).numpy()
    with TestClient(app) as client:
        answer = client.post("/labels", files={"image": encoded(image)})
    with Image.open(io.BytesIO(answer.content)) as labels:
        found = np.asarray(labels)
    app.state.model.close()
    assert len(np.unique(expected)) == 2
    assert np.array_equal(found, expected)
