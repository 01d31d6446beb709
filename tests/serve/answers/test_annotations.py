import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import shapely
from numpy.typing import NDArray

from serve.answers.frame import Frame
from serve.answers.outlines import BLOCK_BYTES
from serve.answers.registry import FORMATS
from serve.contract.errors import ImageTooLargeError
from serve.contract.manifest import Manifest, read_bundle
from tests.support.answers import source_of
from tests.support.errors import raises

LABELS = np.ones((8, 10), np.uint8)
LABELS[2:6, 3:7] = 4
DSA_SCHEMA = jsonschema.Draft6Validator(
    json.loads(Path(__file__).with_name("large_image_annotation_schema.json").read_bytes())
)
"""large_image's own, of which we write polylines only."""


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


def _noise(side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 6, (side, side)).astype(np.uint8)


def test_geojson_is_an_annotation_per_region_with_class_colour_holes_and_measurements(
    manifest: Manifest,
) -> None:
    source = source_of(manifest, LABELS, mpp=0.25, mpp_source="request")
    collection = json.loads(FORMATS["geojson"].render(source, {}))
    assert collection.keys() == {"type", "features"}
    assert collection["type"] == "FeatureCollection"
    outer, inner = collection["features"]
    assert outer["type"] == "Feature"
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in (outer, inner)]
    assert shapes[0].equals(shapely.box(0, 0, 10, 8) - shapely.box(3, 2, 7, 6))
    assert shapes[1].equals(shapely.box(3, 2, 7, 6))
    assert outer["properties"]["classification"] == {"name": "Tumor", "color": [214, 39, 40]}
    assert inner["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "Necrosis", "color": [188, 189, 34]},
        "measurements": {"Area px^2": 16, "Area um^2": 1, "Mean confidence": 0.8},
    }


@pytest.mark.parametrize(("mpp", "source"), [(0.5, "model (assumed)"), (None, "unknown")])
def test_an_assumed_scale_gives_no_area_in_um2(
    mpp: float | None, source: str, manifest: Manifest
) -> None:
    given = source_of(manifest, LABELS, mpp=mpp, mpp_source=source)
    feature = json.loads(FORMATS["geojson"].render(given, {}))["features"][0]
    assert feature["properties"]["measurements"].keys() == {"Area px^2", "Mean confidence"}


def test_an_image_without_regions_of_the_chosen_classes_is_an_empty_collection(
    manifest: Manifest,
) -> None:
    document = FORMATS["geojson"].render(source_of(manifest, LABELS), {"classes": ["Stroma"]})
    assert json.loads(document) == {"type": "FeatureCollection", "features": []}


def test_a_dsa_document_is_closed_polylines_by_large_images_own_schema(manifest: Manifest) -> None:
    document = json.loads(FORMATS["dsa"].render(source_of(manifest, LABELS), {}))
    DSA_SCHEMA.validate(document)
    outer, inner = document["elements"]
    square = [[3, 2, 0], [3, 6, 0], [7, 2, 0], [7, 6, 0]]  # the first point is not repeated
    assert sorted(inner["points"]) == sorted(outer["holes"][0]) == square
    assert (outer["closed"], inner["holes"]) == (True, [])
    assert outer["fillColor"] == "rgba(214, 39, 40, 0.25)"
    assert outer["lineColor"] == "rgb(214, 39, 40)"
    assert outer["label"] == {"value": outer["group"]} == {"value": "Tumor"}
    with pytest.raises(jsonschema.ValidationError, match="colour"):
        DSA_SCHEMA.validate({**document, "elements": [{**outer, "colour": "red"}]})


NAME = "slide [d=2,x=100,y=50,w=20,h=16].png"


@pytest.mark.parametrize(
    ("options", "name", "frame", "box"),
    [
        ({}, "", None, (3, 2, 7, 6)),
        ({}, NAME, None, (106, 54, 114, 62)),
        ({"origin": [1000, 3000]}, NAME, None, (1006, 3004, 1014, 3012)),
        ({"downsample": 4}, NAME, None, (112, 58, 128, 74)),
        ({"downsample": 4}, "slide [d=2,x=100,y=50,w=99,h=80].png", None, (112, 58, 128, 74)),
        ({}, "slide [x=100,y=50,w=80,h=64].png", None, (124, 66, 156, 98)),
        ({}, NAME, Frame((5, 7), (2, 3)), (11, 13, 19, 25)),
        ({"origin": [0, 1]}, NAME, Frame((5, 7), (2, 3)), (6, 7, 14, 19)),
    ],
)
def test_regions_lie_where_the_options_or_the_source_or_its_name_say(
    options: dict[str, object],
    name: str,
    frame: Frame | None,
    box: tuple[int, ...],
    manifest: Manifest,
) -> None:
    source = replace(source_of(manifest, LABELS), name=name, frame=frame)
    _, inner = json.loads(FORMATS["geojson"].render(source, options))["features"]
    assert shapely.geometry.shape(inner["geometry"]).equals(shapely.box(*box))


def test_outlines_are_simplified_and_small_regions_left_out_as_asked(manifest: Manifest) -> None:
    labels = np.tri(30, dtype=np.uint8) + 1  # a diagonal of steps
    labels[20:22, :2] = 3
    source = source_of(manifest, labels)

    def outlines(**options: object) -> list[int]:
        document = json.loads(FORMATS["dsa"].render(source, options))
        return [len(element["points"]) for element in document["elements"]]

    exact = outlines()
    assert len(exact) == 3
    assert len(outlines(min_area_px=5)) == 2
    assert max(outlines(simplify_px=3)) < max(exact) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geojson", "dsa"])
def test_a_large_document_comes_in_blocks_of_bounded_size(name: str, manifest: Manifest) -> None:
    blocks = list(FORMATS[name].blocks(source_of(manifest, _noise(200)), {}))
    assert len(blocks) > 10
    assert max(map(len, blocks)) < 2 * BLOCK_BYTES
    document = json.loads(b"".join(blocks))
    assert len(document["features" if name == "geojson" else "elements"]) > 10_000


@pytest.mark.slow
def test_polygons_are_made_as_their_features_are_written(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    polygons_of = shapely.polygons

    def counted(rings: Any, **holes: Any) -> Any:
        made.append(np.size(rings))
        return polygons_of(rings, **holes)

    monkeypatch.setattr(shapely, "polygons", counted)
    monkeypatch.setattr("serve.answers.polygons._PART_EDGES", 1_000)
    blocks = FORMATS["geojson"].blocks(source_of(manifest, _noise(200)), {})
    assert made == []
    next(blocks)
    at_first = sum(made)
    assert 0 < at_first < 2_000
    list(blocks)
    assert sum(made) > 10 * at_first


def test_too_many_corners_are_refused_before_the_first_block(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.answers.edges.MAX_EDGES", 100)
    with raises(ImageTooLargeError, code="too_many_corners"):
        FORMATS["geojson"].blocks(source_of(manifest, _noise(30)), {})
    assert FORMATS["geojson"].render(source_of(manifest, _noise(30)), {"min_area_px": 100})
