"""The backtest job: trials as Ray tasks, then the report.

What is complete is not run again, so the same command goes on where it was stopped, and further models, seeds
or data sets cost only themselves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast.backtesting import results, trial
from fleetcast.backtesting.data import Data, prepare
from fleetcast.backtesting.options import BacktestOptions
from fleetcast.backtesting.plan import Rung, Trial, rungs
from fleetcast.errors import InputError
from fleetcast.evaluation import peaks
from fleetcast.evaluation.ladder_report import Stopped, render_html, render_markdown
from fleetcast.provenance import provenance
from fleetcast.runtime import Failed, tasks
from fleetcast.store import MANIFEST, Store, fingerprint
from fleetcast.training.options import FitOptions
from fleetcast.windows.views import read_values

log = logging.getLogger("fleetcast")


def backtest(store: Store, options: BacktestOptions) -> dict[str, Any]:
    """Runs all trials that are not complete; writes `backtests/<name>/report.{html,md}` and `ladder.parquet`.

    A trial that fails is named in the report with its reason; the others go on. Raises InputError if none
    came to its end.
    """
    store.open_or_create()
    results_store = Store(f"{store.uri}/backtests").open_or_create()
    work = _Work(results_store, prepare(store, options), options, provenance())
    if options.rerun is not None:
        return work.rerun(options.rerun)
    trials, stopped = work.search()
    stopped += work.run(trials)
    report = results.collect(results_store, work.data, trials, stopped, options)
    with results_store.write(f"{options.name}/report.html") as file:
        file.write(render_html(report).encode())
    with results_store.write(f"{options.name}/report.md") as file:
        file.write(render_markdown(report).encode())
    results_store.write_table(f"{options.name}/ladder.parquet", results.table(report).to_arrow())
    results_store.write_json(f"{options.name}/options.json", options.model_dump(mode="json"))
    return {
        "report": f"{results_store.uri}/{options.name}/report.html",
        "trials": len(trials),
        "stopped": [vars(one) for one in stopped],
        "ladder": results.ladder(report),
    }


@dataclass(frozen=True)
class _Work:
    """The trials of a backtest and where their results go."""

    store: Store
    data: list[Data]
    options: BacktestOptions
    about: dict[str, Any]

    def search(self) -> tuple[list[Trial], list[Stopped]]:
        """All trials, each model with the learning rate that was best on the validation part.

        Models whose every try failed have none; they are named with their reason.
        """
        o = self.options
        tries = [
            (data, rung, o.fit.model_copy(update={"learning_rate": rate, "epochs": self._epochs, "seed": 0}))
            for data in self.data
            for rung in rungs(o)
            if not rung.once and rung.options.get("graph", "true") == "true" and len(o.learning_rates) > 1
            for rate in o.learning_rates
        ]
        losses = self._losses(tries)
        best: dict[tuple[str, str], tuple[float, float]] = {}
        reasons: dict[tuple[str, str], str] = {}
        for (data, rung, fit), loss in zip(tries, losses, strict=True):
            key = (data.name, rung.model)
            if isinstance(loss, Failed):
                reasons[key] = loss.reason
            else:
                best[key] = min(best.get(key, (np.inf, 0.0)), (loss, fit.learning_rate))
        stopped = [
            Stopped(model, name, why) for (name, model), why in reasons.items() if (name, model) not in best
        ]
        trials = []
        for data in self.data:
            for rung in rungs(o):
                if (data.name, rung.model) in reasons and (data.name, rung.model) not in best:
                    continue
                rate = best.get((data.name, rung.model), (0, o.learning_rates[0]))[1]
                for seed in range(1 if rung.once else o.seeds):
                    fit = o.fit.model_copy(update={"learning_rate": rate, "seed": seed})
                    trials.append(
                        Trial(data=data.name, data_fingerprint=data.manifest.fingerprint, rung=rung, fit=fit)
                    )
        return trials, stopped

    @property
    def _epochs(self) -> int:
        return min(self.options.search_epochs, self.options.fit.epochs)

    def _losses(self, tries: list[tuple[Data, Rung, FitOptions]]) -> list[float | Failed]:
        """The validation loss of each try, from the store where it is there."""

        def path(one: tuple[Data, Rung, FitOptions]) -> str:
            data, rung, fit = one
            key = [data.manifest.fingerprint, rung.model_dump(mode="json"), fit.model_dump(mode="json")]
            return f"search/{data.name}/{rung.model}-{fingerprint(key)}.json"

        def work(one: tuple[Data, Rung, FitOptions]) -> float:
            torch.set_num_threads(max(1, int(self.options.cpus_per_trial)))
            return trial.search(*one)

        found: list[Any] = [self.store.read_json(path(one)) for one in tries]
        todo = [i for i, saved in enumerate(found) if saved is None]
        made = self._tasks(
            [tries[i] for i in todo],
            work,
            "search",
            lambda one: f"{one[1].name} on {one[0].name}, learning rate {one[2].learning_rate:g}",
        )
        for i, loss in zip(todo, made, strict=True):
            if not isinstance(loss, Failed):
                self.store.write_json(path(tries[i]), {"loss": loss})
            found[i] = loss if isinstance(loss, Failed) else {"loss": loss}
        return [one if isinstance(one, Failed) else one["loss"] for one in found]

    def run(self, trials: list[Trial]) -> list[Stopped]:
        """Runs the trials that are not complete; returns those that failed."""
        todo = [one for one in trials if not self.store.exists(f"{one.folder}/{MANIFEST}")]
        log.info("backtest: %d trials, %d of them complete", len(trials), len(trials) - len(todo))
        thresholds = self._thresholds({one.data for one in todo})
        found = self._tasks(
            todo,
            lambda one: self._one(one, thresholds[one.data], one.folder),
            "trial",
            lambda one: f"{one.rung.name} on {one.data}, seed {one.fit.seed}",
        )
        return [
            Stopped(one.rung.name, one.data, f"seed {one.fit.seed}: {outcome.reason}")
            for one, outcome in zip(todo, found, strict=True)
            if isinstance(outcome, Failed)
        ]

    def rerun(self, folder: str) -> dict[str, Any]:
        """Runs one trial again from its manifest, and says whether it gives the same scores."""
        saved = self.store.read_json(f"{folder}/{MANIFEST}")
        if saved is None:
            known = sorted({path.rsplit("/", 1)[0] for path in self.store.list("trials", MANIFEST)})
            raise InputError(
                f"--rerun {folder}: no such trial in {self.store.uri}; there: "
                f"{', '.join(known[:5]) or 'none'}"
            )
        one = Trial(**saved["trial"])
        known_data = {data.name: data.manifest.fingerprint for data in self.data}
        if known_data.get(one.data) != one.data_fingerprint:
            raise InputError(
                f"--rerun {folder}: its data set {one.data} ({one.data_fingerprint}) is not among those "
                f"of this command: {known_data}"
            )
        again = f"_work/rerun/{one.folder}"
        thresholds = self._thresholds({one.data})[one.data]
        (outcome,) = self._tasks(
            [one], lambda one: self._one(one, thresholds, again), "trial", lambda _: folder
        )
        if isinstance(outcome, Failed):
            raise InputError(f"--rerun {folder}: {outcome.reason}")
        horizon = self._named(one.data).manifest.horizon
        first, second = (results.measured(self.store, at, horizon) for at in (folder, again))
        self.store.remove("_work/rerun")
        same = {name: first[name].scores.to_json() == second[name].scores.to_json() for name in first}
        return {"trial": folder, "same_scores": same}

    def _one(self, one: Trial, thresholds: NDArray[np.float32], folder: str) -> None:
        torch.set_num_threads(max(1, int(self.options.cpus_per_trial)))
        trial.run(self.store, self._named(one.data), one, thresholds, folder, self.about)

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


def _thresholds(data: Data) -> NDArray[np.float32]:
    """[N, F] of all entities, group after group, from the training part; one group in memory at a time."""
    manifest = data.manifest
    found = []
    for group in range(len(manifest.groups)):
        stretches = []
        for shard in manifest.shards:
            stop = min(shard.stop, manifest.boundaries[0])
            if shard.group == group and shard.start < stop:
                values = read_values(data.store, manifest, shard)
                stretches.append(values[shard.start - shard.first : stop - shard.first])
        found.append(peaks.thresholds(stretches))
    return np.concatenate(found)
