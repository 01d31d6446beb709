"""One entry in the registry is enough: every door offers the format."""

import base64
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import Field
from starlette.testclient import TestClient

from serve.answers.format import AnswerFormat, Options
from serve.answers.registry import FORMATS, merged_options
from serve.cli import main
from serve.contract.errors import OptionError
from serve.service.endpoints import build_app
from serve.settings import ServeSettings
from tests.support import ROOT
from tests.support.pictures import blobs, encoded, painted

PNG = encoded(painted(np.full((20, 30), 2)))


class ToyOptions(Options):
    times: int = Field(1, ge=1, le=3, description="how often it is said", examples=[2])


TOY = AnswerFormat(
    name="toy",
    title="Toy",
    kind="TXT",
    description="The first label, in words.",
    media_type="text/toy",
    suffix=".toy.txt",
    options=ToyOptions,
    write=lambda source, options: (
        source.manifest.classes[source.result.labels[0, 0] - 1].name * options.times
    ).encode(),
)


@pytest.fixture
def _toy() -> Iterator[None]:
    FORMATS[TOY.name] = TOY
    yield
    del FORMATS[TOY.name]


@pytest.fixture
def client(_toy: None, toy_bundle: Path) -> Iterator[TestClient]:
    with TestClient(build_app(ServeSettings(bundle=toy_bundle, threads=1))) as client:
        yield client


def test_a_new_format_has_a_route_with_its_options(client: TestClient) -> None:
    answer = client.post("/toy", files={"image": PNG}, params={"times": 2})
    assert (answer.text, answer.headers["content-type"]) == (
        "StromaStroma",
        "text/toy; charset=utf-8",
    )
    refused = client.post("/toy", files={"image": PNG}, params={"times": 4})
    assert (refused.status_code, refused.json()["code"]) == (400, OptionError.code)


def test_a_new_format_is_described_by_openapi(client: TestClient) -> None:
    paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    route = paths["/toy"]["post"]
    assert route["description"] == TOY.description
    assert list(route["responses"]["200"]["content"]) == ["text/toy"]
    schemas = {one["name"]: one["schema"] for one in route["parameters"]}
    assert schemas["times"]["maximum"] == 3
    in_batch = {one["name"]: one["schema"] for one in paths["/batch"]["post"]["parameters"]}
    assert "times" in in_batch
    assert "toy" in in_batch["outputs"]["items"]["enum"]


def test_a_new_format_is_an_output_of_batch(client: TestClient) -> None:
    query = {"outputs": ["toy"], "times": 3}
    answer = client.post("/batch", files=[("images", PNG)], params=query)
    assert base64.b64decode(json.loads(answer.text)["outputs"]["toy"]) == b"Stroma" * 3


def test_a_new_format_is_among_the_downloads_of_the_page(client: TestClient) -> None:
    listed = {entry["name"]: entry for entry in client.get("/").json()["formats"]}
    expected = {"title": "Toy", "path": "/toy", "suffix": ".toy.txt", "options": ["times"]}
    assert expected.items() <= listed["toy"].items()


@pytest.mark.usefixtures("_toy")
def test_a_new_format_is_a_choice_of_the_command_line(toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "slide.png").write_bytes(PNG)
    arguments = ["--bundle", str(toy_bundle), "--out", str(tmp_path), "--format", "toy"]
    assert main(["segment", str(tmp_path / "slide.png"), *arguments, "--times", "2"]) == 0
    assert (tmp_path / "slide.toy.txt").read_bytes() == b"StromaStroma"


def test_the_table_in_the_docs_is_that_of_the_registry() -> None:
    written = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert written == runpy.run_path(str(ROOT / "docs/formats.py"))["text"]()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "many"])
@pytest.mark.parametrize("name", ["alpha", "simplify_px", "min_area_px"])
def test_an_option_that_is_not_in_its_range_is_refused(name: str, value: object) -> None:
    for entry in FORMATS.values():
        if name in entry.options.model_fields:
            with pytest.raises(OptionError) as refused:
                entry.options.of({name: value})
            assert name in str(refused.value)


def test_an_option_means_the_same_in_every_format_that_has_it() -> None:
    class OtherOptions(Options):
        alpha: float = Field(0.1, ge=0, le=9, description="something else", examples=[1])

    other = AnswerFormat(**{**vars(TOY), "options": OtherOptions})
    with pytest.raises(AssertionError, match="alpha"):
        merged_options([FORMATS["overlay"], other], Options)


def test_formats_have_suffixes_and_paths_of_their_own() -> None:
    for name in ("suffix", "path"):
        assert len({getattr(entry, name) for entry in FORMATS.values()}) == len(FORMATS)


def test_a_format_of_an_image_is_the_same_through_every_door(
    toy_bundle: Path, tmp_path: Path
) -> None:
    """Over HTTP, in a batch and as a file of the command line."""
    image = encoded(blobs(50, 70))
    (tmp_path / "slide.png").write_bytes(image)
    names = [entry.name for entry in FORMATS.values() if entry.in_batch and entry.as_file]
    arguments = ["--bundle", str(toy_bundle), "--out", str(tmp_path), "--format", *names]
    assert main(["segment", str(tmp_path / "slide.png"), *arguments]) == 0
    with TestClient(build_app(ServeSettings(bundle=toy_bundle, threads=1))) as client:
        batch = client.post("/batch", files=[("images", image)], params={"outputs": names})
        for name in names:
            alone = client.post(FORMATS[name].path, files={"image": image})
            file = (tmp_path / f"slide{FORMATS[name].suffix}").read_bytes()
            output = json.loads(batch.text)["outputs"][name]
            if FORMATS[name].document is None:
                assert alone.content == file == base64.b64decode(output)
            else:
                written = json.loads(file)
                written.pop("made_with", None)
                assert alone.json() == written == output
