"""A SAM-Path checkpoint, imported and exported: its ONNX graph gives SAM-Path's own labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.gate.answers import onnx_answers
from export.graph.reference import Deployable
from export.graph.to_onnx import export_onnx
from tests.support.sam_path_oracle import random_sam_path
from tests.support.toy_data import TILE_SIZE_PX, toy_settings
from train.fitting.import_sampath import import_sampath
from train.model.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


def test_the_graph_of_an_imported_model_gives_all_labels_of_sam_path(tmp_path: Path):
    theirs = random_sam_path(2)
    torch.save(theirs.checkpoint(), tmp_path / "sampath.ckpt")
    import_sampath(
        tmp_path / "sampath.ckpt", tmp_path / "run", toy_settings(), class_names=("A", "B")
    )
    deployable = Deployable(load_checkpoint(tmp_path / "run")[0]).eval()
    export_onnx(deployable, tmp_path / "model.onnx")
    coarse = np.random.default_rng(3).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = coarse.repeat(TILE_SIZE_PX // 8, axis=1).repeat(TILE_SIZE_PX // 8, axis=2)
    expected = np.stack([theirs.label(torch.from_numpy(image)).numpy() for image in images])
    found = onnx_answers(tmp_path / "model.onnx", images).labels
    assert len(np.unique(expected)) == 2
    assert np.array_equal(found, expected)
