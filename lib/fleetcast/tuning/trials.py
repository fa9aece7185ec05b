"""Many trials on Ray Tune, which share one copy of their data.

A trial is a backtest's: it writes itself into the store, and one that is complete there is not run again. So
a run that was killed goes on with the same command, and all that is left to do here is who runs where.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fleetcast.backtesting import fits
from fleetcast.backtesting import trial as trials
from fleetcast.backtesting.data import Data
from fleetcast.backtesting.plan import Trial
from fleetcast.runtime import log_to, worker_logs
from fleetcast.store import MANIFEST, Store
from fleetcast.training.loop import DivergedError
from fleetcast.tuning.options import TuneOptions
from fleetcast.windows.loader import Shards

log = logging.getLogger("fleetcast")

#: Where Ray Tune keeps its own state.
STATE = "_work/tune"
#: Share of the object store that the data of all trials may take; beyond it trials open their own shards.
_SHARED = 0.5
#: Memory of a trial that waits for its workers [bytes].
_WAITING = 1 << 20
#: Bytes of an open shard for each value: scaled, filled, steps since the last observation, and the mask.
_BYTES = 4 + 4 + 4 + 1


def run(
    results: Store, plan: Sequence[tuple[Trial, Data]], options: TuneOptions, about: dict[str, Any]
) -> dict[str, str]:
    """Runs the trials that are not complete in `results`. Returns the folder of each that failed, and why."""
    todo = [(one, data) for one, data in plan if not results.exists(f"{one.folder}/{MANIFEST}")]
    log.info("tune: %d trials, %d of them complete", len(plan), len(plan) - len(todo))
    if not todo:
        return {}
    data = {found.manifest.fingerprint: found for _, found in todo}
    with worker_logs() as queue:
        grid = _tuner(results, [one for one, _ in todo], data, options, about, queue).fit()
    results.remove(f"{STATE}/{options.name}")  # what is complete is in the store
    reasons: dict[str, str] = {}
    for place, (one, _) in enumerate(todo):
        if not results.exists(f"{one.folder}/{MANIFEST}"):
            error = grid[place].error
            metrics = grid[place].metrics or {}
            failed = None if error is None else reason(error)
            reasons[one.folder] = metrics.get("stopped") or failed or "its process was killed"
    return reasons


def reason(error: Exception) -> str:
    """The last line of what a worker said."""
    *_, last = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
    return last


def _tuner(
    results: Store,
    todo: Sequence[Trial],
    data: dict[str, Data],
    options: TuneOptions,
    about: dict[str, Any],
    queue: Any,
) -> Any:
    from ray import tune

    function = tune.with_parameters(
        _one, results=results, data=data, opened=opened(data), options=options, about=about, queue=queue
    )
    return tune.Tuner(
        tune.with_resources(function, resources(options)),
        param_space={"trial": tune.grid_search([one.model_dump(mode="json") for one in todo])},
        tune_config=tune.TuneConfig(max_concurrent_trials=most(options), reuse_actors=True),
        run_config=tune.RunConfig(
            name=options.name,
            storage_path=results.path(STATE),
            storage_filesystem=results.arrow_fs,
            verbose=0,
        ),
    )


def _one(
    config: dict[str, Any],
    results: Store,
    data: dict[str, Data],
    opened: dict[str, Any],
    options: TuneOptions,
    about: dict[str, Any],
    queue: Any,
) -> None:
    """One trial, on a worker."""
    import ray
    from ray import tune

    one = Trial(**config["trial"])
    found = data[one.data_fingerprint]
    if one.data_fingerprint in opened:
        found = found.with_shards(ray.get(opened[one.data_fingerprint]))
    torch.set_num_threads(max(1, int(options.cpus_per_trial)))
    sender = log_to(queue, f"{one.rung.name} on {found.manifest.name}, seed {one.fit.seed}")
    try:
        trials.run(results, found, one, None, one.folder, about, fit_of(options))
        tune.report({"stopped": ""})
    except DivergedError as error:
        tune.report({"stopped": str(error)})
    finally:
        sender.stop()


def resources(options: TuneOptions) -> dict[str, float]:
    """What Ray keeps for a trial; a trial with workers of its own only waits for them."""
    if options.workers_per_trial > 1:
        # Ray Tune wants something; any share of a CPU could be the one that the last worker lacks.
        return {"memory": _WAITING}
    return {"cpu": options.cpus_per_trial, "gpu": options.gpus_per_trial}


def most(options: TuneOptions) -> int | None:
    """How many trials may run at a time: with workers of their own as many as find room for all of them."""
    import ray

    if options.max_concurrent is not None or options.workers_per_trial == 1:
        return options.max_concurrent
    there = ray.cluster_resources()
    needed = {"CPU": options.cpus_per_trial, "GPU": options.gpus_per_trial}
    room = [there.get(name, 0) // (options.workers_per_trial * of) for name, of in needed.items() if of]
    return max(1, int(min(room)))


def fit_of(options: TuneOptions) -> fits.Fit:
    """How each trial is fitted."""
    o = options
    return fits.by(o.workers_per_trial, o.cpus_per_trial, o.gpus_per_trial, o.tensorboard)


def opened(data: dict[str, Data]) -> dict[str, Any]:
    """Fingerprint → reference to the open shards in the object store, of as many data sets as there is room
    for. They are opened on a worker: the driver holds none of it."""
    import ray

    @ray.remote
    def open_all(one: Data) -> Shards:
        return Shards(one.store, one.manifest).open_all()

    room = _SHARED * ray.cluster_resources().get("object_store_memory", 0)
    found = {}
    for name, one in data.items():
        m = one.manifest
        size = sum((s.last - s.first) * len(m.members(s.group)) for s in m.shards) * len(m.metrics) * _BYTES
        if size <= room:
            room -= size
            found[name] = open_all.remote(one)
        else:
            log.info("tune: %s is too large to be shared, each trial opens its own shards", m.name)
    return found
