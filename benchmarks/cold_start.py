"""What kin are worth to entities that have just begun: siblings to replicas, neighbours to services, and one
series to instances that were renamed.

    python -m benchmarks.cold_start

A synthetic microservice trace is trained on once for each seed. Then the test part is forecast in three
settings, each scored on the same targets, those of the entities in question alone: replicas that a rollout
has started within the look-back, as the trace has them; with windows in which renamed instances are one
series, the same replicas once more; and services whose past is taken away but for the last steps, a third of
them at a time. Errors are in training standard deviations, intervals are paired over origins and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fleetcast.config import Options
from fleetcast.evaluation import backtest
from fleetcast.evaluation.compare import block_length, resample
from fleetcast.evaluation.metrics import per_origin
from fleetcast.evaluation.naive import LAST_VALUE
from fleetcast.forecasting.cold_start import Kin, begin_earlier, kin_of
from fleetcast.forecasting.predict import Selected
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.models import MODELS
from fleetcast.runtime import ray_session, scratch
from fleetcast.schemas import QUANTILES
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.training.options import TrainOptions
from fleetcast.training.run import train_model
from fleetcast.windows import manifest as manifests
from fleetcast.windows.manifest import Manifest, ShardOptions
from fleetcast.windows.views import OpenShard, read_values
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.report import BenchConfig, machine, run, table

#: Steps that services are left of their past.
_AGE = 4
_METRICS = ("cpu", "memory")
#: Of a way of forecasting, for each seed.
_Scores = dict[str, list[dict[int, NDArray[np.float64]]]]


class ColdStartBenchOptions(Options):
    """The cluster."""

    days: int = Field(5, ge=3)
    """Telemetry [days]."""
    containers: int = Field(60, ge=10)
    """Replicas of ten services."""
    churn: float = Field(0.5, gt=0, le=1)
    """Share of them that a rollout replaces on a day."""
    seeds: int = Field(3, ge=1)
    """Models of each kind."""
    model: Literal[tuple(MODELS)] = "stgnn"  # type: ignore[valid-type]
    """What is trained."""
    epochs: int = Field(12, ge=1)
    """Of its training."""
    folder: str | None = None
    """Where the store is kept for the next run; a folder that goes away if not given."""


class Config(ColdStartBenchOptions, BenchConfig):
    __doc__ = __doc__


def main(config: Config) -> None:
    """Prints the table of each setting."""
    with scratch() as aside, ray_session(config.num_cpus):
        store = _store(config, Path(config.folder or aside))
        apart, joined = (_replicas(store, config, within) for within in (None, "15min"))
        replicas = {**apart, "joined with those they replaced": joined["with siblings"]}
        services = _services(store, config)
    what = (
        f"{config.days} days, {config.containers} replicas of ten services, steps of 15 min, a look-back of "
        f"6 h, 3 h ahead; {config.model}, {config.seeds} seeds. {machine()}."
    )
    _print("Replicas that began within the look-back", replicas, what)
    _print(f"Services of which {_AGE} steps are known", services, what)


def _store(config: Config, root: Path) -> Store:
    """Raw files and telemetry, unless they are there."""
    given = SynthesizeOptions(
        trace="microservices-v2021",
        machines=12,
        services=10,
        containers=config.containers,
        days=config.days,
        churn=config.churn,
        requests=100,
    )
    raw, store = Store(str(root / "raw")), Store(str(root / "store"))
    if not raw.exists("."):
        synthesize(given, raw)
    ingest(store, raw.uri, IngestOptions(trace="microservices-v2021"))
    return store


def _windows(store: Store, config: Config, level: str, name: str, **others: Any) -> Manifest:
    """Of one group and one shard, so that any stretch of it can be looked at."""
    options = {"step": "15min", "history": "6h", "horizon": "3h", "lags": ["1d"], "metrics": _METRICS}
    sizes = {"group_size": 10_000, "shard_mb": 4096}
    shard(store, ShardOptions.model_validate({**options, **sizes, **others, "level": level, "windows": name}))
    return manifests.load(store, name)


def _models(store: Store, config: Config, data: Manifest) -> Iterable[Selected]:
    for seed in range(config.seeds):
        options = TrainOptions(windows=data.name, model=config.model, seed=seed, epochs=config.epochs)
        found = train_model(store, options)
        yield Selected(store, found["model"], config.model, LAST_VALUE, "")


def _replicas(store: Store, config: Config, within: str | None) -> _Scores:
    """Replicas that have begun; `within` joins renamed instances."""
    name = "apart" if within is None else "joined"
    data = _windows(store, config, "container", name, **({} if within is None else {"renamed": within}))
    plain = _windows(store, config, "container", "apart")
    born = _born(read_values(store, plain, plain.shards[0]))
    kin = {way: kin_of(store, data, 0, *_nobody(), kinds) for way, kinds in _SIBLINGS.items()}

    def begun(origin: int) -> list[str]:
        return [n for n, at in zip(plain.names, born, strict=True) if 0 < origin - at < data.history]

    return _scores(store, config, data, plain, begun, lambda values, origin: values, kin)


_SIBLINGS: dict[str, tuple[Literal["siblings"], ...]] = {"without": (), "with siblings": ("siblings",)}


def _nobody() -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.zeros((2, 0), np.int64), np.zeros(0, np.float32)


def _born(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """[N] the step of the first value."""
    seen = np.isfinite(values).any(2)
    return np.where(seen.any(0), seen.argmax(0), -(10**6))


def _services(store: Store, config: Config) -> _Scores:
    """Services whose past is taken away; a third of them at a time."""
    data = _windows(store, config, "service", "services", scale="entity")
    opened = OpenShard.read(store, data, data.shards[0])
    edges = opened.batch(np.array([data.steps])).edges
    ends, weight = edges.index.numpy(), edges.weight.numpy()
    kin = {
        "without": kin_of(store, data, 0, ends, weight, ()),
        "with neighbours": kin_of(store, data, 0, ends, weight, ("neighbours",)),
    }
    turn = np.random.default_rng(0).permutation(len(data.names)) % 3

    def begun(origin: int) -> list[str]:
        return [name for n, name in enumerate(data.names) if turn[n] == origin % 3]

    def forget(values: NDArray[np.float32], origin: int) -> NDArray[np.float32]:
        values[: origin - _AGE, turn == origin % 3] = np.nan
        return values

    return _scores(store, config, data, data, begun, forget, kin)


def _scores(
    store: Store,
    config: Config,
    data: Manifest,
    truth: Manifest,
    begun: Callable[[int], list[str]],
    forget: Callable[[NDArray[np.float32], int], NDArray[np.float32]],
    kin: dict[str, list[list[Kin]]],
) -> _Scores:
    """Way → errors of the entities that have `begun` at each origin of the test part, as windows `truth` name
    them."""
    (part,) = data.shards
    whole, came = read_values(store, data, part), read_values(store, truth, truth.shards[0])
    newest = {old: new for new, earlier in data.renamed.items() for old in earlier}
    found: _Scores = {}
    for seed, selected in enumerate(_models(store, config, data)):
        opened = OpenShard.read(store, data, part, selected.scaler, selected.places)
        model, naive, refused = selected.rungs(data)
        assert model is not None, refused
        for origin in data.origins(part, "test").tolist():
            names = begun(origin)
            at = np.array([truth.names.index(name) for name in names], np.int64)
            own = np.array([data.names.index(newest.get(name, name)) for name in names], np.int64)
            y = came[None, origin : origin + data.horizon, at].astype(np.float64)
            spread = truth.scaler.of(at)[1]
            for way, of_way in kin.items():
                values = forget(whole.copy(), origin)
                past = values[max(0, origin - data.context) : origin]
                past[:], _ = begin_earlier(past, of_way, data.history)
                batch = opened.of(values).batch(np.array([origin]))
                for name, rung in {way: model, **({"last value": naive} if way == "without" else {})}.items():
                    given = backtest.forecast(rung, batch, selected.scaler, QUANTILES, None)
                    mean, quantiles = given.mean[:, :, own], given.quantiles[:, :, own]
                    sums = per_origin(y, np.isfinite(y), mean, mean, quantiles, QUANTILES, spread)[0]
                    found.setdefault(name, [{} for _ in range(config.seeds)])[seed][origin] = sums
    return found


def _print(title: str, found: _Scores, what: str) -> None:
    origins = next(iter(found.values()))[0]
    resampled = resample(found, block_length(origins, 12, 900))
    rows = []
    for way in sorted(found, key=lambda name: resampled.error[name]):
        gap = resampled.compare(way, "without")
        share = [100 * one for one in gap.relative]
        words = (
            "–"
            if way == "without"
            else f"{gap.verdict}: {share[0]:+.1f} ({share[1]:+.1f} to {share[2]:+.1f})"
        )
        rows.append([way, f"{resampled.error[way]:.3f}", "–" if way == "without" else words])
    table(title, ["past", "scaled MAE", "against without, %"], rows, what)


if __name__ == "__main__":
    run(main, Config)
