"""A search finds options on the validation part alone, goes on where it was, and what it finds is a trial."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fleetcast.backtesting.promote import PromoteOptions, promote
from fleetcast.errors import InputError
from fleetcast.evaluation.search_report import Try, render
from fleetcast.store import MANIFEST, Store
from fleetcast.tuning import search
from fleetcast.tuning.options import TuneOptions
from fleetcast.tuning.run import tune
from fleetcast.tuning.spaces import space
from pandas import DataFrame
from pydantic import ValidationError
from test_tune_job import options

FIT = {"epochs": 3, "steps_per_epoch": 2, "batch_size": 8}


def searched(folder: Path, **changes: Any) -> TuneOptions:
    given = {"search": "mlp", "trials": 3, "space": {"hidden": (4, 8)}, "fit": FIT, "options": {}, "seeds": 1}
    return options(folder, **(given | changes))


def test_a_search_takes_the_lowest_validation_loss_and_tests_that_one(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    given = searched(tmp_path, seeds=2)
    figures = tune(store, given)
    found = store.read_json("tuning/default/search.json")
    assert figures["tries"] == len(found["tries"]) == 3
    best = min(found["tries"], key=lambda one: one["loss"])
    assert figures["best"] == found["best"] == best["settings"]
    assert found["best"].keys() == {"learning_rate", "weight_decay", "hidden", "dropout"}
    assert {one["settings"]["hidden"] for one in found["tries"]} <= {4, 8}
    assert min(best["history"]) == best["loss"] == figures["validation_loss"]

    assert len(figures["trials"]) == 2
    trials = [store.read_json(f"backtests/{folder}/{MANIFEST}")["trial"] for folder in figures["trials"]]
    assert [one["fit"]["seed"] for one in trials] == [0, 1]
    for one in trials:
        assert one["rung"]["options"]["hidden"] == best["settings"]["hidden"]
        assert one["fit"]["learning_rate"] == best["settings"]["learning_rate"]
    history = store.read_json(f"backtests/{figures['trials'][0]}/history.json")
    assert min(epoch["val_loss"] for epoch in history) == pytest.approx(best["loss"]), "the same fit again"
    assert len(store.list("backtests/trials", MANIFEST)) == 2, "nothing else was tested"

    with pytest.raises(InputError, match="mlp is not selected"):
        promote(store, PromoteOptions(trial=figures["trials"][0], margin=0.99))

    again = tune(store, given)
    assert {**again, "report": None} == {**figures, "report": None}, "complete, so nothing is tried anew"
    assert store.read_json("tuning/default/search.json") == found


@pytest.mark.slow
def test_the_tries_of_a_search_may_be_ddp_runs(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    given = searched(tmp_path, trials=1, workers_per_trial=2, cpus_per_trial=0.5)
    figures = tune(store, given)
    found = store.read_json("tuning/default/search.json")
    assert (figures["tries"], figures["failed"], figures["stopped"]) == (1, [], {})
    (one,) = found["tries"]
    assert len(one["history"]) == 3
    assert one["history"] == sorted(one["history"], reverse=True), "the lowest so far"
    assert store.list("data/default/_work/training") == [], "its state is gone once it is done"
    (trial,) = figures["trials"]
    assert store.read_json(f"backtests/{trial}/{MANIFEST}")["trial"]["workers"] == 2


def test_a_search_that_was_killed_goes_on_after_the_last_epoch_of_its_tries(
    tmp_path, ray_cluster, monkeypatch
):
    store = Store(str(tmp_path / "store"))
    given = searched(tmp_path, trials=1, space={"hidden": (4,), "dropout": (0.0,), "learning_rate": (1e-3,)})
    seen = tmp_path / "seen"
    seen.mkdir()
    whole = search._try

    def dies_once(config, **arguments):
        from fleetcast.training import loop  # as it is on the worker

        validate = loop.validate

        def counted(run):
            (seen / f"epoch {run.progress.epoch + 1}").open("a").write("x")
            if run.progress.epoch == 1 and not (seen / "died").exists():
                (seen / "died").touch()
                raise RuntimeError("the power went")
            return validate(run)

        monkeypatch.undo()
        loop.validate = counted
        try:
            whole(config, **arguments)
        finally:
            loop.validate = validate

    monkeypatch.setattr(search, "_try", dies_once)
    with pytest.raises(InputError, match=r"--search mlp: no try came to its end: .*the power went"):
        tune(store, given)
    figures = tune(store, given)
    epochs = {path.name: path.read_text() for path in seen.iterdir() if path.name != "died"}
    assert epochs == {"epoch 1": "x", "epoch 2": "xx", "epoch 3": "x"}
    assert figures["tries"] == 1


def test_a_try_that_failed_before_its_first_epoch_is_read_with_its_reason():
    found = SimpleNamespace(
        error=RuntimeError("Traceback …\nout of memory"),
        metrics=None,
        config={},
        metrics_dataframe=DataFrame(),
    )
    assert search._read(found) == Try({}, float("inf"), 0, [], "out of memory")


@pytest.mark.slow
def test_population_based_training_searches_as_well(tmp_path, ray_cluster):
    store = Store(str(tmp_path / "store"))
    figures = tune(store, searched(tmp_path, scheduler="pbt", trials=2, fit=FIT | {"epochs": 4}))
    assert figures["tries"] == 2
    assert figures["best"]["hidden"] in (4, 8)


def test_the_space_is_that_of_the_model_and_what_is_given():
    found = space("stgnn", {"layers": (1, 2), "own": (True, False)})
    assert found.keys() == {
        *("learning_rate", "weight_decay", "hidden", "layers", "dropout", "direct", "own"),
    }
    assert found["layers"].categories == [1, 2]
    assert found["hidden"].categories == [24, 48, 96]
    assert found["own"].categories == [True, False]
    with pytest.raises(InputError, match=r"--space depth: is nothing of stgnn, expected some of direct, "):
        space("stgnn", {"depth": (1,)})
    with pytest.raises(InputError, match=r"--search ridge: is fitted at once"):
        space("ridge", {})
    with pytest.raises(InputError, match=r"--space hidden: .*valid integer.* \(got 'wide'\)"):
        space("mlp", {"hidden": (8, "wide")})
    assert space("fusion", {"hidden": (6,), "heads": (3,)})["heads"].categories == [3], "they go together"
    with pytest.raises(InputError, match=r"--space hidden: .*divisor of hidden \(6\) \(got 6\)"):
        space("fusion", {"hidden": (6,), "heads": (4,)})
    with pytest.raises(InputError, match=r"--space learning_rate: .*greater than 0 \(got 0\)"):
        space("mlp", {"learning_rate": (0,)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": "heads"}, "expected exactly one of grid and search"),
        ({"search": None}, "expected exactly one of grid and search"),
        ({"search": "rige"}, "Input should be 'ast_gcn'"),
        ({"trials": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_clash_are_named(tmp_path, given, message):
    with pytest.raises(ValidationError, match=message):
        searched(tmp_path, **given)


def test_the_page_ranks_the_tries_and_names_those_that_diverged():
    tries = [
        Try({"hidden": 4, "learning_rate": 0.01}, float("inf"), 1, [float("inf")]),
        Try({"hidden": 4, "learning_rate": 0.02}, float("inf"), 0, [], "out of memory"),
        Try({"hidden": 8, "learning_rate": 0.002}, 0.2, 3, [0.4, 0.3, 0.2]),
        Try({"hidden": 4, "learning_rate": 0.003}, 0.3, 2, [0.4, 0.3]),
    ]
    text = render("mlp", "lab", tries, "asha").markdown
    assert "lab: of 4 tries of mlp the best has a validation loss of 0.200: hidden 8, learning_rate" in text
    rows = [
        line.split(" | ")[1] for line in text.splitlines() if line[:4] in ("| 1 ", "| 2 ", "| 3 ", "| 4 ")
    ]
    assert rows == ["0.200", "0.300", "diverged", "failed"]
