"""The data sets of a backtest: windows that are there already, or a source to make them of."""

from __future__ import annotations

from dataclasses import dataclass

from fleetcast.backtesting.options import BacktestOptions, SourceOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.store import Store
from fleetcast.traces import tabular
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.windows import manifest as manifests
from fleetcast.windows.manifest import Manifest

_DEFAULT = "default"


@dataclass(frozen=True)
class Data:
    """A windows dataset and the store that holds it."""

    name: str
    store: Store
    manifest: Manifest
    description: str


def prepare(store: Store, options: BacktestOptions) -> list[Data]:
    """All data sets of a backtest, made if they are not there yet; each source has a store of its own."""
    sources = ({options.shard.windows: options} if options.given else {}) | options.data
    windows = options.windows or (() if sources else (_DEFAULT,))
    found = [
        Data(name, store, manifests.load(store, name), f"windows/{name} of the store") for name in windows
    ]
    return found + [_make(store, name, source) for name, source in sources.items()]


def _make(parent: Store, name: str, source: SourceOptions) -> Data:
    store = Store(f"{parent.uri}/data/{name}").open_or_create()
    if source.tabular is not None:
        tabular.load(store, source.tabular)
        description = f"the table {source.tabular.table.rsplit('/', 1)[-1]}"
    else:
        raw = source.raw
        description = f"raw {source.ingest.trace} files in {raw}"
        if source.synthesize is not None:
            o = source.synthesize
            raw, description = _synthetic(parent, name, o), f"a synthetic cluster of coupling {o.coupling:g}"
        assert raw is not None, "one source is given"
        ingest(store, raw, source.ingest)
    shard(store, source.shard)
    return Data(name, store, manifests.load(store, source.shard.windows), description)


def _synthetic(parent: Store, name: str, options: SynthesizeOptions) -> str:
    """Where the raw files of a synthetic cluster are; written anew if they are another's."""
    raw, made_with = Store(f"{parent.uri}/raw/{name}"), f"raw/{name}.json"
    if parent.read_json(made_with) != options.model_dump(mode="json"):
        synthesize(options, raw.open_or_create())
        parent.write_json(made_with, options.model_dump(mode="json"))
    return raw.uri
