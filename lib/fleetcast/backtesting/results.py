"""From the trials in the store to the report of a backtest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from fleetcast.backtesting.data import Data
from fleetcast.backtesting.options import BacktestOptions
from fleetcast.backtesting.plan import NAIVE, PAPERS, Trial, rungs
from fleetcast.backtesting.trial import MEASURED
from fleetcast.errors import InputError
from fleetcast.evaluation import backtest, dependencies
from fleetcast.evaluation.backtest import Measured
from fleetcast.evaluation.ladder import TRUE, Cost, DataSet, Family, GraphLift, Rung, Standing
from fleetcast.evaluation.ladder_report import LadderReport, PaperRun, Stopped
from fleetcast.evaluation.naive import duration
from fleetcast.models import MODELS
from fleetcast.schemas import QUANTILES
from fleetcast.store import MANIFEST, Store
from fleetcast.windows.graph import last_graph


def measured(store: Store, folder: str, horizon: int) -> dict[str, Measured]:
    """What a complete trial says of its rungs on the test part."""
    with store.fs.open(store.path(f"{folder}/{MEASURED}"), "rb") as file:
        return backtest.load(file, QUANTILES, horizon)


def collect(
    store: Store, data: list[Data], trials: list[Trial], stopped: list[Stopped], options: BacktestOptions
) -> LadderReport:
    """The report's contents, from the trials that are complete. Raises InputError if there is none."""
    complete = [trial for trial in trials if store.exists(f"{trial.folder}/{MANIFEST}")]
    if not complete:
        reasons = "; ".join(f"{one.model} on {one.data}: {one.reason}" for one in stopped)
        raise InputError(f"backtest {options.name}: no trial came to its end: {reasons}")
    sets = []
    lifts: list[GraphLift] = []
    for one in data:
        found = _rungs(store, one, [trial for trial in complete if trial.data == one.name])
        main = [rung for rung, graph in found if graph is None]
        graph = last_graph(one.store, one.manifest, dependencies.MOST)
        sets.append(replace(_data_set(one, main), graph=graph))
        lifts += _lifts(Standing.of(_data_set(one, [rung for rung, _ in found])), found)
    papers = [PaperRun(PAPERS[options.paper], one.name) for one in sets] if options.paper else []
    return LadderReport(
        title=_title(options),
        data=sets,
        search=_search(options),
        stopped=stopped,
        graph_lift=lifts,
        papers=papers,
    )


def _lifts(standing: Standing, found: list[tuple[Rung, str | None]]) -> list[GraphLift]:
    """Each graph model that was tried on several graphs."""
    variants: dict[str, dict[str, str]] = defaultdict(dict)
    for rung, graph in found:
        variants[rung.name.split(",")[0]][graph or TRUE] = rung.name
    return [GraphLift(model, standing, graphs) for model, graphs in variants.items() if len(graphs) > 1]


def _rungs(store: Store, data: Data, trials: list[Trial]) -> list[tuple[Rung, str | None]]:
    """The rungs of a data set, and of variants of a model on another graph, which."""
    seeds: dict[str, dict[int, Measured]] = defaultdict(dict)
    costs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    of_rung: dict[str, Trial] = {}
    for trial in trials:
        cost = store.read_json(f"{trial.folder}/{MANIFEST}")["cost"]
        for name, found in measured(store, trial.folder, data.manifest.horizon).items():
            seeds[name][trial.fit.seed] = found
            costs[name].append(cost)
            of_rung[name] = trial
    rungs = []
    for name, of_seeds in seeds.items():
        rung = Rung(name, _family(of_rung[name].rung.model), of_seeds, _mean_cost(costs[name]))
        rungs.append((rung, of_rung[name].rung.graph))
    return rungs


def _family(model: str) -> Family:
    if model == NAIVE:
        return "naive"
    if MODELS[model].fitted:
        return "statistical"
    return "graph" if "graph" in MODELS[model].model_fields else "sequence"


def _mean_cost(costs: list[dict[str, Any]]) -> Cost:
    """Of the seeds: means, and the median time of a forecast."""
    if not costs[0]:
        return Cost()
    mean = {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]}
    mean["forecast_ms"] = float(np.median([cost["forecast_ms"] for cost in costs]))
    return Cost(**{**mean, "parameters": costs[0]["parameters"]})


def _data_set(data: Data, rungs: Sequence[Rung]) -> DataSet:
    m = data.manifest
    shares = [m.bounds(part) for part in ("train", "val", "test")]
    days = [f"{(high - low) * m.step / 86_400:.1f}" for low, high in shares]
    return DataSet(
        name=data.name,
        description=data.description,
        metrics=m.metrics,
        normalised=m.normalised,
        std=np.asarray(m.scaler.std),
        mase_scale=np.asarray(m.seasonal_error),
        start=m.start,
        step=m.step,
        horizon=m.horizon,
        split=f"{days[0]} days of training, {days[1]} of validation, {days[2]} of test; look-back "
        f"{duration(m.history * m.step)}",
        entities=m.entities,
        windows=m.windows("test"),
        rungs=rungs,
    )


def _title(options: BacktestOptions) -> str:
    return f"Backtest {options.name}" + (f": Table 1 of {options.paper}" if options.paper else "")


def _search(options: BacktestOptions) -> str:
    """The budget in words."""
    fit, rates = options.fit, options.learning_rates
    steps = f"at most {fit.steps_per_epoch} steps" if fit.steps_per_epoch else "all training windows"
    fitted = [rung.name for rung in rungs(options) if rung.once and rung.model != NAIVE]
    words = (
        f"Each model trains for at most {_count(fit.epochs, 'epoch')} of {steps} of {fit.batch_size} "
        f"windows, AdamW, a cosine schedule and early stopping after {_count(fit.patience, 'epoch')} without "
        f"a better validation loss, with {_count(options.seeds, 'seed')}. "
    )
    if len(rates) > 1:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        epochs = _count(min(options.search_epochs, fit.epochs), "epoch")
        words += (
            f"Its learning rate is the best of {tried} on the validation part after {epochs} with seed 0; "
            "nothing else was searched."
        )
    else:
        words += f"The learning rate is {rates[0]:g}; nothing was searched."
    if fitted:
        words += (
            f" Fitted at once, without epochs and seeds: {', '.join(fitted)}; where one has to choose, it "
            "does so on the validation part."
        )
    return words


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def ladder(report: LadderReport) -> dict[str, list[dict[str, Any]]]:
    """Data set → its rungs, best first: error, skill, and the ranks that each may have."""
    return {
        data.name: [
            {"rung": p.name, "scaled_mae": p.error, "skill": p.skill, "rank": [p.first, p.last]}
            for p in Standing.of(data).places
        ]
        for data in report.data
    }


def table(report: LadderReport) -> pl.DataFrame:
    """One row per data set, rung, seed and metric, with every figure, for those who go on from here."""
    rows = []
    for data in report.data:
        for rung in data.rungs:
            for f, by_seed in enumerate(rung.figures(data)):
                for place, seed in enumerate(rung.seeds):
                    figures = {name: values[place] for name, values in by_seed.items()}
                    rows.append(
                        {"data": data.name, "rung": rung.name, "seed": seed, "metric": data.metrics[f]}
                        | figures
                    )
    return pl.DataFrame(rows)
