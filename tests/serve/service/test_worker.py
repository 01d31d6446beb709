from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.contract.errors import ImageTooLargeError
from serve.images.mpp import FROM_REQUEST
from serve.inference.segmenter import Segmentation, TileSegmenter
from serve.service.kept import KeptResults, ResultKey
from serve.service.model import Model
from serve.service.telemetry import Telemetry
from serve.service.worker import Job, Worker
from serve.settings import ServeSettings
from tests.support.errors import raises
from tests.support.pictures import blobs, encoded
from tests.support.toy_bundle import write_toy_bundle

Answer = Callable[..., bytes]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The um per pixel of each image that the model was run on."""
    found: list[float | None] = []
    segment = TileSegmenter.segment

    def counted(segmenter: TileSegmenter, image: np.ndarray, **options: Any) -> Segmentation:
        found.append(options.get("mpp"))
        return segment(segmenter, image, **options)

    monkeypatch.setattr(TileSegmenter, "segment", counted)
    return found


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle")


@pytest.fixture
def answer(bundle: Path, runs: list[float | None]) -> Iterator[Answer]:
    settings, telemetry = ServeSettings(bundle=bundle, keep_results_mib=1), Telemetry()
    model, worker = Model(settings, telemetry), Worker(settings, telemetry)

    def one(name: str, size: int = 100, keep: bool = True, **job: Any) -> bytes:
        wanted = Job(formats=(name,), keep=keep, **job)
        return worker.answer(model, encoded(blobs(size, size)), wanted).contents[0]

    assert model.is_ready()
    runs.clear()  # of the warm-up
    yield one
    model.close()


def test_further_formats_of_one_image_do_not_run_the_model_again(
    answer: Answer, runs: list[float | None]
) -> None:
    kept = [answer(name) for name in ("arrays", "labels", "geojson", "json")]
    assert len(runs) == 1
    assert kept == [answer(name, keep=False) for name in ("arrays", "labels", "geojson", "json")]
    assert len(runs) == 5


def test_another_mpp_or_image_or_more_of_it_runs_the_model(
    answer: Answer, runs: list[float | None]
) -> None:
    answer("labels", mpp=0.5)
    answer("labels", mpp=0.25)
    answer("labels", size=90, mpp=0.25)
    assert runs == [0.5, 0.25, 0.25]
    answer("probabilities", mpp=0.25)
    assert len(runs) == 4
    answer("labels", mpp=0.25)
    assert len(runs) == 4


def test_another_model_runs_again(bundle: Path, tmp_path: Path, runs: list[float | None]) -> None:
    settings, telemetry = ServeSettings(bundle=bundle, keep_results_mib=1), Telemetry()
    model, worker = Model(settings, telemetry), Worker(settings, telemetry)
    content, job = encoded(blobs(40, 40)), Job(formats=("json",), keep=True)
    assert b'"1.0.0"' in worker.answer(model, content, job).contents[0]
    write_toy_bundle(bundle, version="2.0.0")
    model.look_for_update()
    assert b'"2.0.0"' in worker.answer(model, content, job).contents[0]
    model.close()


def test_an_image_of_too_many_corners_is_asked_for_again_without_running_the_model(
    answer: Answer, runs: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.answers.edges.MAX_EDGES", 8)
    with raises(ImageTooLargeError, code="too_many_corners"):
        answer("geojson", keep=False)
    smaller = answer("geojson", keep=False, options={"min_area_px": 10_000})
    assert smaller.startswith(b'{"type":"FeatureCollection"')
    assert len(runs) == 1
    answer("geojson", keep=False, size=90, options={"min_area_px": 10_000})
    assert len(runs) == 2


@pytest.mark.slow
def test_the_oldest_results_go_when_the_memory_is_full(
    answer: Answer, runs: list[float | None]
) -> None:
    for size in (500, 501, 500, 502, 501):  # two fit: 0.5 MB each
        answer("labels", size=size)
    assert len(runs) == 4
    answer("labels", size=800)  # too large to be kept
    answer("labels", size=800)
    answer("labels", size=501)
    assert len(runs) == 6


def test_no_result_is_kept_where_the_setting_says_so() -> None:
    kept = KeptResults(0)
    key = ResultKey("0", None, FROM_REQUEST, ())
    kept.put(key, Segmentation(*np.zeros((2, 3, 3), np.uint8), summary=None))  # type: ignore[arg-type]
    assert kept.get(key, with_probabilities=False) is None
