"""A backtest's winner is served only if it deserves it, forecasts as it was tested, and can be taken back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from fleetcast.backtesting.promote import PromoteOptions, promote
from fleetcast.backtesting.run import backtest
from fleetcast.errors import InputError
from fleetcast.forecasting.run import read_selected
from fleetcast.models import saving
from fleetcast.store import MANIFEST, Store
from fleetcast.training.options import TrainOptions
from fleetcast.training.register import SELECTED
from fleetcast.windows import manifest as manifests
from small_table import quick, table


@pytest.fixture(autouse=True)
def at_once(in_process, monkeypatch) -> None:
    """What evaluates a promoted model runs in this process, without Ray."""
    monkeypatch.setattr("fleetcast.training.evaluate.spread", in_process.spread)


@pytest.fixture
def made(tmp_path, tasks) -> Store:
    """The store of a finished backtest of ridge, mlp and dlinear, of which ridge is best."""
    store = Store(str(tmp_path / "store"))
    backtest(store, quick(table(tmp_path)))
    return store


def served(store: Store) -> Any:
    """What is selected in the store of the backtest's windows; None if nothing is."""
    return Store(f"{store.uri}/data/default").read_json(SELECTED)


def trials(store: Store, rung: str) -> list[str]:
    folders = store.read_json("backtests/default/trials.json")
    return [folder for folder in folders if folder.startswith(f"trials/default/{rung}/")]


def fit_better(store: Store, folder: str, losses: list[float]) -> None:
    """Makes a trial's fit have had these validation losses."""
    store.write_json(f"backtests/{folder}/history.json", [{"val_loss": loss} for loss in losses])


def test_the_winner_is_registered_as_a_trained_model_and_selected(made):
    given = promote(made, PromoteOptions(margin=0.2))
    windows = Store(given["store"])
    assert windows.uri == f"{made.uri}/data/default"
    assert [given["trial"]] == trials(made, "ridge")
    assert served(made) == {**given["selected"], "before": []}

    selected, data = read_selected(windows), manifests.load(windows, "default")
    assert (selected.name, selected.rung) == ("ridge", "ridge")
    selected.check(data)
    model, _, refused = selected.rungs(data)
    assert refused is None
    tested = saving.load(made, f"backtests/{given['trial']}")
    for (name, one), (_, other) in zip(model.state_dict().items(), tested.state_dict().items(), strict=True):
        assert torch.equal(one, other), name

    options = TrainOptions(**windows.read_json(f"{selected.folder}/{MANIFEST}")["options"])
    assert (options.model, options.windows, options.ridge) == ("ridge", "default", options.ridge)
    errors = given["validation_error"]
    naive = min(error for rung, error in errors.items() if rung != "ridge")
    assert errors["ridge"] < 0.8 * naive
    assert np.isfinite(selected.calibration["shifts"]["ridge"]).all()
    assert windows.list("_work") == []


def test_a_model_that_is_not_better_by_the_margin_is_refused_with_the_figures(made):
    promote(made, PromoteOptions(margin=0.2))
    before = json.dumps(served(made))
    with pytest.raises(
        InputError, match=r"margin 0\.9: ridge is not selected: its validation error 0\.\d+, "
    ) as no:
        promote(made, PromoteOptions(margin=0.9))
    assert "% below, expected more than 90 %" in str(no.value)
    assert json.dumps(served(made)) == before


def test_the_winner_has_the_lowest_mean_validation_loss_and_of_it_the_best_seed_is_taken(made):
    first, second = trials(made, "mlp")
    fit_better(made, first, [0.02, 0.5])
    fit_better(made, second, [0.03, 0.01])
    for folder in trials(made, "dlinear"):
        fit_better(made, folder, [0.018])
    (ridge,) = trials(made, "ridge")
    fit_better(made, ridge, [0.019])
    # Means: mlp 0.015, dlinear 0.018, ridge 0.019. It is named, whether it is good enough or not.
    with pytest.raises(InputError, match="mlp is not selected"):
        promote(made, PromoteOptions(margin=0.99))
    registered = Store(f"{made.uri}/data/default").list("models", MANIFEST)
    assert len(registered) == 1
    assert registered[0].endswith(f"-{second.rsplit('-', 1)[-1]}/{MANIFEST}")


def test_any_trial_can_be_promoted_and_rollback_returns_to_the_one_before(made):
    ridge = promote(made, PromoteOptions(margin=0))["selected"]
    trial = trials(made, "mlp")[1]
    with pytest.raises(InputError, match="mlp is not selected"):
        promote(made, PromoteOptions(trial=trial, margin=0.99))
    windows = Store(f"{made.uri}/data/default")
    mlp = {**ridge, "model": windows.list("models/mlp", MANIFEST)[0].removesuffix(f"/{MANIFEST}")}
    windows.write_json(SELECTED, {**mlp, "before": [ridge]})

    back = promote(made, PromoteOptions(rollback=True, data="default"))
    assert back["selected"] == ridge
    assert served(made) == {**ridge, "before": []}
    with pytest.raises(InputError, match=r"--rollback: .* has no selection before the present one"):
        promote(made, PromoteOptions(rollback=True, data="default"))
    assert served(made) == {**ridge, "before": []}


def test_promoting_the_same_model_again_adds_nothing_to_the_past(made):
    promote(made, PromoteOptions(margin=0))
    once = served(made)
    promote(made, PromoteOptions(margin=0))
    assert served(made) == once


def test_a_model_that_is_gone_is_not_returned_to(made):
    ridge = promote(made, PromoteOptions(margin=0))["selected"]
    windows = Store(f"{made.uri}/data/default")
    gone = {**ridge, "model": "models/mlp/gone"}
    windows.write_json(SELECTED, {**ridge, "before": [gone]})
    with pytest.raises(InputError, match="does not have models/mlp/gone any more"):
        promote(made, PromoteOptions(rollback=True, data="default"))
    assert served(made) == {**ridge, "before": [gone]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backtest": "other"}, r"--backtest other: no such backtest in .*; there: default"),
        ({"data": "other"}, r"--data: other, expected one of default's: default"),
        ({"trial": "trials/nowhere"}, r"--trial trials/nowhere: no such trial"),
        ({"rollback": True, "data": "default"}, r"--rollback: .* has no selection before the present one"),
    ],
)
def test_what_is_not_there_is_named(made, wrong, message):
    with pytest.raises(InputError, match=message):
        promote(made, PromoteOptions(**wrong))
    assert served(made) is None


def test_naive_forecasts_are_no_model_to_promote(made):
    with pytest.raises(InputError, match="is of naive forecasts, expected one of a model"):
        promote(made, PromoteOptions(trial=trials(made, "naive")[0]))
