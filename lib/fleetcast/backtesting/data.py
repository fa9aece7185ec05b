"""The data sets of a backtest: windows that are there already, or a source to make them of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fleetcast.backtesting.options import BacktestOptions, SourceOptions
from fleetcast.errors import InputError
from fleetcast.ingest.shards import shard
from fleetcast.ingest.sources import load, windows_of
from fleetcast.ingest.synthesize import synthesize
from fleetcast.store import MANIFEST, Store
from fleetcast.traces.mapping import TabularOptions
from fleetcast.traces.synthesis import SynthesizeOptions, services
from fleetcast.windows import manifest as manifests
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest, ShardOptions

_DEFAULT = "default"


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
        table, description = _load(parent, store, name, source)
        options = change(windows_of(source.shard, table, store.read_json(f"telemetry/{MANIFEST}")))
        shard(store, options)
    except InputError as error:
        raise InputError(f"data set {name}: {error}") from error
    return Data(name, store, manifests.load(store, options.windows), description)


def _load(parent: Store, store: Store, name: str, source: SourceOptions) -> tuple[TabularOptions | None, str]:
    """Makes the source the telemetry of its store; returns the table that it is, and what it is, in words."""
    raw, table, o = source.raw, source.tabular, source.synthesize
    options = source.ingest
    if o is not None:
        raw, description = _synthetic(parent, name, o), f"a synthetic cluster of coupling {o.coupling:g}"
        if o.trace == "services":
            table = services.table_of(raw)
        else:
            options = options.model_copy(update={"trace": o.trace})
    elif table is not None:
        description = f"the table {table.table.rsplit('/', 1)[-1]}"
    else:
        description = f"raw {source.ingest.trace} files in {raw}"
    load(store, raw, options, table)
    return table, description


def _synthetic(parent: Store, name: str, options: SynthesizeOptions) -> str:
    """Where the raw files of a synthetic cluster are; written anew if they are another's."""
    raw, made_with = Store(f"{parent.uri}/raw/{name}"), f"raw/{name}.json"
    if parent.read_json(made_with) != options.model_dump(mode="json"):
        synthesize(options, raw.open_or_create())
        parent.write_json(made_with, options.model_dump(mode="json"))
    return raw.uri
