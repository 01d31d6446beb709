import asyncio
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.client import AsyncTritonClient, TritonClient
from serve.client.segment_files import main as segment_files
from serve.contract.errors import (
    BackendUnavailableError,
    BackendUnreachableError,
    BundleError,
    FocalPathError,
    ImageTooLargeError,
    ModelChangedError,
)
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.segmenter import Segmentation, TileSegmenter, open_segmenter
from serve.inference.triton import TritonBackend
from serve.settings import InferenceSettings
from tests.support.errors import raises
from tests.support.pictures import blobs, encoded, painted
from tests.support.ports import free_port
from tests.support.toy_bundle import add_warm_up


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have waited."""
    found: list[float] = []
    monkeypatch.setattr("serve.inference.patient_triton.time.sleep", found.append)
    return found


@pytest.fixture
def version() -> list[str]:
    """What Triton says that it serves."""
    return ["1"]


@pytest.fixture
def lossy(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, version: list[str]
) -> list[FocalPathError]:
    """What Triton fails with first; it then answers as ONNX Runtime does."""
    errors: list[FocalPathError] = []
    own = OnnxRuntimeBackend(toy_bundle, read_bundle(toy_bundle))

    def infer(_: TritonBackend, images: NDArray[np.uint8], outputs: Sequence[str]) -> Any:
        if errors:
            raise errors.pop()
        return own.infer(images, outputs)

    def begin(self: TritonBackend, url: str, manifest: Manifest, **_: object) -> None:
        self._url, self._manifest, self._version = url, manifest, "1"

    monkeypatch.setattr(TritonBackend, "__init__", begin)
    monkeypatch.setattr(TritonBackend, "infer", infer)
    monkeypatch.setattr(TritonBackend, "_check_interface", lambda _: version[0])
    monkeypatch.setattr(TritonBackend, "_count_tiles", lambda _: None)
    monkeypatch.setattr(TritonBackend, "close", lambda _: None)
    return errors


def _client(path: Path, **options: Any) -> TritonClient:
    return TritonClient("127.0.0.1:8001", read_bundle(path), **options)


@pytest.mark.parametrize(("num_lost", "expected"), [(0, []), (1, [1]), (3, [1, 2, 4])])
def test_tiles_are_sent_again_to_a_triton_that_was_lost(
    num_lost: int,
    expected: list[float],
    toy_bundle: Path,
    lossy: list[FocalPathError],
    pauses: list[float],
) -> None:
    image = blobs(40, 50)
    with open_segmenter(InferenceSettings(bundle=toy_bundle)) as segmenter:
        labels = segmenter.segment(image).labels
    lossy += [BackendUnreachableError("gone")] * num_lost
    with _client(toy_bundle) as client:
        assert np.array_equal(client.segment(image).labels, labels)
    assert pauses == expected


@pytest.mark.parametrize("number", ["1", "2"])
def test_what_comes_back_with_another_model_answers_nothing(
    number: str,
    toy_bundle: Path,
    tmp_path: Path,
    lossy: list[FocalPathError],
    pauses: list[float],
    version: list[str],
) -> None:
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    side = read_bundle(bundle).tile_size_px
    image = painted(np.arange(side**2).reshape(side, side) * 5 // side**2 + 1)
    with open_segmenter(InferenceSettings(bundle=bundle)) as segmenter:
        add_warm_up(bundle, image, segmenter.segment(image).labels)
    with _client(bundle, bundle=bundle) as client:
        version[0] = number
        np.savez(bundle / "warm_up.npz", image=image, labels=np.full((side, side), 2))
        lossy.append(BackendUnreachableError("gone"))
        with raises(
            ModelChangedError,
            "version 2" if number == "2" else "warm-up image's labels",
            code="model_changed",
        ):
            client.segment(image)
    shutil.copy(toy_bundle / "manifest.json", bundle)
    add_warm_up(bundle, image, np.full((side, side), 2))
    with raises(BundleError, "warm_up.npz", code="warm_up_differs"):
        _client(bundle, bundle=bundle)
    assert pauses == [1]


@pytest.mark.parametrize(
    ("error", "patience_s", "expected"),
    [
        (BackendUnreachableError("gone"), 120, [1, 2, 4]),  # a few times only
        (BackendUnreachableError("gone"), 0, []),
        (BackendUnavailableError("too slow"), 120, []),
        (ModelChangedError("another version"), 120, []),
    ],
)
def test_a_client_gives_up_where_waiting_does_not_help(
    error: FocalPathError,
    patience_s: float,
    expected: list[float],
    toy_bundle: Path,
    lossy: list[FocalPathError],
    pauses: list[float],
) -> None:
    lossy += [error] * 9
    with _client(toy_bundle, patience_s=patience_s) as client, raises(type(error), error):
        client.segment(blobs(40, 50))
    assert pauses == expected


@pytest.mark.usefixtures("lossy")
def test_the_limit_of_tiles_is_the_segmenters(toy_bundle: Path) -> None:
    settings = InferenceSettings(bundle=toy_bundle, max_image_tiles=2)
    with open_segmenter(settings) as segmenter, _client(toy_bundle, max_tiles=2) as client:
        one: TileSegmenter
        for one in (segmenter, client):
            assert one.segment(blobs(60, 60)).labels.shape == (60, 60)
            with raises(ImageTooLargeError, "2 tiles", code="too_many_tiles"):
                one.segment(blobs(200, 200))


@pytest.mark.parametrize("door", [["--url", "grpc://127.0.0.1:8001"], ["--backend", "triton"]])
def test_the_command_line_waits_and_limits_tiles_too(
    door: list[str],
    toy_bundle: Path,
    tmp_path: Path,
    lossy: list[FocalPathError],
    pauses: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    image, large = tmp_path / "image.png", tmp_path / "large.png"
    image.write_bytes(encoded(blobs(50, 60)))
    large.write_bytes(encoded(blobs(200, 200)))
    lossy.append(BackendUnreachableError("gone"))
    options = ["--bundle", toy_bundle, "--out", tmp_path / "out", "--max-image-tiles", "2"]
    assert segment_files([str(value) for value in (image, large, *door, *options)]) == 1
    assert "2 tiles" in capsys.readouterr().err
    assert (tmp_path / "out" / "image.json").is_file()
    assert not (tmp_path / "out" / "large.json").exists()
    assert pauses == [1]


@pytest.mark.usefixtures("lossy")
def test_the_connection_and_the_largest_image_are_as_the_caller_says(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(self: TritonBackend, url: str, manifest: Manifest, **options: object) -> None:
        found.update(options)
        begin(self, url, manifest)

    found: dict[str, object] = {}
    begin = TritonBackend.__init__
    monkeypatch.setattr(TritonBackend, "__init__", noted)
    options: dict[str, object] = {"timeout_s": 7.0, "shared_memory": "off"}
    with _client(toy_bundle, max_pixels=8000, **options) as client:
        assert found == options
        mpp = 2 * client.manifest.mpp
        assert client.segment(blobs(40, 50), mpp=mpp).labels.shape == (40, 50)
        with raises(ImageTooLargeError, "8000 pixels", code="too_many_tiles"):
            client.segment(blobs(45, 50), mpp=mpp)


@pytest.mark.usefixtures("lossy")
def test_the_async_client_takes_the_same_options_and_gives_the_same(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = blobs(90, 70)
    options: dict[str, Any] = {"mpp": 0.4, "mpp_source": "OME-XML", "with_probabilities": True}
    close = Mock()
    monkeypatch.setattr(TritonBackend, "close", close)
    with _client(toy_bundle) as client:
        expected = client.segment(image, **options)
    close.reset_mock()

    async def segment() -> Segmentation:
        manifest = read_bundle(toy_bundle)
        async with AsyncTritonClient("127.0.0.1:8001", manifest, max_tiles=9) as asynchronous:
            assert await asynchronous.manifest() == manifest
            with raises(ImageTooLargeError, "9 tiles", code="too_many_tiles"):
                await asynchronous.segment(blobs(300, 300))
            return await asynchronous.segment(image, **options)

    found = asyncio.run(segment())
    assert np.array_equal(found.labels, expected.labels)
    assert found.low_res is not None
    assert expected.low_res is not None
    assert np.array_equal(found.low_res.probabilities, expected.low_res.probabilities)
    assert found.summary.image == expected.summary.image
    close.assert_called_once()


@pytest.mark.usefixtures("lossy")
def test_other_work_goes_on_while_the_async_client_waits(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infer_when_told(*arguments: Any) -> Any:
        assert told.wait(60)
        return infer(*arguments)

    told, infer = threading.Event(), TritonBackend.infer
    monkeypatch.setattr(TritonBackend, "infer", infer_when_told)

    async def segment() -> Segmentation:
        manifest = read_bundle(toy_bundle)
        async with AsyncTritonClient("127.0.0.1:8001", manifest) as client:
            waiting = asyncio.create_task(client.segment(blobs(40, 50)))
            await asyncio.sleep(0)
            told.set()
            return await waiting

    assert asyncio.run(segment()).labels.shape == (40, 50)


@pytest.mark.parametrize("kind", [TritonClient, AsyncTritonClient])
def test_a_client_without_triton_names_its_address(kind: type, toy_bundle: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with raises(BackendUnreachableError, address, code="backend_unavailable"):
        kind(address, read_bundle(toy_bundle))
