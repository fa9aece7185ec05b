"""A store of many machines, written by the canonical schemas: what ingest would leave of a large trace."""

from __future__ import annotations

import numpy as np
import polars as pl
from fleetcast import schemas
from fleetcast.store import MANIFEST, Store

METRICS = ("cpu", "memory", "net_in")
STEP, SLICE = 3600, 43_200
START = 1_514_764_800  # 2018-01-01
#: Machines that mostly depend on each other, and on how many others each depends.
_CLUSTER, _SOURCES = 40, 8


def names(entities: int) -> list[str]:
    """All machines, sorted as the store has them."""
    return [f"m_{n:06d}" for n in range(entities)]


def write(store: Store, entities: int, days: int = 2, seed: int = 0) -> Store:
    """Telemetry of `days` days in hours, and the dependencies of each half day."""
    random = np.random.default_rng(seed)
    machines = np.array(names(entities))
    member = random.permutation(entities)  # machines of a cluster are not neighbours by name
    sources = _sources(entities, random)
    level, phase = random.uniform(0.2, 0.6, entities), random.uniform(0, 2 * np.pi, entities)
    files = []
    for day in range(days):
        date = str(pl.Series([(START + day * 86_400) * 1000]).cast(pl.Datetime("ms")).dt.date()[0])
        hours = np.arange(24)
        cycle = 0.15 * np.sin(2 * np.pi * hours[:, None] / 24 + phase)
        columns = {"entity": np.tile(machines, 24)}
        columns["time"] = np.repeat(1000 * (START + day * 86_400 + hours * STEP), entities)
        for metric in METRICS:
            value = level + cycle + random.normal(0, 0.03, (24, entities))
            columns |= {name: value.clip(0, 1).ravel() for name in (metric, f"{metric}_max")}
        columns["samples"] = np.full(24 * entities, 60)
        schema = schemas.telemetry(list(METRICS))
        table = pl.DataFrame(columns).cast({"time": pl.Datetime("ms", "UTC")}).to_arrow()
        files.append(f"telemetry/date={date}/machine-00.parquet")
        store.write_table(files[-1], table.select(schema.names).cast(schema))
        edges = pl.DataFrame(
            {
                "time": np.repeat(
                    [1000 * (START + day * 86_400 + at) for at in range(0, 86_400, SLICE)], sources.size
                ),
                "source": np.tile(machines[member[sources.ravel()]], 86_400 // SLICE),
                "target": np.tile(np.repeat(machines[member], _SOURCES), 86_400 // SLICE),
                "kind": "batch",
                "weight": random.uniform(1, 10, sources.size * (86_400 // SLICE)),
            }
        ).filter(pl.col("source") != pl.col("target"))
        table = edges.cast({"time": pl.Datetime("ms", "UTC")}).unique(("time", "source", "target")).to_arrow()
        files.append(f"dependencies/date={date}/machine.parquet")
        store.write_table(files[-1], table.select(schemas.DEPENDENCIES.names).cast(schemas.DEPENDENCIES))
    _describe(store, list(machines), files, days)
    return store


def _sources(entities: int, random: np.random.Generator) -> np.ndarray:
    """[entities, sources] mostly of the same cluster."""
    cluster = np.arange(entities)[:, None] // _CLUSTER * _CLUSTER
    near = cluster + random.integers(0, _CLUSTER, (entities, _SOURCES))
    far = random.integers(0, entities, (entities, _SOURCES))
    return np.where(random.random(near.shape) < 0.75, np.minimum(near, entities - 1), far)


def _describe(store: Store, machines: list[str], files: list[str], days: int) -> None:
    unknown = dict.fromkeys(("parent", "service"), pl.lit(None, pl.String))
    capacity = dict.fromkeys(("cpu_capacity", "memory_capacity"), pl.lit(1.0))
    last = START + days * 86_400 - STEP
    entities = (
        pl.DataFrame({"entity": machines})
        .with_columns(
            kind=pl.lit("machine"),
            measured=pl.lit(True),
            last_measured=pl.lit(1000 * last),
            **unknown,
            **capacity,
        )
        .cast({"last_measured": pl.Datetime("ms", "UTC")})
    )
    table = entities.select(schemas.ENTITIES.names).to_arrow().cast(schemas.ENTITIES)
    store.write_table("entities/entities.parquet", table)
    store.write_json(
        f"telemetry/{MANIFEST}",
        {
            "fingerprint": f"{len(machines)} machines, {days} days",
            "metrics": list(METRICS),
            "settings": {"step": STEP, "slice": SLICE},
            "spans": {"machine": {"first": START, "last": last}},
            "files": files,
        },
    )
