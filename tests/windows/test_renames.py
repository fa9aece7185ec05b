"""Instances that were renamed: who takes whose place."""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
import pytest
from fleetcast.windows.renames import lives, successors

HOUR = 3600


def joined(*spans: tuple[str, str, float, float], within: int = HOUR // 2) -> dict[str, tuple[str, ...]]:
    """Of instances (service, name, first, last), in hours."""
    rows = [(name, service, int(HOUR * first), int(HOUR * last)) for service, name, first, last in spans]
    frame = pl.DataFrame(rows, ["entity", "service", "first", "last"], orient="row")
    return successors(frame, within)


def test_a_rollout_after_another_is_one_series() -> None:
    assert joined(("web", "a", 0, 10), ("web", "b", 10.1, 20), ("web", "c", 20.4, 30)) == {"c": ("a", "b")}


def test_a_surge_begins_the_new_one_before_the_old_one_ends() -> None:
    assert joined(("web", "a", 0, 10), ("web", "b", 9.8, 20)) == {"b": ("a",)}


@pytest.mark.parametrize(
    ("why", "spans"),
    [
        ("another service", [("web", "a", 0, 10), ("db", "b", 10.1, 20)]),
        ("too long after", [("web", "a", 0, 10), ("web", "b", 11, 20)]),
        ("both live on", [("web", "a", 0, 20), ("web", "b", 10, 20)]),
        ("they came together", [("web", "a", 10, 10.3), ("web", "b", 10, 20)]),
        ("the new one ended first", [("web", "a", 0, 10), ("web", "b", 9.8, 9.9)]),
        ("scaled out", [("web", "a", 0, 20), ("web", "b", 5, 20), ("web", "c", 7, 20)]),
    ],
)
def test_what_is_no_rename(why: str, spans: list[tuple[str, str, float, float]]) -> None:
    assert joined(*spans) == {}, why


def test_each_is_followed_by_one_at_most_the_nearest_first() -> None:
    found = joined(
        ("web", "a", 0, 10), ("web", "b", 0, 10.2), ("web", "c", 10.1, 20), ("web", "d", 10.3, 20),
        ("web", "e", 10.4, 20),
    )  # fmt: skip
    assert found == {"c": ("a",), "d": ("b",)}


def test_the_order_of_rows_does_not_matter() -> None:
    spans = [("web", "a", 0, 10), ("web", "b", 10.1, 20), ("db", "x", 0, 5), ("db", "y", 5, 20)]
    assert joined(*spans) == joined(*spans[::-1]) == {"b": ("a",), "y": ("x",)}


def test_lives_are_from_the_first_to_the_last_bin() -> None:
    times = [datetime(2024, 1, 1, hour, tzinfo=UTC) for hour in (3, 1, 2)]
    rows = pl.DataFrame(
        {"entity": ["a", "a", "b"], "time": times}, schema_overrides={"entity": pl.Categorical}
    )
    start = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
    assert lives(rows.to_arrow()).rows() == [
        ("a", start + HOUR, start + 3 * HOUR), ("b", start + 2 * HOUR, start + 2 * HOUR),
    ]  # fmt: skip
