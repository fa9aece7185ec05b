"""The training job: a model that says where it comes from, and is served only if it is better."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation.naive import DAILY_MAXIMUM, LAST_VALUE, YESTERDAY
from fleetcast.models import saving
from fleetcast.models.stgnn import StgnnConfig
from fleetcast.schemas import QUANTILES
from fleetcast.store import Store
from fleetcast.training import evaluate, run
from fleetcast.training.evaluate import scaled_mae
from fleetcast.training.options import TrainOptions
from fleetcast.training.run import train_model

FILES = {
    *("config.json", "weights.safetensors", "metrics.json"),
    *("scores.json", "calibration.json", "manifest.json"),
}
OPTIONS = TrainOptions(
    windows="test", epochs=3, patience=3, batch_size=8, steps_per_epoch=4, stgnn=StgnnConfig(hidden=4)
)


@pytest.fixture
def made(dataset):
    """Three entities in two groups, with a day's cycle and noise."""
    random = np.random.default_rng(4)
    cycle = np.sin(2 * np.pi * np.arange(220) / 96)[:, None, None]
    values = 0.5 + 0.2 * cycle + 0.05 * random.normal(size=(220, 3, 2))
    return dataset(values.astype(np.float32), groups=[["e0", "e1"], ["e2"]], history=8, lags=(96,))


def select(store: Store, model: str, errors: dict[str, float]) -> dict[str, str]:
    """What is selected where a finished model had these errors on the validation part."""
    metrics = store.read_json(f"{model}/metrics.json")
    metrics["summary"]["validation_error"] = errors
    store.write_json(f"{model}/metrics.json", metrics)
    again = train_model(store, OPTIONS)
    selected = store.read_json("models/selected.json")
    assert again["selected"] == selected["rung"]
    return selected


def test_a_trained_model_is_saved_with_its_figures_and_origin_once_and_selected_if_better(made, ray_cluster):
    store, data = made
    figures = train_model(store, OPTIONS)
    model = figures["model"]
    assert figures["skipped"] is False
    assert figures["epochs"] == 3
    assert {name.removeprefix(f"{model}/") for name in store.list(model)} == FILES, "no pickle among them"
    assert store.list("_work") == []
    assert saving.load(store, model).geometry.horizon == data.horizon

    manifest = store.read_json(f"{model}/manifest.json")
    assert manifest["data"] == data.fingerprint
    assert manifest["scaler"] == data.scaler.model_dump(mode="json")
    assert TrainOptions(**manifest["options"]) == OPTIONS
    assert {"fleetcast", "python", "torch", "ray"} <= set(manifest["versions"])

    metrics = store.read_json(f"{model}/metrics.json")
    rungs = ["stgnn", LAST_VALUE, YESTERDAY, DAILY_MAXIMUM]
    assert len(metrics["history"]) == 3
    assert all(0 < epoch["wait_share"] < 1 for epoch in metrics["history"])
    assert 0 < metrics["summary"]["wait_share"] == figures["wait_share"] < 1
    assert list(metrics["summary"]["validation_error"]) == list(figures["test_error"]) == rungs
    targets = 3 * data.horizon * data.windows("test")
    for rung, state in store.read_json(f"{model}/scores.json").items():
        assert np.sum(state["n"], axis=0).tolist() == [targets, targets], rung
    calibration = store.read_json(f"{model}/calibration.json")
    for kind in ("shifts", "total_shifts"):
        assert list(calibration[kind]) == rungs
        for shifts in calibration[kind].values():
            assert np.shape(shifts) == (data.horizon, 2, len(QUANTILES))

    before = {name: store.read_bytes(name) for name in store.list(model)}
    again = train_model(store, OPTIONS)
    assert again == {**figures, "skipped": True}
    assert {name: store.read_bytes(name) for name in store.list(model)} == before

    better = select(store, model, {"stgnn": 0.4, LAST_VALUE: 0.7, YESTERDAY: 0.5})
    assert (better["model"], better["rung"], better["naive"]) == (model, "stgnn", YESTERDAY)
    for error in (0.5, 0.6):
        worse = select(store, model, {"stgnn": error, LAST_VALUE: 0.7, YESTERDAY: 0.5})
        assert (worse["model"], worse["rung"], worse["naive"]) == (model, YESTERDAY, YESTERDAY)
        assert worse["reason"] == f"validation error {error:.4f}, same time yesterday 0.5000"


def test_two_workers_of_which_one_dies_go_on_from_their_last_epoch(made, ray_cluster, monkeypatch, tmp_path):
    store, _ = made

    def dies_once(*arguments):
        from fleetcast.training import run  # as it is on the worker

        loop = run.train

        def train(state, save) -> None:
            def save_and_die(state, figures) -> None:
                save(state, figures)
                epoch = tmp_path / f"epoch {state.progress.epoch} of rank {state.rank} in {os.getpid()}"
                epoch.touch()
                if state.progress.epoch == 2 and state.rank == 1 and not (tmp_path / "died").exists():
                    (tmp_path / "died").touch()
                    os._exit(1)

            loop(state, save_and_die)

        run.train = train
        return run._worker(*arguments)

    monkeypatch.setattr(run, "_worker", dies_once)
    figures = train_model(store, OPTIONS.model_copy(update={"workers": 2, "cpus_per_worker": 0.5}))
    assert (tmp_path / "died").exists()
    for rank in (0, 1):
        assert len(list(tmp_path.glob(f"epoch 1 of rank {rank} in *"))) == 1, (
            "the first epoch is not repeated"
        )
        assert len(list(tmp_path.glob(f"epoch 3 of rank {rank} in *"))) == 1
    assert figures["epochs"] == 3
    assert len(store.read_json(f"{figures['model']}/metrics.json")["history"]) == 3
    assert {Path(name).name for name in store.list(figures["model"])} == FILES


def test_without_windows_the_error_names_those_that_are_there(made):
    store, _ = made
    with pytest.raises(InputError, match=r"--windows other: no such dataset .*there: test"):
        train_model(store, TrainOptions(windows="other"))


def test_evaluation_in_fewer_tasks_of_more_groups_finds_the_same(made, ray_cluster, monkeypatch):
    store, data = made
    model = train_model(store, OPTIONS)["model"]
    found = []
    for most in (256, 1):
        monkeypatch.setattr(evaluate, "_MOST_TASKS", most)
        found.append(evaluate.evaluate(store, data, model, "stgnn", f"_work/{most}"))
        assert (len(store.list(f"_work/{most}", ".npz")) == 2) == (most == 1), "one of each part"
    for name, one in found[0].test.items():
        other = found[1].test[name]
        assert one.scores.n.tolist() == other.scores.n.tolist()
        np.testing.assert_allclose(scaled_mae(one), scaled_mae(other), rtol=1e-12)
        np.testing.assert_array_equal(one.entities.n, other.entities.n)
        np.testing.assert_array_equal(found[0].shifts[name], found[1].shifts[name])
