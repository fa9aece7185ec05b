"""A search for the best options of one model: Optuna with ASHA, or PBT, on the validation part alone.

Each try is a fit that reports its validation loss after every epoch; those that fall behind are stopped. The
best one is then a trial like any other, with several seeds and a test, and can be promoted.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetcast.backtesting.data import Data
from fleetcast.backtesting.plan import Rung, Trial
from fleetcast.backtesting.trial import build
from fleetcast.errors import InputError
from fleetcast.evaluation import search_report
from fleetcast.evaluation.search_report import Try
from fleetcast.models import configure
from fleetcast.provenance import provenance
from fleetcast.runtime import log_to, worker_logs
from fleetcast.store import MANIFEST, Store, fingerprint
from fleetcast.training import checkpoints
from fleetcast.training.curves import curves
from fleetcast.training.loop import DivergedError, Run, train
from fleetcast.training.options import FitOptions
from fleetcast.tuning import trials
from fleetcast.tuning.options import TuneOptions
from fleetcast.tuning.spaces import FIT, space

log = logging.getLogger("fleetcast")

#: Epochs that every try has before it may be stopped, and how many times more the better half then gets.
_GRACE, _FACTOR = 2, 2
#: What a try reports: the lowest validation loss so far.
_LOSS = "loss"
#: Where neither their number nor a time is given.
_TRIES = 20


def search(store: Store, data: Data, options: TuneOptions) -> dict[str, Any]:
    """Runs or continues the search; then tests the best configuration with every seed.

    Writes `tuning/<name>/report.{html,md}` and `search.json`. Raises InputError if no try came to its end.
    """
    assert options.search is not None, "there is a model to search"
    results = Store(f"{store.uri}/backtests").open_or_create()
    tries = _tries(results, data, options, options.search)
    finished = [one for one in tries if np.isfinite(one.loss)]
    if not finished:
        reasons = sorted({one.failure or "diverged" for one in tries})
        raise InputError(f"--search {options.search}: no try came to its end: {'; '.join(reasons)}")
    best = finished[0]
    plan = [(_trial(data, options, best.settings, seed), data) for seed in range(options.seeds)]
    stopped = trials.run(results, plan, options, provenance())
    complete = [one.folder for one, _ in plan if results.exists(f"{one.folder}/{MANIFEST}")]
    place = Store(f"{store.uri}/tuning").open_or_create()
    page = search_report.render(options.search, data.name, tries, options.scheduler)
    place.write_json(
        f"{options.name}/search.json",
        {"model": options.search, "best": best.settings, "loss": best.loss, "trials": complete}
        | {"tries": [vars(one) for one in tries]},
    )
    return {
        "report": page.write(place, options.name),
        "tries": len(tries),
        "best": best.settings,
        "validation_loss": best.loss,
        "trials": complete,
        "stopped": stopped,
        "failed": [one.failure for one in tries if one.failure],
    }


def _tries(results: Store, data: Data, options: TuneOptions, model: str) -> list[Try]:
    """All tries, best first; one that was killed, or failed, goes on after its last epoch."""
    from ray import tune

    opened = trials.opened({data.manifest.fingerprint: data})
    domains = space(model, options.space)
    settings = {"search", "scheduler", "trials", "minutes", "space", "fit", "options", "workers_per_trial"}
    about = options.model_dump(mode="json", include=settings)
    name = f"search-{model}-{fingerprint([data.manifest.fingerprint, about])}"
    path = results.path(f"{trials.STATE}/{name}")
    with worker_logs() as queue:
        function = tune.with_resources(
            tune.with_parameters(_try, data=data, opened=opened, options=options, queue=queue),
            trials.resources(options),
        )
        if tune.Tuner.can_restore(path, storage_filesystem=results.arrow_fs):
            log.info("search: goes on where it was")
            tuner = tune.Tuner.restore(
                path, function, resume_errored=True, storage_filesystem=results.arrow_fs
            )
        else:
            tuner = tune.Tuner(
                function,
                param_space=domains,
                tune_config=_tune_config(options),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=results.path(trials.STATE),
                    storage_filesystem=results.arrow_fs,
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                    verbose=0,
                ),
            )
        found = tuner.fit()
    return sorted((_read(one) for one in found), key=lambda one: (one.loss, str(one.settings)))


def _tune_config(options: TuneOptions) -> Any:
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
    from ray.tune.search.optuna import OptunaSearch

    if options.scheduler == "pbt":
        scheduler: Any = PopulationBasedTraining(
            perturbation_interval=_GRACE,
            hyperparam_mutations={name: tune.loguniform(*bounds) for name, bounds in FIT.items()},
        )
        algorithm = None
    else:
        epochs = options.fit.epochs
        scheduler = ASHAScheduler(max_t=epochs, grace_period=min(_GRACE, epochs), reduction_factor=_FACTOR)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        algorithm = OptunaSearch(seed=0)
    return tune.TuneConfig(
        metric=_LOSS,
        mode="min",
        num_samples=options.trials or (_TRIES if options.minutes is None else -1),
        time_budget_s=None if options.minutes is None else 60 * options.minutes,
        scheduler=scheduler,
        search_alg=algorithm,
        max_concurrent_trials=trials.most(options),
        reuse_actors=options.scheduler != "pbt" and options.workers_per_trial == 1,
    )


def _try(
    config: dict[str, Any], data: Data, opened: dict[str, Any], options: TuneOptions, queue: Any
) -> None:
    """One try, on a worker: a fit that reports after every epoch."""
    import ray
    from ray import tune

    assert options.search is not None
    one = _trial(data, options, config, seed=0)
    if options.workers_per_trial > 1:
        _try_on_workers(one, data, options, queue)
        return
    if data.manifest.fingerprint in opened:
        data = data.with_shards(ray.get(opened[data.manifest.fingerprint]))
    torch.set_num_threads(max(1, int(options.cpus_per_trial)))
    sender = log_to(queue, f"{options.search}, try {tune.get_context().get_trial_id()}")
    run = Run.start(build(data, one), data.shards(), one.fit)
    last = tune.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            checkpoints.restore(run, Path(folder))

    def report(run: Run, figures: dict[str, float]) -> None:
        watch(run, figures)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.write(run, Path(folder))
            tune.report({_LOSS: run.progress.best_loss}, checkpoint=tune.Checkpoint.from_directory(folder))

    try:
        with curves(options.tensorboard and f"{options.tensorboard}/{one.search}") as watch:
            train(run, report)
    except DivergedError as error:
        log.info("stopped: %s", error)
        tune.report({_LOSS: np.inf})
    finally:
        sender.stop()


def _try_on_workers(one: Trial, data: Data, options: TuneOptions, queue: Any) -> None:
    """The same by DDP workers, which keep their own state to go on from. Their epochs are reported once all
    are over: workers that Ray Tune stops half-way take what others wait for with them."""
    from ray import tune

    sender = log_to(queue, f"{one.rung.name}, try {tune.get_context().get_trial_id()}")
    try:
        progress, _ = trials.fit_of(options)(data, one, build(data, one))
        for loss in np.minimum.accumulate([epoch["val_loss"] for epoch in progress.history]):
            tune.report({_LOSS: float(loss)})
    finally:
        sender.stop()


def _trial(data: Data, options: TuneOptions, settings: dict[str, Any], seed: int) -> Trial:
    """The trial of a configuration. Raises InputError for an option that the model does not take."""
    assert options.search is not None
    of_fit = {name: value for name, value in settings.items() if name in FIT}
    of_model = {name: value for name, value in settings.items() if name not in FIT}
    given = options.options.get(options.search, {}) | of_model
    rung = Rung(
        name=options.search,
        model=options.search,
        options=configure(options.search, given).model_dump(mode="json"),
    )
    fit = FitOptions(**(options.fit.model_dump() | of_fit), seed=seed)
    return Trial(
        data=data.name,
        data_fingerprint=data.manifest.fingerprint,
        rung=rung,
        fit=fit,
        workers=options.workers_per_trial,
    )


def _read(found: Any) -> Try:
    metrics = found.metrics or {}
    reports = found.metrics_dataframe
    # A try that failed before its first epoch has reported nothing.
    history = [] if reports is None or _LOSS not in reports else reports[_LOSS].tolist()
    failure = "" if found.error is None else trials.reason(found.error)
    return Try(
        settings=dict(found.config),
        loss=np.inf if failure else float(metrics.get(_LOSS, np.inf)),
        epochs=len(history),
        history=[float(loss) for loss in history],
        failure=failure,
    )
