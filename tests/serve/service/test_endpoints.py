import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import shapely
from PIL import Image

from serve.answers.format import AnswerFormat, Source
from serve.answers.registry import FORMATS
from serve.contract.errors import OptionError
from serve.contract.manifest import read_bundle
from serve.inference.segmenter import open_segmenter
from serve.inference.summary import Summary
from serve.settings import ServeSettings
from tests.support.errors import refusal_of
from tests.support.pictures import blobs, encoded, painted
from tests.support.toy_bundle import CLASSES

IMAGE = blobs(150, 210)
PNG = encoded(IMAGE)
IMAGE_ENDPOINTS = (
    "segment", "labels", "confidence", "overlay", "geojson", "dsa", "probabilities", "arrays",
    "image",
)  # fmt: skip


def _post(
    url: str, endpoint: str, file: bytes | tuple[str, bytes] = PNG, **options: Any
) -> httpx.Response:
    files = {"images" if endpoint == "batch" else "image": file}
    form = options.pop("form", None)
    return httpx.post(f"{url}/{endpoint}", files=files, params=options, data=form)


def _summary(response: httpx.Response) -> Summary:
    assert response.status_code == 200, response.text
    return Summary.model_validate_json(response.content)


@pytest.mark.parametrize("entry", FORMATS.values(), ids=lambda entry: entry.name)
def test_each_endpoint_says_what_it_answers_with(entry: AnswerFormat, service_url: str) -> None:
    response = _post(service_url, entry.path[1:])
    assert response.status_code == 200
    assert response.headers["content-type"] == entry.media_type


@pytest.mark.slow
def test_a_large_geojson_is_streamed_and_a_small_one_is_not(service_url: str) -> None:
    labels = np.random.default_rng(0).integers(1, 6, (100, 100)).repeat(8, 0).repeat(8, 1)
    large = _post(service_url, "geojson", encoded(painted(labels)))
    assert large.headers.get("transfer-encoding") == "chunked"
    assert large.headers["X-Mpp-Source"] == "model (assumed)"
    polygons = [shapely.geometry.shape(one["geometry"]) for one in large.json()["features"]]
    assert sum(polygon.area for polygon in polygons) == 800 * 800
    assert "content-length" in _post(service_url, "geojson", classes="Necrosis").headers


def test_a_tiff_is_handed_back_as_a_png_of_the_same_pixels(service_url: str) -> None:
    response = _post(service_url, "image", encoded(IMAGE, "TIFF"))
    with Image.open(io.BytesIO(response.content), formats=["PNG"]) as picture:
        assert np.array_equal(np.asarray(picture), IMAGE)


def test_the_mpp_may_be_in_the_query_or_in_the_form(service_url: str) -> None:
    in_query = _summary(_post(service_url, "segment", mpp=1.0))
    in_form = _summary(_post(service_url, "segment", form={"mpp": "1.0"}))
    assert in_query == in_form
    assert (in_query.image.mpp, in_query.image.mpp_source) == (1.0, "request")
    assert sum(row.area_um2 or 0 for row in in_query.classes) == pytest.approx(150 * 210)


def test_the_files_mpp_is_taken_where_the_request_states_none(service_url: str) -> None:
    content = encoded(IMAGE, dpi=(25_400, 25_400))
    image = _summary(_post(service_url, "segment", content)).image
    assert image.mpp == pytest.approx(1.0)
    assert image.mpp_source == "PNG density"


def test_the_requests_mpp_comes_before_the_files(service_url: str) -> None:
    content = encoded(IMAGE, dpi=(25_400, 25_400))
    image = _summary(_post(service_url, "segment", content, mpp=0.5)).image
    assert (image.mpp, image.mpp_source) == (0.5, "request")
    assert image.notes == ("PNG density says 1 um per pixel, 0.5 was given, and counts",)


def test_without_any_mpp_the_answer_says_that_the_models_is_assumed(service_url: str) -> None:
    summary = _summary(_post(service_url, "segment"))
    assert (summary.image.mpp, summary.image.mpp_source) == (0.5, "model (assumed)")
    assert all(row.area_um2 is None for row in summary.classes)


@pytest.mark.parametrize(
    ("endpoint", "mpp"),
    [
        *((endpoint, "0") for endpoint in IMAGE_ENDPOINTS),
        *(("segment", mpp) for mpp in ("-1", "1e9", "nan", "inf", "half", "0x1")),
    ],
)
def test_an_absurd_mpp_is_a_400_that_names_it(endpoint: str, mpp: str, service_url: str) -> None:
    for response in (
        _post(service_url, endpoint, mpp=mpp),
        _post(service_url, endpoint, form={"mpp": mpp}),
    ):
        assert refusal_of(response, "mpp") == (400, OptionError.code)


def test_an_mpp_that_is_stated_twice_is_refused_unless_both_are_the_same(service_url: str) -> None:
    both = _post(service_url, "segment", mpp=1.0, form={"mpp": "2"})
    assert refusal_of(both, "mpp", 1, 2) == (400, OptionError.code)
    assert _summary(_post(service_url, "segment", mpp=1.0, form={"mpp": "1"})).image.mpp == 1.0


@pytest.mark.parametrize("endpoint", ["segment", "geojson", "image"])
def test_an_option_of_one_value_that_is_given_twice_is_refused(
    endpoint: str, service_url: str
) -> None:
    twice = _post(service_url, endpoint, mpp=["0.5", "0.7"])
    assert refusal_of(twice, "mpp", 2) == (400, OptionError.code)


def test_an_absurd_mpp_in_the_form_is_a_400_also_beside_a_good_one_in_the_query(
    service_url: str,
) -> None:
    answer = _post(service_url, "segment", mpp=0.5, form={"mpp": "-0.95"})
    assert refusal_of(answer, "-0.95") == (400, OptionError.code)


def test_an_image_that_would_be_enlarged_too_far_is_a_413(service_url: str) -> None:
    answer = _post(service_url, "segment", mpp=20)
    assert refusal_of(answer, "40 times") == (413, "enlarged_too_far")


def test_a_printers_resolution_is_not_believed_and_said_so(service_url: str) -> None:
    printed = encoded(blobs(64, 64), dpi=(2400, 2400))
    image = _summary(_post(service_url, "segment", printed)).image
    assert (image.mpp, image.mpp_source) == (0.5, "model (assumed)")
    assert "2400 dpi" in image.mpp_note


@pytest.mark.parametrize("endpoint", ["segment", "labels", "overlay", "geojson", "arrays"])
def test_every_answer_says_where_its_mpp_is_from(endpoint: str, service_url: str) -> None:
    headers = _post(service_url, endpoint, encoded(blobs(64, 64), dpi=(25_400, 25_400))).headers
    assert (headers["X-Mpp"], headers["X-Mpp-Source"]) == ("1", "PNG density")


def test_the_answer_says_how_the_pixels_were_changed(service_url: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    content = encoded(blobs(40, 64), "WEBP", exif=exif.tobytes(), lossless=True)
    image = _summary(_post(service_url, "segment", content)).image
    assert len(image.notes) == 1
    assert "orientation 3" in image.notes[0]


@pytest.mark.parametrize("mpp", [0.2, 0.9])
def test_pictures_of_a_resampled_image_have_its_own_size(mpp: float, service_url: str) -> None:
    for endpoint in ("labels", "confidence", "overlay"):
        picture = Image.open(io.BytesIO(_post(service_url, endpoint, mpp=mpp).content))
        assert picture.size == (210, 150)


def test_polygons_of_a_resampled_image_are_in_its_own_pixels(service_url: str) -> None:
    collection = _post(service_url, "geojson", mpp=0.9).json()
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in collection["features"]]
    assert shapely.union_all(shapes).equals(shapely.box(0, 0, 210, 150))


def test_the_confidence_is_that_of_the_arrays(service_url: str) -> None:
    picture = Image.open(io.BytesIO(_post(service_url, "confidence").content))
    with np.load(io.BytesIO(_post(service_url, "arrays").content)) as arrays:
        assert np.array_equal(np.asarray(picture), arrays["confidence"])


def test_the_labels_are_those_of_the_segmenter_in_process(
    service_url: str, toy_bundle: Path
) -> None:
    with open_segmenter(ServeSettings(bundle=toy_bundle)) as segmenter:
        result = segmenter.segment(IMAGE, mpp=0.8)
    expected = FORMATS["labels"].render(Source(IMAGE, result, read_bundle(toy_bundle)), {})
    assert _post(service_url, "labels", mpp=0.8).content == expected


def test_the_overlay_shows_the_chosen_classes_at_the_chosen_opacity(service_url: str) -> None:
    image = painted(np.repeat([[1], [2]], 64, axis=1).repeat(32, axis=0))
    response = _post(service_url, "overlay", encoded(image), alpha=1, classes=["Stroma"])
    overlay = np.asarray(Image.open(io.BytesIO(response.content)))
    assert np.array_equal(overlay[:31], image[:31])
    assert (overlay[-31:] == [0x2C, 0xA0, 0x2C]).all()


def test_geojson_is_simpler_and_has_fewer_regions_where_it_is_asked_for(service_url: str) -> None:
    exact = _post(service_url, "geojson")
    simple = _post(service_url, "geojson", simplify_px=2, min_area_px=50, classes=["Tumor"])
    assert len(simple.content) < len(exact.content) / 2
    found = [feature["properties"] for feature in simple.json()["features"]]
    assert min(one["measurements"]["Area px^2"] for one in found) >= 50
    assert {one["classification"]["name"] for one in found} == {"Tumor"}


@pytest.mark.parametrize(
    ("name", "query", "expected"),
    [
        ("tile [d=2,x=100,y=200,w=80,h=60].png", {}, (100, 200, 180, 260)),
        ("tile [d=2,x=100,y=200,w=80,h=60].png", {"origin": "7,8"}, (7, 8, 87, 68)),
        ("tile.png", {"origin": ["7", "8.5"], "downsample": 0.5}, (7, 8.5, 27, 23.5)),
        ("tile.png", {"downsample": 3}, (0, 0, 120, 90)),
    ],
)
def test_polygons_are_put_into_the_frame_of_the_slide(
    name: str, query: dict[str, Any], expected: tuple[float, ...], service_url: str
) -> None:
    file = (name, encoded(painted(np.full((30, 40), 2))))
    (feature,) = _post(service_url, "geojson", file, **query).json()["features"]
    assert shapely.geometry.shape(feature["geometry"]).bounds == expected
    (element,) = _post(service_url, "dsa", file, **query).json()["elements"]
    assert shapely.Polygon(element["points"]).bounds == expected


@pytest.mark.parametrize(
    ("endpoint", "name", "nearest"),
    [
        *((endpoint, "mmp", "mpp") for endpoint in (*IMAGE_ENDPOINTS, "batch")),
        ("segment", "MPP", "mpp"),
        ("geojson", "simplify", "simplify_px"),
        ("dsa", "class", "classes"),
        ("batch", "class", "classes"),
    ],
)
def test_a_parameter_that_a_route_does_not_have_is_refused_with_the_nearest_name(
    endpoint: str, name: str, nearest: str, service_url: str
) -> None:
    response = _post(service_url, endpoint, **{name: "1"})
    assert refusal_of(response, repr(name), repr(nearest)) == (400, OptionError.code)


def test_probabilities_of_a_resampled_image_say_where_they_are(service_url: str) -> None:
    content = _post(service_url, "probabilities", mpp=1.0).content
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert arrays["probabilities"].shape == (5, 75, 105)
        assert arrays["stride_px"].tolist() == [2, 2]
        assert arrays["classes"].tolist() == [tissue.name for tissue in CLASSES]


@pytest.mark.parametrize(
    ("endpoint", "option", "value"),
    [
        ("overlay", "alpha", "2"),
        ("overlay", "alpha", "nan"),
        ("overlay", "classes", "Muscle"),
        ("geojson", "classes", "Muscle"),
        ("geojson", "simplify_px", "-1"),
        ("dsa", "simplify_px", "inf"),
        ("dsa", "min_area_px", "1.5"),
        ("geojson", "min_area_px", "-3"),
        ("arrays", "probabilities", "perhaps"),
        ("batch", "outputs", "arrays"),
        *(("geojson", "origin", origin) for origin in ("1", "1,2,3", "a,b", "nan,1")),
    ],
)
def test_an_option_that_cannot_be_used_is_a_400_that_repeats_it(
    endpoint: str, option: str, value: str, service_url: str
) -> None:
    response = _post(service_url, endpoint, **{option: value})
    assert refusal_of(response, *value.split(",")) == (400, OptionError.code)


@pytest.mark.parametrize(
    "path", ["nowhere", "segment/", "segment/x", "docs.json", "%00", "..%2f..%2fetc%2fpasswd"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_a_404_in_json(path: str, method: str, service_url: str) -> None:
    answer = httpx.request(method, f"{service_url}/{path}")
    assert refusal_of(answer) == (404, "not_found")
