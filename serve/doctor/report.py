"""The doctor's report, as a table and as JSON."""

from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.contract.machine import Machine
from serve.contract.strict import Strict

Status = Literal["ok", "absent", "warning", "failed"]
"""`absent`: missing, but not needed with these settings."""
_STYLES: dict[Status, str] = {
    "ok": "green",
    "absent": "dim",
    "warning": "yellow",
    "failed": "bold red",
}


class Finding(Strict):
    """The result of one check."""

    section: str
    name: str
    status: Status
    detail: str


class Report(Strict):
    """The results of all checks."""

    machine: Machine
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that failed: with them the service would not answer."""
        return tuple(finding for finding in self.findings if finding.status == "failed")


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
