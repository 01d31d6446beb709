import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import shapely
from PIL import ImageColor

from serve.answers.annotations import dsa_annotation, geojson
from serve.answers.polygons import Regions, trace_regions
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.summary import Summary, summarise
from serve.inference.tiling import Prediction

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
    parsed: dict[str, Any] = json.loads(geojson(regions, summary, manifest))
    return parsed


@pytest.fixture(scope="module")
def document(regions: Regions, manifest: Manifest) -> dict[str, Any]:
    summary = _summary(manifest, 0.25, "request")
    parsed: dict[str, Any] = json.loads(dsa_annotation(regions, summary, manifest))
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
    parsed = json.loads(geojson(regions, _summary(manifest, mpp, source), manifest))
    assert "Area um^2" not in parsed["features"][0]["properties"]["measurements"]


def test_an_image_without_regions_of_the_chosen_classes_is_an_empty_collection(
    regions: Regions, manifest: Manifest
) -> None:
    none = Regions(
        regions.polygons[:0], regions.labels[:0], regions.area_px[:0], regions.mean_confidence[:0]
    )
    parsed = json.loads(geojson(none, _summary(manifest, None, "unknown"), manifest))
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
