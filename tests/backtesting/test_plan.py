"""Which trials a backtest is made of, and what it refuses at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleetcast.backtesting import plan
from fleetcast.backtesting.options import BacktestOptions, SourceOptions
from fleetcast.backtesting.plan import Trial, rungs
from fleetcast.config import JobConfig, parse, read_yaml
from fleetcast.errors import InputError
from fleetcast.evaluation.papers import FUSION, STGNN
from fleetcast.ingest.sources import windows_of
from fleetcast.models import MODELS, configure
from fleetcast.training.options import FitOptions
from fleetcast.windows.manifest import ShardOptions
from pydantic import ValidationError

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLE = {"table": "t.csv", "entity": "host", "time": "when", "metrics": ("cpu",)}
HOUR = 3600


class Config(BacktestOptions, JobConfig):
    """As the job's."""


# -- rungs -------------------------------------------------------------------------------------------------


def test_the_ladder_is_the_naive_rungs_and_every_model_with_all_of_its_options():
    ladder = rungs(BacktestOptions(models=("ridge", "mlp"), options={"mlp": {"hidden": 8}}))
    assert [rung.name for rung in ladder] == ["naive", "ridge", "mlp"]
    assert ladder[2].options == configure("mlp", {"hidden": 8}).model_dump(mode="json")
    assert [rung.name for rung in rungs(BacktestOptions())] == ["naive", *MODELS]


def test_only_what_is_trained_with_chance_is_repeated():
    once = {rung.name for rung in rungs(BacktestOptions()) if rung.once}
    assert once == {"naive", "ridge", "lightgbm"}


def test_a_lift_adds_the_model_on_the_three_other_graphs():
    ladder = rungs(
        BacktestOptions(models=("stgnn", "fusion"), lift=("stgnn",), options={"stgnn": {"hidden": 4}})
    )
    variants = {rung.name: rung for rung in ladder if rung.graph is not None}
    assert {name: rung.graph for name, rung in variants.items()} == {
        "stgnn, identity graph": "identity",
        "stgnn, shuffled graph": "shuffled",
        "stgnn, learned graph": "learned",
    }
    (true,) = (rung for rung in ladder if rung.name == "stgnn")
    assert true.options["graph"] == "true"
    for rung in variants.values():
        assert rung.model == "stgnn"
        assert rung.options == true.options | {"graph": rung.graph}


def test_a_model_told_to_see_another_graph_is_that_model_and_no_variant():
    ladder = rungs(BacktestOptions(models=("stgnn",), options={"stgnn": {"graph": "identity"}}))
    assert [(rung.name, rung.graph) for rung in ladder] == [("naive", None), ("stgnn", None)]


@pytest.mark.parametrize(
    ("paper", "table", "beside"), [("fusion", FUSION, []), ("stgnn", STGNN, ["ast_gcn"])]
)
def test_a_papers_experiment_is_its_table_in_the_published_form(paper, table, beside):
    given: dict[str, Any] = {"mlp": {"hidden": 8, "residual": True}}
    ladder = rungs(BacktestOptions(paper=paper, models=("ridge",), options=given))
    assert [rung.name for rung in ladder] == ["naive", *table.rungs.values(), *beside, "ridge", "lightgbm"]
    for rung in ladder[1:]:
        assert rung.model == rung.name
        assert rung.options["residual"] is False
        assert {name: rung.options[name] for name in plan.plain(rung.name)} == plan.plain(rung.name)
        if rung.name == "mlp":
            assert rung.options["hidden"] == 8, "its size may be chosen"


# -- trials ------------------------------------------------------------------------------------------------


def trial(data: str = "d", content: str = "1", fit: dict[str, Any] | None = None, **options: Any) -> Trial:
    (_, rung) = rungs(BacktestOptions(models=("mlp",), options={"mlp": options}))
    return Trial(data=data, data_fingerprint=content, rung=rung, fit=FitOptions(**fit or {}))


def test_a_trial_has_a_folder_of_its_own_for_all_that_its_figures_depend_on():
    assert trial().folder == trial().folder
    others = [
        trial(data="e"),
        trial(content="2"),
        trial(hidden=8),
        trial(fit={"epochs": 3}),
        trial(fit={"seed": 1}),
    ]
    assert len({one.folder for one in [trial(), *others]}) == 6
    assert len({one.search for one in [trial(), *others]}) == 6
    assert trial(fit={"seed": 1}).folder.startswith("trials/d/mlp/seed-1-")


def test_a_trial_comes_back_from_its_manifest():
    assert Trial(**trial(hidden=8).model_dump(mode="json")) == trial(hidden=8)


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("rige",)}, "unknown model 'rige', expected some of ast_gcn, "),
        ({"models": ("mlp", "mlp")}, "models: mlp is there twice"),
        ({"options": {"rige": {}}}, "unknown model 'rige'"),
        ({"options": {"mlp": {"hiden": 8}}}, r"model mlp: option hiden: .*\(got 8\)"),
        ({"options": {"mlp": {"hidden": "wide"}}}, r"model mlp: option hidden: .*\(got 'wide'\)"),
        ({"learning_rates": ()}, "learning_rates\n.* at least 1 item"),
        ({"learning_rates": (1e-3, 0)}, "expected learning rates above 0"),
        ({"lift": ("mlp",)}, "lift: mlp reads no graph"),
        ({"models": ("mlp",), "lift": ("stgnn",)}, "lift: stgnn is not among the models mlp"),
        ({"lift": ("stgnn",), "options": {"stgnn": {"graph": "learned"}}}, "leave its option graph out"),
        ({"lift": ("stgnn",), "paper": "stgnn"}, "leave one of lift and paper out"),
        ({"paper": "bert"}, "'fusion' or 'stgnn'"),
        ({"tabular": TABLE, "raw": "r"}, "the source: expected exactly one .*, got tabular and raw"),
        ({"data": {"a": {}}}, "a: expected exactly one of tabular, raw and synthesize, got none"),
        ({"data": {"a/b": {"raw": "r"}}}, "data: 'a/b' cannot be a folder"),
        ({"raw": "r", "data": {"default": {"raw": "s"}}}, "names of data sets: default is there twice"),
        ({"windows": ("a",), "data": {"a": {"raw": "s"}}}, "names of data sets: a is there twice"),
        (
            {"raw": "r", "shard": {"horizon": "10min"}},
            r"--shard: horizon \(600 s\) must be a positive multiple",
        ),
    ],
)
def test_what_cannot_be_meant_is_named_before_anything_is_read(options, message):
    with pytest.raises((ValidationError, InputError), match=message):
        BacktestOptions(**options)


def test_an_option_of_the_fit_leaves_the_others_as_they_are():
    assert BacktestOptions(fit={"epochs": 5}).fit == BacktestOptions().fit.model_copy(update={"epochs": 5})
    assert parse(Config, ["--store", "s", "--fit.epochs", "5"]).fit.steps_per_epoch == 150


# -- windows of a table ------------------------------------------------------------------------------------


def windows(step: int, steps: int, tabular: dict[str, Any] | None = None, /, **shard: Any) -> ShardOptions:
    """Of a table with so many steps."""
    source = SourceOptions(tabular=TABLE | (tabular or {}), shard=shard)
    assert source.tabular is not None
    span = {"first": 1_700_000_000 // step * step, "last": (1_700_000_000 // step + steps - 1) * step}
    return windows_of(
        source.shard, source.tabular, {"settings": {"step": step}, "spans": {source.tabular.kind: span}}
    )


def test_what_is_not_given_of_a_tables_windows_is_taken_from_the_table():
    found = windows(60, 1440, {"metrics": ("cpu", "ram"), "level": "machine"})
    assert (found.level, found.metrics, found.step) == ("machine", ("cpu", "ram"), 60)
    assert (found.history, found.horizon, found.lags) == (720, 720, (86_400, 604_800))
    assert windows(300, 10_000).level == "service"
    assert windows(300, 10_000).horizon == 3600


@pytest.mark.parametrize(("steps", "width"), [(120, 12), (119, 11), (60, 6), (10, 1), (5, 1)])
def test_a_short_table_has_a_horizon_of_a_tenth(steps, width):
    found = windows(60, steps)
    assert (found.history, found.horizon) == (60 * width, 60 * width)


def test_what_is_given_wins_and_the_rest_follows_it():
    assert windows(60, 1440, step="1min", horizon="10min", history="5min").history == 300
    assert windows(60, 1440, horizon="1h").history == HOUR, "a look-back as long as the horizon"
    assert windows(60, 1440, horizon="5min").history == 720
    wider = windows(60, 14_400, step="5min", metrics=("ram",), lags=("2h",))
    assert (wider.step, wider.horizon, wider.metrics, wider.lags) == (300, HOUR, ("ram",), (7200,))
    with pytest.raises(InputError, match=r"--shard: horizon \(90 s\) must be a positive multiple of step"):
        windows(60, 1440, horizon=90)


def test_a_short_horizon_may_be_given_for_a_table_on_the_command_line():
    source = ["--tabular.table", "t.csv", "--tabular.metrics", "cpu"]
    config = parse(Config, ["--store", "s", *source, "--shard.horizon", "10min"]).only(BacktestOptions)
    assert config.shard.model_dump() == {"horizon": 600}
    with pytest.raises(InputError, match="--shard: horizon"):
        parse(Config, ["--store", "s", "--raw", "r", "--shard.horizon", "10min"])


def test_raw_files_have_the_windows_of_the_shard_job():
    source = SourceOptions(raw="r", shard={"step": "5min"})
    assert windows_of(source.shard, None, {}) == ShardOptions(step=300)


@pytest.mark.parametrize(
    ("level", "metrics"),
    [("machine", ("cpu", "memory")), ("service", ("cpu", "memory", "request_rate", "latency"))],
)
def test_a_trace_with_metrics_of_its_own_for_a_level_has_them_where_nobody_says_which(level, metrics):
    telemetry = {"settings": {"trace": "microservices-v2021"}}
    given = SourceOptions(raw="r", shard={"level": level}).shard
    assert windows_of(given, None, telemetry) == ShardOptions(level=level, metrics=metrics)
    given = SourceOptions(raw="r", shard={"level": level, "metrics": ["cpu"]}).shard
    assert windows_of(given, None, telemetry).metrics == ("cpu",)


# -- the examples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("alibaba-2018", ["--raw", "raw"]),
        ("graph-lift", []),
        ("los-loop", ["--tabular.table", "t.csv"]),
        ("los-loop-tgcn", ["--tabular.table", "t.csv"]),
        ("online-boutique-24h", ["--tabular.table", "t.csv"]),
        ("online-boutique-nezha", ["--tabular.table", "t.csv"]),
        ("production-services", ["--tabular.table", "t.csv"]),
        ("services-lift", []),
    ],
)
def test_the_examples_are_backtests(name, given):
    config = parse(Config, ["--store", "s", "--config", str(EXAMPLES / f"{name}.yaml"), *given])
    assert config.sources
    assert rungs(config)
    for source in config.sources.values():
        if source.tabular is not None:
            assert source.tabular.step is not None
            shard = windows(source.tabular.step, 10_000, **read_yaml(str(EXAMPLES / f"{name}.yaml"))["shard"])
            assert shard.windows == name
