"""One image, the same labels from every runtime: against the real Triton server."""

import asyncio
import contextlib
import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from export.triton import Target, publish, render_config
from serve.client import AsyncTritonClient, HttpClient, TritonClient
from serve.client.benchmark_routes import TritonHttpBackend
from serve.client.segment_files import main as segment_files
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.backend import Backend
from serve.inference.batching import TilePool
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.segmenter import Segmentation, TileSegmenter
from serve.inference.triton import TritonBackend
from tests.support.http_service import running_service, wait_until_ready
from tests.support.pictures import encoded
from tests.support.toy_bundle import REFERENCE_RGB, TILE_SIZE_PX, write_toy_bundle
from tests.support.triton_server import (
    CACHE_VARIABLE,
    TritonServer,
    TritonSetupError,
    install_triton,
)

pytestmark = pytest.mark.triton

OUTPUTS = ("labels", "confidence", "low_res_probabilities", "iou_scores")
SERVICE_TIMEOUT_S = 60
Answer = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def server(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("triton") / "repository"
    publish(toy_bundle, repository)
    yield from _running(TritonServer(repository))


@pytest.fixture(scope="session")
def explicit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server with no model at its start: the tests put one into its repository and load it."""
    repository = tmp_path_factory.mktemp("triton") / "explicit"
    repository.mkdir()
    yield from _running(TritonServer(repository, control_mode="explicit"))


def _running(server: TritonServer) -> Iterator[TritonServer]:
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(server)
        except TritonSetupError as error:
            failure = str(error)
        else:
            return
    pytest.fail(failure, pytrace=False)


@pytest.fixture(scope="session")
def services(
    toy_bundle: Path, server: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The addresses of the HTTP service with each backend."""
    scratch = tmp_path_factory.mktemp("services")
    with contextlib.ExitStack() as stack:
        urls = {}
        for backend in ("onnxruntime", "triton"):
            settings = {"backend": backend, "triton_url": server.grpc_url}
            service = running_service(toy_bundle, scratch / f"{backend}.log", **settings)
            urls[backend] = stack.enter_context(service)
        for url in urls.values():
            wait_until_ready(url)
        yield urls


@pytest.fixture(scope="session")
def in_process(toy_bundle: Path) -> TileSegmenter:
    manifest = read_bundle(toy_bundle)
    pool = TilePool(OnnxRuntimeBackend(toy_bundle, manifest), max_tiles=1)
    return TileSegmenter(pool, manifest)


@pytest.fixture(
    params=["ONNX Runtime", "Triton gRPC", "service on onnxruntime", "service on triton"]
)
def segmenter(
    request: pytest.FixtureRequest, toy_bundle: Path, server: TritonServer
) -> Iterator[TileSegmenter]:
    """Each way to segment an image."""
    if request.param == "ONNX Runtime":
        yield request.getfixturevalue("in_process")
        return
    if request.param == "Triton gRPC":
        client = TritonClient(server.grpc_url, read_bundle(toy_bundle))
    else:
        backend = request.param.removeprefix("service on ")
        client = HttpClient(request.getfixturevalue("services")[backend])
    with contextlib.closing(client):
        yield client


@pytest.fixture(scope="session")
def direct(toy_bundle: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(toy_bundle / "model.onnx")


def _tiles(count: int, seed: int = 0) -> np.ndarray:
    """(count, 64, 64, 3) uint8: random patches of the reference colours, with noise."""
    random = np.random.default_rng(seed)
    patches = random.integers(len(REFERENCE_RGB), size=(count, 8, 8))
    side = TILE_SIZE_PX // 8
    colors = REFERENCE_RGB[patches.repeat(side, axis=1).repeat(side, axis=2)]
    noise = random.normal(scale=40, size=colors.shape)
    return np.clip(colors + noise, 0, 255).astype(np.uint8)


def _larger_image() -> np.ndarray:
    """(150, 210, 3) uint8: several tiles, of which the last ones are padded."""
    top, bottom = _tiles(8, seed=4).reshape(2, 4, TILE_SIZE_PX, TILE_SIZE_PX, 3)
    rows = [np.concatenate(list(tiles), axis=1) for tiles in (top, bottom, top)]
    return np.concatenate(rows)[:150, :210]


def _post(url: str, path: str, image: np.ndarray) -> httpx.Response:
    return httpx.post(f"{url}{path}", files={"image": encoded(image)}, timeout=60)


def _run_directly(session: onnxruntime.InferenceSession, images: np.ndarray) -> Answer:
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"image": images}), strict=True))


def _statistics(server: TritonServer) -> tritonclient.grpc.service_pb2.ModelStatistics:
    """What the server has counted, once that holds still: it counts after it has answered."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        before = None
        while True:
            counted = client.get_inference_statistics("segmenter").model_stats[0]
            if counted == before:
                return counted
            before = counted
            time.sleep(0.2)


def _bytes(answer: Answer) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in answer.items()}


def _named(manifest: Manifest, name: str) -> Manifest:
    return manifest.model_copy(update={"name": name})


def _place(server: TritonServer, name: str, config: str, model: Path, file: str) -> None:
    folder = server.repository / name
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / "1" / file).write_bytes(model.read_bytes())


def _load(server: TritonServer, name: str) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.load_model(name)


def test_an_interrupted_installation_of_the_server_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []

    def build(folder: Path) -> None:
        folder.mkdir()
        builds.append(folder)
        if len(builds) == 1:
            raise KeyboardInterrupt

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("tests.support.triton_server._build", build)
    with pytest.raises(KeyboardInterrupt):
        install_triton()

    installed = install_triton()
    assert installed == install_triton()
    assert len(builds) == 2


@pytest.mark.parametrize("num_tiles", [1, 3, 8])
@pytest.mark.parametrize("transport", ["HTTP", "gRPC", "shared memory"])
def test_triton_and_onnx_runtime_answer_the_same_bytes(
    server: TritonServer,
    toy_bundle: Path,
    direct: onnxruntime.InferenceSession,
    transport: str,
    num_tiles: int,
) -> None:
    images, manifest = _tiles(num_tiles), read_bundle(toy_bundle)
    backend: Backend = (
        TritonHttpBackend(server.http_url, manifest)
        if transport == "HTTP"
        else TritonBackend(
            server.grpc_url, manifest, shared_memory="on" if transport != "gRPC" else "off"
        )
    )
    with contextlib.closing(backend):
        assert backend.is_ready()
        assert _bytes(backend.infer(images, OUTPUTS)) == _bytes(_run_directly(direct, images))
        assert set(backend.infer(images, ("confidence",))) == {"confidence"}


def test_the_tiles_of_these_tests_have_every_label(direct: onnxruntime.InferenceSession) -> None:
    labels = _run_directly(direct, _tiles(1))["labels"]

    assert set(np.unique(labels)) == {1, 2, 3, 4, 5}


def test_concurrent_requests_share_batches_and_each_gets_its_own_answer(
    server: TritonServer, toy_bundle: Path, direct: onnxruntime.InferenceSession
) -> None:
    tiles = _tiles(32, seed=1)[:, np.newaxis]
    before = _statistics(server)
    backend = TritonBackend(server.grpc_url, read_bundle(toy_bundle))
    with contextlib.closing(backend), ThreadPoolExecutor(max_workers=16) as pool:
        answers = list(pool.map(lambda tile: backend.infer(tile, OUTPUTS), tiles))
    after = _statistics(server)

    assert after.inference_count - before.inference_count == len(tiles)
    assert after.execution_count - before.execution_count < len(tiles)
    for tile, answer in zip(tiles, answers, strict=True):
        assert np.array_equal(answer["labels"], _run_directly(direct, tile)["labels"])


def test_the_server_warms_the_model_up_before_it_is_ready(server: TritonServer) -> None:
    assert "is running warmup sample 'batch_1'" in server.log


def test_a_new_export_takes_over_when_the_model_is_loaded_again(
    explicit_server: TritonServer, tmp_path: Path
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    _named(read_bundle(bundle), "reexported").write(bundle)
    publish(bundle, explicit_server.repository)
    _load(explicit_server, "reexported")
    larger = write_toy_bundle(tmp_path / "larger", tile_size_px=128)
    manifest = _named(read_bundle(larger), "reexported")
    manifest.write(larger)
    publish(larger, explicit_server.repository)
    _load(explicit_server, "reexported")

    with tritonclient.grpc.InferenceServerClient(explicit_server.grpc_url) as client:
        assert client.get_model_metadata("reexported").versions == ["2"]
    images = np.zeros((1, 128, 128, 3), np.uint8)
    with contextlib.closing(TritonBackend(explicit_server.grpc_url, manifest)) as backend:
        assert backend.infer(images, ("labels",))["labels"].shape == (1, 128, 128)


@pytest.mark.parametrize(
    ("target", "model_file", "only_obstacle"),
    [
        ("onnxruntime-gpu", "model.onnx", "kind KIND_GPU but no GPUs are available"),
        ("tensorrt-a100", "model.plan", "unable to find backend library for backend 'tensorrt'"),
    ],
)
def test_a_gpu_config_lacks_nothing_but_what_this_machine_lacks(
    explicit_server: TritonServer,
    toy_bundle: Path,
    target: Target,
    model_file: str,
    only_obstacle: str,
) -> None:
    config = render_config(_named(read_bundle(toy_bundle), target), target)
    _place(explicit_server, target, config, toy_bundle / "model.onnx", model_file)

    with pytest.raises(InferenceServerException, match=only_obstacle):
        _load(explicit_server, target)


def test_the_gpu_config_loads_on_a_cpu_but_for_its_instance_group(
    explicit_server: TritonServer, toy_bundle: Path
) -> None:
    manifest = _named(read_bundle(toy_bundle), "gpu-on-cpu")
    config = render_config(manifest, "onnxruntime-gpu").replace("KIND_GPU", "KIND_CPU")
    _place(explicit_server, "gpu-on-cpu", config, toy_bundle / "model.onnx", "model.onnx")

    _load(explicit_server, "gpu-on-cpu")

    for batch_size in (1, 2, 4, 8):
        sample = f"instance gpu-on-cpu_0_0 is running warmup sample 'batch_{batch_size}'"
        assert sample in explicit_server.log


def test_every_way_to_segment_gives_a_tile_the_labels_of_onnx_runtime(
    segmenter: TileSegmenter, direct: onnxruntime.InferenceSession
) -> None:
    tile = _tiles(1, seed=2)

    expected = _run_directly(direct, tile)["labels"]
    assert segmenter.segment(tile[0]).labels.tobytes() == expected.tobytes()


@pytest.mark.parametrize("options", [{}, {"mpp": 0.8, "with_probabilities": True}])
def test_every_way_to_segment_gives_a_larger_image_the_same(
    segmenter: TileSegmenter, in_process: TileSegmenter, options: Any
) -> None:
    image = _larger_image()

    found, expected = (one.segment(image, **options) for one in (segmenter, in_process))
    assert found.labels.shape == image.shape[:2]
    assert found.labels.tobytes() == expected.labels.tobytes()
    if options:
        assert found.low_res is not None
        assert expected.low_res is not None
        assert found.low_res.probabilities.tobytes() == expected.low_res.probabilities.tobytes()


def test_tiles_of_one_image_share_batches_on_triton(server: TritonServer, toy_bundle: Path) -> None:
    before = _statistics(server)
    with TritonClient(server.grpc_url, read_bundle(toy_bundle)) as client:
        client.segment(np.tile(_larger_image(), (3, 3, 1)))
    after = _statistics(server)

    executions = after.execution_count - before.execution_count
    assert executions < after.inference_count - before.inference_count


def test_the_async_client_gives_the_same_labels(
    server: TritonServer, toy_bundle: Path, in_process: TileSegmenter
) -> None:
    images = [_tiles(1, seed=seed)[0] for seed in range(4)]

    async def segment_all() -> list[Segmentation]:
        async with AsyncTritonClient(server.grpc_url, read_bundle(toy_bundle)) as client:
            return await asyncio.gather(*(client.segment(image) for image in images))

    for image, result in zip(images, asyncio.run(segment_all()), strict=True):
        assert result.labels.tobytes() == in_process.segment(image).labels.tobytes()


def _regions_known_to(server: TritonServer) -> set[str]:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as admin:
        return set(admin.get_system_shared_memory_status().regions)


def _shared_regions() -> set[str]:
    """Those of this process: another one's tests may use some at the same time."""
    return {path.name for path in Path("/dev/shm").glob(f"focalpath-{os.getpid()}-*")}


def test_shared_memory_gives_the_same_answer_and_leaves_nothing_behind(
    server: TritonServer, toy_bundle: Path, in_process: TileSegmenter
) -> None:
    image = _larger_image()
    manifest = read_bundle(toy_bundle)
    before = _shared_regions(), _regions_known_to(server)
    with TritonClient(server.grpc_url, manifest) as client:
        labels = [client.segment(image).labels.tobytes() for _ in range(3)]
        one_tile = client.segment(image[:50, :60]).labels.tobytes()
        assert _shared_regions() > before[0]

    assert set(labels) == {in_process.segment(image).labels.tobytes()}
    assert one_tile == in_process.segment(image[:50, :60]).labels.tobytes()
    assert (_shared_regions(), _regions_known_to(server)) == before


def _unregister_all(admin: tritonclient.grpc.InferenceServerClient) -> None:
    """Unregister all regions; Triton keeps one that the last request has not let go of yet."""
    deadline = time.monotonic() + SERVICE_TIMEOUT_S
    while True:
        try:
            admin.unregister_system_shared_memory()
            return
        except InferenceServerException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_shared_memory_that_triton_forgot_is_made_again(
    server: TritonServer, toy_bundle: Path, in_process: TileSegmenter
) -> None:
    tile = _tiles(1, seed=5)[0]
    manifest = read_bundle(toy_bundle)
    before = _shared_regions()
    with TritonClient(server.grpc_url, manifest, shared_memory="on") as client:
        client.segment(tile)
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as admin:
            _unregister_all(admin)
        expected = in_process.segment(tile).labels.tobytes()
        assert client.segment(tile).labels.tobytes() == expected
        assert client.segment(tile).labels.tobytes() == expected
    assert _shared_regions() == before


def test_without_shared_memory_tensors_are_sent(
    server: TritonServer,
    toy_bundle: Path,
    in_process: TileSegmenter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no space left on /dev/shm")

    monkeypatch.setattr(
        "serve.inference.triton_shared_memory.shm.create_shared_memory_region", refuse
    )
    tile = _tiles(1, seed=6)[0]
    manifest = read_bundle(toy_bundle)
    with TritonClient(server.grpc_url, manifest, shared_memory="on") as client:
        labels = client.segment(tile).labels.tobytes()
    assert labels == in_process.segment(tile).labels.tobytes()
    assert "no space left on /dev/shm" in caplog.text


def test_a_client_waits_for_a_triton_that_restarts(
    toy_bundle: Path,
    tmp_path: Path,
    in_process: TileSegmenter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.inference.patience.MAX_FAILURES", 7)  # this machine may be busy
    image = _larger_image()
    publish(toy_bundle, tmp_path / "repository")
    with (
        TritonServer(tmp_path / "repository") as triton,
        TritonClient(triton.grpc_url, read_bundle(toy_bundle)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        triton.kill()
        assert not client.is_ready()
        result = pool.submit(client.segment, image)
        triton.start()
        assert result.result(60).labels.tobytes() == in_process.segment(image).labels.tobytes()


def test_the_command_line_writes_the_same_files_from_triton_and_from_the_bundle(
    server: TritonServer, toy_bundle: Path, tmp_path: Path
) -> None:
    image = tmp_path / "slide.png"
    Image.fromarray(_larger_image()).save(image)
    formats = ["--format", "labels", "overlay", "geojson", "dsa", "probabilities"]
    for name, url in (("triton", f"grpc://{server.grpc_url}"), ("bundle", str(toy_bundle))):
        arguments = ["--url", url, "--bundle", str(toy_bundle), "--out", str(tmp_path / name)]
        assert segment_files([str(image), *arguments, *formats]) == 0

    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert len(names) == 7
    for name in names - {"slide.json"}:
        written = (tmp_path / "triton" / name).read_bytes()
        assert written == (tmp_path / "bundle" / name).read_bytes()


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_the_label_png_of_the_service_holds_the_labels_of_onnx_runtime(
    services: dict[str, str], direct: onnxruntime.InferenceSession, backend: str
) -> None:
    tile = _tiles(1, seed=3)

    response = _post(services[backend], "/labels", tile[0])
    labels = np.asarray(Image.open(io.BytesIO(response.content)))
    assert labels.tobytes() == _run_directly(direct, tile)["labels"].tobytes()


def test_the_service_answers_503_while_triton_is_down_and_recovers_by_itself(
    toy_bundle: Path, tmp_path: Path
) -> None:
    publish(toy_bundle, tmp_path / "repository")
    with TritonServer(tmp_path / "repository") as triton:
        _lose_and_find(triton, toy_bundle, tmp_path)
        assert not _regions_known_to(triton)  # nothing of the service that has ended
    lines = (tmp_path / "triton.log").read_text().splitlines()
    assert all(line.startswith("{") for line in lines), lines


def _lose_and_find(triton: TritonServer, bundle: Path, tmp_path: Path) -> None:
    settings = {"backend": "triton", "triton_url": triton.grpc_url}
    with running_service(bundle, tmp_path / "triton.log", **settings) as url:
        wait_until_ready(url)
        assert _post(url, "/segment", _larger_image()).status_code == 200

        triton.kill()
        refused = _post(url, "/segment", _larger_image())
        assert refused.status_code == 503
        assert f"Triton is not reachable at {triton.grpc_url}" in refused.json()["error"]
        wait_until_ready(url, status=503)

        triton.start()
        wait_until_ready(url)
        for _ in range(2):
            assert _post(url, "/segment", _larger_image()).status_code == 200
        assert _regions_known_to(triton)  # shared memory is used again
