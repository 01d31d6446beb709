"""`python -m serve benchmark`: opens the routes, measures them, and writes the report."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from serve.client.benchmark import (
    MODEL,
    SEGMENTER,
    SERVICE,
    BenchmarkReport,
    Measurement,
    Unit,
    describe_machine,
    goals_of,
    measure,
)
from serve.client.benchmark_report import markdown
from serve.client.benchmark_routes import (
    Ask,
    Route,
    TritonHttpBackend,
    one_tile_of,
    own_service,
    png_of,
    service_route,
    spread_tiles_of,
    tiles_of,
    tissue_image,
    triton_http_of,
)
from serve.client.http import HttpClient
from serve.client.whole_files import write_together
from serve.contract.errors import BackendUnavailableError, SettingsError
from serve.contract.key_file import read_key
from serve.contract.manifest import Manifest
from serve.images.decode import read_picture
from serve.images.tiles import cut_tiles
from serve.inference.backend import Backend
from serve.inference.batching import pool_of
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.segmenter import TileSegmenter, open_segmenter
from serve.inference.triton import TritonBackend
from serve.settings import InferenceSettings, ServeSettings, SharedMemory

_SHARED_MEMORY: dict[str, SharedMemory] = {"Triton gRPC": "off", "Triton shared memory": "on"}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure latency and throughput: in this process, over HTTP, and on Triton.

    Runs the bundle's model in this process, and in a service that it starts unless --url names one.
    Measures Triton if one answers at --triton-url. The report says what was left out.
    """

    settings: Annotated[InferenceSettings, tyro.conf.arg(name="")] = field(
        default_factory=InferenceSettings.from_environment
    )
    """The bundle, and how the model runs here and in the service that is started."""
    url: str | None = None
    """Measure this service, http://host:port, instead of starting one."""
    api_key_file: Path | None = None
    """File with the API key of that service."""
    endpoint: str = "/segment"
    """Route to request; /labels, /overlay and /arrays also encode images or arrays."""
    triton_http_url: str | None = None
    """host:port of Triton's HTTP endpoint; by default the gRPC port less one."""
    image: Path | None = None
    """Image to segment; by default one is generated."""
    image_size_px: int = 1024
    """Side of the generated image."""
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of clients."""
    rounds: int = 3
    """Number of turns of each route."""
    min_requests: int = 7
    """Requests per turn, or twice the number of clients if that is more."""
    out: Path = Path("artifacts/benchmark")
    """Folder for benchmark.json and benchmark.md."""


def run_benchmark(command: Benchmark) -> BenchmarkReport:
    """Measure all routes that can be opened, and write the report.

    Raises:
        SettingsError: an option is out of range.
        FocalPathError: a route that was asked for does not answer.
    """
    _check(command)
    if command.image is None:
        image = tissue_image(command.image_size_px)
    else:
        image = read_picture(command.image, command.settings).pixels
    report = _Run(command, image).report()
    files = {
        "benchmark.json": report.model_dump_json(indent=2).encode() + b"\n",
        "benchmark.md": markdown(report).encode(),
    }
    write_together(command.out, files)
    print(markdown(report))
    print(f"wrote {', '.join(files)} in {command.out}")
    return report


def _check(command: Benchmark) -> None:
    numbers = (*command.clients, command.rounds, command.min_requests, command.image_size_px)
    if not command.clients or any(number < 1 for number in numbers):
        raise SettingsError(
            f"--clients is {command.clients}, --rounds {command.rounds}, --min-requests "
            f"{command.min_requests} and --image-size-px {command.image_size_px}; expected numbers "
            "above 0."
        )
    if command.settings.backend != "onnxruntime":
        raise SettingsError(
            "--backend is triton, but the benchmark runs the model in this process to compare. "
            "Leave the option out: Triton is measured if it answers at --triton-url."
        )


class _Run:
    """One run of the benchmark."""

    def __init__(self, command: Benchmark, image: NDArray[np.uint8]) -> None:
        self._command = command
        self._image = image
        self._png = png_of(image)
        self._raw: Backend
        self._notes: list[str] = []
        self._agreement: dict[str, float] = {}
        self._console = Console(stderr=True)

    def report(self) -> BenchmarkReport:
        """Open the routes, measure them, and close them."""
        load_before = os.getloadavg()[0]
        with ExitStack() as stack:
            segmenter = stack.enter_context(
                open_segmenter(self._command.settings, observe=self._keep)
            )
            manifest = segmenter.manifest
            expected = segmenter.segment(self._image).labels
            triton = self._triton(manifest)
            url = self._service(stack)
            key = read_key(self._command.api_key_file)
            with HttpClient(url, api_key=key) as client:
                self._compare(SERVICE, client.segment(self._image).labels, expected)
            routes = [
                *self._in_process(segmenter),
                service_route(SERVICE, url, self._command.endpoint, self._png, key),
                *self._image_routes(stack, triton, manifest, expected),
            ]
            measurements = self._measure(routes, "image")
            if triton:
                tiles = [
                    Route(name, _same(one_tile_of(backend, self._image, manifest)))
                    for name, backend in triton.items()
                ]
                measurements += self._measure(tiles, "tile")
            return BenchmarkReport(
                machine=describe_machine(load_before),
                model=f"{manifest.name} {manifest.version}",
                backend=_described(self._command.settings, self._raw),
                image_px=(self._image.shape[1], self._image.shape[0]),
                png_bytes=len(self._png),
                num_tiles=len(cut_tiles(self._image, manifest.tile_size_px)),
                num_rounds=self._command.rounds,
                measurements=tuple(measurements),
                label_agreement=self._agreement,
                goals=tuple(goals_of(measurements)),
                notes=tuple(self._notes),
            )

    def _keep(self, backend: Backend) -> Backend:
        self._raw = backend
        return backend

    def _measure(self, routes: Sequence[Route], unit: Unit) -> list[Measurement]:
        with self._console.status("") as status:
            return measure(
                routes,
                unit,
                levels=self._command.clients,
                num_rounds=self._command.rounds,
                min_requests=self._command.min_requests,
                tell=status.update,
            )

    def _in_process(self, segmenter: TileSegmenter) -> Iterator[Route]:
        # If several batches run at the same time, each on a part of the processor, the model's own
        # time is that of the runner that spreads them.
        if self._command.settings.parallel_batches == 1:
            ask = tiles_of(self._raw, self._image, segmenter.manifest)
        else:
            ask = spread_tiles_of(segmenter.backend, self._image, segmenter.manifest)
        yield Route(MODEL, _same(ask))
        yield Route(SEGMENTER, _same(lambda: segmenter.segment(self._image)))

    def _service(self, stack: ExitStack) -> str:
        if self._command.url is not None:
            self._notes.append("The service was already running, with its own settings.")
            return self._command.url.rstrip("/")
        most = max(self._command.clients)
        return stack.enter_context(own_service(self._command.settings, most))

    def _triton(self, manifest: Manifest) -> dict[str, Backend]:
        """Triton by each transport; empty, with a note, if none answers."""
        command, settings = self._command, self._command.settings
        http_url = command.triton_http_url or triton_http_of(settings.triton_url)
        over_http = TritonHttpBackend(http_url, manifest)
        backends: dict[str, Backend] = {}
        try:
            over_http.check()
            for name, shared in _SHARED_MEMORY.items():
                backends[name] = TritonBackend(
                    settings.triton_url,
                    manifest,
                    timeout_s=max(settings.triton_timeout_s, 300.0),
                    shared_memory=shared,
                )
        except BackendUnavailableError as error:
            self._notes.append(f"Triton was left out: {error}")
            return {}
        return {"Triton HTTP": over_http, **backends}

    def _image_routes(
        self,
        stack: ExitStack,
        backends: dict[str, Backend],
        manifest: Manifest,
        expected: NDArray[np.uint8],
    ) -> Iterator[Route]:
        """Whole images on Triton, cut and blended in this process as `TritonClient` does."""
        for name, backend in backends.items():
            pool = pool_of(backend, manifest)
            stack.callback(pool.close)
            on_triton = TileSegmenter(pool, manifest)
            self._compare(name, on_triton.segment(self._image).labels, expected)
            yield Route(name, _same(partial(on_triton.segment, self._image)))

    def _compare(self, name: str, labels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
        same = labels.shape == expected.shape and float(np.mean(labels == expected))
        self._agreement[name] = float(same)


def _described(settings: InferenceSettings, backend: Backend) -> str:
    threads = settings.threads or "one per core"
    batch = settings.max_batch_size or "the model's own"
    runtime = "OpenVINO"
    if isinstance(backend, OnnxRuntimeBackend):
        runtime = f"ONNX Runtime ({backend.providers[0]})"
    return (
        f"{runtime} in {settings.precision} (threads: {threads}, "
        f"largest batch: {batch}, batches at the same time: {settings.parallel_batches}, images at "
        f"the same time: {ServeSettings.from_environment().images_at_once})"
    )


def _same(ask: Ask) -> Callable[[], AbstractContextManager[Ask]]:
    """A `connect` for a route without connections: every client calls the same function."""
    return lambda: nullcontext(ask)
