"""The server's series, and what a query asks of them."""

from __future__ import annotations

import promql_parser

#: On /metrics, scraped by a Prometheus: name → labels.
GAUGES = {
    "fleetcast_forecast_stale": set(),
    "fleetcast_refused": set(),
    "fleetcast_forecast_issued_timestamp_seconds": set(),
    "fleetcast_forecast_valid_until_timestamp_seconds": set(),
    "fleetcast_fallback_entities": set(),
    "fleetcast_entities": set(),
    "fleetcast_total_ahead": {"metric", "level", "ahead_hours"},
    "fleetcast_peak": {"entity", "metric", "level"},
    "fleetcast_time_to_limit_seconds": {"entity", "metric", "limit", "level"},
}


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """Every selector of a PromQL query. Raises ValueError if it cannot be parsed."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def check_gauges(query: str) -> None:
    """Raises AssertionError for a query of anything but the server's gauges and their labels."""
    found = selectors(query)
    assert found, query
    for selector in found:
        assert selector.name in GAUGES, query
        assert {matcher.name for matcher in selector.matchers.matchers} <= GAUGES[selector.name], query
