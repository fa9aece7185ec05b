"""The backtest job: from a table to the report; resumed, rerun, spread, and as a command."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
from fleetcast import runtime
from fleetcast.backtesting import trial
from fleetcast.backtesting.options import BacktestOptions
from fleetcast.backtesting.run import backtest
from fleetcast.errors import InputError
from fleetcast.evaluation.naive import LAST_VALUE, LAST_WEEK, WEEKLY_MAXIMUM, YESTERDAY
from fleetcast.models.mlp import Mlp
from fleetcast.store import MANIFEST, Store
from fleetcast.windows import manifest as manifests
from small_table import quick, table

JOB = Path(__file__).parents[2] / "jobs" / "backtest.py"
NAIVE = {LAST_VALUE, YESTERDAY, LAST_WEEK, WEEKLY_MAXIMUM}
#: The second of these diverges.
RATES = (1e-2, 1e9)

Ladder = list[dict[str, Any]]


class Made(NamedTuple):
    """A finished backtest of a table that only its columns are known of."""

    store: Store
    table: str
    options: BacktestOptions
    figures: dict[str, Any]

    @property
    def ladder(self) -> Ladder:
        return self.figures["ladder"]["default"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, in_process) -> Made:
    folder = tmp_path_factory.mktemp("made")
    options = quick(table(folder), learning_rates=RATES)
    store = Store(str(folder / "store"))
    return Made(store, options.tabular.table, options, backtest(store, options))


def manifest_times(store: Store) -> dict[str, int]:
    """Every finished trial, and when it was finished [ns]."""
    found = store.list("backtests/trials", MANIFEST)
    return {path: Path(store.path(path)).stat().st_mtime_ns for path in found}


# -- the report --------------------------------------------------------------------------------------------


def test_a_table_of_which_only_the_columns_are_known_gives_the_whole_ladder(made):
    data = manifests.load(Store(f"{made.store.uri}/data/default"), "default")
    assert (data.entities, data.steps, data.step) == (3, 300, 3600)
    assert (data.history, data.horizon, data.lags) == (12, 12, (24, 168))
    assert {place["rung"] for place in made.ladder} == {*NAIVE, "ridge", "mlp", "dlinear"}
    errors = [place["scaled_mae"] for place in made.ladder]
    assert errors == sorted(errors)
    assert made.ladder[0]["rung"] == "ridge", "of two epochs the others learn little"
    assert made.figures["trials"] == 1 + 1 + 2 * 2, "naive, ridge, and two seeds of the others"


def test_report_table_and_options_agree(made):
    results = Store(f"{made.store.uri}/backtests")
    html, text = (results.read_bytes(f"default/report.{kind}").decode() for kind in ("html", "md"))
    assert made.figures["report"] == f"{results.uri}/default/report.html"
    rows = pl.from_arrow(results.read_table("default/ladder.parquet"))
    assert isinstance(rows, pl.DataFrame)
    assert set(rows["rung"]) == {place["rung"] for place in made.ladder}
    assert rows.group_by("rung").len().filter(pl.col("len") == 2)["rung"].sort().to_list() == [
        "dlinear",
        "mlp",
    ]
    for place in made.ladder:
        assert place["rung"] in html
        assert place["rung"] in text
        mean = rows.filter(pl.col("rung") == place["rung"])["scaled_mae"].mean()
        assert mean == pytest.approx(place["scaled_mae"])
    saved = results.read_json("default/options.json")
    assert BacktestOptions(**saved) == made.options
    assert BacktestOptions(**saved).shard.model_dump() == {}, "what was taken from the table is again"


def test_the_report_says_what_was_searched(made):
    text = made.store.read_bytes("backtests/default/report.md").decode()
    assert "at most 2 epochs of at most 3 steps of 8 windows" in text
    assert "the best of 0.01, 1e+09 on the validation part after 1 epoch with seed 0" in text
    assert "Fitted at once, without epochs and seeds: ridge;" in text


# -- the search and divergence -----------------------------------------------------------------------------


def test_a_learning_rate_that_diverges_is_named_and_the_other_one_taken(made):
    stopped = {one["model"]: one["reason"] for one in made.figures["stopped"]}
    assert stopped.keys() == {"mlp", "dlinear"}
    for reason in stopped.values():
        assert reason.startswith("learning rate 1e+09: DivergedError: epoch 1, step ")
    for path in made.store.list("backtests/trials", MANIFEST):
        manifest = made.store.read_json(path)
        assert manifest["trial"]["fit"]["learning_rate"] == 1e-2
        assert {"command", "commit", "versions"} <= manifest.keys()


def test_the_search_takes_the_rate_with_the_lowest_validation_loss(made, tmp_path, tasks, monkeypatch):
    losses = {1e-3: 0.5, 2e-3: 0.3, 4e-3: 0.4}

    def search(data, one) -> float:
        assert (one.fit.epochs, one.fit.seed) == (1, 0), "the same small budget for every model"
        return losses[one.fit.learning_rate]

    monkeypatch.setattr(trial, "search", search)
    options = quick(made.table, models=("mlp",), learning_rates=tuple(losses), seeds=1)
    store = Store(str(tmp_path / "store"))
    backtest(store, options)
    (path,) = store.list("backtests/trials/default/mlp", MANIFEST)
    assert store.read_json(path)["trial"]["fit"]["learning_rate"] == 2e-3
    assert tasks.done[:3] == [f"search: mlp on default, learning rate {rate:g}" for rate in losses]


def test_a_model_that_diverges_is_stopped_with_its_reason_and_the_others_finish(
    made, tmp_path, tasks, monkeypatch
):
    raw = Mlp.raw
    monkeypatch.setattr(Mlp, "raw", lambda self, batch: raw(self, batch) * float("nan"))
    store = Store(str(tmp_path / "store"))
    figures = backtest(store, quick(made.table, learning_rates=(1e-2,)))
    assert {place["rung"] for place in figures["ladder"]["default"]} == {*NAIVE, "ridge", "dlinear"}
    reason = "DivergedError: epoch 1, step 1: the loss is nan, expected less than 1e+04 on scaled targets"
    assert figures["stopped"] == [
        {"model": "mlp", "data": "default", "reason": f"seed {seed}: {reason}"} for seed in (0, 1)
    ]
    assert f"| mlp | default | seed 0: {reason} |" in store.read_bytes("backtests/default/report.md").decode()


def test_a_seed_that_fails_leaves_the_rung_with_the_others(made, tmp_path, tasks, monkeypatch):
    run = trial.run

    def fail(store, data, one, *rest) -> None:
        if one.rung.name == "mlp" and one.fit.seed == 0:
            raise InputError("no room")
        run(store, data, one, *rest)

    monkeypatch.setattr(trial, "run", fail)
    store = Store(str(tmp_path / "store"))
    figures = backtest(store, quick(made.table, learning_rates=(1e-2,)))
    assert [one["reason"] for one in figures["stopped"]] == ["seed 0: InputError: no room"]
    rows = pl.from_arrow(store.read_table("backtests/default/ladder.parquet"))
    assert rows.filter(pl.col("rung") == "mlp")["seed"].to_list() == [1]


def test_where_nothing_comes_to_its_end_the_job_fails_with_the_reasons(made, tmp_path, tasks, monkeypatch):
    def fail(*_) -> None:
        raise InputError("no room")

    monkeypatch.setattr(trial, "run", fail)
    with pytest.raises(InputError, match=r"no trial came to its end: naive on default: seed 0: .*no room"):
        backtest(Store(str(tmp_path / "store")), quick(made.table, models=()))


# -- again -------------------------------------------------------------------------------------------------


def test_the_same_command_again_runs_nothing(made, tasks):
    before = manifest_times(made.store)
    again = backtest(made.store, made.options)
    assert tasks.done == [f"search: {m} on default, learning rate 1e+09" for m in ("mlp", "dlinear")], (
        "what failed is tried again"
    )
    assert manifest_times(made.store) == before
    assert again == made.figures


def test_another_seed_costs_only_itself(made, tasks):
    before = manifest_times(made.store)
    figures = backtest(made.store, made.options.model_copy(update={"seeds": 3, "name": "three"}))
    assert [done for done in tasks.done if done.startswith("trial")] == [
        "trial: mlp on default, seed 2",
        "trial: dlinear on default, seed 2",
    ]
    assert before.items() < manifest_times(made.store).items()
    assert figures["trials"] == 8


@pytest.mark.parametrize("dies_after", [3, 7])
def test_an_interrupted_backtest_goes_on_with_what_is_left(made, tmp_path, tasks, dies_after):
    """There are four tries of the search, of which two diverge, and six trials."""
    store = Store(str(tmp_path / "store"))
    tasks.dies_after = dies_after
    with pytest.raises(KeyboardInterrupt):
        backtest(store, made.options)
    finished, first = manifest_times(store), list(tasks.done)
    assert len(finished) == max(0, dies_after - 4)
    assert not store.exists("backtests/default")

    tasks.done.clear()
    tasks.dies_after = None
    figures = backtest(store, made.options)
    repeated = set(first) & set(tasks.done)
    assert all("1e+09" in one for one in repeated), "only what failed is tried again"
    assert len(set(first) | set(tasks.done)) == 4 + 6
    assert finished.items() <= manifest_times(store).items()
    assert figures["ladder"] == made.figures["ladder"]


# -- one trial again ---------------------------------------------------------------------------------------


def rerun(store: Store, folder: str) -> dict[str, Any]:
    """With nothing but the trial's folder, as the manifest is enough."""
    return backtest(store, BacktestOptions(rerun=folder))


@pytest.mark.parametrize("rung", ["mlp", "ridge", "naive"])
def test_every_trial_can_be_run_again_alone_and_gives_the_same_scores(made, tasks, rung):
    path = made.store.list(f"backtests/trials/default/{rung}", MANIFEST)[0]
    folder = path.removeprefix("backtests/").removesuffix(f"/{MANIFEST}")
    before = manifest_times(made.store)
    again = rerun(made.store, folder)
    names = NAIVE if rung == "naive" else {rung}
    assert again["same_scores"] == dict.fromkeys(names, True)
    assert tasks.done == [f"trial: {folder}"]
    assert manifest_times(made.store) == before
    if rung == "ridge":
        (place,) = (place for place in made.ladder if place["rung"] == "ridge")
        assert again["scaled_mae"]["ridge"] == pytest.approx(place["scaled_mae"])


def test_scores_that_are_not_the_same_are_not_said_to_be(made, tasks, monkeypatch):
    path = made.store.list("backtests/trials/default/mlp", MANIFEST)[0]
    raw = Mlp.raw
    monkeypatch.setattr(Mlp, "raw", lambda self, batch: raw(self, batch) * 1.01)
    again = rerun(made.store, path.removeprefix("backtests/").removesuffix(f"/{MANIFEST}"))
    assert again["same_scores"] == {"mlp": False}


def test_a_trial_that_is_not_there_is_refused(made):
    with pytest.raises(InputError, match=r"--rerun trials/x: no such trial in .*; there: trials/default/"):
        rerun(made.store, "trials/x")
    with pytest.raises(InputError, match=r"no store there"):
        rerun(Store(f"{made.store.uri}-elsewhere"), "trials/x")


def test_a_trial_of_data_that_have_changed_is_refused(tmp_path, tasks):
    store = Store(str(tmp_path / "store"))
    options = quick(table(tmp_path), models=())
    backtest(store, options)
    (path,) = store.list("backtests/trials", MANIFEST)
    folder = path.removeprefix("backtests/").removesuffix(f"/{MANIFEST}")
    backtest(store, quick(table(tmp_path, seed=1), models=()))
    with pytest.raises(InputError, match=r"does not have its data set any more: default with the finger"):
        rerun(store, folder)
    assert len(store.list("backtests/trials", MANIFEST)) == 2


# -- other data sets ---------------------------------------------------------------------------------------


def test_a_table_gives_the_same_ladder_as_csv_and_as_parquet(made, tmp_path, tasks):
    store = Store(str(tmp_path / "store"))
    options = quick(table(tmp_path, "load.parquet"), learning_rates=RATES)
    assert backtest(store, options)["ladder"] == made.figures["ladder"]


def test_several_data_sets_have_a_ladder_each(made, tmp_path, tasks):
    source = {"entity": "host", "time": "when", "metrics": ["cpu"]}
    data = {
        "first": {"tabular": {"table": made.table, **source}},
        "short": {"tabular": {"table": table(tmp_path, seed=1, steps=60), **source}},
    }
    store = Store(str(tmp_path / "store"))
    figures = backtest(store, quick(data=data, models=("ridge",)))
    assert figures["ladder"].keys() == {"first", "short"}
    assert {place["rung"] for place in figures["ladder"]["short"]} == {LAST_VALUE, YESTERDAY, "ridge"} | {
        "daily maximum"
    }
    ridge = [place for place in figures["ladder"]["first"] if place["rung"] == "ridge"]
    assert ridge[0]["scaled_mae"] == next(p["scaled_mae"] for p in made.ladder if p["rung"] == "ridge")


def test_windows_of_the_store_are_tested_as_they_are(made, tmp_path, tasks):
    windows = Store(f"{made.store.uri}/data/default")
    found = backtest(windows, quick(models=("ridge",)))
    assert found["ladder"]["default"]
    with pytest.raises(InputError, match=r"--windows other: no such dataset .*; there: default"):
        backtest(windows, quick(windows=("other",)))
    with pytest.raises(InputError, match="no store there"):
        backtest(Store(str(tmp_path / "nowhere")), quick())
    assert not (tmp_path / "nowhere").exists()


def test_a_synthetic_cluster_is_written_once_and_anew_if_it_is_another(tmp_path, tasks):
    def options(seed: int) -> BacktestOptions:
        cluster = {"machines": 3, "days": 1, "sample_interval": 300, "seed": seed}
        shard = {"metrics": ["cpu"], "step": "15min", "history": "1h", "horizon": "1h"}
        return quick(data={"cluster": {"synthesize": cluster, "shard": shard}}, models=("ridge",))

    store = Store(str(tmp_path / "store"))
    first = backtest(store, options(0))
    raw = {path: store.read_bytes(path) for path in store.list("raw/cluster")}
    assert backtest(store, options(0)) == first
    other = backtest(store, options(1))
    assert other["ladder"] != first["ladder"]
    assert any(store.read_bytes(path) != content for path, content in raw.items())
    assert backtest(store, options(0))["ladder"] == first["ladder"]


# -- on Ray ------------------------------------------------------------------------------------------------


@pytest.fixture
def on_ray(ray_cluster, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr("fleetcast.backtesting.run.tasks", runtime.tasks)
    yield


def test_one_trial_at_a_time_and_two_give_the_same(made, tmp_path, tasks, on_ray):
    for most in (1, 2):
        store = Store(str(tmp_path / f"store-{most}"))
        figures = backtest(
            store, made.options.model_copy(update={"max_concurrent": most, "cpus_per_trial": 0.5})
        )
        assert figures["ladder"] == made.figures["ladder"]
        assert {one["model"] for one in figures["stopped"]} == {"mlp", "dlinear"}
        assert len(manifest_times(store)) == figures["trials"] == made.figures["trials"]
        assert manifest_times(store).keys() <= manifest_times(made.store).keys()


def command(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    given = [sys.executable, str(JOB), "--store", str(store), *arguments]
    return subprocess.run(given, capture_output=True, text=True, env=environment, timeout=300)


def test_as_a_command_it_needs_a_table_and_the_names_of_its_columns(made, tmp_path):
    source = ["--tabular.table", made.table, "--tabular.entity", "host", "--tabular.time", "when"]
    few = ["--models", "ridge", "--models", "mlp", "--seeds", "1", "--learning-rates", "0.01"]
    fit = ["--fit.epochs", "1", "--fit.steps-per-epoch", "2"]
    done = command(tmp_path / "store", *source, "--tabular.metrics", "cpu", *few, *fit)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    assert figures["ok"] is True
    assert figures["stopped"] == []
    assert {place["rung"] for place in figures["ladder"]["default"]} == {*NAIVE, "ridge", "mlp"}
    assert Path(figures["report"]).stat().st_size > 10_000
    assert "trial 3/3" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "code", "error"),
    [
        (["--tabular.metrics", "gpu"], 1, "data set default: --metrics gpu: "),
        (["--tabular.metrics", "cpu", "--tabular.time", "at"], 1, "data set default: --time at: "),
        (["--tabular.metrics", "cpu", "--models", "rige"], 2, "unknown model 'rige'"),
        (["--tabular.metrics", "cpu", "--options", '{"mlp": {"hiden": 8}}'], 2, "model mlp: option hiden: "),
        (["--tabular.metrics", "cpu", "--raw", "r"], 2, "the source: expected exactly one of "),
    ],
)
def test_what_is_wrong_is_named_and_the_command_fails(
    made, tmp_path, tasks, monkeypatch, capsys, wrong, code, error
):
    log = logging.getLogger("fleetcast")
    monkeypatch.setattr(log, "handlers", log.handlers)
    monkeypatch.setattr(log, "propagate", log.propagate)
    monkeypatch.setattr(runtime, "ray_session", lambda *_: contextlib.nullcontext())
    source = ["--tabular.table", made.table, "--tabular.entity", "host", "--tabular.time", "when"]
    monkeypatch.setattr(sys, "argv", [str(JOB), "--store", str(tmp_path / "store"), *source, *wrong])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(JOB), run_name="__main__")
    assert end.value.code == code
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ok"] is False
    assert error in last["error"]
