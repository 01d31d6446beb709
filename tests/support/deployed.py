"""What the files in deploy/ and the Dockerfile say, read for tests."""

import json
import re

from tests.support import ROOT

DEPLOY = ROOT / "deploy"
_SUFFIXES = re.compile(r"_(total|sum|count|bucket|created)$")


def family(name: str) -> str:
    """A metric's name without what Prometheus appends for each of its series."""
    return _SUFFIXES.sub("", name)


def dashboard_queries() -> list[str]:
    """The queries of the dashboard's panels."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/focalpath.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def metrics_in(queries: list[str], prefix: str) -> set[str]:
    """The families of the metrics with a prefix that queries name."""
    return {family(name) for name in re.findall(rf"\b{prefix}\w+", " ".join(queries))}


def metrics_of(text: str) -> set[str]:
    """The families of the metrics in Prometheus' text format, also of those without a sample."""
    return {family(name) for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)}


def dockerfile_stage(name: str) -> list[str]:
    """The instructions of a stage of the Dockerfile, one per line, from its FROM."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    (stage,) = re.findall(rf"^FROM \S+ AS {name}\n.*?(?=^FROM |\Z)", text, re.DOTALL | re.MULTILINE)
    return [line for line in stage.splitlines() if line.strip() and not line.startswith("#")]
