"""What is deployed reads what is served: KEDA's paths and Grafana's panels, on real answers."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def triggers() -> list[tuple[str, dict[str, str]]]:
    """Every metrics-api trigger, and the file that it is in."""
    return [
        (path.name, trigger["metadata"])
        for path in sorted((DEPLOY / "keda").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
        for trigger in document.get("spec", {}).get("triggers", [])
        if trigger["type"] == "metrics-api"
    ]


@pytest.mark.parametrize(
    ("file", "trigger"), triggers(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_kedas_path_is_a_number_of_the_real_answer(client, file, trigger):
    url = urlsplit(trigger["url"])
    asked = dict(parse_qsl(url.query)) | {"metric": "cpu"}  # the night has no rate
    path = url.path.rsplit("/", 1)[0]
    answer = client.get(f"{path}/m_1", params=asked)
    assert answer.status_code == 200, answer.text
    value = answer.json()
    for part in trigger["valueLocation"].split("."):  # as GJSON goes down a path
        value = value[int(part)] if isinstance(value, list) else value[part]
    assert isinstance(value, int | float)
    assert value > 0
    assert float(trigger["targetValue"]) != 0


def test_there_is_a_manifest_for_replicas_and_one_for_load():
    assert {trigger["valueLocation"] for _, trigger in triggers()} == {"required_replicas", "load"}


def test_every_panel_of_the_forecasts_draws_something(client):
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    variables = {"$entity": "m_4", "$metric": "cpu"}
    queries = [
        target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
        if target["datasource"]["uid"] == "${forecast}"
    ]
    assert len(queries) > 5
    day = 86_400
    issued = 1515196800
    for query in queries:
        for name, value in variables.items():
            query = query.replace(name, value)
        asked = {"query": query, "start": issued - day, "end": issued + day, "step": "15m"}
        found = client.post("/api/v1/query_range", data={k: str(v) for k, v in asked.items()}).json()
        (line,) = found["data"]["result"]
        assert len(line["values"]) > 10, query


def test_the_dashboards_variables_have_values(client):
    for label in ("entity", "metric"):
        assert client.get(f"/api/v1/label/{label}/values").json()["data"]
