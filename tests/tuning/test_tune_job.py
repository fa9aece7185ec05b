"""The tuning job: from a table to studies with a verdict; resumed; with one copy of the data for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.store import MANIFEST, Store
from fleetcast.tuning import run
from fleetcast.tuning.options import TuneOptions
from fleetcast.tuning.run import tune
from fleetcast.windows import order
from fleetcast.windows.loader import Shards

HOURS = 240


def options(folder: Path, entities: int = 3, **changes: Any) -> TuneOptions:
    """A study of a table of some hosts, hour by hour, whose trials take a second."""
    random = np.random.default_rng(0)
    clock = np.arange(HOURS)
    rows = pl.DataFrame(
        {
            "when": np.repeat(
                np.datetime64("2024-01-01", "ms") + clock * np.timedelta64(3600, "s"), entities
            ),
            "host": [f"h{n:02d}" for n in range(entities)] * HOURS,
            "cpu": (
                0.4
                + 0.2 * np.sin(2 * np.pi * clock / 24)[:, None]
                + 0.05 * random.normal(size=(HOURS, entities))
            ).ravel(),
        }
    )
    rows.write_parquet(folder / "load.parquet")
    given: dict[str, Any] = {
        "tabular": {
            "table": str(folder / "load.parquet"),
            "entity": "host",
            "time": "when",
            "metrics": ("cpu",),
        },
        "fit": {"epochs": 1, "steps_per_epoch": 2, "batch_size": 8},
        "seeds": 2,
        "options": {"fusion": {"hidden": 8, "direct": 8}, "stgnn": {"hidden": 8, "direct": 8}},
    }
    return TuneOptions(**(given | changes))


def finished(store: Store) -> dict[str, int]:
    """Every finished trial, and when it was finished [ns]."""
    found = store.list("backtests/trials", MANIFEST)
    return {path: Path(store.path(path)).stat().st_mtime_ns for path in found}


def test_a_study_runs_every_point_with_every_seed_and_says_what_came_out(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    figures = tune(store, options(tmp_path, grid="heads"))
    assert (figures["trials"], figures["stopped"]) == (8, {})
    assert figures["report"] == f"{store.uri}/tuning/default/report.html"
    assert figures["verdicts"]["heads"].startswith("default, attention heads: ")
    assert figures["verdicts"]["heads"] in store.read_bytes("tuning/default/report.md").decode()

    (study,) = store.read_json("tuning/default/studies.json")
    assert (study["grid"], study["model"], study["paper"]) == ("heads", "fusion", "4")
    assert list(study["values"]) == ["1", "2", "4", "8"]
    for found in study["values"].values():
        assert {figure: len(values) for figure, values in found.items()} == dict.fromkeys(
            ("mse", "mae", "mape", "rmse"), 2
        )
        assert np.square(found["rmse"]) == pytest.approx(found["mse"])
    trials = [store.read_json(path)["trial"] for path in finished(store)]
    assert sorted((one["rung"]["options"]["heads"], one["fit"]["seed"]) for one in trials) == [
        (heads, seed) for heads in (1, 2, 4, 8) for seed in (0, 1)
    ]
    assert {one["rung"]["options"]["hidden"] for one in trials} == {8}


def test_what_is_complete_is_not_run_again_and_the_figures_are_the_same(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    part = options(tmp_path, grid="heads", points=(1, 4))
    tune(store, part)
    before, first = finished(store), store.read_json("tuning/default/studies.json")
    lost = sorted(before)[0]
    store.remove(lost)  # as if it had been killed there
    tune(store, part)
    again = finished(store)
    assert again.keys() == before.keys()
    assert {path for path in again if again[path] != before[path]} == {lost}
    values = [one["values"] for one in store.read_json("tuning/default/studies.json")]
    assert values == [one["values"] for one in first], "the same bits from the same seed"


def test_points_that_the_data_do_not_allow_are_left_out_with_the_reason(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    figures = tune(store, options(tmp_path, entities=25, grid="nodes", seeds=1))
    assert figures["trials"] == 1
    (study,) = store.read_json("tuning/default/studies.json")
    assert list(study["values"]) == ["20"]
    assert study["missing"].keys() == {"40", "60", "80", "100"}
    assert "--entities 40: expected at most the 25 there are" in study["missing"]["40"]
    with pytest.raises(InputError, match=r"no trial came to its end: .*--step 300"):
        tune(store, options(tmp_path, grid="window", points=(5,)))


def test_levels_of_load_are_parts_of_the_test_of_the_same_trials(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    services = {"trace": "services", "services": 6, "days": 6, "requests": 4000}
    shard = {"windows": "small", "step": 900, "history": 3600, "horizon": 3600, "lags": (86_400,)}
    given = options(tmp_path, tabular=None, synthesize=services, shard=shard, grid="concurrency")
    figures = tune(store, given)
    assert (figures["trials"], figures["left_out"]) == (2, {}), "one for each seed"
    (study,) = store.read_json("tuning/default/studies.json")
    assert len(study["values"]) >= 3
    assert study["values"].keys() | study["missing"].keys() == {"1000", "2500", "5000", "8000", "inf"}
    assert set(study["missing"].values()) <= {"no target of the test part is of such a time"}
    for found in study["values"].values():
        assert {figure: len(values) for figure, values in found.items()} == dict.fromkeys(
            ("mae", "rmse", "r2"), 2
        )
    before = {path: store.read_bytes(path) for path in store.list("backtests/trials", "levels.json")}
    assert len(before) == 2
    tune(store, given)
    assert before == {path: store.read_bytes(path) for path in before}

    fifths = tune(store, given.model_copy(update={"levels": "quantiles"}))
    (study,) = store.read_json("tuning/default/studies.json")
    assert study["values"].keys() == {"0.2", "0.4", "0.6", "0.8", "1"}
    assert fifths["verdicts"].keys() == {"concurrency-quantiles"}
    assert store.list("backtests/trials", "levels.json") == list(before), "of the same trials"


def test_a_study_that_the_data_do_not_allow_is_named_beside_the_others(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    with pytest.raises(InputError, match="no trial came to its end: needs a metric request_rate"):
        tune(store, options(tmp_path, grid="concurrency"))
    figures = tune(store, options(tmp_path, grid="all", seeds=1))
    assert figures["verdicts"].keys() == {"layers", "heads", "sparsity", "window"}
    assert figures["left_out"].keys() == {"number of nodes", "requests per second"}
    assert figures["trials"] < 6 + 4 + 9, "a default is the same trial in every grid"
    page = store.read_bytes("tuning/default/report.md").decode()
    assert "requests per second: left out: needs a metric request_rate, the data have cpu." in page


def test_a_trial_that_diverges_is_named_and_the_others_go_on(tmp_path, ray_cluster, monkeypatch):
    store = Store(str(tmp_path / "store"))
    given = options(tmp_path, grid="heads", points=(1, 4), seeds=1)
    trials = run._trials

    def one_explodes(grid, value, data, options):
        (one,) = trials(grid, value, data, options)
        fit = one.fit.model_copy(update={"learning_rate": 1e9 if value == 1 else 1e-3, "epochs": 3})
        return [one.model_copy(update={"fit": fit})]

    monkeypatch.setattr(run, "_trials", one_explodes)
    figures = tune(store, given)
    (reason,) = figures["stopped"].values()
    assert reason.startswith("epoch 1, step ")
    (study,) = store.read_json("tuning/default/studies.json")
    assert list(study["values"]) == ["4"]
    assert study["missing"] == {"1": "none of its trials came to its end"}


@pytest.mark.slow
def test_a_trial_may_be_two_ddp_workers_which_take_the_steps_of_one_with_both_batches(tmp_path, ray_cluster):
    """Two workers with batches of 4 against one with batches of 8: what differs is which windows are met."""
    store = Store(str(tmp_path / "store"))
    two = options(
        tmp_path,
        grid="heads",
        points=(1,),
        seeds=1,
        workers_per_trial=2,
        cpus_per_trial=0.5,
        tensorboard=str(tmp_path / "curves"),
    )
    figures = tune(store, two)
    assert figures["stopped"] == {}
    (path,) = store.list("backtests/trials", MANIFEST)
    saved = store.read_json(path)
    assert saved["trial"]["workers"] == 2
    assert saved["cost"]["epochs"] == 1
    assert store.list("data/default/_work/training") == [], "its state is gone once it is done"
    before = finished(store)
    tune(store, two)
    assert finished(store) == before

    tune(store, two.model_copy(update={"workers_per_trial": 1}))
    assert len(finished(store)) == 2, "other workers are another trial"
    losses = [
        store.read_json(path.replace(MANIFEST, "history.json"))[0]["val_loss"] for path in finished(store)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    assert len(list((tmp_path / "curves" / "trials").rglob("events.*"))) == 2, "one for each trial"


def test_why_a_trial_failed_is_one_line(tmp_path, ray_cluster):
    (tmp_path / "file").write_text("no folder")
    given = options(tmp_path, grid="heads", points=(1,), seeds=1, tensorboard=str(tmp_path / "file"))
    with pytest.raises(InputError) as failure:
        tune(Store(str(tmp_path / "store")), given)
    words = str(failure.value)
    assert words.startswith("tune default: no trial came to its end: [Errno 20] Not a directory: ")
    assert "\n" not in words


def test_losses_by_epoch_are_there_for_tensorboard(tmp_path, ray_cluster):
    from tensorboardX.proto.event_pb2 import Event

    store = Store(str(tmp_path / "store"))
    fit = {"epochs": 3, "steps_per_epoch": 2, "batch_size": 8}
    given = options(tmp_path, grid="heads", points=(1,), seeds=1, fit=fit, tensorboard=str(tmp_path / "tb"))
    tune(store, given)
    (path,) = store.list("backtests/trials", MANIFEST)
    history = store.read_json(path.replace(MANIFEST, "history.json"))
    (file,) = (tmp_path / "tb").rglob("events.*")
    assert str(file.parent).endswith(path.removeprefix("backtests/").removesuffix(f"/{MANIFEST}"))
    found, data = [], file.read_bytes()
    while data:  # a record: its length, a checksum of that, itself, a checksum of it
        length = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    losses = {
        event.step: value.simple_value
        for event in found
        for value in event.summary.value
        if value.tag == "val_loss"
    }
    assert losses == pytest.approx({n: epoch["val_loss"] for n, epoch in enumerate(history, start=1)})


def test_all_trials_read_one_copy_of_the_data(dataset, ray_cluster):
    import ray

    store, m = dataset(np.random.default_rng(1).random((80, 3, 2)).astype(np.float32), width=20)

    @ray.remote
    def opened() -> Shards:
        return Shards(store, m).open_all()

    @ray.remote
    def mean(shards: Shards) -> tuple[bool, torch.Tensor]:
        index, origins = order.evaluation(m, "test", 4)[-1]
        shard = shards[index]
        return shard._scaled.numpy().flags.owndata, shard.batch(origins).x

    shared = opened.remote()
    index, origins = order.evaluation(m, "test", 4)[-1]
    expected = Shards(store, m)[index].batch(origins).x
    for owns, x in ray.get([mean.remote(shared), mean.remote(shared)]):
        assert not owns, "the array is the object store's"
        assert torch.equal(x, expected)
