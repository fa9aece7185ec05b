"""A store's published forecasts, replayed against what came."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from fleetcast.control.what_if import WhatIfOptions, what_if
from fleetcast.errors import InputError
from fleetcast.store import Store
from pydantic import ValidationError

START = datetime(2025, 1, 1, tzinfo=UTC)


def store_of(folder: Path, truth: list[float], q50: list[float], q90: list[float]) -> Store:
    """A store of one entity in steps of an hour."""
    store = Store(str(folder)).open_or_create()
    times = [START + timedelta(hours=number) for number in range(len(q50))]
    forecast = {
        "entity": ["a"] * len(q50),
        "metric": ["cpu"] * len(q50),
        "time": times,
        "q50": q50,
        "q90": q90,
    }
    store.write_json("forecasts/issued=20250101T000000Z/manifest.json", {"step": 3600})
    store.write_table("forecasts/issued=20250101T000000Z/part.parquet", pl.DataFrame(forecast).to_arrow())
    if truth:
        telemetry = {"entity": ["a"] * len(truth), "time": times[: len(truth)], "cpu": truth}
        store.write_table("telemetry/date=2025-01-01/machine.parquet", pl.DataFrame(telemetry).to_arrow())
    return store


def test_minutes_under_provisioned_and_idle_core_hours_by_hand(tmp_path: Path) -> None:
    store = store_of(tmp_path, [1.0, 3.0, 2.0, 2.0], [1.0, 1.0, 2.0, 3.0], [2.0, 2.0, 3.0, 4.0])
    options = WhatIfOptions(quantiles=("q50", "q90"), leads=(1, 2), factors=(1.0,), unit=1, cores=2)
    found = what_if(store, options)
    per_day = 24 / 4
    rows = {(row["quantile"], row["lead"]): row for row in found.table.iter_rows(named=True)}
    assert rows["q50", 1]["under_minutes"] == 60 * per_day
    assert rows["q50", 1]["idle_core_hours"] == 2 * 1 * per_day
    assert rows["q50", 1]["missing_core_hours"] == 2 * 2 * per_day
    assert rows["q50", 2]["missing_core_hours"] == 2 * 1 * per_day, "the second hour has the third's 2"
    assert rows["q90", 2]["under_minutes"] == 0
    assert found.pictures()["what-if"].startswith(b"\x89PNG")


def test_more_traffic_than_was_forecast_is_missing(tmp_path: Path) -> None:
    store = store_of(tmp_path, [1.0, 1.0], [1.0, 1.0], [2.0, 2.0])
    options = WhatIfOptions(quantiles=("q50", "q90"), leads=(1,), factors=(1.5,), unit=1)
    assert what_if(store, options).table["under_minutes"].to_list() == [1440, 0]


def test_a_forecast_of_which_nothing_has_come_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, [], [1.0], [2.0])
    with pytest.raises(InputError, match="no telemetry from 2025-01-01 00:00:00"):
        what_if(store, WhatIfOptions(quantiles=("q50",)))


def test_what_came_in_a_step_is_the_mean_of_its_bins(tmp_path: Path) -> None:
    """Telemetry is finer than forecasts: the first bin of a step alone would say that all was well."""
    store = store_of(tmp_path, [], [2.0, 2.0], [3.0, 3.0])
    times = [START + timedelta(minutes=30 * number) for number in range(4)]
    bins = pl.DataFrame({"entity": ["a"] * 4, "time": times, "cpu": [1.0, 5.0, 1.0, 5.0]})
    store.write_table("telemetry/date=2025-01-01/machine.parquet", bins.to_arrow())
    options = WhatIfOptions(quantiles=("q50", "q90"), leads=(1,), factors=(1.0,), unit=1)
    found = what_if(store, options).table
    assert found["under_minutes"].to_list() == [1440, 0]
    assert found["missing_core_hours"].to_list() == [24, 0]


def test_forecasts_of_different_steps_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, [1.0], [1.0], [2.0])
    store.write_json("forecasts/issued=20250102T000000Z/manifest.json", {"step": 900})
    with pytest.raises(InputError, match=r"steps of 900 s and 3600 s, expected .* of one step"):
        what_if(store, WhatIfOptions(quantiles=("q50",)))


def test_a_store_without_forecasts_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path)).open_or_create()
    with pytest.raises(InputError, match=f"^{tmp_path}: no forecast, expected published ones"):
        what_if(store, WhatIfOptions())
    for wrong in ({"leads": [0]}, {"factors": [-1]}, {"quantiles": []}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            WhatIfOptions.model_validate(wrong)


@pytest.mark.parametrize(("metric", "came"), [("cpu", [1.5, 3.0]), ("request_rate", [3.0, 3.0])])
def test_services_are_what_their_containers_did(tmp_path: Path, metric: str, came: list[float]) -> None:
    """Two containers in the first hour, one in the second: the mean of shares, the sum of rates."""
    store = Store(str(tmp_path)).open_or_create()
    times = [START, START + timedelta(hours=1)]
    forecast = {"entity": ["web"] * 2, "metric": [metric] * 2, "time": times, "q50": came}
    place = "forecasts/issued=20250101T000000Z"
    store.write_json(f"{place}/manifest.json", {"step": 3600, "level": "service"})
    store.write_table(f"{place}/part.parquet", pl.DataFrame(forecast).to_arrow())
    rows = {"entity": ["a", "b", "a"], "time": [*times[:1] * 2, times[1]], metric: [1.0, 2.0, 3.0]}
    store.write_table("telemetry/date=2025-01-01/container-00.parquet", pl.DataFrame(rows).to_arrow())
    described = {"entity": ["a", "b"], "kind": ["container"] * 2, "service": ["web"] * 2}
    store.write_table("entities/entities.parquet", pl.DataFrame(described).to_arrow())
    options = WhatIfOptions(metric=metric, quantiles=("q50",), leads=(1,), factors=(1.0,), unit=0.5, least=0)
    row = what_if(store, options).table.row(0, named=True)
    assert (row["under_minutes"], row["idle_core_hours"]) == (0, 0), "what came is what was forecast"
