"""The data sets of a backtest: windows that are there already, or a source to make them of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fleetcast.backtesting.options import BacktestOptions, SourceOptions
from fleetcast.errors import InputError
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.store import MANIFEST, Store
from fleetcast.traces import tabular
from fleetcast.traces.synthesis import SynthesizeOptions, services
from fleetcast.windows import manifest as manifests
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest, ShardOptions

_DEFAULT = "default"
#: Steps of look-back and horizon where neither is given, and as which share of the table at most: the test
#: part of a fifth then holds two horizons.
_STEPS = 12
_SHARE = 10


@dataclass(frozen=True)
class Data:
    """A windows dataset and the store that holds it."""

    name: str
    store: Store
    manifest: Manifest
    description: str
    opened: Shards | None = None
    """Shards that are open already, and shared by trials; else each trial opens its own."""

    def with_shards(self, opened: Shards) -> Data:
        """The same data, of which these shards are open."""
        return replace(self, opened=opened)

    def shards(self) -> Shards:
        """The shards to read batches from."""
        return self.opened or Shards(self.store, self.manifest)


def prepare(store: Store, options: BacktestOptions) -> list[Data]:
    """All data sets of a backtest, made if they are not there yet; each source has a store of its own."""
    names = options.windows or (() if options.sources else (_DEFAULT,))
    found = [Data(name, store, manifests.load(store, name), f"windows/{name} of the store") for name in names]
    return found + [make(store, name, source) for name, source in options.sources.items()]


def find(store: Store, name: str, fingerprint: str) -> Data | None:
    """The data set of this name and content, if the store still has it."""
    for where in (store, home(store, name)):
        for path in where.list("windows", MANIFEST):
            if where.read_json(path).get("fingerprint") == fingerprint:
                windows = path.split("/")[1]
                return Data(name, where, manifests.load(where, windows), f"windows/{windows}")
    return None


def windows_of(source: SourceOptions, telemetry: dict[str, Any]) -> ShardOptions:
    """How a source is cut into windows: as is given, else as suits its telemetry, of which this is the
    manifest (`SourceOptions.shard` says how). Raises InputError if that clashes with what is given."""
    table, o = source.tabular, source.synthesize
    if o is not None and o.trace == "services":
        table = services.table_of("")
    if table is None:
        return source.shard.resolve({})
    given, span = source.shard.model_dump(), telemetry["spans"][table.kind]
    step = given.get("step", telemetry["settings"]["step"])
    steps = (span["last"] - span["first"]) // step + 1
    width = step * max(1, min(_STEPS, steps // _SHARE))
    horizon = given.get("horizon", width)
    of_table = {"level": table.level, "metrics": table.metrics}
    return source.shard.resolve(
        {**of_table, "step": step, "horizon": horizon, "history": max(width, horizon)}
    )


def home(parent: Store, name: str) -> Store:
    """The store of a data set that a backtest made of a source."""
    return Store(f"{parent.uri}/data/{name}")


def make(
    parent: Store,
    name: str,
    source: SourceOptions,
    change: Callable[[ShardOptions], ShardOptions] = lambda options: options,
) -> Data:
    """The data set of a source, in a store of its own; `change` may cut it into other windows."""
    store = home(parent, name).open_or_create()
    try:
        description = _load(parent, store, name, source)
        options = change(windows_of(source, store.read_json(f"telemetry/{MANIFEST}")))
        shard(store, options)
    except InputError as error:
        raise InputError(f"data set {name}: {error}") from error
    return Data(name, store, manifests.load(store, options.windows), description)


def _load(parent: Store, store: Store, name: str, source: SourceOptions) -> str:
    """Makes the source the telemetry of its store; returns what it is, in words."""
    raw, table, o = source.raw, source.tabular, source.synthesize
    if o is not None:
        raw, description = _synthetic(parent, name, o), f"a synthetic cluster of coupling {o.coupling:g}"
        table = services.table_of(raw) if o.trace == "services" else None
    elif table is not None:
        description = f"the table {table.table.rsplit('/', 1)[-1]}"
    else:
        description = f"raw {source.ingest.trace} files in {raw}"
    if table is not None:
        tabular.load(store, table)
    else:
        assert raw is not None, "one source is given"
        ingest(store, raw, source.ingest)
    return description


def _synthetic(parent: Store, name: str, options: SynthesizeOptions) -> str:
    """Where the raw files of a synthetic cluster are; written anew if they are another's."""
    raw, made_with = Store(f"{parent.uri}/raw/{name}"), f"raw/{name}.json"
    if parent.read_json(made_with) != options.model_dump(mode="json"):
        synthesize(options, raw.open_or_create())
        parent.write_json(made_with, options.model_dump(mode="json"))
    return raw.uri
