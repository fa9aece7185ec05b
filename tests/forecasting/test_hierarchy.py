"""Levels that belong together: sums of the level below, and one forecast that both agree on."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from fleetcast.forecasting.hierarchy import (
    Family,
    Fit,
    Links,
    Side,
    errors,
    fit_of,
    reconcile,
    scale_of,
)
from numpy.testing import assert_allclose

PAST, HORIZON = 40, 5
CONTAINERS = tuple(f"c{n}" for n in range(6))
SERVICES, MACHINES = ("a", "b"), ("m0", "m1", "m2")
FREE = (-np.inf, np.inf)
ENTITIES = pl.DataFrame(
    {
        "entity": [*CONTAINERS, *MACHINES],
        "kind": ["container"] * 6 + ["machine"] * 3,
        "service": ["a", "a", "a", "b", "b", "b", None, None, None],
        "parent": ["m0", "m1", "m0", "m1", "m0", "m1", None, None, None],
        "cpu_capacity": [1, 2, 3, 4, 1, 2, 10, 20, 10],
    },
    schema_overrides={"cpu_capacity": pl.Float32},
)


def side(names: tuple[str, ...], seed: int, *, mean: np.ndarray | None = None, spread: float = 0.1) -> Side:
    random = np.random.default_rng(seed)
    past, own, y = (random.uniform(0.2, 0.6, (t, len(names))) for t in (PAST, HORIZON, HORIZON))
    return Side(names, past, own if mean is None else mean, np.full_like(own, spread), y)


def family(*levels: str, metric: str = "cpu", spread: float = 0.1) -> Family:
    names = {"service": SERVICES, "machine": MACHINES}
    parents = {level: names[level] for level in levels}
    sides = [side(parents[level], 10 + n, spread=spread) for n, level in enumerate(levels)]
    at = np.repeat(np.arange(len(levels)), [len(parents[level]) for level in levels])
    links = Links.of(ENTITIES, CONTAINERS, parents, metric)
    whole = sides[0] if len(sides) == 1 else sides[0] + sides[1]
    return Family(side(CONTAINERS, 1), whole, at, links)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("latency", [[1 / 3, 1 / 3, 1 / 3, 0, 0, 0], [0, 0, 0, 1 / 3, 1 / 3, 1 / 3]]),
        ("request_rate", [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]),
    ],
)
def test_a_service_is_the_mean_of_its_containers_and_its_rates_their_sum(metric: str, expected: list) -> None:
    links = family("service", metric=metric).links
    assert_allclose(links.matrix(np.ones(6, bool)).toarray(), expected)
    values = np.random.default_rng(0).uniform(size=(4, 6))
    assert_allclose(links.sums(values), values @ np.array(expected).T)


def test_containers_count_on_their_machine_by_their_share_of_its_capacity() -> None:
    links = family("machine").links
    expected = [[0.1, 0, 0.3, 0, 0.1, 0], [0, 0.1, 0, 0.2, 0, 0.1], [0] * 6]
    assert_allclose(links.matrix(np.ones(6, bool)).toarray(), expected, rtol=1e-6)


def test_a_mean_is_over_those_that_were_observed_and_unknown_where_too_few_were() -> None:
    links = family("service", metric="latency").links
    values = np.array([[1, 2, np.nan, 4, np.nan, np.nan], [1, 2, 3, 4, 5, 6]])
    assert_allclose(links.sums(values), [[1.5, np.nan], [2, 5]])


def test_services_agree_with_their_containers_exactly() -> None:
    given = family("service", metric="latency")
    found = reconcile(given, Fit(np.ones(1), 2.0, 0.5), FREE)
    assert_allclose(found.below, given.links.sums(given.children.mean))
    assert_allclose(found.parents, given.links.sums(found.children))
    assert np.abs(found.parents - found.below).max() > 0.01


def test_machines_carry_what_their_containers_do_not() -> None:
    given = family("machine")
    beside = given.parents.past - given.links.sums(given.children.past)
    found = reconcile(given, Fit(np.ones(1), 1.0, 1.0), FREE)
    expected = given.links.sums(given.children.mean) + beside.mean(0)
    assert_allclose(found.below[:, :2], expected[:, :2])
    assert np.isnan(found.below[:, 2]).all()  # nothing runs on it


@pytest.mark.parametrize("levels", [("service",), ("machine",), ("service", "machine")])
def test_it_is_the_closed_form_of_minimum_trace(levels: tuple[str, ...]) -> None:
    given = family(*levels)
    fit = Fit(np.array([1.0, 0.7])[: len(levels)], 1.5, 0.8)
    found = reconcile(given, fit, FREE)
    below = given.below(fit.scale)
    used = np.isfinite(below.mean).all(0)
    b = below.matrix.toarray()[used]
    sigma_c = fit.below * np.diag(given.children.spread[0] ** 2)
    sigma_r = fit.below * np.diag(below.noise[used])
    sigma_p = fit.above * np.diag(given.parents.spread[0, used] ** 2)
    for h in range(HORIZON):
        gap = given.parents.mean[h, used] - b @ given.children.mean[h] - below.rest[used]
        s = np.linalg.solve(b @ sigma_c @ b.T + sigma_r + sigma_p, gap)
        children = given.children.mean[h] + sigma_c @ b.T @ s
        assert_allclose(found.children[h], children, rtol=1e-6)
        assert_allclose(found.parents[h, used], b @ children + below.rest[used] + sigma_r @ s, rtol=1e-6)


def test_the_more_certain_level_moves_less() -> None:
    sure, unsure = (
        reconcile(family("service", spread=spread), Fit(np.ones(1), 1.0, 1.0), FREE) for spread in (0.001, 10)
    )
    own = family("service").parents.mean
    assert np.abs(sure.parents - own).max() < 1e-4
    assert np.abs(unsure.children - family("service").children.mean).max() < 1e-3


def test_parents_without_children_and_those_that_are_gone_stay_as_they_are() -> None:
    given = family("machine")
    mean = given.children.mean.copy()
    mean[:, [0, 2, 4]] = np.nan  # all that ran on m0
    gone = Side(CONTAINERS, given.children.past, mean, given.children.spread, given.children.y)
    found = reconcile(Family(gone, given.parents, given.level, given.links), Fit(np.ones(1), 1, 1), FREE)
    assert_allclose(found.parents[:, [0, 2]], given.parents.mean[:, [0, 2]])
    assert not np.allclose(found.parents[:, 1], given.parents.mean[:, 1])
    assert np.isnan(found.children[:, [0, 2, 4]]).all()
    assert np.isfinite(found.children[:, [1, 3, 5]]).all()


def test_nothing_leaves_its_bounds() -> None:
    given = family("service", metric="request_rate")
    found = reconcile(given, Fit(np.ones(1), 50.0, 0.01), (0.0, 1.0))
    assert found.children.min() >= 0
    assert found.parents.max() <= 1


def test_the_scale_of_machines_and_the_size_of_errors_are_fitted() -> None:
    given = family("machine")
    x = given.links.sums(given.children.past)
    noise = np.random.default_rng(2).normal(0, 0.001, x.shape)
    past = np.where(np.isfinite(x), 3 * x + 0.05 + noise, 0.5)
    children = given.children
    told = 3 * given.links.sums(children.y) + 0.05
    truth = np.where(np.isfinite(told), told, 0.5)
    parents = Side(MACHINES, past, truth + 0.2, np.full_like(truth, 0.1), truth)
    family_ = Family(children, parents, given.level, given.links)
    scale = scale_of(family_.moments(), ("machine",))
    assert scale == pytest.approx([3], rel=0.05)
    fit = fit_of(scale, errors(family_, scale))
    assert fit.above == pytest.approx(4)  # errors of 0.2 where the forecast says 0.1
    assert scale_of(family_.moments(), ("service",)) == 1


def test_a_level_that_says_nothing_of_another_does_not_change_it() -> None:
    given = family("machine")
    x = given.links.sums(given.children.past)
    against = Side(
        MACHINES, 1 - np.nan_to_num(x), *(getattr(given.parents, n) for n in ("mean", "spread", "y"))
    )
    moments = Family(given.children, against, given.level, given.links).moments()
    assert scale_of(moments, ("machine",)) == 0
    found = reconcile(given, Fit(np.zeros(1), 1.0, 1.0), FREE)
    assert_allclose(found.children, given.children.mean)
