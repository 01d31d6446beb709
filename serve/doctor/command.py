"""The command: its options, and how the findings are printed."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.contract.machine import this_machine
from serve.doctor.checks import Report, Status, look
from serve.settings import ServeSettings

_STYLES: dict[Status, str] = {
    "ok": "green",
    "absent": "dim",
    "warning": "yellow",
    "failed": "bold red",
}


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
        report = Report(machine=machine, findings=tuple(look(command.settings, machine)))
    if command.json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        print_report(report, Console())
    return 1 if report.failed else 0


def print_report(report: Report, console: Console) -> None:
    """Print the findings as one table, and a verdict below."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "", "Status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("Found", overflow="fold")
    before = ""
    for finding in report.findings:
        if before and finding.section != before:
            table.add_section()
        table.add_row(
            Text(finding.section if finding.section != before else "", style="bold"),
            Text(finding.name),
            Text(finding.status, style=_STYLES[finding.status]),
            Text(finding.detail),  # never markup: paths may have brackets
        )
        before = finding.section
    console.print(table)
    console.print()
    if not report.failed:
        console.print(Text("This machine can serve this bundle.", style="green"))
        return
    names = ", ".join(f"{finding.section.lower()}: {finding.name}" for finding in report.failed)
    console.print(Text(f"{len(report.failed)} failed ({names}).", style="bold red"))
