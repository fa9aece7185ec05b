"""The dashboard: every query asks for series that are there, of the data source that has them."""

import itertools
import json
import re

import pytest
from fleetcast.errors import InputError
from fleetcast.schemas import QUANTILES
from fleetcast.serving import prometheus
from resources import DEPLOY, load
from series import check_gauges, selectors

DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
LEVELS = {f"{level:g}" for level in QUANTILES}


def filled(text):
    """As Grafana sends it, with every variable replaced."""
    for name in re.findall(r"\$\{?(\w+)\}?", text):
        assert name in VARIABLES, text
    return re.sub(r"\$\{?\w+\}?", "any", text)


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            yield panel, filled(target["expr"])


def of(panel, source):
    return panel["datasource"] == {"type": "prometheus", "uid": f"${{{source}}}"}


def check_forecasts(query):
    """The server understands a selector and no more."""
    (selector,) = selectors(query)
    found = prometheus.parse(query)
    assert isinstance(found, tuple)
    assert selector.name in prometheus.NAMES, query
    assert {matcher.label for matcher in found} <= set(prometheus.LABELS), query
    for matcher in found:
        if matcher.label == "quantile":
            assert matcher.value in LEVELS, query


def test_every_query_asks_for_what_its_data_source_has():
    assert len(list(queries())) >= len(PANELS)
    for panel, query in queries():
        if of(panel, "forecast"):
            check_forecasts(query)
        else:
            assert of(panel, "prometheus")
            check_gauges(query)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ('fleetcast_forecasts{metric="cpu"}', AssertionError),
        ('fleetcast_forecast{metrics="cpu"}', AssertionError),
        ('fleetcast_forecast{quantile="0.96"}', AssertionError),
        ('max(fleetcast_forecast{metric="cpu"})', InputError),
        ('fleetcast_forecast{metric="cpu"', ValueError),
    ],
)
def test_a_slip_in_a_query_is_seen(query, error):
    with pytest.raises(error):
        check_forecasts(query)


def test_shows_yesterday_and_tomorrow():
    assert DASHBOARD["time"] == {"from": "now-1d", "to": "now+1d"}


def test_what_prometheus_is_asked_for_is_not_in_the_future():
    for panel in DASHBOARD["panels"]:
        assert ("timeFrom" in panel) == of(panel, "prometheus"), panel["title"]


def test_has_what_operators_ask_for():
    names = {selector.name for _, query in queries() for selector in selectors(query)}
    assert names >= {
        "fleetcast_forecast",
        "fleetcast_observed",
        "fleetcast_total",
        "fleetcast_time_to_limit_seconds",
        "fleetcast_forecast_issued_timestamp_seconds",
        "fleetcast_fallback_entities",
    }


def test_bands_are_drawn_between_series_that_are_there():
    bands = 0
    for panel in DASHBOARD["panels"]:
        shown = {target["legendFormat"] for target in panel["targets"]}
        for override in panel["fieldConfig"]["overrides"]:
            for found in override["properties"]:
                if found["id"] == "custom.fillBelowTo":
                    assert {override["matcher"]["options"], found["value"]} <= shown
                    bands += 1
    assert bands == 3


def test_variables_are_data_sources_and_labels_of_the_server():
    assert VARIABLES.keys() == {"forecast", "prometheus", "entity", "metric"}
    for name in ("forecast", "prometheus"):
        assert (VARIABLES[name]["type"], VARIABLES[name]["query"]) == ("datasource", "prometheus")
    for name in ("entity", "metric"):
        assert VARIABLES[name]["query"]["query"] == f"label_values({name})"
        assert VARIABLES[name]["datasource"]["uid"] == "${forecast}"
        assert name in prometheus.LABELS


def test_panels_have_ids_and_places_of_their_own():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    squares = [
        square
        for grid in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for square in itertools.product(
            range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])
        )
    ]
    assert len(set(squares)) == len(squares)
    assert max(x for x, _ in squares) < 24


def test_the_data_source_is_the_server_and_its_token_comes_from_the_environment():
    (source,) = load("deploy/grafana/datasources.yaml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["httpHeaderName1"] == "Authorization"
    assert source["secureJsonData"] == {"httpHeaderValue1": "Bearer $FLEETCAST_TOKEN"}
