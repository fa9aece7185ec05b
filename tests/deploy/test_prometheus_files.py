"""Scraping, alerts and external metrics: valid, and of series that the server has."""

import shutil
import subprocess
from typing import Literal

import pytest
import yaml
from pydantic import Field, ValidationError
from resources import DEPLOY, Part, load
from series import GAUGES, check_gauges

PROMETHEUS = DEPLOY / "prometheus"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH (Debian: apt-get install prometheus)"
)


class Annotations(Part):
    summary: str
    description: str


class Labels(Part):
    severity: Literal["info", "warning", "critical"]


class Alert(Part):
    alert: str
    expr: str
    lasting: str = Field(alias="for")
    labels: Labels
    annotations: Annotations


class Group(Part):
    name: str
    rules: list[Alert]


class Rules(Part):
    groups: list[Group]


class Resources(Part):
    namespaced: Literal[False]


class ExternalRule(Part):
    seriesQuery: str
    metricsQuery: str
    resources: Resources


class Adapter(Part):
    externalRules: list[ExternalRule]


def alerts():
    (group,) = Rules.model_validate(load("deploy/prometheus/alerts.yml")).groups
    return {rule.alert: rule for rule in group.rules}


def test_alerts_ask_for_the_gauges_of_the_server():
    assert alerts()
    for rule in alerts().values():
        check_gauges(rule.expr)


@pytest.mark.parametrize("query", ['fleetcast_peaks{metric="cpu"}', 'fleetcast_peak{metrics="cpu"}', "1 + 1"])
def test_a_slip_in_a_query_is_seen(query):
    with pytest.raises(AssertionError):
        check_gauges(query)


def test_a_slip_in_a_rule_is_seen():
    rules = load("deploy/prometheus/alerts.yml")
    rules["groups"][0]["rules"][0]["fro"] = "15m"
    with pytest.raises(ValidationError, match="fro"):
        Rules.model_validate(rules)


def test_external_metrics_are_one_number_of_gauges_of_the_server():
    for rule in Adapter.model_validate(load("deploy/prometheus/adapter.yml")).externalRules:
        labels = ",".join(f'{label}="any"' for label in sorted(GAUGES[rule.seriesQuery]))
        query = rule.metricsQuery.replace("<<.Series>>", rule.seriesQuery)
        query = query.replace("<<.LabelMatchers>>", labels)
        assert query.startswith("max(")
        check_gauges(query)


def test_scrapes_with_the_token_from_a_file():
    (job,) = load("deploy/prometheus/prometheus.yml")["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "fleetcast-token"}
    assert job.get("metrics_path", "/metrics") == "/metrics"


@needs_promtool
def test_promtool_finds_no_fault(tmp_path):
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(PROMETHEUS / name, tmp_path)
    (tmp_path / "fleetcast-token").write_text("any")
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path):
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)

    def when(series, firing, minutes):
        """One case: series → values of each minute; the alerts that fire, with labels, after so many."""
        checks = [
            {
                "eval_time": f"{minutes}m",
                "alertname": name,
                "exp_alerts": [
                    {
                        "exp_labels": {"severity": rule.labels.severity, **firing[name]},
                        "exp_annotations": {
                            "summary": firing[name].get("summary", rule.annotations.summary),
                            "description": rule.annotations.description,
                        },
                    }
                ]
                if name in firing
                else [],
            }
            for name, rule in alerts().items()
        ]
        values = [{"series": name, "values": text} for name, text in series.items()]
        return {"interval": "1m", "input_series": values, "alert_rule_test": checks}

    valid, refused = {"fleetcast_forecast_stale": "0x400"}, {"fleetcast_refused": "1x400"}
    near = 'fleetcast_time_to_limit_seconds{entity="m_1",metric="cpu",limit="0.8",level="0.95"}'
    cases = [
        when(valid, {}, 300),
        when({}, {"FleetcastForecastMissing": {}}, 300),
        when({"fleetcast_forecast_stale": "1x400"}, {}, 180),
        when({"fleetcast_forecast_stale": "1x400"}, {"FleetcastForecastStale": {}}, 300),
        when(valid | refused, {"FleetcastForecastRefused": {}}, 300),
        when(valid | {near: f"{25 * 3600}x400"}, {}, 300),
    ]
    limit = when(valid | {near: f"{23 * 3600}x400"}, {"FleetcastLimitNear": {}}, 300)
    (expected,) = (
        check["exp_alerts"][0]
        for check in limit["alert_rule_test"]
        if check["alertname"] == "FleetcastLimitNear"
    )
    expected["exp_labels"] |= {"entity": "m_1", "metric": "cpu", "limit": "0.8"}
    expected["exp_annotations"]["summary"] = "m_1 may pass 0.8 of its cpu in 23 h"

    file = tmp_path / "cases.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": [*cases, limit]}))
    ran = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
