import shutil
from pathlib import Path

import numpy as np
import pytest

from export.errors import SettingsError
from export.gate.answers import onnx_answers
from export.gate.certificate import (
    CertificateSettings,
    certificate_section,
    draw_curve,
    measure_certificate,
)
from export.gate.gate import Gate
from export.gate.schema import Tolerances
from export.gate.tiles import ValidationTiles, validation_tiles
from serve.contract.certificate import ScaleCertificate
from tests.support.errors import raises
from tests.support.toy_bundle import CLASSES, REFERENCE_RGB
from tests.support.toy_data import write_twice_as_large
from train.data.scale import TileScale, cut_image, seen_at

NAMES = tuple(entry.name for entry in CLASSES)
SIDE, MPP = 64, 0.5


def _striped(width_px: int) -> np.ndarray:
    """Columns of the first two classes' colours in turn, (SIDE, SIDE, 3) uint8."""
    of_class = np.arange(SIDE) // width_px % 2
    return np.tile(REFERENCE_RGB[of_class][None], (SIDE, 1, 1)).astype(np.uint8)


def _gate(graph: Path, images: np.ndarray) -> Gate:
    """A gate whose expected answers are the graph's own."""
    place = TileScale(tile_size_px=SIDE, mpp=MPP).place(SIDE, SIDE, MPP)

    def from_scale(factor: float, count: int) -> np.ndarray:
        scale = TileScale(tile_size_px=SIDE, mpp=MPP)
        seen = [seen_at(image, MPP, MPP * factor) for image in images[:count]]
        return np.concatenate([cut_image(image, place, scale) for image in seen])

    names = tuple(map(str, range(len(images))))
    return Gate(
        tiles=ValidationTiles(
            source="stripes", names=names, images=images, masks=None, from_scale=from_scale
        ),
        expected=onnx_answers(graph, images),
        class_names=NAMES,
        tolerances=Tolerances(),
    )


@pytest.fixture
def graph(toy_bundle: Path) -> Path:
    return toy_bundle / "model.onnx"


def _measured(gate: Gate, graph: Path, **settings: object) -> ScaleCertificate:
    found = measure_certificate(gate, graph, CertificateSettings(**settings))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_detail_that_a_coarser_source_lacks_costs_labels_and_broad_shapes_stay(graph: Path) -> None:
    images = np.stack([_striped(4), _striped(32)])
    found = _measured(_gate(graph, images), graph, scale_factors=(0.8, 4.0))
    finer, own, coarser = found.points
    assert (own.factor, own.label_agreement) == (1.0, 1.0)
    assert finer.label_agreement > 0.99
    assert coarser.label_agreement < 0.8
    broad = _measured(_gate(graph, images[1:]), graph, scale_factors=(0.8, 4.0))
    assert broad.points[-1].label_agreement > 0.9
    assert found.holds(finer)
    assert not found.holds(coarser)


def test_the_tiles_of_a_finer_data_set_are_its_own_pixels(toy_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    write_twice_as_large(data)  # 0.25 um per pixel, for a model of 0.5
    tiles = validation_tiles(data, SIDE, 2, class_names=NAMES, mpp=MPP)
    assert tiles.own_factor == 0.5
    assert tiles.from_scale is not None
    assert np.array_equal(tiles.from_scale(0.5, 2), tiles.images)
    assert not np.array_equal(tiles.from_scale(1.25, 2), tiles.images)


def test_a_coarser_source_smooths_what_is_finer_than_its_pixels() -> None:
    tiles = validation_tiles(None, SIDE, 1, mpp=MPP)
    assert tiles.from_scale is not None

    def roughness(images: np.ndarray) -> float:
        return float(np.abs(np.diff(images.astype(int), axis=2)).mean())

    rough = [roughness(tiles.from_scale(factor, 1)) for factor in (0.8, 1.25, 2.0)]
    assert roughness(tiles.images) > rough[0] > rough[1] > rough[2]


@pytest.mark.parametrize("settings", [{"scale_tiles": 0}, {"scale_factors": ()}])
def test_it_can_be_left_out(graph: Path, settings: dict[str, object]) -> None:
    gate = _gate(graph, _striped(32)[None])
    assert measure_certificate(gate, graph, CertificateSettings(**settings)) is None  # type: ignore[arg-type]


def test_a_model_whose_scale_is_not_known_has_none(toy_data: Path) -> None:
    tiles = validation_tiles(toy_data, SIDE, 2, class_names=NAMES, mpp=None)
    assert tiles.from_scale is None


def test_fewer_tiles_are_measured_where_that_is_asked_for(graph: Path) -> None:
    gate = _gate(graph, np.stack([_striped(32), _striped(4)]))
    found = _measured(gate, graph, scale_tiles=1, scale_factors=(2.0,))
    assert found.num_tiles == 1
    assert found.points[-1].label_agreement > 0.9


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scale_factors": (0.8, 1.01)}, ["1.01", "2%"]),
        ({"scale_factors": (8.0,)}, ["8", "0.25", "4"]),
        ({"scale_tiles": -1}, ["--scale-tiles", "-1"]),
        ({"min_scale_agreement": 95.0}, ["--min-scale-agreement", "95"]),
    ],
)
def test_settings_that_measure_nothing_are_refused(
    settings: dict[str, object], named: list[str]
) -> None:
    with raises(SettingsError, *named):
        CertificateSettings(**settings)  # type: ignore[arg-type]


def test_the_report_has_a_row_per_factor_and_tells_which_were_only_enlarged(
    graph: Path, tmp_path: Path
) -> None:
    found = _measured(_gate(graph, _striped(4)[None]), graph, scale_factors=(0.8, 4.0))
    text = "\n".join(certificate_section(found, NAMES, MPP))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert "0.4" in rows[2]
    assert "**no**" in rows[-1]
    assert "only enlarged" in text
    draw_curve(found, CLASSES, MPP, tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "parity_scale.png").stat().st_size > 1000


def test_the_report_says_that_there_is_none() -> None:
    assert "Not measured" in "\n".join(certificate_section(None, NAMES, MPP))
