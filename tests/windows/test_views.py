"""Windows are views: equal to the materialised ones bit for bit, and blind to all from their origin on."""

import dataclasses

import numpy as np
import pytest
import torch
from fleetcast.windows.batch import Batch
from fleetcast.windows.calendar import time_features
from fleetcast.windows.manifest import PARTS, Manifest, Scaler
from fleetcast.windows.views import OpenShard, interpolate

STEPS, ENTITIES = 64, 5
GROUPS = (("e0", "e2", "e4"), ("e3", "e1"))
BORDERS = (("e1",), ("e0", "e4"))
START = 1_514_765_700  # a quarter of an hour after a slice begins
SLICE = 3600


def telemetry(steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """[T, N, 2] values with short and long gaps; entity 3 was never observed, entity 2 never missing."""
    random = np.random.default_rng(seed)
    values = random.normal(5, 2, (steps, ENTITIES, 2)).astype(np.float32)
    missing = random.random(values.shape) < 0.3
    missing[20:30, 0] = missing[33:36, 1] = missing[-5:, 4] = missing[:, 3] = True
    missing[:, 2] = False
    return np.where(missing, np.float32(np.nan), values)


def edges(start: int, stop: int, seed: int = 0) -> list[tuple[int, str, str, float]]:
    """In most slices four edges inside groups and two between them; weights that scaling leaves alone."""
    random = np.random.default_rng(seed)
    return [
        (time, f"e{source}", f"e{target}", weight)
        for time in range(start // SLICE * SLICE, stop, SLICE)
        if random.random() < 0.8
        for source, target, weight in [
            (*random.permutation([0, 2, 4])[:2], 1.0),
            (*random.permutation([0, 2, 4])[:2], 0.5),
            (*random.permutation([1, 3]), 0.25),
            (0, 1, 0.125),
            (1, 4, 0.0625),
            (4, 0, 0.0625),  # for the second group: between two of its border
        ]
    ]


# -- the definition of a window, in plain loops ------------------------------------------------------------


def look_back(column: np.ndarray, origin: int, m: Manifest) -> list[float]:
    """What is known of one entity's metric at the origin, from the values [T] before it alone."""
    past = column[:origin]
    seen = np.flatnonzero(np.isfinite(past))
    filled = []
    for t in range(origin - m.history, origin):
        before, after = seen[seen <= t], seen[seen >= t]
        if not len(before):  # nothing yet
            filled.append(0)
        elif not len(after):  # a gap that is still open is as long as it is by now
            last = before[-1]
            filled.append(past[last] if origin - 1 - last <= m.max_gap else 0)
        elif after[0] - before[-1] - 1 > m.max_gap:
            filled.append(0)
        else:
            left, right, width = past[before[-1]], past[after[0]], after[0] - before[-1]
            share = (t - before[-1]) / np.float64(max(width, 1))
            filled.append(np.float32(left + (right - left) * share))
    return filled


def materialise(values: np.ndarray, m: Manifest, group: int, origin: int) -> dict[str, torch.Tensor]:
    """One window, copied out of the whole telemetry [T, N, F]."""
    mean, std = (np.float32(part) for part in (m.scaler.mean, m.scaler.std))
    members, own = [int(name[1:]) for name in m.members(group)], len(m.groups[group])
    scaled = (values[:, members] - mean) / std
    steps, nodes, metrics = scaled.shape
    beyond = np.full((m.horizon, nodes, metrics), np.nan, np.float32)
    y = np.concatenate([scaled, beyond])[origin : origin + m.horizon]
    before_all = np.full((max(m.lags, default=0), nodes, metrics), np.nan, np.float32)
    longer = np.concatenate([before_all, scaled])

    def one_lag_before(first: int, count: int) -> np.ndarray:
        lagged = [longer[len(before_all) + first - lag :][:count] for lag in m.lags]
        return np.stack(lagged, -1) if lagged else np.zeros((count, nodes, metrics, 0), np.float32)

    seasonal_x, seasonal = one_lag_before(origin - m.history, m.history), one_lag_before(origin, m.horizon)
    calendar = time_features(m.start, m.step, 0, steps + m.horizon)
    x = [[look_back(scaled[:, n, f], origin, m) for f in range(metrics)] for n in range(nodes)]
    return {
        "x": torch.from_numpy(np.array(x, np.float32).transpose(2, 0, 1).copy()),
        "mask": torch.from_numpy(np.isfinite(scaled[origin - m.history : origin])),
        "y": torch.from_numpy(np.nan_to_num(y[:, :own])),
        "y_mask": torch.from_numpy(np.isfinite(y[:, :own])),
        "seasonal_x": torch.from_numpy(np.nan_to_num(seasonal_x)),
        "seasonal_x_mask": torch.from_numpy(np.isfinite(seasonal_x)),
        "seasonal": torch.from_numpy(np.nan_to_num(seasonal)),
        "seasonal_mask": torch.from_numpy(np.isfinite(seasonal)),
        "time_x": calendar[origin - m.history : origin],
        "time_y": calendar[origin : origin + m.horizon],
    }


def known_edges(graph, m: Manifest, group: int, origin: int) -> list[tuple[int, int, float]]:
    """The edges of the last slice that was over at the origin: between members, one of them its own."""
    at = (m.start + m.step * origin) // SLICE * SLICE - SLICE
    names, own = m.members(group), m.groups[group]
    of_slice = [e for e in graph if e[0] == at and (e[1] in own or e[2] in own)]
    inside = [e for e in of_slice if e[1] in names and e[2] in names]
    weights: dict[tuple[int, int], float] = {}
    for _, source, target, weight in inside:
        pair = (names.index(source), names.index(target))
        weights[pair] = weights.get(pair, 0) + weight
    return sorted((*pair, weight) for pair, weight in weights.items())


def window_edges(batch: Batch, b: int) -> list[tuple[int, int, float]]:
    nodes = batch.x.shape[2]
    return sorted(
        (source - b * nodes, target - b * nodes, weight)
        for source, target, weight in zip(
            *batch.edges.index.tolist(), batch.edges.weight.tolist(), strict=True
        )
        if source // nodes == b
    )


def origins(m: Manifest, index: int) -> np.ndarray:
    """Every origin of a shard: of all parts, between parts, and the forecast's."""
    shard = m.shards[index]
    return np.arange(max(m.history, shard.start), shard.stop)


# -- bit for bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [STEPS, 23, 7], ids="shards of {} steps".format)
@pytest.mark.parametrize("lags, max_gap", [((), 3), ((4,), 3), ((4, 20), 3), ((4,), 0), ((4,), 9)])
@pytest.mark.parametrize("borders", [None, BORDERS], ids=["no border", "borders"])
def test_a_windowed_batch_equals_the_materialised_one(dataset, width, lags, max_gap, borders):
    values = telemetry()
    store, m = dataset(values, groups=GROUPS, borders=borders, width=width, lags=lags, max_gap=max_gap)
    seen = []
    for index, shard in enumerate(m.shards):
        at = origins(m, index)
        if not len(at):
            continue
        batch = OpenShard.read(store, m, shard).batch(at)
        for b, origin in enumerate(at):
            for name, expected in materialise(values, m, shard.group, origin).items():
                assert torch.equal(getattr(batch, name)[b], expected), f"{name}, origin {origin}"
            seen.append((shard.group, int(origin)))
        assert batch.origins.tolist() == at.tolist()
    assert sorted(seen) == [(g, t) for g in range(2) for t in range(m.history, STEPS + 1)]


@pytest.mark.parametrize("width", [STEPS, 7], ids="shards of {} steps".format)
@pytest.mark.parametrize(
    "short",
    [{}, {"history": 1, "lags": (), "max_gap": 0}, {"borders": BORDERS}],
    ids=["", "look-back of 1", "borders"],
)
def test_edges_are_those_of_the_last_slice_that_is_over(dataset, width, short):
    graph = edges(START, START + 900 * STEPS)
    store, m = dataset(telemetry(), graph, groups=GROUPS, width=width, **short)
    found = 0
    for index, shard in enumerate(m.shards):
        at = origins(m, index)
        if not len(at):
            continue
        batch = OpenShard.read(store, m, shard).batch(at)
        for b, origin in enumerate(at):
            assert window_edges(batch, b) == known_edges(graph, m, shard.group, origin), f"origin {origin}"
        found += len(batch.edges.weight)
    assert found > STEPS


def test_order_and_company_of_the_windows_in_a_batch_do_not_matter(dataset):
    graph = edges(START, START + 900 * STEPS)
    store, m = dataset(telemetry(), graph)
    shard = OpenShard.read(store, m, m.shards[0])
    together = shard.batch(np.array([40, 12, 33, 12]))
    for b, origin in enumerate([40, 12, 33, 12]):
        alone = shard.batch(np.array([origin]))
        for field in dataclasses.fields(Batch):
            if field.name not in ("edges", "nodes"):
                assert torch.equal(getattr(together, field.name)[b], getattr(alone, field.name)[0])
        assert window_edges(together, b) == window_edges(alone, 0)


def test_a_shorter_look_back_is_the_end_of_the_longer_one(dataset):
    store, m = dataset(telemetry())
    shard = OpenShard.read(store, m, m.shards[0])
    long, short = shard.batch(np.array([21, 27])), shard.batch(np.array([21, 27]), history=2)
    for name in ("x", "mask", "time_x"):
        assert torch.equal(getattr(short, name), getattr(long, name)[:, -2:])
    assert torch.equal(short.y, long.y)


# -- no leaks ----------------------------------------------------------------------------------------------


def test_nothing_at_or_after_the_origin_reaches_a_window(dataset):
    steps, scaler = 40, Scaler(mean=(5, 4), std=(2, 3))
    values = telemetry(steps)
    store, m = dataset(values, graph := edges(START, START + 900 * steps))
    truth = OpenShard.read(store, m, m.shards[0], scaler)
    for origin in range(m.history, steps + 1):
        now = m.start + m.step * origin
        other = values.copy()
        other[origin:] = telemetry(steps, seed=origin)[origin:] + 1  # other gaps, too
        future = [e for e in edges(now - SLICE, now + 9 * SLICE, seed=origin) if e[0] + SLICE > now]
        store, n = dataset(other, [*(e for e in graph if e[0] + SLICE <= now), *future])
        expected = truth.batch(np.array([origin]))
        given = OpenShard.read(store, n, n.shards[0], scaler).batch(np.array([origin]))
        known = {f.name for f in dataclasses.fields(Batch)} - {"y", "y_mask", "edges", "nodes", "origins"}
        for name in known:
            assert torch.equal(getattr(given, name), getattr(expected, name)), f"{name}, origin {origin}"
        assert torch.equal(given.edges.index, expected.edges.index), f"edges, origin {origin}"
        assert torch.equal(given.edges.weight, expected.edges.weight), f"edges, origin {origin}"


# -- gaps --------------------------------------------------------------------------------------------------

NAN = float("nan")


def test_gaps_up_to_max_gap_become_straight_lines_and_longer_ones_stay_missing():
    values = np.float32([NAN, 1, NAN, NAN, 4, NAN, NAN, NAN, 8, NAN])
    assert interpolate(values, 2) == pytest.approx([NAN, 1, 2, 3, 4, NAN, NAN, NAN, 8, NAN], nan_ok=True)
    assert interpolate(values, 3) == pytest.approx([NAN, 1, 2, 3, 4, 5, 6, 7, 8, NAN], nan_ok=True)
    assert interpolate(values, 0) == pytest.approx(values, nan_ok=True)


def one_entity(dataset, column: list[float], **options) -> OpenShard:
    """The shard of one entity with one metric, whose values are not scaled."""
    store, m = dataset(np.float32(column)[:, None, None], metrics=("cpu",), lags=(4,), **options)
    return OpenShard.read(store, m, m.shards[0], Scaler(mean=(0,), std=(1,)))


def test_the_mask_remembers_what_was_observed(dataset):
    shard = one_entity(dataset, [1, 2, NAN, 4, 0, NAN, NAN, 6, *range(8, 50)])
    batch = shard.batch(np.array([8]))
    assert batch.x[0, :, 0, 0].tolist() == [3, 4, 0, 2, 4, 6]
    assert batch.mask[0, :, 0, 0].tolist() == [False, True, True, False, False, True]


def test_an_open_gap_holds_the_last_value_while_it_may_still_be_short(dataset):
    """max_gap is 3: at origin 13 the gap is 3 steps long, at 14 too long to be filled, however it ends."""
    shard = one_entity(dataset, [*range(1, 11), *[NAN] * 7, *range(18, 61)])
    batch = shard.batch(np.array([11, 12, 13, 14, 17, 18]))
    assert batch.x[:, :, 0, 0].tolist() == [
        [6, 7, 8, 9, 10, 10],
        [7, 8, 9, 10, 10, 10],
        [8, 9, 10, 10, 10, 10],
        [9, 10, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 18],
    ]
    assert batch.mask.sum((1, 2, 3)).tolist() == [5, 4, 3, 2, 0, 1]


def test_a_gap_open_at_the_origin_is_not_bent_towards_its_end(dataset):
    shard = one_entity(dataset, [*range(1, 11), NAN, NAN, 100, *range(14, 61)])
    assert shard.batch(np.array([12])).x[0, -3:, 0, 0].tolist() == [10, 10, 10]
    assert shard.batch(np.array([13])).x[0, -4:, 0, 0].tolist() == [10, 40, 70, 100]


def test_an_entity_never_observed_is_all_zeros_and_counts_nowhere(dataset):
    store, m = dataset(telemetry())
    batch = OpenShard.read(store, m, m.shards[0]).batch(origins(m, 0))
    for values in (batch.x, batch.y, batch.seasonal_x, batch.seasonal):
        assert not values[:, :, 3].any()
    for mask in (batch.mask, batch.y_mask, batch.seasonal_x_mask, batch.seasonal_mask):
        assert not mask[:, :, 3].any()


def test_what_is_not_a_number_counts_as_missing(dataset):
    values = telemetry()
    values[25, 2, 0] = np.inf
    store, m = dataset(values)
    batch = OpenShard.read(store, m, m.shards[0]).batch(np.array([26, 24]))
    assert not batch.mask[0, -1, 2, 0]
    assert not batch.y_mask[1, 1, 2, 0]
    assert all(torch.isfinite(part).all() for part in (batch.x, batch.y, batch.seasonal))


# -- the forecast's window, and memory ---------------------------------------------------------------------


def test_the_last_shard_of_each_group_holds_the_forecast_and_it_has_no_targets(dataset):
    store, m = dataset(telemetry(), groups=GROUPS, width=23)
    last = [shard for shard in m.shards if shard.stop > STEPS]
    assert sorted(shard.group for shard in last) == [0, 1]
    for shard in last:
        batch = OpenShard.read(store, m, shard).batch(np.array([STEPS]))
        assert not batch.y_mask.any()
        assert not batch.y.any()
        assert all(STEPS not in m.origins(shard, part) for part in PARTS)


def test_an_open_shard_does_not_grow_with_the_look_back(dataset):
    store, m = dataset(telemetry(), history=4)
    held = {
        history: OpenShard.read(store, m.model_copy(update={"history": history}), m.shards[0]).nbytes
        for history in (4, 8, 32)
    }
    assert len(set(held.values())) == 1
    cells = STEPS * ENTITIES * 2
    calendar = (STEPS + m.horizon) * 6 * 4
    assert held[4] == cells * (4 + 4 + 4 + 1) + calendar  # scaled, filled, steps since observed; mask


def test_a_shard_without_gaps_is_held_once(dataset):
    store, m = dataset(np.ones((STEPS, ENTITIES, 2), np.float32))
    calendar = (STEPS + m.horizon) * 6 * 4
    assert OpenShard.read(store, m, m.shards[0]).nbytes == STEPS * ENTITIES * 2 * (4 + 1) + calendar
