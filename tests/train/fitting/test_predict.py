"""Masks and overlays straight from a checkpoint."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import run_train
from tests.support.errors import raises
from tests.support.pictures import blobs
from train.errors import ImageFileError, ScaleError, SourceError
from train.fitting.predict import predict_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(blobs(64, 64)).save(folder / "Gewebe ü.png")
    Image.fromarray(blobs(90, 130)).save(folder / "large.PNG")
    return folder


def test_every_image_gets_a_mask_an_overlay_and_its_areas(
    toy_run: Path, images: Path, tmp_path: Path
):
    out = tmp_path / "out"
    run_train("predict", toy_run, images, out, "--mpp", 0.25)
    with Image.open(out / "masks" / "large.png") as mask:
        labels = np.asarray(mask)
    assert labels.shape == (90, 130)
    assert set(np.unique(labels)) <= {1, 2, 3, 4, 5}
    with Image.open(out / "overlays" / "Gewebe ü.png") as overlay:
        assert overlay.size == (64, 64)
    with (out / "areas.csv").open(encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    row = rows["large"]
    assert (row["mpp"], row["mpp_source"]) == ("0.25", "request")
    share, area = float(row["Tumor_share"]), float(row["Tumor_mm2"])
    assert share == pytest.approx((labels == 1).mean(), abs=1e-6)
    assert area == pytest.approx((labels == 1).sum() * 0.25**2 / 1e6, rel=1e-4)


def test_an_assumed_scale_is_told_and_gives_no_area(
    toy_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    predict_images(toy_run, images / "large.PNG", tmp_path / "out")
    assert "0.5, is assumed" in capsys.readouterr().out
    with (tmp_path / "out" / "areas.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["mpp_source"], row["Tumor_mm2"]) == ("model (assumed)", "")


def test_an_image_that_serving_would_refuse_as_too_coarse_is_refused(
    toy_run: Path, images: Path, tmp_path: Path
):
    with raises(ScaleError, "Gewebe ü.png", "16 times"):
        predict_images(toy_run, images, tmp_path / "out", mpp=8)
    assert not (tmp_path / "out").exists()


def test_a_file_that_states_another_scale_than_is_given_is_told(
    toy_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    Image.fromarray(blobs(64, 64)).save(images / "large.PNG", dpi=(25_400, 25_400))
    predict_images(toy_run, images, tmp_path / "out", mpp=0.5)
    told = " ".join(capsys.readouterr().out.split())
    assert "1 images, such as large.PNG, state another um per pixel" in told


def test_a_name_that_is_not_utf_8_is_refused_before_any_image_is_segmented(
    toy_run: Path, images: Path, tmp_path: Path
):
    odd = images / os.fsdecode(b"x\xff.png")
    (images / "large.PNG").rename(odd)
    for given in (images, odd):
        with raises(SourceError, "udcff.png"):
            predict_images(toy_run, given, tmp_path / "out")


def test_a_damaged_image_is_named_before_any_other_is_segmented(
    toy_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("train.fitting.predict.label_images", None)
    (images / "folder.png").mkdir()
    (images / "large.PNG").write_bytes(b"no picture")
    with raises(ImageFileError, "large.PNG"):
        predict_images(toy_run, images, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
