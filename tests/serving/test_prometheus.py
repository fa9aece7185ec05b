"""Prometheus and Grafana read the same numbers: checked by promtool, scraped by a real Prometheus."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.serving import prometheus
from fleetcast.serving.prometheus import Matcher, parse
from prometheus_client.parser import text_string_to_metric_families
from real_prometheus import needs_prometheus, running

START = 1515196800  # 2018-01-06T00:00:00Z, where the forecast begins
NEEDS = "Debian's package prometheus has it"


def ranged(client: httpx.Client, query: str, start: int, end: int, step: str = "900") -> list[dict]:
    answer = client.get(
        "/api/v1/query_range", params={"query": query, "start": start, "end": end, "step": step}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["resultType"] == "matrix"
    return answer.json()["data"]["result"]


def test_a_panel_from_yesterday_to_tomorrow_draws_past_and_future(client):
    forecast = client.get("/v1/forecasts/m_4?metric=cpu&quantile=0.95").json()["forecasts"][0]["series"][0]
    history = client.get("/v1/history/m_4").json()
    first, last = START - 86_400, START + 86_400
    (line,) = ranged(client, 'fleetcast_forecast{entity="m_4",metric="cpu",quantile="0.95"}', first, last)
    assert line["metric"] == {
        "__name__": "fleetcast_forecast",
        "entity": "m_4",
        "metric": "cpu",
        "quantile": "0.95",
    }
    assert [t for t, _ in line["values"]] == [START + 900 * h for h in range(24)]
    assert np.allclose([float(v) for _, v in line["values"]], forecast["quantiles"]["0.95"], rtol=1e-5)
    (past,) = ranged(client, 'fleetcast_observed{entity="m_4",metric="cpu"}', first, last)
    seen = [v for v in history["values"]["cpu"][-96:] if v is not None]
    assert np.allclose([float(v) for _, v in past["values"]], seen, rtol=1e-5)
    assert past["values"][-1][0] < START
    (total,) = ranged(client, 'fleetcast_total{metric="cpu",stat="mean"}', first, last)
    expected = client.get("/v1/totals?metric=cpu").json()["mean"]
    assert np.allclose([float(v) for _, v in total["values"]], expected, rtol=1e-5)


def test_a_value_holds_for_its_step(client):
    query = 'fleetcast_total{metric="cpu",stat="mean"}'
    (fine,) = ranged(client, query, START, START + 1799, "300")
    values = [v for _, v in fine["values"]]
    assert values[0] == values[1] == values[2] != values[3]
    assert values[3] == values[5]


def test_the_same_by_a_form_at_an_instant_and_by_rfc_3339(client):
    form = {"query": 'fleetcast_total{metric=~"cpu|mem.*",quantile="0.5"}', "time": "2018-01-06T00:20:00Z"}
    posted = client.post("/api/v1/query", data=form).json()
    assert posted == client.get("/api/v1/query", params=form).json()
    assert [one["metric"]["metric"] for one in posted["data"]["result"]] == ["cpu", "memory"]
    assert posted["data"]["result"][0]["value"][0] == START + 1200
    ranges = {"query": "fleetcast_total", "start": str(START), "end": str(START + 900), "step": "15m"}
    found = client.post("/api/v1/query_range", data=ranges).json()["data"]["result"]
    assert len(found) == 2 * 9


def test_what_grafana_asks_of_a_data_source(client):
    assert client.get("/api/v1/query", params={"query": "1+1"}).json()["data"]["result"][1] == "2"
    assert client.get("/api/v1/status/buildinfo").json()["data"]["application"] == "fleetcast"
    assert set(client.get("/api/v1/label/__name__/values").json()["data"]) == set(prometheus.NAMES)
    assert client.get("/api/v1/label/metric/values").json()["data"] == ["cpu", "memory"]
    series = client.get("/api/v1/series", params={"match[]": 'fleetcast_observed{entity="m_1"}'}).json()
    assert [one["metric"] for one in series["data"]] == ["cpu", "memory"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('a{b="c"}', (Matcher("__name__", "=", "a"), Matcher("b", "=", "c"))),
        ('{b!~"c|d", e!="f",}', (Matcher("b", "!~", "c|d"), Matcher("e", "!=", "f"))),
        (r'a{b="c\"d\\"}', (Matcher("__name__", "=", "a"), Matcher("b", "=", 'c"d\\'))),
        (" a ", (Matcher("__name__", "=", "a"),)),
        ("1.5", 1.5),
    ],
)
def test_selectors_are_understood(query, expected):
    assert parse(query) == expected


@pytest.mark.parametrize(
    "query",
    ["", "rate(a[5m])", "a + b", "a{b=c}", 'a{b="c"', "a[5m]", 'a{b="c" d="e"}', "sum(a)", "x" * 10_001],
)
def test_what_is_not_supported_is_said(client, query):
    answer = client.get("/api/v1/query", params={"query": query})
    assert answer.status_code == 422
    with pytest.raises(InputError, match="query"):
        parse(query)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": 'fleetcast_total{metric=~"("}'}, "not a regular expression"),
        ({"start": "yesterday"}, "expected Unix seconds or RFC 3339"),
        ({"step": "fast"}, "expected a duration"),
        ({"step": "1"}, "expected at most 11000"),
        ({"step": "0"}, "expected a rising range"),
        ({"end": "0"}, "expected a rising range"),
        ({"start": "nan"}, "expected a time"),
    ],
)
def test_a_range_that_cannot_be_is_an_error_of_prometheus_form(client, change, words):
    asked = {"query": "fleetcast_total", "start": str(START), "end": str(START + 86_400), "step": "60"}
    answer = client.get("/api/v1/query_range", params=asked | change)
    assert answer.status_code == 422
    assert answer.json()["status"] == "error"
    assert words in answer.json()["error"]


def test_the_gauges_are_the_forecast(client):
    text = client.get("/metrics").text
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    peak = client.get("/v1/peaks?metric=cpu&limit=1").json()["peaks"][0]
    labels = (("entity", peak["entity"]), ("level", "0.95"), ("metric", "cpu"))
    assert found["fleetcast_peak", *labels] == pytest.approx(peak["value"])
    assert found["fleetcast_forecast_issued_timestamp_seconds",] == START
    total = client.get("/v1/totals?metric=cpu").json()["quantiles"]["0.5"]
    ahead = (("ahead_hours", "3"), ("level", "0.5"), ("metric", "cpu"))
    assert found["fleetcast_total_ahead", *ahead] == pytest.approx(total[12])
    assert all(np.isfinite(value) and value >= 0 for value in found.values())
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    assert client.get("/metrics", headers=accept).text.endswith("# EOF\n")


@pytest.mark.skipif(not shutil.which("promtool"), reason=f"no promtool here; {NEEDS}")
def test_promtool_finds_nothing_wrong(client):
    text = client.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")


@needs_prometheus
def test_a_real_prometheus_scrapes_it(served, client, tmp_path):
    config = {
        "scrape_configs": [
            {
                "job_name": "fleetcast",
                "scrape_interval": "1s",
                "static_configs": [{"targets": [served.removeprefix("http://")]}],
            }
        ]
    }
    with running(tmp_path, config) as url, httpx.Client(base_url=url) as peer:
        found = _first(peer, 'fleetcast_total_ahead{metric="cpu",level="0.5",ahead_hours="3"}', tmp_path)
        up = _first(peer, "up", tmp_path)
    total = client.get("/v1/totals?metric=cpu").json()["quantiles"]["0.5"]
    assert float(found["value"][1]) == pytest.approx(total[12], rel=1e-5)
    assert up["value"][1] == "1"


def _first(peer: httpx.Client, query: str, folder: Path) -> dict:
    """The result of a query once there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if result := peer.get("/api/v1/query", params={"query": query}).json()["data"]["result"]:
            return result[0]
        time.sleep(0.1)
    raise AssertionError((folder / "log").read_text()[-2000:])


def test_the_deployed_dashboards_and_alerts_know_these_gauges(service):
    """`tests/deploy` holds what is deployed to a table of series; this holds the table to the server."""
    place = Path(__file__).parents[1] / "deploy" / "series.py"
    known = runpy.run_path(str(place))["GAUGES"]
    gauges = prometheus.Gauges(service.snapshot, False, "trace").collect()
    found = {family.name: set(family._labelnames) for family in gauges}
    assert found == {name: labels for name, labels in known.items() if name in found}
    assert found.keys() == known.keys()
