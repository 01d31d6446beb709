import io
import json
import zipfile
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import starlette.testclient

from serve.service.endpoints import build_app
from serve.service.gateway import build_gateway
from serve.settings import ServeSettings
from tests.support.pictures import blobs, encoded
from tests.support.toy_bundle import CLASSES

PATHS = {
    "/segment", "/labels", "/confidence", "/overlay", "/geojson", "/dsa", "/probabilities",
    "/arrays", "/image", "/batch", "/model", "/runtime", "/metrics",
}  # fmt: skip
HEALTH = {"/livez", "/readyz"}
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
def described_with_keys(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("ward:the-right-key-of-the-ward\n")
    return build_app(ServeSettings(bundle=toy_bundle, api_keys_file=keys)).openapi()


@pytest.fixture(scope="module")
def document(app: Any) -> dict[str, Any]:
    generated: dict[str, Any] = app.openapi()
    return generated


def test_every_endpoint_is_described(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == PATHS | HEALTH
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"]
            assert set(operation["responses"]) != {"200"} or path in ("/metrics", "/livez")


def test_every_status_that_occurs_is_described_and_no_other(
    document: dict[str, Any], described_with_keys: dict[str, Any]
) -> None:
    upload = {"200", "400", "408", "413", "429", "500", "503", "504"}
    for found, more in ((document, set()), (described_with_keys, {"401"})):
        for path, operations in found["paths"].items():
            if "post" in operations:
                assert set(operations["post"]["responses"]) == upload | more, path
        assert set(found["paths"]["/model"]["get"]["responses"]) == {"200", "500", "503"} | more
        assert set(found["paths"]["/metrics"]["get"]["responses"]) == {"200"}


def test_only_what_needs_a_key_is_described_so(described_with_keys: dict[str, Any]) -> None:
    without = {
        path
        for path, operations in described_with_keys["paths"].items()
        if not any("security" in operation for operation in operations.values())
    }
    assert without == {"/metrics", *HEALTH}


def test_the_headers_of_answers_are_described(document: dict[str, Any]) -> None:
    for path in PATHS:
        for operation in document["paths"][path].values():
            for status, response in operation["responses"].items():
                assert "X-Request-ID" in response["headers"]
                assert ("Retry-After" in response["headers"]) == (status == "429")


@pytest.mark.parametrize("path", sorted(HEALTH))
def test_health_is_answered_as_it_is_described(
    path: str, document: dict[str, Any], service_url: str
) -> None:
    answer = httpx.get(f"{service_url}{path}")
    described = document["paths"][path]["get"]["responses"][str(answer.status_code)]
    assert list(described["content"]) == [answer.headers["content-type"].partition(";")[0]]


def test_every_option_is_described_with_its_bounds(document: dict[str, Any]) -> None:
    parameters = {
        parameter["name"]: parameter
        for path in document["paths"].values()
        for operation in path.values()
        for parameter in operation.get("parameters", [])
    }
    assert set(parameters) == {
        "mpp", "alpha", "classes", "simplify_px", "min_area_px", "outputs", "probabilities",
        "origin", "downsample",
    }  # fmt: skip
    assert all(parameter["description"] for parameter in parameters.values())
    assert all(parameter["schema"]["examples"] for parameter in parameters.values())
    assert parameters["alpha"]["schema"]["maximum"] == 1


def test_every_upload_is_described_as_a_file_in_a_form(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        if "post" in operations:
            body = operations["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
            assert body["required"] == ["images" if path == "/batch" else "image"]
            assert "mpp" in body["properties"]


def _in_full(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """A schema with the components that it refers to."""
    return {**schema, "components": document["components"]}


def test_every_answer_but_files_has_an_example_that_fits_its_schema(
    document: dict[str, Any],
) -> None:
    checked = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                for media_type, content in response["content"].items():
                    if media_type in ("image/png", "application/x-npz"):
                        continue
                    schema = content["schema"]
                    _, _, name = schema.get("$ref", "").rpartition("/")
                    target = document["components"]["schemas"].get(name, schema)
                    examples = [content["example"]] if "example" in content else target["examples"]
                    for example in examples:
                        jsonschema.validate(example, _in_full(schema, document))
                    checked.add((path, status))
    assert {
        ("/segment", "200"),
        ("/geojson", "200"),
        ("/batch", "200"),
        ("/model", "200"),
    } < checked
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize("path", ["/segment", "/geojson", "/dsa"])
def test_a_document_is_described_to_its_last_field(
    path: str, document: dict[str, Any], app: Any
) -> None:
    """The schema, made strict, still takes the answer: it names every field that there is."""

    def strict(schema: Any) -> Any:
        if isinstance(schema, list):
            return [strict(part) for part in schema]
        if not isinstance(schema, dict):
            return schema
        closed = {"additionalProperties": False} if "properties" in schema else {}
        return {**{name: strict(part) for name, part in schema.items()}, **closed}

    with starlette.testclient.TestClient(app) as client:
        answer = client.post(path, files={"image": FILES["image/png"]}, params={"mpp": 0.5})
    (content,) = document["paths"][path]["post"]["responses"]["200"]["content"].values()
    jsonschema.validate(answer.json(), strict(_in_full(content["schema"], document)))


def test_a_line_of_a_batch_is_described(document: dict[str, Any], app: Any) -> None:
    files = [("images", FILES["image/png"]), ("images", b"none")]
    with starlette.testclient.TestClient(app) as client:
        answer = client.post("/batch", files=files, params={"outputs": ["json", "labels", "dsa"]})
    schema = _in_full(document["components"]["schemas"]["BatchLine"], document)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["status"] for line in lines] == [200, 400]
    for line in lines:
        jsonschema.validate(line, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**lines[0], "outputs": {"labels": 1}}, schema)


@pytest.mark.slow
def test_the_service_does_what_its_openapi_document_says(app: Any) -> None:
    # Imported here: they take a second and a half, of every collection of the tests.
    import hypothesis
    import schemathesis
    from hypothesis import strategies
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import negative_data_rejection

    for media_type, content in FILES.items():
        schemathesis.openapi.media_type(media_type, strategies.just(content))
    gateway = build_gateway(app, app.state.settings)
    schema = schemathesis.openapi.from_asgi("/openapi.json", gateway).exclude(path=sorted(HEALTH))

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(data=strategies.data())
    def run(cases: Any, mode: GenerationMode, data: strategies.DataObject) -> None:
        case = data.draw(cases)
        if mode is GenerationMode.POSITIVE and "classes" in case.query:
            # Which classes there are is the model's to say, and not the document's.
            case.query["classes"] = data.draw(strategies.sampled_from([["Tumor"], NAMES]))
        if mode is GenerationMode.POSITIVE:
            # So is how far an image may be enlarged: from 2.0 to the toy model's 0.5.
            for place in (case.query, case.body):
                if isinstance(place, dict) and isinstance(place.get("mpp"), int | float):
                    place["mpp"] = min(place["mpp"], 2.0)
            # And a document cannot say that the query and the form must not state two.
            if "mpp" in case.query and isinstance(case.body, dict):
                case.body.pop("mpp", None)
        if isinstance(case.body, dict) and isinstance(case.body.get("images"), bytes):
            case.body["images"] = [case.body["images"]]  # else it is sent as text
        # A form cannot tell a list of one from a value, nor an empty list from nothing: what is
        # refused is tested field by field in test_endpoints.py.
        case.call_and_validate(excluded_checks=[negative_data_rejection])

    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == PATHS
    for operation in operations:
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        for mode in modes if operation.method == "post" else modes[:1]:
            run(operation.as_strategy(generation_mode=mode), mode)  # built once: that takes long
