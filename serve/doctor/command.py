"""The command: its options, and the order of its checks."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console

from serve.contract.machine import Machine, this_machine
from serve.doctor.checks import (
    look_at_bundle,
    look_at_machine,
    look_at_packages,
    look_at_places,
    look_at_providers,
    look_at_slides,
    look_at_start,
    look_at_triton,
    look_at_warm_up,
)
from serve.doctor.report import Finding, Report, print_report
from serve.settings import ServeSettings

_MIN_WIDTH = 100
"""Columns of the table where the output is not a terminal."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check whether this machine can serve a bundle, and what it lacks.

    Takes the settings of `http`, from the environment or as flags. Prints one table. The exit
    status is 1 if the service would not start or would not become ready, else 0.
    """

    settings: Annotated[ServeSettings, tyro.conf.arg(name="")] = field(
        default_factory=ServeSettings.from_environment
    )
    """Settings to check."""
    json: bool = False
    """Print the report as JSON."""


def run_doctor(command: Doctor) -> int:
    """Run all checks, print the report, and return the exit status."""
    machine = this_machine()
    console = Console(stderr=True)
    with console.status("Checking this machine; a large model takes a minute"):
        report = Report(machine=machine, findings=tuple(_look(command.settings, machine)))
    if command.json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        out = Console()
        print_report(report, out if out.is_terminal else Console(width=max(_MIN_WIDTH, out.width)))
    return 1 if report.failed else 0


def _look(settings: ServeSettings, machine: Machine) -> Iterator[Finding]:
    yield from look_at_machine(machine)
    yield from look_at_packages()
    yield from look_at_providers(settings)
    yield from look_at_slides(settings)
    yield from look_at_places(settings)
    manifest, finding = look_at_bundle(settings)
    yield finding
    if manifest is not None:
        yield from look_at_warm_up(settings, manifest)
    yield from look_at_triton(settings, manifest)
    yield from look_at_start(settings, manifest)
