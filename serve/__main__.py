"""Serve a bundle: `python -m serve http`, `segment` and `benchmark`."""

import ipaddress
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, assert_never

import tyro
from rich.console import Console
from rich.table import Table

from serve.benchmark import Report, describe_machine, measure, noise_image, print_report
from serve.client import HttpClient, TritonClient
from serve.errors import FocalPathError, ImageError
from serve.images import read_image
from serve.manifest import read_bundle
from serve.outputs import Summary, label_png, overlay_png
from serve.segmenter import ImageSegmenter, open_segmenter
from serve.settings import ServeSettings

FlatSettings = tyro.conf.OmitArgPrefixes[ServeSettings]


@dataclass(frozen=True, kw_only=True)
class Http:
    """Start the HTTP service and run it until it is told to stop.

    Every setting is also read from the environment, as FOCALPATH_<NAME>; flags come first.
    """

    settings: FlatSettings = field(default_factory=ServeSettings.from_environment)
    """What to serve, and the limits."""
    host: str = "127.0.0.1"
    """IP address to listen at. There is no access control: think before opening it to others."""
    port: int = 3000
    """TCP port to listen at."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment images: a label PNG, an overlay PNG and a JSON for each, in the output folder."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """PNG, JPEG, TIFF or WebP files."""
    settings: FlatSettings = field(default_factory=ServeSettings.from_environment)
    """What to run when no --url is given, and the limits."""
    url: str | None = None
    """Ask this service instead of opening a bundle: http://host:port."""
    out: Path = Path("artifacts/segmentations")
    """Folder to write to; made if it is missing."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure how long one answer takes, and write the numbers as JSON."""

    settings: FlatSettings = field(default_factory=ServeSettings.from_environment)
    """What to run in this process; --backend triton measures Triton."""
    url: str | None = None
    """Measure this service as well: http://host:port."""
    image_sizes: tuple[int, ...] = ()
    """Sides of the square images in pixels; by default the model's tile size."""
    num_requests: int = 50
    """Answers to time for each size."""
    out: Path = Path("artifacts/benchmark.json")
    """File to write to."""


Command = (
    Annotated[Http, tyro.conf.subcommand("http")]
    | Annotated[Segment, tyro.conf.subcommand("segment")]
    | Annotated[Benchmark, tyro.conf.subcommand("benchmark")]
)


def run_http(command: Http) -> None:
    """Check what can be checked, then hand over to BentoML, which returns when it is stopped."""
    settings = replace(command.settings, bundle=command.settings.bundle.resolve())
    manifest = read_bundle(settings.bundle)
    _check_address(command.host, command.port)
    os.environ.update(settings.to_environment())  # for the worker processes
    with tempfile.TemporaryDirectory(prefix="focalpath-") as home:
        # Of its own, since a second server would delete the first one's metrics in a shared one.
        os.environ.setdefault("BENTOML_HOME", home)
        from serve.service import run

        print(
            f"Serving {manifest.name} {manifest.version} at http://{command.host}:{command.port} "
            f"({settings.backend}). Press Ctrl+C to stop.",
            flush=True,
        )
        run(command.host, command.port)


def run_segment(command: Segment) -> None:
    """Segment each image and write its three files, whole or not at all."""
    _check_images(command.images)
    segmenter: ImageSegmenter
    if command.url is None:
        segmenter = open_segmenter(command.settings)
    elif command.url.startswith("grpc://"):
        segmenter = TritonClient(command.url, read_bundle(command.settings.bundle))
    else:
        segmenter = HttpClient(command.url)
    try:
        for path in command.images:
            image = read_image(path, command.settings)
            result = segmenter.segment(image)
            written = _write_whole(
                command.out,
                {
                    f"{path.stem}.labels.png": label_png(result.labels, segmenter.manifest),
                    f"{path.stem}.overlay.png": overlay_png(
                        image, result.labels, segmenter.manifest
                    ),
                    f"{path.stem}.json": result.summary.model_dump_json(indent=2).encode(),
                },
            )
            _print_summary(path, result.summary)
            print("wrote " + ", ".join(map(str, written)), flush=True)
    finally:
        segmenter.close()


def run_benchmark(command: Benchmark) -> None:
    """Measure every route and size, print the table and write the JSON."""
    if command.num_requests < 1 or any(size < 1 for size in command.image_sizes):
        raise FocalPathError(
            f"--num-requests is {command.num_requests} and --image-sizes {command.image_sizes}; "
            "expected numbers above 0."
        )
    name = "ONNX Runtime in process" if command.settings.backend == "onnxruntime" else "Triton gRPC"
    routes: list[tuple[str, ImageSegmenter]] = [(name, open_segmenter(command.settings))]
    if command.url is not None:
        routes.append(("HTTP", HttpClient(command.url)))
    sizes = command.image_sizes or (routes[0][1].manifest.tile_size_px,)
    report = Report(
        machine=describe_machine(),
        latencies=tuple(
            measure(segmenter, noise_image(size), route=route, num_requests=command.num_requests)
            for size in sizes
            for route, segmenter in routes
        ),
    )
    for _, segmenter in routes:
        segmenter.close()
    print_report(report)
    out = command.out
    _write_whole(out.parent, {out.name: report.model_dump_json(indent=2).encode()})
    print(f"wrote {out}")


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at, before anything is started."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise FocalPathError(
            f"--host is {host!r}, expected an IP address such as 127.0.0.1."
        ) from error
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise FocalPathError(
                f"cannot listen at {host} port {port}: {reason}. Stop what uses the port, or "
                "choose another with --port."
            ) from error


def _check_images(paths: Sequence[Path]) -> None:
    if not paths:
        raise ImageError("no image is named. Name one or more files.")
    for path in paths:
        if not path.is_file():
            raise ImageError(f"{path} is no file. Check the path; nothing was segmented.")
    stems = [path.stem for path in paths]
    for path in paths:
        if stems.count(path.stem) > 1:
            raise ImageError(
                f"more than one image is called {path.stem}; their outputs would overwrite each "
                "other. Segment them into different folders with --out."
            )


def _write_whole(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    """Write files beside their places and rename them, so that none is ever seen half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for name, content in contents.items():
            (Path(scratch) / name).write_bytes(content)
        return [(Path(scratch) / name).replace(folder / name) for name in contents]


def _print_summary(path: Path, summary: Summary) -> None:
    table = Table(title=f"{path.name}, {summary.image.width_px} x {summary.image.height_px}")
    table.add_column("class")
    for title in ("share", "mean confidence", "predicted IoU"):
        table.add_column(title, justify="right")
    for row in summary.classes:
        confidence = "" if row.mean_confidence is None else f"{row.mean_confidence:.2f}"
        table.add_row(row.name, f"{row.pixel_share:.1%}", confidence, f"{row.predicted_iou:.2f}")
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        command: Http | Segment | Benchmark = tyro.cli(
            Command,
            prog="python -m serve",
            description=__doc__,
            args=arguments,
        )
        match command:
            case Http():
                run_http(command)
            case Segment():
                run_segment(command)
            case Benchmark():
                run_benchmark(command)
            case _:
                assert_never(command)
    except (FocalPathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
