"""Live forecasts: the same as the nightly ones on the same telemetry, whoever asks at the same time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fleetcast import models
from fleetcast.errors import InputError
from fleetcast.forecasting.predict import ForecastOptions
from fleetcast.forecasting.run import forecast
from fleetcast.models.stgnn import StgnnConfig
from fleetcast.serving.live import SHARE, UNKNOWN, Answer, Asked, Live, Points
from fleetcast.serving.snapshot import Snapshot, column, newest
from fleetcast.store import Store
from fleetcast.training import run
from fleetcast.training.loop import Progress
from fleetcast.training.options import TrainOptions
from fleetcast.training.register import SELECTED
from night import DAY, METRICS

STEP = 900


@pytest.fixture(scope="module")
def fresh(night: Store) -> Live:
    return Live.load(night, "default")


@pytest.fixture
def live(fresh: Live) -> Live:
    found = Live(**{name: getattr(fresh, name) for name in _FIELDS})
    found.tracks = [track.copy() for track in fresh.tracks]
    found.unknown = {}
    return found


_FIELDS = ("data", "selected", "model", "naive", "refused", "tracks", "graphs", "kin")


def one(live: Live, *asked: Asked) -> Answer:
    found, *_ = live.forecast(asked)
    assert isinstance(found, Answer), found
    return found


def end(live: Live) -> int:
    """Unix time of the step after the newest observation."""
    return live.data.start + STEP * max(track.end for track in live.tracks)


def points(live: Live, entity: str, steps: range, cpu: float = 0.5, memory: float = 0.8) -> Points:
    """A point at the beginning of each step, counted from the end of the telemetry."""
    times = end(live) + STEP * np.array(steps)
    values = {"cpu": np.full(len(times), cpu), "memory": np.full(len(times), memory)}
    return Points(entity, times, values)


def test_on_the_same_telemetry_it_is_the_nightly_forecast(live, night):
    snapshot = Snapshot.load(night, newest(night))
    names = ("m_7", "m_1", "m_12")
    found = one(live, Asked(names))
    assert found.origin == snapshot.seconds[0]
    assert found.reasons == (None, None, None)
    for place, name in enumerate(names):
        np.testing.assert_allclose(
            found.values[place], snapshot.values[snapshot.place(name)], rtol=1e-4, atol=1e-5
        )


def test_what_was_sent_point_by_point_is_what_the_windows_have(live):
    """The last steps are taken out of the state and sent again, in no order and several points a step."""
    expected = one(live, Asked(("m_2", "m_9"))).values
    (group,) = {live._places[name][0] for name in ("m_2", "m_9")}
    track, gone = live.tracks[group], 5
    sent = track.values[-gone:].copy()
    for array, empty in ((track.values, np.nan), (track.counts, 0)):
        array[gone:] = array[:-gone].copy()
        array[:gone] = empty
    track.end -= gone
    random = np.random.default_rng(0)
    messages = []
    for place, name in enumerate(live.data.groups[group]):
        for step in range(gone):
            for offset, spread in ((0, 0.02), (400, -0.02)):
                time = np.array([live.data.start + STEP * (track.end + step) + offset])
                values = {
                    m: sent[step, place, f : f + 1].astype(float) + spread for f, m in enumerate(METRICS)
                }
                messages.append(Points(name, time, values))
    random.shuffle(messages)
    for message in messages:
        kept, rejected = live.add([message])
        assert (kept, rejected) == (int(np.isfinite([v[0] for v in message.values.values()]).sum()), {})
    np.testing.assert_allclose(one(live, Asked(("m_2", "m_9"))).values, expected, rtol=1e-3, atol=1e-4)


def test_telemetry_in_the_request_is_that_in_the_state_and_stays_in_the_request(live):
    before = one(live, Asked(("m_1",)))
    burst = points(live, "m_1", range(3), cpu=0.95)
    asked = one(live, Asked(("m_1",), (burst,)))
    assert asked.origin == before.origin + 3 * STEP
    assert asked.values[0, 0, 0, 0] > before.values[0, 0, 0, 0]
    again = one(live, Asked(("m_1",)))
    assert np.array_equal(again.values, before.values), "the state has not changed"
    live.add([burst])
    np.testing.assert_allclose(one(live, Asked(("m_1",))).values, asked.values, rtol=1e-5, atol=1e-6)


def test_an_answer_does_not_depend_on_its_batch_mates(live):
    stranger = points(live, "new", range(-DAY, 0))
    other = Points("other", stranger.times, {"cpu": np.full(DAY, 0.1)})
    asked = [
        Asked(("m_1", "m_3")),
        Asked(("m_1",), (points(live, "m_1", range(2), cpu=0.9),)),
        Asked(("new",), (stranger,)),
        Asked(("m_3", "other"), (other, points(live, "m_2", range(1), cpu=0.1))),
        Asked(("nobody",)),
        Asked(("m_12",)),
    ]
    together = live.forecast(asked)
    for found, alone in zip(together, (live.forecast([one_of])[0] for one_of in asked), strict=True):
        if isinstance(alone, InputError):
            assert str(found) == str(alone)
        else:
            assert found.reasons == alone.reasons
            np.testing.assert_allclose(found.values, alone.values, rtol=1e-4, atol=1e-5)


def test_an_unknown_entity_gets_a_wide_interval_and_the_reason(live):
    known = one(live, Asked(("m_1",)))
    history = live.tracks[0].values[-DAY:, live._places["m_1"][1]].astype(float)
    times = end(live) + STEP * np.arange(-DAY, 0)
    told = Points("new", times, {metric: history[:, f] for f, metric in enumerate(METRICS)})
    found = one(live, Asked(("new",), (told,)))
    assert found.reasons == (UNKNOWN,)
    low, high = column(0.05), column(0.95)
    widths = [(a.values[0, :, :, high] - a.values[0, :, :, low]).mean() for a in (found, known)]
    assert widths[0] > 1.3 * widths[1]
    assert np.isfinite(found.values).all()


def test_of_too_few_points_the_naive_forecast_is_given_with_the_reason(live):
    found = one(live, Asked(("new",), (points(live, "new", range(-2, 0)),)))
    assert found.reasons == (f"less than {SHARE:.0%} of the look-back is observed",)
    assert np.isfinite(found.values).all()
    assert (found.values >= 0).all()


@pytest.mark.parametrize("steps", [range(-40, -20), range(-3, 0), range(1)])
def test_gaps_are_allowed_anywhere(live, steps):
    told = points(live, "m_5", steps)
    told.values["cpu"][:] = np.nan
    found = one(live, Asked(("m_5",), (told,)))
    assert np.isfinite(found.values).all()


def test_points_that_cannot_be_used_are_counted_by_reason(live):
    old = points(live, "m_1", range(-10_000, -9_998))
    late = Points("m_1", np.array([10**11]), {"cpu": np.array([0.5])})
    wrong = Points("m_1", np.array([end(live)]), {"cpu": np.array([-0.5]), "weight": np.array([1.0])})
    good = Points(
        "m_1",
        np.array([end(live)]),
        {
            "cpu": np.array(
                [
                    0.5,
                ]
            ),
            "memory": np.array([np.nan]),
        },
    )
    before = one(live, Asked(("m_2",))).origin
    kept, rejected = live.add([old, late, wrong, good])
    assert kept == 1
    assert rejected == {
        "older than what a forecast looks at": 4,
        "in the future": 1,
        "negative": 1,
        "weight is not a metric of the model": 1,
    }
    assert one(live, Asked(("m_2",))).origin == before + STEP, "a wrong clock has not moved the state on"


def test_unknown_entities_beyond_the_most_are_not_kept(live):
    live.most_unknown = 2
    kept, rejected = live.add([points(live, name, range(-1, 0)) for name in ("a", "b", "c")])
    assert (kept, rejected) == (4, {"too many entities that the model does not know": 2})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(("nobody",)), "entities: nobody is not known and has no telemetry"),
        (
            Asked(("m_1",), origin=0),
            "origin: 1970-01-01T00:00:00Z, expected a time within 4 steps before and 24 after",
        ),
        (
            Asked(("m_1",), (Points("m_1", np.array([1515196800]), {"x": np.array([1.0])}),)),
            "telemetry: 1 values cannot be used: x is not a metric of the model",
        ),
    ],
)
def test_what_cannot_be_answered_is_said(live, asked, message):
    (found,) = live.forecast([asked])
    assert isinstance(found, InputError)
    assert message in str(found)


def test_what_was_sent_outlives_another_model(live, fresh):
    live.add([points(live, "m_1", range(2), cpu=0.9), points(live, "stranger", range(-30, 2))])
    expected = one(live, Asked(("m_1", "stranger")))
    newer = Live(**{name: copy.deepcopy(getattr(fresh, name)) for name in _FIELDS})
    newer.take_over(live)
    found = one(newer, Asked(("m_1", "stranger")))
    assert found.origin == expected.origin
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)


# -- groups and their borders ------------------------------------------------------------------------------


@pytest.fixture
def served(dataset, monkeypatch, ray_cluster):
    """`served(values)`: four entities in two groups: e2 sends its load to e0, and each borders the
    other's group. An stgnn with its initial weights and its nightly forecast."""

    def untrained(store, manifest, options, geometry, digest):
        torch.manual_seed(0)
        return Progress(epoch=1, best_epoch=0), models.build("stgnn", {"hidden": 4}, geometry).state_dict(), 1

    monkeypatch.setattr(run, "fit", untrained)

    def make(values: np.ndarray) -> Store:
        edges = [(1_514_764_800 + 3600 * hour, "e2", "e0", 1.0) for hour in range(40)]
        groups = {"groups": [["e0", "e1"], ["e2", "e3"]], "borders": [["e2"], ["e0"]]}
        store, _ = dataset(values, edges, **groups, history=8, horizon=4, lags=(16,))
        run.train_model(store, TrainOptions(windows="test", stgnn=StgnnConfig(hidden=4)))
        store.write_json(SELECTED, {**store.read_json(SELECTED), "rung": "stgnn"})
        forecast(store, ForecastOptions(windows="test"))
        return store

    return make


@pytest.fixture
def noise() -> np.ndarray:
    """[T, N, F] the load of these entities."""
    return np.random.default_rng(4).uniform(0.2, 0.8, (120, 4, 2)).astype(np.float32)


@pytest.fixture
def bordered(served, noise) -> Store:
    return served(noise)


def test_a_group_with_a_border_is_forecast_as_in_the_nightly_job(bordered):
    names = ("e0", "e1", "e2", "e3")
    found = one(Live.load(bordered, "test"), Asked(names))
    snapshot = Snapshot.load(bordered, newest(bordered))
    expected = np.stack([snapshot.values[snapshot.place(name)] for name in names])
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)


def test_an_entity_that_has_just_begun_is_forecast_as_in_the_nightly_job(served, noise):
    noise[:-2, 0] = np.nan  # e0, whose neighbour is e2
    store = served(noise)
    snapshot = Snapshot.load(store, newest(store))
    live = Live.load(store, "test")
    found = one(live, Asked(("e0", "e1"))).values
    expected = np.stack([snapshot.values[snapshot.place(name)] for name in ("e0", "e1")])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    live.kin = [[[] for _ in group] for group in live.data.groups]
    live._remembered.clear()
    alone = one(live, Asked(("e0",))).values
    assert not np.allclose(alone[0], found[0], rtol=1e-2), "nobody's past stands in for its own"


def test_what_is_sent_of_an_entity_reaches_the_groups_that_it_borders(bordered):
    live = Live.load(bordered, "test")
    now = end(live)
    before = one(live, Asked(("e0", "e3"), origin=now)).values
    burst = points(live, "e2", range(-3, 0), cpu=5.0)
    asked = one(live, Asked(("e0", "e3"), (burst,), origin=now)).values
    assert not np.array_equal(asked[0], before[0]), "e2 is on the border of e0"
    np.testing.assert_array_equal(one(live, Asked(("e0", "e3"), origin=now)).values, before)
    live.add([burst])
    sent = one(live, Asked(("e0", "e3"), origin=now)).values
    np.testing.assert_allclose(sent, asked, rtol=1e-5, atol=1e-6)
    stranger = points(live, "e1", range(-3, 0), cpu=5.0)
    alone = one(live, Asked(("e3",), (stranger,), origin=now)).values
    np.testing.assert_array_equal(alone[0], sent[1], "e1 is on no border")


def test_a_border_that_lags_behind_is_a_gap_and_one_that_is_ahead_is_not_seen(bordered):
    live = Live.load(bordered, "test")
    now = end(live)
    at_once = one(live, Asked(("e0",), origin=now)).values
    live.add([points(live, "e2", range(3), cpu=5.0)])
    np.testing.assert_array_equal(one(live, Asked(("e0",), origin=now)).values, at_once)
    live.add([Points("e0", np.array([now + 3 * STEP]), {"cpu": np.array([0.5])})])
    later = one(live, Asked(("e0", "e1")))
    assert later.origin == now + 4 * STEP
    assert np.isfinite(later.values).all()


def test_an_edge_between_two_groups_is_in_the_graph_once(bordered):
    snapshot = Snapshot.load(bordered, newest(bordered))
    ends = [[snapshot.entities[place] for place in pair] for pair in snapshot.past.ends.T]
    assert ends == [["e2", "e0"]]
