"""A dataset's manifest: the chronological split, and what is refused at the door."""

import json

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.store import Store
from fleetcast.windows import manifest
from fleetcast.windows.manifest import PARTS, ShardOptions
from pydantic import ValidationError

GROUPS = (("a", "b"), ("c",))


def test_the_split_is_chronological_and_no_target_is_in_two_parts(plan):
    m = plan(100, history=6, horizon=4)
    assert m.boundaries == (60, 80)
    targets = {
        part: {t + h for shard in m.shards for t in m.origins(shard, part) for h in range(m.horizon)}
        for part in PARTS
    }
    assert targets["train"] == set(range(6, 60))
    assert targets["val"] == set(range(60, 80))
    assert targets["test"] == set(range(80, 100))


@pytest.mark.parametrize("width", [100, 31, 3])
def test_every_window_is_in_one_shard_of_each_group_whatever_their_size(plan, width):
    m = plan(100, GROUPS, width=width)
    expected = {"train": range(6, 57), "val": range(60, 77), "test": range(80, 97)}
    for part in PARTS:
        assert m.windows(part) == len(expected[part])
        for group in range(2):
            shards = [shard for shard in m.shards if shard.group == group]
            found = np.concatenate([m.origins(shard, part) for shard in shards])
            assert found.tolist() == list(expected[part])


def test_a_window_looks_back_as_far_as_its_longest_lag_or_the_gap_before_its_look_back(plan):
    assert plan(100, history=6, lags=(), max_gap=3).context == 9
    assert plan(100, history=6, lags=(1, 2), max_gap=3).context == 9
    assert plan(100, history=6, lags=(4, 20), max_gap=3).context == 26


@pytest.mark.parametrize(
    "steps, shares, history, said",
    [
        (16, (0.6, 0.2, 0.2), 7, "of 16 steps the train part leaves 3"),
        (5, (0.6, 0.2, 0.2), 7, "of 5 steps the train part leaves 0"),
        (18, (0.65, 0.15, 0.2), 6, "of 18 steps the val part leaves 3"),
        (19, (0.6, 0.25, 0.15), 6, "of 19 steps the test part leaves 3"),
    ],
)
def test_a_part_without_a_whole_window_is_refused(steps, shares, history, said):
    with pytest.raises(InputError, match=f"{said} for targets, expected at least the horizon of 4"):
        manifest.boundaries(steps, shares, history, horizon=4)


def test_the_shortest_split_that_holds_a_window_in_every_part_is_taken():
    assert manifest.boundaries(20, (0.6, 0.2, 0.2), history=8, horizon=4) == (12, 16)


def test_a_dataset_that_is_not_there_is_an_error_that_names_it_and_what_there_is(dataset, tmp_path):
    store, _ = dataset(np.ones((60, 2, 2), np.float32))
    with pytest.raises(InputError, match=r"--windows tset: no such dataset .*; there: test$"):
        manifest.load(store, "tset")
    with pytest.raises(InputError, match="there: none"):
        manifest.load(Store(str(tmp_path / "empty")), "tset")


def test_a_dataset_of_another_format_is_refused(dataset):
    store, m = dataset(np.ones((60, 2, 2), np.float32))
    assert manifest.load(store, "test") == m
    old = json.loads(store.read_bytes("windows/test/manifest.json")) | {
        "format": 0,
        "created_by": "fleetcast 0.0",
    }
    store.write_json("windows/test/manifest.json", old)
    with pytest.raises(
        InputError, match=r"windows/test: written in format 0 by 'fleetcast 0\.0'.*expects format 3"
    ):
        manifest.load(store, "test")


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"step": "0s"}, "step"),
        ({"max_gap": "-1h"}, "max_gap"),
        ({"history": "100min"}, r"history \(6000 s\) must be a positive multiple of step \(900 s\)"),
        ({"horizon": 0}, "horizon"),
        ({"lags": ("1000s",)}, r"lag \(1000 s\) must be a multiple"),
        ({"split": (0.5, 0.5, 0.5)}, "three positive shares that sum to 1"),
        ({"split": (1, 0, 0)}, "three positive shares that sum to 1"),
        ({"metrics": ("cpu", "cpu")}, "each once"),
        ({"metrics": ()}, "at least one metric"),
        ({"windows": "../elsewhere"}, "windows"),
        (
            {"span": "2d"},
            r"span \(172800 s\) is too short: --split 0.6 0.2 0.2: of 192 steps the train part leaves 19 ",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(wrong, said):
    with pytest.raises(ValidationError, match=said):
        ShardOptions(**wrong)
