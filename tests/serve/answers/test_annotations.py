import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import ImageColor

from serve.answers.annotations import BLOCK_BYTES, dsa_annotation, geojson
from serve.answers.format import Source
from serve.answers.polygons import Regions, trace_regions
from serve.answers.registry import FORMATS
from serve.contract.errors import ImageTooLargeError
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.segmenter import Segmentation
from serve.inference.summary import Summary, summarise
from serve.inference.tiling import Prediction
from tests.support.errors import raises

LABELS = np.ones((8, 10), np.uint8)
LABELS[2:6, 3:7] = 4
CONFIDENCE = np.full(LABELS.shape, 204, np.uint8)
DSA_SCHEMA = jsonschema.Draft6Validator(
    json.loads(Path(__file__).with_name("large_image_annotation_schema.json").read_bytes())
)
"""large_image's own, of which we write polylines only."""


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


@pytest.fixture(scope="module")
def regions() -> Regions:
    return trace_regions(LABELS, CONFIDENCE)


def _summary(manifest: Manifest, mpp: float | None, source: Any) -> Summary:
    prediction = Prediction(LABELS, CONFIDENCE, np.zeros(5, np.float32))
    return summarise(prediction, manifest, mpp=mpp, mpp_source=source)


@pytest.fixture(scope="module")
def collection(regions: Regions, manifest: Manifest) -> dict[str, Any]:
    summary = _summary(manifest, 0.25, "request")
    parsed: dict[str, Any] = json.loads(b"".join(geojson([regions], summary, manifest)))
    return parsed


@pytest.fixture(scope="module")
def document(regions: Regions, manifest: Manifest) -> dict[str, Any]:
    summary = _summary(manifest, 0.25, "request")
    parsed: dict[str, Any] = json.loads(b"".join(dsa_annotation([regions], summary, manifest)))
    return parsed


def test_geojson_is_a_collection_of_annotations(collection: dict[str, Any]) -> None:
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "annotation"


def test_geojson_names_and_colours_the_class(
    collection: dict[str, Any], manifest: Manifest
) -> None:
    found = [feature["properties"]["classification"] for feature in collection["features"]]
    wanted = [manifest.classes[0], manifest.classes[3]]
    assert found == [
        {"name": tissue.name, "color": list(ImageColor.getrgb(tissue.color))} for tissue in wanted
    ]


def test_geojson_polygons_are_valid_with_their_holes(collection: dict[str, Any]) -> None:
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in collection["features"]]
    assert [shape.is_valid for shape in shapes] == [True, True]
    assert shapes[0].equals(shapely.box(0, 0, 10, 8) - shapely.box(3, 2, 7, 6))


def test_geojson_measures_each_region(collection: dict[str, Any]) -> None:
    assert collection["features"][1]["properties"]["measurements"] == {
        "Area px^2": 16,
        "Area um^2": 1,
        "Mean confidence": 0.8,
    }


@pytest.mark.parametrize(("mpp", "source"), [(0.5, "model (assumed)"), (None, "unknown")])
def test_an_assumed_scale_gives_no_area_in_um2(
    mpp: float | None, source: str, regions: Regions, manifest: Manifest
) -> None:
    parsed = json.loads(b"".join(geojson([regions], _summary(manifest, mpp, source), manifest)))
    assert "Area um^2" not in parsed["features"][0]["properties"]["measurements"]


def test_an_image_without_regions_of_the_chosen_classes_is_an_empty_collection(
    regions: Regions, manifest: Manifest
) -> None:
    none = Regions(
        regions.polygons[:0], regions.labels[:0], regions.area_px[:0], regions.mean_confidence[:0]
    )
    parsed = json.loads(b"".join(geojson([none], _summary(manifest, None, "unknown"), manifest)))
    assert parsed == {"type": "FeatureCollection", "features": []}


def test_a_dsa_document_is_one_by_large_images_own_schema(document: dict[str, Any]) -> None:
    DSA_SCHEMA.validate(document)
    assert all(element["closed"] for element in document["elements"])


def test_large_images_schema_refuses_what_it_does_not_know(document: dict[str, Any]) -> None:
    element = {**document["elements"][0], "colour": "red"}
    with pytest.raises(jsonschema.ValidationError, match="colour"):
        DSA_SCHEMA.validate({**document, "elements": [element]})


def test_a_dsa_polyline_is_closed_without_repeating_its_first_point(
    document: dict[str, Any],
) -> None:
    points = document["elements"][1]["points"]
    assert sorted(points) == [[3, 2, 0], [3, 6, 0], [7, 2, 0], [7, 6, 0]]


def test_a_dsa_polyline_has_holes_colours_label_and_group(document: dict[str, Any]) -> None:
    outer = document["elements"][0]
    assert sorted(outer["holes"][0]) == [[3, 2, 0], [3, 6, 0], [7, 2, 0], [7, 6, 0]]
    assert outer["fillColor"] == "rgba(214, 39, 40, 0.25)"
    assert outer["lineColor"] == "rgb(214, 39, 40)"
    assert outer["label"] == {"value": "Tumor"}
    assert outer["group"] == "Tumor"


def _source(manifest: Manifest, labels: NDArray[np.uint8]) -> Source:
    confidence = np.full(labels.shape, 255, np.uint8)
    summary = summarise(Prediction(labels, confidence, np.zeros(5, np.float32)), manifest)
    image = np.zeros((*labels.shape, 3), np.uint8)
    return Source(image, Segmentation(labels, confidence, summary), manifest)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geojson", "dsa"])
def test_a_large_document_comes_in_blocks_of_bounded_size(name: str, manifest: Manifest) -> None:
    labels = np.random.default_rng(0).integers(1, 6, (200, 200)).astype(np.uint8)
    blocks = list(FORMATS[name].blocks(_source(manifest, labels), {}))
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
    labels = np.random.default_rng(0).integers(1, 6, (200, 200)).astype(np.uint8)
    blocks = FORMATS["geojson"].blocks(_source(manifest, labels), {})
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
    labels = np.random.default_rng(0).integers(1, 6, (30, 30)).astype(np.uint8)
    with raises(ImageTooLargeError, code="too_many_corners"):
        FORMATS["geojson"].blocks(_source(manifest, labels), {})
    assert FORMATS["geojson"].render(_source(manifest, labels), {"min_area_px": 100})
