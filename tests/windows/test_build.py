"""From telemetry and dependencies to shards: binning, merging, the scaler of the training part."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from fleetcast.store import Store
from fleetcast.windows import build
from fleetcast.windows.build import Grid, Places, RowGroup, build_shard, split_dependencies, split_telemetry
from fleetcast.windows.manifest import Shard
from fleetcast.windows.views import read_values

NAN = float("nan")
MIDNIGHT = datetime(2018, 1, 1, tzinfo=UTC)


def grid(steps: int = 4, **options) -> Grid:
    """Steps of a quarter of an hour from midnight."""
    given = {
        "metrics": ("cpu", "cpu_max"),
        "start": int(MIDNIGHT.timestamp()),
        "step": 900,
        "steps": steps,
        "lag": None,
        "train": steps,
        "kinds": ("call",),
    }
    return Grid(**(given | options))


def shard(group: int = 0, start: int = 0, stop: int = 4, first: int = 0, last: int = 4) -> Shard:
    return Shard(
        path="v.parquet", edges="e.parquet", group=group, start=start, stop=stop, first=first, last=last
    )


def units(*border: tuple[int, int, int, int], **own: tuple[int, int]) -> Places:
    """`units((home, place, group, index), …, a=(group, index))`."""
    rows = [(entity, group, index) for entity, (group, index) in own.items()]
    schema = {"entity": pl.String, "group": pl.Int32, "index": pl.Int32}
    ends = dict.fromkeys(("home", "place", "group", "index"), pl.Int32)
    named = pl.DataFrame(rows, schema, orient="row")
    return Places(named, named, pl.DataFrame(border, ends, orient="row"))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path)).open_or_create()


def write_telemetry(store: Store, name: str, rows: list[tuple[int, str, float | None, float | None]]) -> str:
    """Rows of (minute, entity, mean, maximum)."""
    frame = pl.DataFrame(
        [(MIDNIGHT + timedelta(minutes=minute), *rest) for minute, *rest in rows],
        schema={
            "time": pl.Datetime("ms", "UTC"),
            "entity": pl.Categorical,
            "cpu": pl.Float32,
            "cpu_max": pl.Float32,
        },
        orient="row",
    )
    store.write_table(name, frame.to_arrow())
    return name


def dense(
    store: Store, files: list[str], places: Places, axes: Grid, part: Shard, entities: int
) -> np.ndarray:
    """[T, N, F] of a shard as a reader finds it."""
    rows = []
    for name in files:
        groups = split_telemetry(store, name, f"split-{name}", places, axes)["groups"]
        rows += [RowGroup(f"split-{name}", i) for i, group in enumerate(groups) if group == part.group]
    names = tuple(f"n{i}" for i in range(entities))
    build_shard(store, axes, part, names, (), rows, [], (part.path, part.edges))
    table = store.read_table(part.path)
    assert table["entity"].to_pylist() == list(names) * (part.last - part.first)
    columns = [table[metric].to_numpy() for metric in axes.metrics]
    return np.stack(columns, -1).reshape(part.last - part.first, entities, -1)


# -- values ------------------------------------------------------------------------------------------------


def test_a_coarser_step_averages_bins_and_takes_the_maximum_of_maxima(store):
    file = write_telemetry(
        store,
        "t.parquet",
        [(0, "a", 0.25, 0.5), (5, "a", 0.5, 0.9), (10, "a", 0.75, 0.75), (15, "a", 0.125, 0.25)],
    )
    found = dense(store, [file], units(a=(0, 0)), grid(), shard(), 1)
    assert found[:, 0] == pytest.approx(
        np.float32([[0.5, 0.9], [0.125, 0.25], [NAN, NAN], [NAN, NAN]]), nan_ok=True
    )


def test_a_bin_without_a_sample_is_missing_and_zero_is_a_value(store):
    rows = [(0, "a", None, None), (15, "a", 0.0, 0.0), (30, "a", 0.5, None), (35, "a", None, 0.75)]
    found = dense(store, [write_telemetry(store, "t.parquet", rows)], units(a=(0, 0)), grid(), shard(), 1)
    assert found[:, 0] == pytest.approx(
        np.float32([[NAN, NAN], [0, 0], [0.5, 0.75], [NAN, NAN]]), nan_ok=True
    )


def test_a_service_is_the_mean_of_its_containers_in_all_files_and_their_maximum(store):
    one = write_telemetry(store, "1.parquet", [(0, "a", 0.25, 0.5), (0, "b", 0.5, 0.625), (15, "a", 1, 1)])
    two = write_telemetry(store, "2.parquet", [(0, "c", 0.75, 0.75), (5, "c", 1, 1), (30, "c", 0.5, 0.5)])
    same = units(a=(0, 0), b=(0, 0), c=(0, 0))
    expected = np.float32([[2.5 / 4, 1], [1, 1], [0.5, 0.5], [NAN, NAN]])
    for files in ([one, two], [two, one]):
        assert dense(store, files, same, grid(), shard(), 1)[:, 0] == pytest.approx(expected, nan_ok=True)


def test_each_group_gets_its_entities_in_their_order_and_strangers_are_left_out(store):
    rows = [(0, "a", 1, 1), (0, "b", 2, 2), (0, "c", 3, 3), (0, "stranger", 4, 4)]
    file = write_telemetry(store, "t.parquet", rows)
    places = units(a=(1, 0), b=(0, 0), c=(1, 1))
    assert dense(store, [file], places, grid(), shard(group=0), 1)[0, :, 0].tolist() == [2]
    assert dense(store, [file], places, grid(), shard(group=1), 2)[0, :, 0].tolist() == [1, 3]


def test_a_service_on_the_border_is_the_mean_of_its_containers_in_every_group_that_sees_it(store):
    one = write_telemetry(store, "1.parquet", [(0, "a", 0.5, 1), (0, "c", 0.25, 1), (0, "d", 0.75, 1)])
    two = write_telemetry(store, "2.parquet", [(0, "b", 1, 1)])
    places = units((0, 0, 1, 1), (0, 0, 2, 1), a=(0, 0), b=(0, 0), c=(1, 0), d=(2, 0))
    for group, expected in ((1, [0.25, 0.75]), (2, [0.75, 0.75])):
        found = dense(store, [one, two], places, grid(), shard(group=group), 2)
        assert found[0, :, 0].tolist() == expected
    assert dense(store, [one, two], places, grid(), shard(group=0), 1)[0, :, 0].tolist() == [0.75]


def test_rows_outside_the_grid_and_the_shard_are_left_out(store):
    file = write_telemetry(store, "t.parquet", [(m, "a", m / 60, m / 60) for m in range(-30, 90, 15)])
    found = dense(store, [file], units(a=(0, 0)), grid(), shard(first=1, last=4), 1)
    assert found[:, 0, 0].tolist() == [0.25, 0.5, 0.75]


def test_only_means_or_only_maxima_can_be_asked_for(store):
    file = write_telemetry(store, "t.parquet", [(0, "a", 0.25, 0.5), (5, "a", 0.75, 1)])
    for metric, value in (("cpu", 0.5), ("cpu_max", 1)):
        found = dense(store, [file], units(a=(0, 0)), grid(metrics=(metric,)), shard(), 1)
        assert found[0].tolist() == [[value]]


def test_a_group_without_any_telemetry_is_all_missing(store):
    file = write_telemetry(store, "t.parquet", [(0, "a", 1, 1)])
    assert np.isnan(dense(store, [file], units(a=(0, 0), b=(1, 0)), grid(), shard(group=1), 1)).all()


def test_an_infinite_value_counts_as_missing(store):
    file = write_telemetry(store, "t.parquet", [(0, "a", float("inf"), 1), (15, "a", 0.5, float("-inf"))])
    found = dense(store, [file], units(a=(0, 0)), grid(), shard(), 1)
    assert found[:2, 0] == pytest.approx(np.float32([[NAN, 1], [0.5, NAN]]), nan_ok=True)


# -- edges -------------------------------------------------------------------------------------------------


def test_edges_are_kept_inside_groups_as_positions_and_for_the_slices_a_shard_may_ask_for(store):
    def at(hours: int, source: str, target: str, kind: str = "call") -> tuple:
        return (MIDNIGHT + timedelta(hours=hours), source, target, kind, 2.0)

    kept = [at(-47, "a", "c"), at(0, "c", "a")]
    dropped = [at(-100, "a", "c"), at(100, "a", "c"), at(0, "a", "b"), at(0, "c", "a", "batch")]
    schema = {
        "time": pl.Datetime("ms", "UTC"),
        "source": pl.Categorical,
        "target": pl.Categorical,
        "kind": pl.Categorical,
        "weight": pl.Float32,
    }
    store.write_table("d.parquet", pl.DataFrame([*kept, *dropped], schema=schema, orient="row").to_arrow())
    places = units(a=(1, 0), b=(0, 0), c=(1, 1))
    groups = split_dependencies(store, "d.parquet", "s.arrow", places, grid())["groups"]
    assert groups == [1]
    build_shard(
        store, grid(), shard(1), ("a", "c"), (), [], [RowGroup("s.arrow", 0)], ("v.parquet", "e.parquet")
    )
    found = store.read_table("e.parquet").to_pylist()
    assert [(row["time"], row["source"], row["target"], row["weight"]) for row in found] == [
        (MIDNIGHT - timedelta(hours=47), 0, 1, 1.0),
        (MIDNIGHT, 1, 0, 1.0),
    ]


def test_an_edge_into_or_out_of_a_group_is_kept_where_its_other_end_is_on_the_border(store):
    """Group 0 is a, b with c on its border; group 1 is c, d with b on its border."""
    places = units((1, 0, 0, 2), (0, 1, 1, 2), a=(0, 0), b=(0, 1), c=(1, 0), d=(1, 1))
    rows = [
        (MIDNIGHT, source, target, "call", 1.0)
        for source, target in ["ab", "cd", "ca", "bc", "cb", "da", "bd", "ad"]
    ]
    names = ["time", "source", "target", "kind", "weight"]
    table = pl.DataFrame(rows, names, orient="row").cast(
        {"time": pl.Datetime("ms", "UTC"), "weight": pl.Float32}
    )
    store.write_table("d.parquet", table.to_arrow())
    assert split_dependencies(store, "d.parquet", "s.arrow", places, grid())["groups"] == [0, 1]
    found = []
    for group, (own, border) in enumerate([(("a", "b"), ("c",)), (("c", "d"), ("b",))]):
        links = [RowGroup("s.arrow", group)]
        build_shard(store, grid(), shard(group), own, border, [], links, ("v.parquet", "e.parquet"))
        members = own + border
        rows = store.read_table("e.parquet").to_pylist()
        found.append({members[row["source"]] + members[row["target"]] for row in rows})
        assert len(rows) == len(found[-1])
    assert found == [{"ab", "ca", "bc", "cb"}, {"cd", "bc", "cb", "bd"}]


# -- the scaler --------------------------------------------------------------------------------------------


def random_values(steps: int = 80, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.gamma(2, [0.1, 300], (steps, 4, 2)).astype(np.float32)
    return np.where(random.random(values.shape) < 0.2, np.float32(NAN), values)


@pytest.mark.parametrize("width", [80, 33, 7])
def test_the_scaler_is_that_of_the_observed_training_values_each_counted_once(dataset, width):
    values = random_values()
    _, m = dataset(values, groups=(("e0", "e1", "e2"), ("e3",)), width=width)
    train = values[: m.boundaries[0]].astype(np.float64)
    assert m.scaler.mean == pytest.approx(np.nanmean(train, (0, 1)), rel=1e-12)
    assert m.scaler.std == pytest.approx(np.nanstd(train, (0, 1)), rel=1e-12)
    assert m.observed == pytest.approx(np.isfinite(values).mean((0, 1)), rel=1e-12)
    change = np.abs(train[m.lags[0] :] - train[: -m.lags[0]])
    assert m.seasonal_error == pytest.approx(np.nanmean(change, (0, 1)), rel=1e-6)


def test_values_after_the_training_part_do_not_reach_the_scaler(dataset):
    values, other = random_values(), random_values()
    _, m = dataset(values, width=33)
    other[m.boundaries[0] :] = 1e6
    _, changed = dataset(other, width=33)
    assert changed.scaler == m.scaler
    assert changed.seasonal_error == m.seasonal_error


@pytest.mark.parametrize("constant", [0, 0.1, 12345.678, 1e9])
def test_a_constant_metric_is_only_centred(dataset, constant):
    values = random_values()
    values[..., 1] = constant
    store, m = dataset(values, width=33)
    assert m.scaler.std[1] == 1
    assert m.scaler.mean[1] == pytest.approx(np.float32(constant), rel=1e-12)
    assert (read_values(store, m, m.shards[0])[..., 1] == np.float32(constant)).all()


def test_a_metric_of_small_values_is_scaled_like_any_other(dataset):
    values = random_values()
    values[..., 1] *= 1e-12
    _, m = dataset(values)
    assert m.scaler.std[1] == pytest.approx(np.nanstd(values[: m.boundaries[0], :, 1].astype(np.float64)))


def test_a_metric_unseen_in_training_is_reported():
    statistics = {
        "count": [[3.0, 0.0]],
        "sum": [[3.0, 0.0]],
        "squares": [[1.0, 0.0]],
        "observed": [[3.0, 2.0]],
        "cells": [[8.0, 8.0]],
        "seasonal_sum": [[0.0, 0.0]],
        "seasonal_count": [[0.0, 0.0]],
    }
    summary = build.summarise([statistics, statistics], [0, 0])
    assert summary.unseen == (1,)
    assert summary.scaler.std[1] == 1
    assert summary.seasonal_error == (0, 0)
    assert summary.observed == (3 / 8, 2 / 8)


def test_each_entity_has_a_scale_of_its_own_where_asked_for(dataset):
    values = random_values()
    values[:, 1] = values[:, 1] * 50 + 7
    values[:, 0, 1] = 3  # constant: on the metric's scale
    _, m = dataset(values, scale="entity", width=40)
    train = values[: m.boundaries[0]].astype(np.float64)
    mean, std = m.scaler.of(np.array([1, 0, -1]))
    expected = np.nanstd(train, axis=0)
    expected[0, 1] = np.nanstd(train[..., 1])
    np.testing.assert_allclose(mean[:2], np.nanmean(train, axis=0)[[1, 0]])
    np.testing.assert_allclose(std[:2], expected[[1, 0]])
    np.testing.assert_allclose((mean[2], std[2]), (m.scaler.mean, m.scaler.std))
    pooled = dataset(values)[1].scaler.of(np.array([1, 0]))
    np.testing.assert_allclose(pooled[1], np.broadcast_to(np.nanstd(train, axis=(0, 1)), (2, 2)))
