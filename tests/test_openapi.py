import io
import zipfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection

from serve.endpoints import build_app
from serve.settings import ServeSettings
from tests.pictures import blobs, encoded
from tests.toy_bundle import CLASSES

PATHS = {
    "/segment", "/labels", "/confidence", "/overlay", "/geojson", "/dsa", "/probabilities",
    "/arrays", "/image", "/batch", "/model", "/metrics",
}  # fmt: skip
EXAMPLES = 15
"""Requests for each endpoint, once that should be answered and once that should not."""
NAMES = [tissue.name for tissue in CLASSES]
SMALL = blobs(8, 12)


def _zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.png", content)
    return buffer.getvalue()


FILES = {
    "image/png": encoded(SMALL),
    "image/jpeg": encoded(SMALL, "JPEG"),
    "image/tiff": encoded(SMALL, "TIFF"),
    "image/webp": encoded(SMALL, "WEBP"),
    "application/zip": _zip(encoded(SMALL)),
}
"""Each kind of file that the document names."""


@pytest.fixture(scope="module")
def app(toy_bundle: Path) -> Any:
    app = build_app(ServeSettings(bundle=toy_bundle, threads=1))
    app.state.model.is_ready()
    return app


@pytest.fixture(scope="module")
def document(app: Any) -> dict[str, Any]:
    generated: dict[str, Any] = app.openapi()
    return generated


def test_every_endpoint_is_described(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == PATHS
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["description"]
            assert set(operation["responses"]) != {"200"} or path == document["paths"]["/metrics"]


def test_every_option_is_described_with_its_bounds(document: dict[str, Any]) -> None:
    parameters = {
        parameter["name"]: parameter
        for path in document["paths"].values()
        for operation in path.values()
        for parameter in operation.get("parameters", [])
    }
    assert set(parameters) == {
        "mpp", "alpha", "classes", "simplify_px", "min_area_px", "outputs", "probabilities",
    }  # fmt: skip
    assert all(parameter["description"] for parameter in parameters.values())
    assert parameters["alpha"]["schema"]["maximum"] == 1


def test_every_upload_is_described_as_a_file_in_a_form(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        if "post" in operations:
            body = operations["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
            assert body["required"] == ["images" if path == "/batch" else "image"]
            assert "mpp" in body["properties"]


def test_answers_and_errors_have_examples(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["Summary"]["examples"][0]["classes"]
    assert schemas["ErrorAnswer"]["examples"]
    assert "HTTPValidationError" not in schemas


def test_the_example_of_the_summary_is_one(document: dict[str, Any]) -> None:
    from serve.outputs import Summary

    example = document["components"]["schemas"]["Summary"]["examples"][0]
    assert Summary.model_validate(example).model_dump(mode="json") == example


@pytest.mark.slow
def test_the_service_does_what_its_openapi_document_says(app: Any) -> None:
    for media_type, content in FILES.items():
        schemathesis.openapi.media_type(media_type, strategies.just(content))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(data=strategies.data())
    def run(operation: Any, mode: GenerationMode, data: strategies.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if mode is GenerationMode.POSITIVE and "classes" in case.query:
            # Which classes there are is the model's to say, and not the document's.
            case.query["classes"] = data.draw(strategies.sampled_from([["Tumor"], NAMES]))
        if isinstance(case.body, dict) and isinstance(case.body.get("images"), bytes):
            case.body["images"] = [case.body["images"]]  # else it is sent as text
        # A form cannot tell a list of one from a value, nor an empty list from nothing: what is
        # refused is tested field by field in test_endpoints.py.
        case.call_and_validate(excluded_checks=[negative_data_rejection])

    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == PATHS
    for operation in operations:
        run(operation, GenerationMode.POSITIVE)
        if operation.method == "post":
            run(operation, GenerationMode.NEGATIVE)
