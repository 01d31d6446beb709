"""Serve a bundle: `python -m serve http`, `doctor`, `segment`, `slides`, `benchmark`, `load`."""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, assert_never

import tyro

from serve.client.benchmark_run import Benchmark, run_benchmark
from serve.client.load import Load, run_load
from serve.client.segment_files import Segment, run_segment
from serve.contract.errors import FocalPathError, SettingsError, message_of
from serve.contract.interrupts import safe_interrupts
from serve.contract.printing import printing
from serve.doctor.command import Doctor, run_doctor
from serve.inference.trial import HOME_VARIABLE
from serve.service.logs import configure_logging
from serve.service.start import check_start
from serve.settings import ServeSettings
from serve.slides.cli import Slides, run_slides

_log = logging.getLogger("serve")
FlatSettings = Annotated[ServeSettings, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Http:
    """Start the HTTP service and run it until it is told to stop.

    Each setting is also read from FOCALPATH_<NAME>; a flag overrides it. On SIGTERM or SIGINT the
    service takes no new request and finishes those at work. `/livez`, `/readyz` and `/metrics` need
    no API key: keep them from the outside.
    """

    settings: FlatSettings = field(default_factory=ServeSettings.from_environment)
    """What to serve, where, and the limits."""


Command = (
    Annotated[Http, tyro.conf.subcommand("http")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Segment, tyro.conf.subcommand("segment")]
    | Annotated[Slides, tyro.conf.subcommand("slides")]
    | Annotated[Benchmark, tyro.conf.subcommand("benchmark")]
    | Annotated[Load, tyro.conf.subcommand("load")]
)


def run_http(command: Http) -> None:
    """Check what can be checked, then hand over to BentoML, which returns when it is stopped."""
    _check_python()
    # Absolute, since workers start in another folder. Links stay links: their targets may change.
    paths = ("bundle", "api_keys_file", "slides", "slides_out")
    given = {name: getattr(command.settings, name) for name in paths}
    settings = command.settings.model_copy(
        update={name: path and path.absolute() for name, path in given.items()}
    )
    manifest = check_start(settings)
    os.environ.update(settings.to_environment())  # for the worker processes
    with tempfile.TemporaryDirectory(prefix="focalpath-") as home:
        # One folder per server, also where the user names one: in a shared one a second server
        # would delete the metrics.
        os.environ["BENTOML_HOME"] = os.environ[HOME_VARIABLE] = home
        from serve.service.server import run

        configure_logging(settings.log_format)
        _log.info(
            "%s %s is served at http://%s:%d (%s); Ctrl+C stops it",
            *(manifest.name, manifest.version, settings.host, settings.port, settings.backend),
        )
        run(settings.host, settings.port)


def _check_python() -> None:
    """Raise SettingsError where asserts are left out: zarr reads files by them."""
    if sys.flags.optimize:
        raise SettingsError(
            "Python runs optimized (-O, PYTHONOPTIMIZE), with which BentoML and zarr fail. Start "
            "it without."
        )


@safe_interrupts()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        with printing():
            command: Http | Doctor | Segment | Slides | Benchmark | Load = tyro.cli(
                Command, prog="python -m serve", description=__doc__, args=arguments
            )
            match command:
                case Http():
                    run_http(command)
                case Doctor():
                    return run_doctor(command)
                case Segment():
                    return run_segment(command)
                case Slides():
                    _check_python()
                    return run_slides(command)
                case Benchmark():
                    run_benchmark(command)
                case Load():
                    return run_load(command)
                case _:
                    assert_never(command)
    except (FocalPathError, OSError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
