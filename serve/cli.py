"""Serve a bundle: `python -m serve http`, `segment`, `slides`, `benchmark` and `load`."""

import ipaddress
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, assert_never

import tyro

from serve.client.benchmark_run import Benchmark, run_benchmark
from serve.client.load import Load, run_load
from serve.client.segment_files import Segment, run_segment
from serve.contract.arguments import read_arguments
from serve.contract.errors import FocalPathError
from serve.contract.manifest import read_bundle
from serve.inference.probe import check_provider
from serve.inference.providers import candidates_for
from serve.service.access import ApiKeys
from serve.service.logs import configure_logging
from serve.service.telemetry import check_tracing
from serve.settings import ServeSettings
from serve.slides.cli import Slides, run_slides

_log = logging.getLogger("serve")
FlatSettings = Annotated[ServeSettings, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Http:
    """Start the HTTP service and run it until it is told to stop.

    Every setting is also read from the environment, as FOCALPATH_<NAME>; flags come first. On
    SIGTERM and SIGINT no new request is taken and those at work are finished. `/livez`, `/readyz`
    and `/metrics` need no API key: keep them from the outside.
    """

    settings: FlatSettings = field(default_factory=ServeSettings.from_environment)
    """What to serve, where, and the limits."""


Command = (
    Annotated[Http, tyro.conf.subcommand("http")]
    | Annotated[Segment, tyro.conf.subcommand("segment")]
    | Annotated[Slides, tyro.conf.subcommand("slides")]
    | Annotated[Benchmark, tyro.conf.subcommand("benchmark")]
    | Annotated[Load, tyro.conf.subcommand("load")]
)


def run_http(command: Http) -> None:
    """Check what can be checked, then hand over to BentoML, which returns when it is stopped."""
    # Absolute, since workers start elsewhere; links are kept, since one may come to lead elsewhere.
    keys_file = command.settings.api_keys_file
    settings = command.settings.model_copy(
        update={
            "bundle": command.settings.bundle.absolute(),
            "api_keys_file": keys_file and keys_file.absolute(),
        }
    )
    manifest = read_bundle(settings.bundle)
    if settings.backend == "onnxruntime":
        candidates_for(settings, manifest)
        check_provider(settings)
    _check_address(settings.host, settings.port)
    _check_access(settings.host, settings)
    check_tracing(settings)
    os.environ.update(settings.to_environment())  # for the worker processes
    with tempfile.TemporaryDirectory(prefix="focalpath-") as home:
        # Of its own, since a second server would delete the first one's metrics in a shared one.
        os.environ.setdefault("BENTOML_HOME", home)
        from serve.service.server import run

        configure_logging(settings.log_format)
        _log.info(
            "%s %s is served at http://%s:%d (%s); Ctrl+C stops it",
            *(manifest.name, manifest.version, settings.host, settings.port, settings.backend),
        )
        run(settings.host, settings.port)


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


def _check_access(host: str, settings: ServeSettings) -> None:
    """Refuse to serve whoever can reach this machine, unless that is what is wanted."""
    if settings.api_keys_file is not None:
        ApiKeys(settings.api_keys_file)
    elif not ipaddress.ip_address(host).is_loopback and not settings.insecure_no_key:
        raise FocalPathError(
            f"--host is {host}, where others can reach the service, and no API key is asked for. "
            "Set --api-keys-file, or --insecure-no-key if something before it checks who calls."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        command: Http | Segment | Slides | Benchmark | Load = read_arguments(
            Command, prog="python -m serve", description=__doc__, arguments=arguments
        )
        match command:
            case Http():
                run_http(command)
            case Segment():
                return run_segment(command)
            case Slides():
                return run_slides(command)
            case Benchmark():
                run_benchmark(command)
            case Load():
                return run_load(command)
            case _:
                assert_never(command)
    except (FocalPathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
