"""Two rungs are told apart where their paired errors differ by more than chance, and not otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation.compare import block_length, ranking, resample
from fleetcast.evaluation.metrics import ABSOLUTE, COUNT

T, H, F = 240, 3, 2
BLOCK = 12


def rung(level, noise=0.0, seed=0, shared=None):
    """By origin: the absolute errors of ten entities, `level` on average, in standard deviations."""
    errors = level + noise * np.random.default_rng(seed).normal(size=(T, H, F))
    errors = errors if shared is None else errors * shared
    sums = np.zeros((T, 5, H, F))
    sums[:, COUNT], sums[:, ABSOLUTE] = 10, 10 * errors
    return {1000 + i: sums[i] for i in range(T)}


def autocorrelated(seed, steps, overlap):
    """Errors of windows that overlap by `overlap` steps: their moving mean."""
    white = np.random.default_rng(seed).normal(size=steps + overlap - 1)
    return np.convolve(white, np.ones(overlap) / overlap, "valid")


def single(errors):
    """By origin, one metric and step."""
    sums = np.zeros((len(errors), 5, 1, 1))
    sums[:, COUNT, 0, 0], sums[:, ABSOLUTE, 0, 0] = 1, errors
    return dict(enumerate(sums))


def test_a_known_difference_is_found_with_its_size():
    found = resample({"good": [rung(0.8, 0.1)], "bad": [rung(1.0, 0.1, seed=1)]}, BLOCK)
    gap = found.compare("good", "bad")
    assert gap.verdict == "better" and found.compare("bad", "good").verdict == "worse"
    assert gap.difference == pytest.approx(-0.2, abs=0.02) and gap.low < gap.difference < gap.high < 0
    assert gap.relative == pytest.approx([x / gap.reference for x in (gap.difference, gap.low, gap.high)])


def test_the_error_is_the_mean_over_metrics_of_scaled_mae_pooled_over_origins():
    one = rung(0.5)
    one[1000] = one[1000] * 0
    one[1001] = one[1001] * 0
    one[1001][COUNT] = 30.0
    found = resample({"a": [one]}, BLOCK)
    assert found.error["a"] == pytest.approx(0.5 * (T - 2) * 10 / ((T - 2) * 10 + 30))
    unseen = {origin: sums * [1, 0] for origin, sums in rung(0.5).items()}
    assert resample({"a": [unseen]}, BLOCK).error["a"] == pytest.approx(0.5), "nothing of one metric"


def test_identical_rungs_tie():
    found = resample({"one": [rung(1, 0.3)], "same": [rung(1, 0.3)]}, BLOCK)
    gap = found.compare("one", "same")
    assert (gap.verdict, gap.low, gap.difference, gap.high) == ("tie", 0, 0, 0)


def test_pairing_finds_a_gap_that_is_small_beside_what_all_rungs_share():
    weather = np.exp(np.random.default_rng(5).normal(size=(T, 1, 1)))
    found = resample({"a": [rung(0.98, shared=weather)], "b": [rung(1, shared=weather)]}, BLOCK)
    assert found.compare("a", "b").verdict == "better"
    assert np.quantile(found.draws["a"], 0.975) > np.quantile(found.draws["b"], 0.025), (
        "unpaired they overlap"
    )


def test_seeds_that_disagree_make_a_tie():
    steady = [rung(1.0, 0.01)]
    seeds = [rung(level, 0.01) for level in (0.8, 1.1, 0.98)]
    assert resample({"a": seeds, "b": steady}, BLOCK).compare("a", "b").verdict == "tie"
    alike = [rung(0.96, 0.01, seed) for seed in range(3)]
    assert resample({"a": alike, "b": steady}, BLOCK).compare("a", "b").verdict == "better"


@pytest.mark.parametrize("overlap", [1, 12])
def test_the_interval_covers_the_true_difference_about_as_often_as_it_says(overlap):
    steps, repeats = 240, 150
    block = block_length(range(steps), overlap, step=7200)
    covered = 0
    for seed in range(repeats):
        a = single(10 + autocorrelated(2 * seed, steps, overlap))
        b = single(10 + autocorrelated(2 * seed + 1, steps, overlap))
        covered += resample({"a": [a], "b": [b]}, block).compare("a", "b").verdict == "tie"
    assert 0.90 <= covered / repeats <= 0.99


def test_neither_the_order_of_origins_nor_of_rungs_matters():
    given = {"a": [rung(1, 0.2, s) for s in range(3)], "b": [rung(0.99, 0.2, 7)]}
    shuffled = {
        name: [{o: seed[o] for o in np.random.default_rng(1).permutation(list(seed))} for seed in seeds]
        for name, seeds in reversed(given.items())
    }
    assert resample(given, BLOCK).compare("a", "b") == resample(shuffled, BLOCK).compare("a", "b")


def test_too_few_origins_for_two_blocks_prove_nothing():
    one, other = ({1000: rung(level)[1000]} for level in (0.1, 1.0))
    gap = resample({"a": [one], "b": [other]}, 1).compare("a", "b")
    assert gap.verdict == "tie" and gap.difference == pytest.approx(-0.9)


def test_blocks_last_a_day_or_two_horizons_but_leave_eight_of_them():
    assert block_length(range(5000), horizon=12, step=300) == 288
    assert block_length(range(5000), horizon=300, step=300) == 600
    assert block_length(range(800), horizon=12, step=300) == 100
    assert block_length(range(3), horizon=12, step=300) == 1


def test_other_targets_are_refused():
    less = {origin: sums * 0.5 for origin, sums in rung(1).items()}
    with pytest.raises(InputError, match="less and all did not count the same targets"):
        resample({"all": [rung(1)], "less": [less]}, BLOCK)
    later = {origin + 1: sums for origin, sums in rung(1).items()}
    with pytest.raises(InputError, match="a: expected at least one seed, all on the same origins"):
        resample({"a": [rung(1), later]}, BLOCK)
    with pytest.raises(InputError, match="a and b cover other origins"):
        resample({"b": [rung(1)], "a": [later]}, BLOCK)


def test_the_ladder_names_ranks_and_ties():
    rungs = {
        "last value": [rung(2.0, 0.1)],
        "same time last week": [rung(1.25, 0.1, 1)],
        "ridge": [rung(1.0, 0.3, 2)],
        "stgnn": [rung(1.0, 0.3, 4)],
    }
    places = {place.name: place for place in ranking(resample(rungs, BLOCK))}
    assert {name: (p.first, p.last) for name, p in places.items()} == {
        "ridge": (1, 2),
        "stgnn": (1, 2),
        "same time last week": (3, 3),
        "last value": (4, 4),
    }
    assert places["ridge"].ties == ("stgnn",) and places["last value"].ties == ()
    assert places["ridge"].skill == pytest.approx(0.2, abs=0.03)
    assert places["same time last week"].skill == 0 and places["last value"].skill < 0
    del rungs["same time last week"]
    assert {p.name: p.skill for p in ranking(resample(rungs, BLOCK))}["last value"] == 0
    del rungs["last value"]
    assert {p.skill for p in ranking(resample(rungs, BLOCK))} == {None}
