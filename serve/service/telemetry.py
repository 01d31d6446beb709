"""Metrics for Prometheus, and traces.

Metrics are prometheus_client's. BentoML's workers run it in multiprocess mode (it sets
PROMETHEUS_MULTIPROC_DIR before they start): each writes its own files, and whichever answers
`/metrics` adds them up. Traces are OpenTelemetry's; without an exporter they cost next to nothing,
and a caller's `traceparent` is still passed on to Triton.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray
from opentelemetry import trace
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    multiprocess,
)
from prometheus_client.registry import Collector

from serve.contract.manifest import Manifest
from serve.inference.backend import Backend
from serve.inference.summary import Summary
from serve.service.logs import current_request

Stage = Literal["queue", "decode", "segment", "batch", "infer", "encode"]
"""Stages of an answer. `queue`: waiting for a thread. `decode`: reading the image. `segment`: from
pixels to labels, with the parts `batch` (a tile waits for its batch) and `infer` (the model runs a
batch). `encode`: writing the answer."""
METRICS_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
SERVICE_NAME = "focalpath"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_TILES = (0, 1, 2, 4, 9, 16, 25, 64, 144, 400, 1024)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1)
_REASONS = {
    400: "bad_request",
    401: "no_key",
    404: "not_found",
    405: "method",
    408: "slow",
    413: "too_large",
    415: "media_type",
    422: "bad_request",
    429: "busy",
    503: "unavailable",
    504: "timeout",
}
"""Reasons of refusals, by the status of the answer."""


class Telemetry:
    """The service's metrics, and the timers that fill them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._tracer = trace.get_tracer(SERVICE_NAME)
        self._add_request_metrics()
        self._add_model_metrics()
        self._add_slide_metrics()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

    def _gauge(
        self, name: str, text: str, *labels: str, mode: Literal["livesum", "mostrecent"] = "livesum"
    ) -> Gauge:
        return Gauge(name, text, labels, multiprocess_mode=mode, registry=self._registry)

    def _add_request_metrics(self) -> None:
        self._requests = self._counter(
            "focalpath_requests", "Answered requests.", "endpoint", "status"
        )
        self._rejections = self._counter("focalpath_rejections", "Refused requests.", "reason")
        self._request_seconds = self._histogram(
            "focalpath_request_seconds",
            "Seconds from a request's header to the end of its answer.",
            "endpoint",
        )
        self._stage_seconds = self._histogram(
            "focalpath_stage_seconds",
            "Seconds per stage of an answer; batch: a tile's wait, infer: a batch in the model.",
            "stage",
        )
        self._in_progress = self._gauge(
            "focalpath_requests_in_progress", "Requests at work or waiting."
        )
        self._image_tiles = self._histogram(
            "focalpath_image_tiles",
            "Tiles that an image costs; 0 where its result was kept.",
            buckets=_TILES,
        )
        self._waiting_tiles = self._gauge(
            "focalpath_tiles_in_progress",
            "Tiles of the images at work or waiting; see max_waiting_tiles.",
        )
        self._tile_rate = self._gauge(
            "focalpath_tiles_per_second",
            "Measured speed while there is work; Retry-After is reckoned from it.",
        )

    def _add_model_metrics(self) -> None:
        self._batch_size = self._histogram(
            "focalpath_batch_size", "Tiles per batch of the model.", buckets=_BATCHES
        )
        self._class_pixels = self._counter(
            "focalpath_class_pixels", "Pixels by their label.", "class"
        )
        self._low_confidence = self._histogram(
            "focalpath_low_confidence_share",
            "Share of an image's pixels whose label has a probability below 0.5.",
            buckets=_SHARES,
        )
        self._model_info = self._gauge(
            "focalpath_model_info",
            "1 for the model that answers, 0 for an earlier one.",
            *("name", "version", "backend"),
            mode="mostrecent",
        )
        self._model_changes = self._counter(
            "focalpath_model_changes",
            "New versions of the model, by outcome; each worker counts its own.",
            "outcome",
        )
        # Present from the start, so that the first change is an increase.
        for outcome in ("swapped", "refused"):
            self._model_changes.labels(outcome)

    def _add_slide_metrics(self) -> None:
        self._slide_jobs = self._gauge(
            "focalpath_slide_jobs",
            "Slides that wait to be segmented, and that are.",
            "status",
            mode="mostrecent",
        )
        self._slide_jobs_ended = self._counter(
            "focalpath_slide_jobs_ended", "Jobs of slides, by how they ended.", "status"
        )
        self._slide_tiles = self._counter("focalpath_slide_tiles", "Tiles of ended jobs of slides.")
        self._slide_crashes = self._counter(
            "focalpath_slide_reader_crashes",
            "Processes that read slides and ended or were ended.",
        )

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time the block, as a metric; within a request also as a span and for the log."""
        start = time.perf_counter()
        # A batch of several requests belongs to no single trace.
        is_request = current_request() is not None
        try:
            with self._tracer.start_as_current_span(name) if is_request else nullcontext():
                yield
        finally:
            self.observe_stage(name, time.perf_counter() - start)

    def observe_stage(self, name: Stage, seconds: float) -> None:
        """Count a stage that was timed elsewhere."""
        self._stage_seconds.labels(name).observe(seconds)
        if (record := current_request()) is not None:
            record.stage_ms[name] = record.stage_ms.get(name, 0.0) + 1000 * seconds

    def observe_batch_wait(self, seconds: float) -> None:
        """Count how long a tile waited for its batch; a request's tiles wait side by side."""
        self._stage_seconds.labels("batch").observe(seconds)

    def observe_weight(self, tiles: int) -> None:
        """Count what an image costs, as a metric and for the access log."""
        self._image_tiles.observe(tiles)
        if (record := current_request()) is not None:
            record.tiles = (record.tiles or 0) + tiles

    def observe_queue(self, tiles: int, tiles_per_second: float | None) -> None:
        """Tell how full the queue is, and how fast images are done."""
        self._waiting_tiles.set(tiles)
        if tiles_per_second is not None:
            self._tile_rate.set(tiles_per_second)

    def observe_batch(self, size: int) -> None:
        """Count a batch of the model."""
        self._batch_size.observe(size)

    def observe_summary(self, summary: Summary) -> None:
        """Count the pixels per class of an image, and its share of low confidence."""
        for row in summary.classes:
            self._class_pixels.labels(row.name).inc(row.pixel_count)
        self._low_confidence.observe(summary.low_confidence_share)

    def observe_answer(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)
        if status >= 400:
            self._rejections.labels(_REASONS.get(status, "error")).inc()

    def in_progress(self) -> AbstractContextManager[Any]:
        """Count a request as in progress while inside."""
        return self._in_progress.track_inprogress()

    def model_serves(self, manifest: Manifest, backend: str, before: Manifest | None) -> None:
        """Record which model answers from now on, and which one did before."""
        if before is not None:
            self._model_info.labels(before.name, before.version, backend).set(0)
            self._model_changes.labels("swapped").inc()
        self._model_info.labels(manifest.name, manifest.version, backend).set(1)

    def model_refused(self) -> None:
        """Count a new version that cannot be served."""
        self._model_changes.labels("refused").inc()

    def slide_jobs(self, counts: Mapping[str, int]) -> None:
        """Tell how many jobs of slides wait and run."""
        for status, count in counts.items():
            self._slide_jobs.labels(status).set(count)

    def slide_job_ended(self, status: str, num_tiles: int) -> None:
        """Count a job of a slide that has ended."""
        self._slide_jobs_ended.labels(status).inc()
        self._slide_tiles.inc(num_tiles)

    def slide_reader_crashed(self) -> None:
        """Count a process that read slides and has ended, or took too long."""
        self._slide_crashes.inc()

    def render(self) -> bytes:
        """All metrics of all workers, in Prometheus' text format."""
        if METRICS_FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        registry.register(_WorkersFiles(Path(os.environ[METRICS_FOLDER_VARIABLE])))
        return generate_latest(registry)


class _WorkersFiles(Collector):
    """The metrics of all workers. Files in which a worker has written nothing yet are left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Add up what the workers have written."""
        files = [str(file) for file in self._folder.glob("*.db") if _size(file)]
        metrics: Iterable[Metric] = multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return metrics


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # of a worker that has ended
        return 0


class ObservedBackend:
    """A backend whose batches are counted and timed."""

    def __init__(self, backend: Backend, telemetry: Telemetry) -> None:
        self._backend = backend
        self._telemetry = telemetry

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        self._telemetry.observe_batch(len(images))
        with self._telemetry.stage("infer"):
            return self._backend.infer(images, outputs)

    def is_ready(self) -> bool:
        """See `Backend.is_ready`."""
        return self._backend.is_ready()

    def close(self) -> None:
        """See `Backend.close`."""
        self._backend.close()


def forget_dead_workers() -> None:
    """Remove workers that have ended from the gauges. Every worker calls this at its start."""
    folder = Path(os.environ.get(METRICS_FOLDER_VARIABLE, os.devnull))
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not psutil.pid_exists(pid):
            with suppress(FileNotFoundError):  # another worker starts at the same time
                multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
