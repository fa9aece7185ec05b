"""The backtest job: trials as Ray tasks, then the report.

What is complete is not run again, so the same command goes on where it was stopped, and further models, seeds
or data sets cost only themselves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast.backtesting import fits, results, trial
from fleetcast.backtesting.data import Data, find, prepare
from fleetcast.backtesting.options import BacktestOptions
from fleetcast.backtesting.plan import Rung, Trial, rungs
from fleetcast.errors import InputError
from fleetcast.evaluation import peaks
from fleetcast.evaluation.ladder_report import Stopped, render
from fleetcast.provenance import provenance
from fleetcast.runtime import Failed, tasks
from fleetcast.store import MANIFEST, Store
from fleetcast.training.evaluate import scaled_mae
from fleetcast.training.options import FitOptions
from fleetcast.windows.views import read_values

log = logging.getLogger("fleetcast")

#: Folders of a backtest's trials, beside its report.
TRIALS = "trials.json"
#: Trials that an error lists.
_NAMED = 5


def backtest(store: Store, options: BacktestOptions) -> dict[str, Any]:
    """Runs all trials that are not complete; writes `backtests/<name>/report.{html,md}` and `ladder.parquet`.

    A trial that fails is named in the report with its reason; the others go on. Raises InputError if none
    came to its end.
    """
    if options.rerun is not None:
        return _rerun(store.open_existing(), options, options.rerun)
    store = store.open_or_create() if options.sources else store.open_existing()
    data = prepare(store, options)
    results_store = Store(f"{store.uri}/backtests").open_or_create()
    work = _Work(results_store, data, options, provenance())
    trials, stopped = work.search()
    stopped += work.run(trials)
    report = results.collect(results_store, work.data, trials, stopped, options)
    page = render(report).write(results_store, options.name)
    results_store.write_table(f"{options.name}/ladder.parquet", results.table(report).to_arrow())
    results_store.write_json(f"{options.name}/options.json", options.model_dump(mode="json"))
    complete = [one.folder for one in trials if results_store.exists(f"{one.folder}/{MANIFEST}")]
    results_store.write_json(f"{options.name}/{TRIALS}", complete)
    return {
        "report": page,
        "trials": len(trials),
        "stopped": [vars(one) for one in stopped],
        "ladder": results.ladder(report),
    }


def _rerun(store: Store, options: BacktestOptions, folder: str) -> dict[str, Any]:
    """Runs one trial again from its manifest, and says whether it gives the same scores."""
    results_store = Store(f"{store.uri}/backtests")
    saved = results_store.read_json(f"{folder}/{MANIFEST}")
    if saved is None:
        known = sorted({path.rsplit("/", 1)[0] for path in results_store.list("trials", MANIFEST)})
        raise InputError(
            f"--rerun {folder}: no such trial in {results_store.uri}; there: "
            f"{', '.join(known[:_NAMED]) or 'none'}" + (", …" if len(known) > _NAMED else "")
        )
    one = Trial(**saved["trial"])
    data = find(store, one.data, one.data_fingerprint)
    if data is None:
        raise InputError(
            f"--rerun {folder}: {store.uri} does not have its data set any more: {one.data} with the "
            f"fingerprint {one.data_fingerprint}"
        )
    return _Work(results_store, [data], options, provenance()).rerun(one, folder)


@dataclass(frozen=True)
class _Work:
    """The trials of a backtest and where their results go."""

    store: Store
    data: list[Data]
    options: BacktestOptions
    about: dict[str, Any]

    def search(self) -> tuple[list[Trial], list[Stopped]]:
        """All trials, each model with the learning rate that was best on the validation part.

        Tries that failed are named with their reason; a model whose every try failed has no trials.
        """
        o, ladder = self.options, rungs(self.options)
        tries = [
            _trial(data, rung, o.fit_options(rate, seed=0, epochs=min(o.search_epochs, o.fit.epochs)))
            for data in self.data
            for rung in ladder
            if not rung.once and rung.graph is None and len(o.learning_rates) > 1
            for rate in o.learning_rates
        ]
        best: dict[tuple[str, str], tuple[float, float]] = {}
        stopped = []
        for one, loss in zip(tries, self._losses(tries), strict=True):
            model, rate = (one.data, one.rung.model), one.fit.learning_rate
            if isinstance(loss, Failed):
                stopped.append(Stopped(one.rung.name, one.data, f"learning rate {rate:g}: {loss.reason}"))
            else:
                best[model] = min(best.get(model, (np.inf, 0.0)), (loss, rate))
        searched = {(one.data, one.rung.model) for one in tries}
        trials = [
            _trial(data, rung, o.fit_options(rate, seed))
            for data in self.data
            for rung in ladder
            if (model := (data.name, rung.model)) in best or model not in searched
            for rate in [best[model][1] if model in best else o.learning_rates[0]]
            for seed in range(1 if rung.once else o.seeds)
        ]
        return trials, stopped

    def _losses(self, tries: list[Trial]) -> list[float | Failed]:
        """The validation loss of each try, from the store where it is there."""

        def work(one: Trial) -> None:
            self._use_threads()
            loss = trial.search(self._named(one.data), one)
            self.store.write_json(one.search, {"loss": loss})

        todo = [one for one in tries if not self.store.exists(one.search)]
        made = self._tasks(
            todo, work, "search", lambda one: f"{_title(one)}, learning rate {one.fit.learning_rate:g}"
        )
        failed = {one.search: out for one, out in zip(todo, made, strict=True) if isinstance(out, Failed)}
        return [failed.get(one.search) or self.store.read_json(one.search)["loss"] for one in tries]

    def run(self, trials: list[Trial]) -> list[Stopped]:
        """Runs the trials that are not complete; returns those that failed."""
        todo = [one for one in trials if not self.store.exists(f"{one.folder}/{MANIFEST}")]
        log.info("backtest: %d trials, %d of them complete", len(trials), len(trials) - len(todo))
        thresholds = self._thresholds({one.data for one in todo})
        found = self._tasks(
            todo,
            lambda one: self._one(one, thresholds[one.data], one.folder),
            "trial",
            lambda one: f"{_title(one)}, seed {one.fit.seed}",
        )
        return [
            Stopped(one.rung.name, one.data, f"seed {one.fit.seed}: {outcome.reason}")
            for one, outcome in zip(todo, found, strict=True)
            if isinstance(outcome, Failed)
        ]

    def rerun(self, one: Trial, folder: str) -> dict[str, Any]:
        """Runs a trial again beside `folder`, where it is complete, and compares."""
        again = f"_work/rerun/{one.folder}"
        thresholds = self._thresholds({one.data})[one.data]
        (outcome,) = self._tasks(
            [one], lambda one: self._one(one, thresholds, again), "trial", lambda _: folder
        )
        if isinstance(outcome, Failed):
            raise InputError(f"--rerun {folder}: {outcome.reason}")
        horizon = self._named(one.data).manifest.horizon
        first, second = (results.measured(self.store, at, horizon) for at in (folder, again))
        self.store.remove(again)
        return {
            "trial": folder,
            "scaled_mae": {name: scaled_mae(found) for name, found in second.items()},
            "same_scores": {
                name: found.scores.to_json() == second[name].scores.to_json() for name, found in first.items()
            },
        }

    def _one(self, one: Trial, thresholds: NDArray[np.float32], folder: str) -> None:
        self._use_threads()
        fit = fits.by(one.workers, self.options.cpus_per_trial, self.options.gpus_per_trial)
        trial.run(self.store, self._named(one.data), one, thresholds, folder, self.about, fit)

    def _use_threads(self) -> None:
        torch.set_num_threads(max(1, int(self.options.cpus_per_trial)))

    def _named(self, name: str) -> Data:
        return next(data for data in self.data if data.name == name)

    def _thresholds(self, names: set[str]) -> dict[str, NDArray[np.float32]]:
        """Data set → [N, F] what counts as high load of each entity."""
        data = [self._named(name) for name in sorted(names)]
        found = self._tasks(data, lambda one: _thresholds(one), "high load", lambda one: one.name)
        for one, outcome in zip(data, found, strict=True):
            if isinstance(outcome, Failed):
                raise InputError(f"{one.name}: {outcome.reason}")
        return dict(zip((one.name for one in data), found, strict=True))

    def _tasks(self, items: list[Any], work: Any, what: str, name: Any) -> list[Any]:
        o = self.options
        return tasks(items, work, what, name, o.cpus_per_trial, o.gpus_per_trial, o.max_concurrent)


def _trial(data: Data, rung: Rung, fit: FitOptions) -> Trial:
    return Trial(data=data.name, data_fingerprint=data.manifest.fingerprint, rung=rung, fit=fit)


def _title(one: Trial) -> str:
    return f"{one.rung.name} on {one.data}"


def _thresholds(data: Data) -> NDArray[np.float32]:
    """[N, F] of all entities, group after group, from the training part; one group in memory at a time."""
    manifest = data.manifest
    found = []
    for _, shards in groupby(sorted(manifest.shards, key=lambda shard: shard.group), lambda one: one.group):
        stretches = []
        for shard in shards:
            stop = min(shard.stop, manifest.boundaries[0])
            if shard.start < stop:
                values = read_values(data.store, manifest, shard)
                stretches.append(values[shard.start - shard.first : stop - shard.first])
        found.append(peaks.thresholds(stretches))
    return np.concatenate(found)
