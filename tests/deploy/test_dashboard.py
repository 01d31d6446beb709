"""Every metric that a dashboard, the autoscaler or a rule names is one of the service."""

import json

import yaml

from serve.service.telemetry import Telemetry
from tests.support.deployed import DEPLOY, dashboard_queries, metrics_in, metrics_of

DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/focalpath.json").read_text())


def test_the_dashboard_shows_every_metric_of_the_service_and_no_other() -> None:
    served = metrics_of(Telemetry().render().decode())
    assert "focalpath_requests" in served
    assert metrics_in(dashboard_queries(), "focalpath_") == served


def test_the_dashboards_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        covered = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not covered & cells, panel["title"]
        cells |= covered


def test_the_dashboard_asks_the_source_that_is_provisioned() -> None:
    sources = DEPLOY / "grafana/provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


def test_the_autoscalers_metric_is_made_of_a_metric_of_the_service() -> None:
    values = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    named = metrics_in([rule["metricsQuery"], rule["seriesQuery"]], "focalpath_")
    assert named
    assert named <= metrics_of(Telemetry().render().decode())
    autoscaler = yaml.safe_load((DEPLOY / "kubernetes/autoscaler.yaml").read_text())
    metric = autoscaler["spec"]["metrics"][0]["pods"]["metric"]
    assert metric["name"] == rule["name"]["as"]
