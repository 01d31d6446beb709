"""Whole slides as a source, proven on one whose colours are its coordinates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.support.coordinates import coordinate_colors, largest_error_px
from tests.support.errors import raises
from tests.support.slides import tissue_pixels
from tests.support.tiny_pretraining import tiniest_pretraining
from train.errors import DatasetError, FocalPathError, ScaleError, SourceError
from train.pretraining import whole_slides
from train.pretraining.footprints import Footprint
from train.pretraining.regions import RegionSource
from train.pretraining.run import pretrain
from train.pretraining.settings import ViewSettings
from train.pretraining.sources import open_source
from train.pretraining.split_source import SplitSource, usable_slides

MPP = 0.25
HEIGHT, WIDTH = 768, 1024


def write_pyramid(
    path: Path, pixels: np.ndarray, *, mpp: float | None = MPP, num_levels: int = 3
) -> Path:
    """Write a tiled TIFF whose levels are area means, as a scanner's are."""
    options: dict[str, Any] = {"photometric": "rgb", "compression": "deflate", "tile": (256, 256)}
    level = pixels
    with tifffile.TiffWriter(path) as tiff:
        for number in range(num_levels):
            if mpp is not None:
                per_cm = 1e4 / (mpp * 2**number)
                options |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            tiff.write(level, subfiletype=int(number > 0), metadata=None, **options)
            height, width = level.shape[:2]
            blocks = level.reshape(height // 2, 2, width // 2, 2, 3)
            level = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
    return path


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory: pytest.TempPathFactory) -> RegionSource:
    folder = tmp_path_factory.mktemp("coordinates")
    write_pyramid(folder / "a.tiff", coordinate_colors(HEIGHT, WIDTH))
    return open_source(folder).source


@pytest.mark.parametrize("mpp", [0.25, 0.31, 0.5, 0.61, 1.0, 1.7])
def test_every_pixel_lies_where_its_footprint_says(coordinates: RegionSource, mpp: float) -> None:
    """To half a pixel of the level that is read, the rounding of colours included."""
    corner = (13.37, 21.9)
    view = coordinates.read(0, Footprint(*corner, 64 * mpp), 64)
    level = 2 ** min(2, int(np.log2(mpp / MPP * 1.001)))
    in_px = (corner[0] / MPP, corner[1] / MPP)
    assert largest_error_px(view, in_px, mpp / MPP) <= level / 2


def test_the_coarsest_level_that_is_fine_enough_is_read(
    coordinates: RegionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = coordinates._reader(0)  # type: ignore[attr-defined]
    read, levels = reader.read, []
    monkeypatch.setattr(reader, "read", lambda level, *at: levels.append(level) or read(level, *at))
    for mpp in (0.25, 0.45, 0.5, 0.9, 1.0, 2.0):
        coordinates.read(0, Footprint(0, 0, 32 * mpp), 32)
    assert levels == [0, 0, 1, 1, 2, 2]


def test_pixels_that_were_not_scanned_are_refused(coordinates: RegionSource) -> None:
    with raises(ScaleError, 0.2, 1.25):
        coordinates.read(0, Footprint(0, 0, 64 * 0.2), 64)


def _half_glass(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    pixels = tissue_pixels(height, width)
    pixels[:, width // 2 :] = 245
    return pixels


def test_tissue_is_told_from_glass(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tiff", _half_glass(), num_levels=3)
    source = open_source(tmp_path).source
    assert source.tissue_share(0, Footprint(0, 0, 100)) > 0.9
    assert source.tissue_share(0, Footprint(0, 140, 100)) == 0


VIEWS = ViewSettings(view_px=96, num_local=0, local_px=48)


def _usable(root: Path, views: ViewSettings = VIEWS) -> tuple[SplitSource, tuple[int, ...]]:
    found = open_source(root)
    return found, usable_slides(found, found.slides["training"], views)


def _no_mpp(root: Path) -> None:
    write_pyramid(root / "a.tiff", _half_glass(), mpp=None)


def _too_small(root: Path) -> None:
    write_pyramid(root / "a.tiff", tissue_pixels(256, 256))


def _glass(root: Path) -> None:
    for name in "ab":
        write_pyramid(root / f"{name}.tiff", np.full((HEIGHT, WIDTH, 3), 244, np.uint8))


def _damaged(root: Path) -> None:
    content = write_pyramid(root / "a.tiff", _half_glass()).read_bytes()
    (root / "a.tiff").write_bytes(content[: len(content) // 2])


def _too_coarse(root: Path) -> None:
    write_pyramid(root / "a.tiff", _half_glass(), mpp=0.5)


def _without_coarse_levels(root: Path) -> None:
    write_pyramid(root / "a.tiff", _half_glass(), num_levels=1)


def _forgotten_in_folds(root: Path) -> None:
    for name in "ab":
        write_pyramid(root / f"{name}.tiff", _half_glass())
    (root / "folds.csv").write_text("img_id,fold\na.tiff,1\n")


def _unknown_in_folds(root: Path) -> None:
    write_pyramid(root / "a.tiff", _half_glass())
    (root / "folds.csv").write_text("img_id,fold\na,1\nc.tiff,-1\n")


@pytest.mark.parametrize(
    ("write", "kind", "named"),
    [
        (_no_mpp, ScaleError, ["a.tiff", "folds.csv"]),
        (_too_small, SourceError, ["128 um", "64 um", "--view-px"]),
        (_glass, SourceError, ["none of the 2 slides", "glass"]),
        (_damaged, SourceError, ["a.tiff"]),
        (_too_coarse, ScaleError, ["0.5 um", "0.25"]),
        (_without_coarse_levels, SourceError, ["a.tiff", "1024 x 768"]),
        (_forgotten_in_folds, DatasetError, ["folds.csv", "b.tiff"]),
        (_unknown_in_folds, DatasetError, ["folds.csv", "c.tiff"]),
    ],
)
def test_slides_that_cannot_be_learned_from_are_refused_with_one_error(
    write: Callable[[Path], None],
    kind: type[FocalPathError],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if write is _without_coarse_levels:
        monkeypatch.setattr(whole_slides, "_MAX_OVERVIEW_PX", 10_000)
    write(tmp_path)
    with raises(kind, *named):
        _usable(tmp_path)


def test_the_um_per_pixel_of_folds_csv_counts_and_unusable_slides_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _no_mpp(tmp_path)
    write_pyramid(tmp_path / "small.tiff", tissue_pixels(256, 256))
    write_pyramid(tmp_path / "coarse.tiff", _half_glass(), mpp=0.5)
    (tmp_path / "folds.csv").write_text(
        "img_id,fold,mpp,group\na,1,0.25,P1\nsmall,1,,P2\ncoarse.tiff,2,,P3\n"
    )
    found, usable = _usable(tmp_path)
    assert [found.source.slides[slide].name for slide in usable] == ["a.tiff"]
    assert found.source.slides[0].group == "P1"
    assert "2 of 3" in capsys.readouterr().err


def test_results_beside_slides_are_no_slides(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    for folder in ("series", "a"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1").write_bytes(bytes(128) + b"DICM")
    for name in ("run.json", "summary.json"):
        (tmp_path / "a" / name).touch()
    found = whole_slides.find_slides(tmp_path)
    assert [file.path.name for file in found] == ["a.svs", "series"]


@pytest.mark.slow
def test_an_encoder_is_pretrained_on_the_training_slides_alone(tmp_path: Path) -> None:
    tiny = tiniest_pretraining(view_px=48, steps=1, batch_size=4, num_workers=2)
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in "abc":
        write_pyramid(slides / f"{name}.tiff", _half_glass())
    (slides / "folds.csv").write_text("img_id,fold\na,1\nb,-1\nc,0\n")
    encoder = pretrain(tiny, slides, tmp_path / "run")
    assert (encoder / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "pretrain.json").read_text())["slides"] == ["a.tiff"]
