"""One trial: the same bits each time, chosen on the validation part, stopped where it diverges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fleetcast.backtesting import run, trial
from fleetcast.backtesting.data import Data
from fleetcast.backtesting.options import BacktestOptions
from fleetcast.backtesting.plan import Trial, rungs
from fleetcast.evaluation import backtest
from fleetcast.evaluation.naive import LAST_VALUE, YESTERDAY
from fleetcast.models import saving
from fleetcast.models.mlp import Mlp
from fleetcast.schemas import QUANTILES
from fleetcast.store import MANIFEST, Store
from fleetcast.training import loop
from fleetcast.training.loop import DivergedError
from fleetcast.training.options import FitOptions, TrainOptions
from fleetcast.training.run import train_model

STEPS, DAY = 240, 48
FIT = {"epochs": 2, "steps_per_epoch": 3, "batch_size": 8, "learning_rate": 1e-2}

#: `load(…)` → a data set of two groups.
Load = Callable[..., Data]


@pytest.fixture
def load(dataset) -> Load:
    """Three entities of a short day's cycle and noise; `test` is added to the values of the test part."""

    def make(test: float = 0, **options: Any) -> Data:
        cycle = np.sin(2 * np.pi * np.arange(STEPS) / DAY)[:, None, None]
        values = 0.5 + 0.2 * cycle + 0.05 * np.random.default_rng(0).normal(size=(STEPS, 3, 2))
        values[192:] += test
        store, manifest = dataset(
            values.astype(np.float32),
            **({"groups": [["e0", "e1"], ["e2"]], "history": 8, "lags": (DAY,), "width": 80} | options),
        )
        return Data("d", store, manifest, "")

    return make


def plan(data: Data, model: str = "mlp", fit: dict[str, Any] | None = None) -> Trial:
    (rung,) = (
        (
            rung
            for rung in rungs(BacktestOptions(models=(model,), options={"mlp": {"hidden": 8}}))
            if rung.name == model
        )
        if model != "naive"
        else rungs(BacktestOptions(models=()))
    )
    fitted = FitOptions(**FIT | (fit or {}))
    return Trial(data=data.name, data_fingerprint=data.manifest.fingerprint, rung=rung, fit=fitted)


def finish(data: Data, one: Trial, folder: str) -> dict[str, Any]:
    """Runs a trial into a folder of the data's own store; its manifest."""
    trial.run(data.store, data, one, run._thresholds(data), folder, {"command": ["here"]})
    return data.store.read_json(f"{folder}/{MANIFEST}")


def measured(data: Data, folder: str) -> dict[str, backtest.Measured]:
    with data.store.fs.open(data.store.path(f"{folder}/{trial.MEASURED}"), "rb") as file:
        return backtest.load(file, QUANTILES, data.manifest.horizon)


def states(store: Store, folder: str) -> dict[str, np.ndarray]:
    """Every array of what a trial measured."""
    with store.fs.open(store.path(f"{folder}/{trial.MEASURED}"), "rb") as file, np.load(file) as arrays:
        return dict(arrays)


# -- the same again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "ridge"])
def test_a_trial_gives_the_same_bits_twice(load, model):
    data = load()
    finish(data, plan(data, model), "one")
    torch.rand(3)  # whatever was drawn before does not matter
    finish(data, plan(data, model), "two")
    one, two = (states(data.store, folder) for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name], equal_nan=one[name].dtype.kind == "f") for name in one)
    assert data.store.read_bytes(f"one/{saving.WEIGHTS}") == data.store.read_bytes(f"two/{saving.WEIGHTS}")


def test_another_seed_gives_others(load):
    data = load()
    for seed in (0, 1):
        finish(data, plan(data, fit={"seed": seed}), str(seed))
    assert data.store.read_bytes(f"0/{saving.WEIGHTS}") != data.store.read_bytes(f"1/{saving.WEIGHTS}")


# -- what it leaves ----------------------------------------------------------------------------------------


def test_its_manifest_says_what_was_run_and_what_it_took(load):
    data = load()
    manifest = finish(data, plan(data), "done")
    assert Trial(**manifest["trial"]) == plan(data)
    assert manifest["command"] == ["here"]
    model = saving.load(data.store, "done")
    assert manifest["cost"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert manifest["cost"]["epochs"] == len(data.store.read_json("done/history.json")) == 2
    assert manifest["cost"]["forecast_ms"] > 0


def test_every_window_of_the_test_part_is_scored(load):
    data = load()
    finish(data, plan(data), "done")
    found, m = measured(data, "done")["mlp"], data.manifest
    assert sorted(found.by_origin) == list(range(m.boundaries[1], STEPS - m.horizon + 1))
    targets = 3 * m.horizon * m.windows("test")
    assert found.scores.pooled().n.sum(0).tolist() == [targets, targets]


def test_the_best_epochs_weights_are_saved_and_scored_and_not_the_last_ones(load, monkeypatch):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(loop, "validate", lambda run: next(losses))
    data = load()
    finish(data, plan(data), "done")
    ladder = {"mlp": saving.load(data.store, "done")}
    shifts = trial._shifts(trial._measure(data, ladder, "val", None, None)["mlp"])
    scored = trial._measure(data, ladder, "test", {"mlp": shifts}, None)["mlp"].scores.to_json()
    assert measured(data, "done")["mlp"].scores.to_json() == scored


def test_the_naive_rungs_are_one_trial_without_a_model(load):
    data = load()
    manifest = finish(data, plan(data, "naive"), "done")
    assert list(measured(data, "done")) == [LAST_VALUE, "same time 12 h ago", "maximum 12 h ago"]
    assert manifest["cost"] == {}
    assert YESTERDAY not in measured(data, "done")


def test_a_fitted_model_is_the_one_that_the_training_job_fits(load, ray_cluster, in_process, monkeypatch):
    monkeypatch.setattr("fleetcast.training.evaluate.spread", in_process.spread)
    data = load()
    finish(data, plan(data, "ridge"), "done")
    figures = train_model(data.store, TrainOptions(windows="test", model="ridge", batch_size=8))
    assert (figures["epochs"], figures["best_epoch"]) == (1, 1)
    ours, theirs = (saving.load(data.store, at).state_dict() for at in ("done", figures["model"]))
    assert ours["alpha"].tolist() == theirs["alpha"].tolist()
    assert ours["weight"].any()
    torch.testing.assert_close(ours, theirs)


# -- high load ---------------------------------------------------------------------------------------------


def test_high_load_is_each_entitys_own_top_of_the_training_part_group_after_group(load):
    data = load(test=10)
    found = run._thresholds(data)
    assert found.shape == (3, 2)
    train = data.store.read_table("telemetry.parquet").to_pandas()
    start = train["time"].min()
    seconds = (train["time"] - start).dt.total_seconds()
    train = train[seconds < data.manifest.boundaries[0] * data.manifest.step]
    for n, name in enumerate(data.manifest.names):
        for f, metric in enumerate(data.manifest.metrics):
            values = np.sort(train.loc[train["entity"] == name, metric].to_numpy())
            assert found[n, f] == values[math.ceil(0.95 * (len(values) - 1))]


# -- the search --------------------------------------------------------------------------------------------


def test_the_search_sees_the_validation_part_alone(load):
    plain, shifted = load(), load(test=10)
    one = plan(plain)
    losses = [trial.search(data, one) for data in (plain, shifted)]
    assert losses[0] == losses[1] == trial.fits.alone(plain, one, trial.build(plain, one))[0].best_loss
    finish(plain, one, "done")
    finish(shifted, one, "done")
    errors = [measured(data, "done")["mlp"].scores.pooled().to_json() for data in (plain, shifted)]
    assert errors[0] != errors[1]


# -- divergence --------------------------------------------------------------------------------------------


def test_a_step_too_large_stops_the_trial_with_its_reason(load):
    data = load()
    with pytest.raises(DivergedError, match=r"epoch 1, step 2: the loss is .*, expected less than 1e\+04"):
        finish(data, plan(data, fit={"learning_rate": 1e9}), "done")
    assert not data.store.exists(f"done/{MANIFEST}")


def test_a_model_that_gives_no_numbers_stops_the_trial_with_its_reason(load, monkeypatch):
    raw = Mlp.raw
    monkeypatch.setattr(Mlp, "raw", lambda self, batch: raw(self, batch) * torch.nan)
    data = load()
    with pytest.raises(DivergedError, match="epoch 1, step 1: the loss is nan"):
        finish(data, plan(data), "done")
