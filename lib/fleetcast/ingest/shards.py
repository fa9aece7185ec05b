"""The shard job: telemetry and dependencies → a published windows dataset."""

from __future__ import annotations

import logging
from collections import defaultdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from fleetcast import memory
from fleetcast.errors import InputError
from fleetcast.graphs import cut
from fleetcast.ingest.make import make
from fleetcast.store import MANIFEST, Store, fingerprint
from fleetcast.windows import manifest as manifests
from fleetcast.windows.build import (
    Grid,
    Places,
    RowGroup,
    Summary,
    build_shard,
    split_dependencies,
    split_telemetry,
    summarise,
)
from fleetcast.windows.edges import combine
from fleetcast.windows.manifest import Manifest, Scaler, Shard, ShardOptions
from fleetcast.windows.renames import lives, successors

log = logging.getLogger("fleetcast")

#: Seed of the entities that are drawn where not all are wanted.
_DRAW = 20_180_101
#: The names of each group, or of each group's border.
_Names = list[list[str]]
#: The telemetry that each level is made of.
SOURCE_KIND = {"machine": "machine", "container": "container", "service": "container"}


def shard(store: Store, options: ShardOptions) -> dict[str, Any]:
    """Builds `windows/<name>` from the store's telemetry, unless it is there already.

    Raises InputError for an unknown metric, a level without telemetry, or too little data for the split.
    """
    store.open_existing()
    telemetry = store.read_json(f"telemetry/{MANIFEST}")
    if telemetry is None:
        raise InputError(f"{store.uri}: telemetry is not complete; run ingest (again)")
    listed = [event.model_dump(mode="json") for event in options.calendar.listed()]
    digest = fingerprint([telemetry["fingerprint"], options.model_dump(mode="json"), listed])
    saved = store.read_json(f"windows/{options.windows}/{MANIFEST}")
    if saved is not None and saved.get("fingerprint") == digest and _is_whole(store, saved):
        log.info("shard: windows/%s is complete", options.windows)
        return {**_figures(Manifest(**saved)), "skipped": True}

    telemetry = _last(telemetry, options)
    work = f"_work/windows/{options.windows}-{digest}"
    renamed = _renamed(store, work, options, telemetry)
    units, groups, borders = _units(store, options, telemetry, renamed)
    draft = _draft(telemetry, options, groups, borders, renamed, digest)
    grid = Grid.of(draft, options.dependencies)
    receipts = _build(store, work, telemetry, options, draft, grid, Places.of(draft, units))
    statistics = [receipt["statistics"] for receipt in receipts]
    summary = summarise(statistics, [part.group for part in draft.shards], options.scale == "entity")
    finished = _finish(draft, summary, options)
    store.write_json(f"{work}/dataset/{MANIFEST}", finished.model_dump(mode="json"))
    store.publish(f"{work}/dataset", f"windows/{options.windows}")
    store.remove(work)
    peak = max((receipt.get("peak_bytes", 0) for receipt in receipts), default=0)
    return {**_figures(finished), "peak_bytes": peak, "skipped": False}


def _is_whole(store: Store, saved: dict[str, Any]) -> bool:
    return store.has(path for part in Manifest(**saved).shards for path in (part.path, part.edges))


def _figures(manifest: Manifest) -> dict[str, Any]:
    return {
        "windows": {part: manifest.windows(part) for part in manifests.PARTS},
        "entities": manifest.entities,
        "groups": len(manifest.groups),
        "border": sum(map(len, manifest.borders)),
        "renamed": len(manifest.renamed),
        "shards": len(manifest.shards),
        "steps": manifest.steps,
        "observed_share": dict(zip(manifest.metrics, manifest.observed, strict=True)),
    }


def _last(telemetry: dict[str, Any], options: ShardOptions) -> dict[str, Any]:
    """The telemetry's manifest as if there were no more than the span that is wanted."""
    kind, base = SOURCE_KIND[options.level], telemetry["settings"]["step"]
    if kind not in telemetry["spans"]:
        return telemetry
    whole = telemetry["spans"][kind]
    start, last = whole["first"], whole["last"]
    if options.until is not None:
        last = min(last, options.until - base)
    if options.span is not None:
        first = start // options.step * options.step
        surplus = (last + base - first) // options.step - options.span // options.step
        start = first + surplus * options.step if surplus > 0 else start
    if (start, last) == (whole["first"], whole["last"]):
        return telemetry
    # A window at the start has the edges of the last slice that had ended: it begins up to two before.
    since = {"telemetry": start, "dependencies": start - 2 * telemetry["settings"]["slice"]}
    days = {noun: _day(at) for noun, at in since.items()}
    files = [
        path for path in telemetry["files"] if days[path.split("/")[0]] <= path.split("/")[1] <= _day(last)
    ]
    return {**telemetry, "spans": {kind: {"first": start, "last": last}}, "files": files}


def _day(at: int) -> str:
    """The folder of a day."""
    return f"date={datetime.fromtimestamp(at, UTC):%Y-%m-%d}"


def _measured(store: Store, options: ShardOptions, telemetry: dict[str, Any]) -> pl.DataFrame:
    """The entities that there is telemetry of."""
    entities: Any = pl.from_arrow(store.read_table("entities/entities.parquet"))
    kind = SOURCE_KIND[options.level]
    measured: pl.DataFrame = entities.filter((pl.col("kind") == kind) & pl.col("measured"))
    if options.span is not None and kind in telemetry["spans"]:
        measured = measured.filter(pl.col("last_measured").dt.epoch("s") >= telemetry["spans"][kind]["first"])
    if options.level == "container":  # not what stands for a service as a whole
        measured = measured.filter(pl.col("entity").ne_missing(pl.col("service")))
    return measured


def _renamed(
    store: Store, work: str, options: ShardOptions, telemetry: dict[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Container → those whose place it took, the first first; one file of telemetry in memory at a time."""
    if options.renamed is None:
        return {}
    if options.level != "container":
        raise InputError(f"--renamed {options.renamed}: expected --level container, not {options.level}")
    plan = {f"{work}/lives/{path}": {"source": path} for path in _values(telemetry, "container")}

    def look(item: dict[str, Any]) -> dict[str, Any]:
        found = lives(store.read_table(item["source"], ["entity", "time"]))
        store.write_table(item["target"], found.to_arrow())
        return {"rows": len(found)}

    room = memory.splitting(telemetry.get("rows", 0), 0)
    make(store, plan, look, f"{work}/receipts/lives", "shard: who lived when", room)
    every: pl.DataFrame | None = None
    for path in plan:
        part: Any = pl.from_arrow(store.read_table(path))
        part = part if every is None else pl.concat([every, part])
        every = part.group_by("entity").agg(pl.col("first").min(), pl.col("last").max())
    if every is None:
        return {}
    measured = _measured(store, options, telemetry).select(
        pl.col("entity").cast(pl.String), pl.col("service").cast(pl.String)
    )
    return successors(every.join(measured.drop_nulls(), on="entity"), options.renamed)


def _units(
    store: Store, options: ShardOptions, telemetry: dict[str, Any], renamed: dict[str, tuple[str, ...]]
) -> tuple[pl.DataFrame, _Names, _Names]:
    """`entity` of the telemetry → `unit` that is forecast; the groups of units, and their borders."""
    kind = SOURCE_KIND[options.level]
    unit = pl.col("service") if options.level == "service" else pl.col("entity")
    named = _measured(store, options, telemetry).select("entity", unit=unit).drop_nulls()
    if renamed:
        newest = {old: new for new, earlier in renamed.items() for old in earlier}
        named = named.with_columns(pl.col("unit").cast(pl.String).replace(newest))
    if named.is_empty():
        raise InputError(f"--level {options.level}: the store has no {kind} with telemetry of that level")
    names = named["unit"].unique().sort().to_list()
    if options.entities is not None:
        if options.entities > len(names):
            raise InputError(f"--entities {options.entities}: expected at most the {len(names)} there are")
        drawn = np.random.default_rng(_DRAW).permutation(len(names))[: options.entities]
        names = [names[place] for place in np.sort(drawn)]
    named = named.filter(pl.col("unit").is_in(names))
    if len(names) <= options.group_size:
        return named, [names], [[]]
    graph = _graph(store, options, telemetry, names)
    groups = cut.cut(names, graph, options.group_size)
    flow = graph.select("source", "target", weight="flow")
    return named, groups, cut.border(groups, flow, options.border)


def _values(telemetry: dict[str, Any], kind: str) -> list[str]:
    """The files of telemetry of entities of a kind."""
    return [path for path in telemetry["files"] if path.startswith("telemetry/") and f"/{kind}-" in path]


def _dependencies(telemetry: dict[str, Any], level: str) -> list[str]:
    """The files of dependencies between units of a level."""
    return [path for path in telemetry["files"] if fnmatch(path, f"dependencies/*/{level}.parquet")]


def _graph(store: Store, options: ShardOptions, telemetry: dict[str, Any], names: list[str]) -> pl.DataFrame:
    """All dependencies between units summed over time, as many rows as there are pairs: the `weight` of every
    kind as it is, and the `flow` that models see, of the chosen kinds on one scale."""
    total: pl.DataFrame | None = None
    for path in _dependencies(telemetry, options.level):
        day: Any = pl.from_arrow(store.read_table(path))
        day = day.with_columns(pl.col("source", "target").cast(pl.String))
        seen = (
            combine(day, options.dependencies).group_by("source", "target").agg(flow=pl.col("weight").sum())
        )
        day = day.group_by("source", "target").agg(pl.col("weight").sum())
        day = day.join(seen, on=["source", "target"], how="left")
        both = day if total is None else pl.concat([total, day])
        total = both.group_by("source", "target").agg(pl.col("weight", "flow").sum())
    if total is None:
        numbers = {"weight": pl.Float32, "flow": pl.Float32}
        return pl.DataFrame(schema={"source": pl.String, "target": pl.String, **numbers})
    return total.filter(pl.col("source").is_in(names) & pl.col("target").is_in(names))


def _draft(
    telemetry: dict[str, Any],
    options: ShardOptions,
    groups: _Names,
    borders: _Names,
    renamed: dict[str, tuple[str, ...]],
    digest: str,
) -> Manifest:
    """The manifest but for what only the shards' values can tell."""
    known = [name for metric in telemetry["metrics"] for name in (metric, f"{metric}_max")]
    for metric in options.metrics:
        if metric not in known:
            raise InputError(f"--metrics {metric}: unknown metric, expected some of {', '.join(known)}")
    base = telemetry["settings"]["step"]
    if options.step % base:
        raise InputError(f"--step {options.step}: expected a multiple of the telemetry's step of {base} s")
    span = telemetry["spans"][SOURCE_KIND[options.level]]
    start = span["first"] // options.step * options.step
    steps = (span["last"] + base - start) // options.step  # a last step that is not over yet is left out
    history, horizon = options.history // options.step, options.horizon // options.step
    max_gap = options.max_gap // options.step
    boundaries = manifests.boundaries(steps, options.split, history, horizon)
    lags = tuple(
        lag // options.step
        for lag in sorted(options.lags)
        if horizon <= lag // options.step <= boundaries[0] - horizon
    )
    calendar = options.calendar.resolve(start, start + steps * options.step)
    trained = calendar.within(start, start + boundaries[0] * options.step)
    for name in set(calendar.names) - {name for name, _, _ in trained}:
        log.warning("shard: %s is not in the training part: no model can know what it does", name)
    sizes = [len(group) + len(border) for group, border in zip(groups, borders, strict=True)]
    return Manifest(
        name=options.windows,
        level=options.level,
        metrics=options.metrics,
        calendar=calendar,
        normalised=tuple(telemetry.get("normalised", ())),
        start=start,
        step=options.step,
        steps=steps,
        history=history,
        horizon=horizon,
        lags=lags,
        max_gap=max_gap,
        slice=telemetry["settings"]["slice"],
        boundaries=boundaries,
        groups=tuple(map(tuple, groups)),
        borders=tuple(map(tuple, borders)),
        renamed={name: renamed[name] for group in groups for name in group if name in renamed},
        scaler=Scaler(mean=(), std=()),
        seasonal_error=(),
        observed=(),
        shards=tuple(_stretches(options, steps, history, horizon, lags, max_gap, sizes)),
        fingerprint=digest,
    )


def _stretches(
    options: ShardOptions,
    steps: int,
    history: int,
    horizon: int,
    lags: tuple[int, ...],
    max_gap: int,
    sizes: list[int],
) -> list[Shard]:
    """Shards of groups of these sizes: each of about the wanted size, but never so short that the halo
    outweighs what it surrounds.

    The last shard of a group also holds the origin at the end of the telemetry: the forecast's.
    """
    back = manifests.context(history, lags, max_gap)
    shards = []
    for group, size in enumerate(sizes):
        row = size * len(options.metrics) * 4
        width = max((options.shard_mb << 20) // row, back + horizon)
        count = max(1, round(steps / width))
        edges = [round(steps * i / count) for i in range(count + 1)]
        for number, (low, high) in enumerate(pairwise(edges)):
            name = f"windows/{options.windows}/shards/group-{group:05d}-{number:04d}"
            shards.append(
                Shard(
                    path=f"{name}.parquet",
                    edges=f"{name}-edges.parquet",
                    group=group,
                    start=low,
                    stop=high + 1 if high == steps else high,
                    first=max(0, low - back),
                    last=min(steps, high + horizon - 1),
                )
            )
    return shards


def _build(
    store: Store,
    work: str,
    telemetry: dict[str, Any],
    options: ShardOptions,
    draft: Manifest,
    grid: Grid,
    places: Places,
) -> list[dict[str, Any]]:
    """Splits the files by group, then builds every shard; returns the shards' receipts."""
    kind = SOURCE_KIND[options.level]
    values = _values(telemetry, kind)
    edges = _dependencies(telemetry, options.level)
    key = {"dataset": draft.fingerprint}
    plan = {
        f"{work}/split/{path.removesuffix('.parquet')}.arrow": {"source": path, **key}
        for path in [*values, *edges]
    }

    def split(item: dict[str, Any]) -> dict[str, Any]:
        by = split_dependencies if item["source"].startswith("dependencies/") else split_telemetry
        return by(store, item["source"], item["target"], places, grid)

    # A file of dependencies is smaller. A table read whole does not say how many rows a file of it has.
    room = memory.splitting(telemetry.get("rows", 0), len(draft.metrics))
    receipts = make(store, plan, split, f"{work}/receipts/split", "shard: split by group", room)
    where: dict[tuple[str, int], list[RowGroup]] = defaultdict(list)
    for path, receipt in sorted(receipts.items()):
        what = "edges" if "/split/dependencies/" in path else "values"
        for number, group in enumerate(receipt["groups"]):
            where[what, group].append(RowGroup(path, number))

    def touching(what: str, part: Shard) -> list[dict[str, Any]]:
        """Row groups of the days from a shard's first step, and two slices before for edges, to its last."""
        before = -(-2 * draft.slice // draft.step)
        low, high = (_date(draft, at) for at in (part.first - before, part.last))
        return [vars(at) for at in where[what, part.group] if low <= at.path.split("date=")[1][:10] <= high]

    prefix = f"windows/{options.windows}"
    shards = {
        f"{work}/dataset{part.path.removeprefix(prefix)}": {
            "shard": part.model_dump(),
            "edges_target": f"{work}/dataset{part.edges.removeprefix(prefix)}",
            "values": touching("values", part),
            "edges": touching("edges", part),
            **key,
        }
        for part in draft.shards
    }

    def build(item: dict[str, Any]) -> dict[str, Any]:
        part = Shard(**item["shard"])
        statistics = build_shard(
            store,
            grid,
            part,
            draft.groups[part.group],
            draft.borders[part.group],
            [RowGroup(**at) for at in item["values"]],
            [RowGroup(**at) for at in item["edges"]],
            (item["target"], item["edges_target"]),
        )
        return {"statistics": statistics, "rows": (part.last - part.first) * len(draft.members(part.group))}

    room = memory.building(draft)
    return list(make(store, shards, build, f"{work}/receipts/shards", "shard: shards", room).values())


def _date(draft: Manifest, step: int) -> str:
    seconds = draft.start + draft.step * step
    return str(pl.Series([seconds * 1000]).cast(pl.Datetime("ms")).dt.date()[0])


def _finish(draft: Manifest, summary: Summary, options: ShardOptions) -> Manifest:
    for position in summary.unseen:
        raise InputError(
            f"--metrics {draft.metrics[position]}: no value in the training part; leave the metric out, "
            f"or use another --split than {options.split}"
        )
    return draft.model_copy(
        update={
            "scaler": summary.scaler,
            "seasonal_error": summary.seasonal_error,
            "observed": summary.observed,
        }
    )
