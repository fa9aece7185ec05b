"""The tables of cluster-trace-microservices-v2021 and -v2022: what containers and machines did, and a log of
calls, with the names, headers, number formats, gaps and oddities of the published files.

A file holds all that is of a stretch of time, in no order. A stamp's value is the mean of the time before it.
The load is that of `services`; a container gets its share of it (`replicas`), and a machine is as busy as the
containers on it. Calls are those of `calls`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl

from fleetcast.traces.synthesis.calls import (
    OUTSIDE,
    Kind,
    edge_rates,
    edges,
    latencies,
    rates,
    store_count,
    traces,
)
from fleetcast.traces.synthesis.cluster import Array, Stream, SynthesizeOptions, generator
from fleetcast.traces.synthesis.replicas import MINUTE, Replicas, replicas
from fleetcast.traces.synthesis.services import processors, profile

HOUR = 3600
_MISSING_SAMPLES = 0.01
_RATE_NOISE, _WAIT_NOISE = 0.03, 0.08
#: Shares of the log: lines twice, of all and of http's in 2022; calls that a service also logs as its own.
_TWICE, _HTTP_TWICE, _OWN = 0.04, 0.7, 0.03
#: Of 2022: the cpu and memory that became 0 and 1, and the rate that became 1, in means of the largest.
_LOWEST, _HIGHEST, _PEAK = 0.004, 1.0, 25.0
_INTERFACES = 3


@dataclass(frozen=True)
class Format:
    """One table of a published trace."""

    span: int | None
    """Time in a file [s]; None: all of it."""
    step: int
    """Time between two stamps, or of the calls that are made at once [s]."""
    numbered: bool
    """Whether each line begins with its number, below an empty name."""
    columns: tuple[str, ...]
    make: Callable[[SynthesizeOptions, Array, np.random.Generator], pl.DataFrame]
    """The rows of some stamps [s]."""


# -- names ---------------------------------------------------------------------------------------------------


def _digest(*of: object) -> str:
    return hashlib.sha256("/".join(map(str, of)).encode()).hexdigest()


@lru_cache(maxsize=4)
def service_names(options: SynthesizeOptions) -> pl.Series:
    """Of every service, and every cache and database after them."""
    count = options.service_count + store_count(options)
    if options.trace == "microservices-v2021":
        return pl.Series([_digest(options.seed, "service", number) for number in range(count)])
    return pl.Series([f"MS_{number + 1}" for number in range(count)])


@lru_cache(maxsize=4)
def replica_names(options: SynthesizeOptions) -> pl.Series:
    """Of every container, in the order of `replicas`."""
    everyone = replicas(options)
    pairs = zip(everyone.service.tolist(), everyone.number.tolist(), strict=True)
    if options.trace == "microservices-v2021":
        return pl.Series([_digest(options.seed, "container", *pair) for pair in pairs])
    return pl.Series([f"MS_{service + 1}_POD_{number}" for service, number in pairs])


@lru_cache(maxsize=4)
def machine_names(options: SynthesizeOptions) -> pl.Series:
    """Of every machine."""
    if options.trace == "microservices-v2021":
        return pl.Series([_digest(options.seed, "machine", number) for number in range(options.machines)])
    return pl.Series([f"NODE_{number + 1}" for number in range(options.machines)])


@lru_cache(maxsize=4)
def _interfaces(options: SynthesizeOptions) -> pl.Series:
    """`_INTERFACES` of each service, cache and database."""
    count = options.service_count + store_count(options)
    digests = [
        _digest(options.seed, "interface", number, which)
        for number in range(count)
        for which in range(_INTERFACES)
    ]
    if options.trace == "microservices-v2021":
        return pl.Series(digests)
    return pl.Series([base64.urlsafe_b64encode(bytes.fromhex(text)).decode()[:10] for text in digests])


#: What the time within the id of a trace counts from [ms].
_TRACED = 1_591_920_000_000


def trace_names(options: SynthesizeOptions, minute: int, numbers: pl.Series) -> pl.Series:
    """Of the traces that begin in a minute, counted as in `calls.traces`."""
    if options.trace == "microservices-v2021":
        start = _TRACED + minute * MINUTE * 1000
        return pl.Series(
            [f"0b13{(n * 40_503 + minute) % 65_536:04x}{start}4000{n:05x}" for n in numbers.to_list()],
            dtype=pl.String,
        )
    return pl.Series([f"T_{minute * 1_000_000 + n}" for n in numbers.to_list()], dtype=pl.String)


# -- what is measured ----------------------------------------------------------------------------------------


def flows(options: SynthesizeOptions, received: Array) -> dict[str, tuple[Array, Array]]:
    """What a service's containers count: how often [1/s] and how long [ms], both [T, S], 0 where never."""
    services, e = options.service_count, edges(options)
    calls, waits = edge_rates(options, received), 1000 * latencies(options, received)

    def over(kind: Kind, end: Array) -> tuple[Array, Array]:
        """The calls of a kind by one of their ends."""
        often, waited = np.zeros_like(received), np.zeros_like(received)
        chosen = e.kind == kind
        for at in np.flatnonzero(chosen).tolist():
            often[:, end[at]] += calls[:, at]
            waited[:, end[at]] += calls[:, at] * waits[:, e.target[at]]
        return often, np.divide(waited, often, out=np.zeros_like(waited), where=often > 0)

    inwards = {kind: over(kind, e.target)[0] for kind in (Kind.RPC, Kind.MQ)}
    own = waits[:, :services]
    outside = np.where(inwards[Kind.RPC] + inwards[Kind.MQ] > 0, 0, received)
    cache, database = over(Kind.MC, e.source), over(Kind.DB, e.source)
    return {
        "providerrpc": (inwards[Kind.RPC], own),
        "consumerrpc": over(Kind.RPC, e.source),
        "writemc": (0.2 * cache[0], cache[1]),
        "readmc": (0.8 * cache[0], cache[1]),
        "writedb": (0.3 * database[0], database[1]),
        "readdb": (0.7 * database[0], database[1]),
        "consumermq": (inwards[Kind.MQ], own),
        "providermq": over(Kind.MQ, e.source),
        "http": (outside, own),
    }


@dataclass(frozen=True)
class _Sample:
    """The containers that have a row at some stamps, [T, R] or [R]."""

    who: Replicas
    names: pl.Series
    share: Array
    """Of the requests of their services; 0 of those that do not run."""
    received: Array
    """[T, S] requests of the services."""
    seen: Array
    """Whether there is a row."""


def _sample(options: SynthesizeOptions, times: Array, step: int, random: np.random.Generator) -> _Sample:
    """The state in the middle of what each stamp is the mean of."""
    middle = np.maximum(times - step / 2, 0)
    everyone, first, stop = replicas(options), int(middle[0]), int(middle[-1]) + 1
    who = everyone.among(first, stop)
    names = replica_names(options).filter(pl.Series((everyone.start < stop) & (everyone.stop > first)))
    weight = who.running(middle) * who.weight
    total = np.stack([np.bincount(who.service, row, options.service_count) for row in weight])
    of_all = total[:, who.service]
    share = np.divide(weight, of_all, out=np.zeros_like(weight), where=of_all > 0)
    seen = (share > 0) & (random.random(share.shape) >= _MISSING_SAMPLES)
    return _Sample(who, names, share, rates(options, middle), seen)


def _usage(options: SynthesizeOptions, sample: _Sample, random: np.random.Generator) -> tuple[Array, Array]:
    """[T, R] cpu and memory of the containers [0-1]."""
    who = sample.who
    profiles = [profile(options, service) for service in range(options.service_count)]
    capacity, idle = np.array([(p.capacity, p.idle) for p in profiles]).T
    busy = sample.share * sample.received[:, who.service] * who.nominal / capacity[who.service]
    cpu = processors(busy, idle[who.service], random)
    level = 0.35 + 0.5 * (7 * who.weight % 1)  # as good as drawn for each
    memory = np.clip(level + 0.1 * cpu + 0.003 * random.standard_normal(cpu.shape), 0.01, 0.99)
    return cpu, memory


def _rows(options: SynthesizeOptions, sample: _Sample, times: Array) -> dict[str, pl.Series | Array]:
    """The columns that say what a row is of."""
    stamp, row = np.nonzero(sample.seen)
    return {
        "timestamp": times[stamp] * 1000,
        "msname": service_names(options).gather(sample.who.service[row]),
        "msinstanceid": sample.names.gather(row),
        "nodeid": machine_names(options).gather(sample.who.machine[row]),
    }


def _instances(
    options: SynthesizeOptions, times: Array, step: int, names: tuple[str, str], random: np.random.Generator
) -> pl.DataFrame:
    sample = _sample(options, times, step, random)
    usage = _usage(options, sample, random)
    values = {name: value[sample.seen] for name, value in zip(names, usage, strict=True)}
    return pl.DataFrame(_rows(options, sample, times) | values)


def _machines(
    options: SynthesizeOptions, times: Array, step: int, names: tuple[str, str], random: np.random.Generator
) -> pl.DataFrame:
    sample = _sample(options, times, step, random)
    cpu, _ = _usage(options, sample, random)
    here = sample.share > 0
    busy = np.stack([np.bincount(sample.who.machine, row, options.machines) for row in cpu * here])
    hosted = np.stack([np.bincount(sample.who.machine, row, options.machines) for row in here])
    load = 0.15 + 0.8 * busy / np.maximum(hosted, 1)
    load = np.clip(load + 0.01 * random.standard_normal(load.shape), 0.005, 1)
    memory = np.clip(0.6 + 0.03 * hosted + 0.005 * random.standard_normal(load.shape), 0.01, 0.97)
    seen = random.random(load.shape) >= _MISSING_SAMPLES
    stamp, machine = np.nonzero(seen)
    return pl.DataFrame(
        {
            "timestamp": times[stamp] * 1000,
            "nodeid": machine_names(options).gather(machine),
            **{name: value[seen] for name, value in zip(names, (load, memory), strict=True)},
        }
    )


def _counted(
    options: SynthesizeOptions, times: Array, random: np.random.Generator
) -> tuple[pl.DataFrame, dict[str, pl.Series]]:
    """Whose rows they are, and `<flow>_mcr` [1/s] and `<flow>_rt` [ms], null where there is no such call."""
    sample = _sample(options, times, MINUTE, random)
    stamp, row = np.nonzero(sample.seen)
    service, share = sample.who.service[row], sample.share[sample.seen]
    found = {}
    for name, (often, long) in flows(options, sample.received).items():
        rate = often[stamp, service] * share
        noisy = rate * random.lognormal(-(_RATE_NOISE**2) / 2, _RATE_NOISE, len(rate))
        waited = long[stamp, service] * random.lognormal(0, _WAIT_NOISE, len(rate))
        found[f"{name}_mcr"] = pl.Series(np.where(rate > 0, noisy, np.nan), nan_to_null=True)
        found[f"{name}_rt"] = pl.Series(np.where(rate > 0, waited, np.nan), nan_to_null=True)
    return pl.DataFrame(_rows(options, sample, times)), found


def _lines(options: SynthesizeOptions, minute: int, random: np.random.Generator) -> pl.DataFrame:
    """The log of the traces that begin in a minute, before its format hides what is not known: `calls.traces`
    with a row for each line, and its `timestamp`, `rt`, `sign` (−1: the callee's), `um_named`, `dm_named` and
    `own` (a call within a service)."""
    calls = traces(options, minute)
    size = len(calls)
    late = pl.Series(random.integers(0, 3, size), dtype=pl.Int64)
    calls = calls.with_columns(late=late, called=pl.Series(random.integers(0, _INTERFACES, size)))
    named = pl.lit(True)
    caller = calls.filter("by_caller").with_columns(
        timestamp="time", sign=1, um_named=named, dm_named="target_named", own=False
    )
    callee = calls.filter("by_callee").with_columns(
        timestamp=pl.col("time") + pl.col("late"),
        sign=-1,
        rt=(pl.col("rt") * 0.95).floor().cast(pl.Int64),
        um_named="source_named",
        dm_named=named,
        own=False,
    )
    within = pl.Series(random.random(size) < _OWN) & (calls["target"] < options.service_count)
    own = calls.filter(within).with_columns(
        timestamp="time",
        sign=1,
        source="target",
        source_replica="target_replica",
        um_named=named,
        dm_named=named,
        own=True,
    )
    columns = [*calls.columns, "timestamp", "sign", "um_named", "dm_named", "own"]
    return pl.concat([some.select(columns) for some in (caller, callee, own)])


def _name_of(names: pl.Series, numbers: pl.Series) -> pl.Series:
    """The names of these numbers, null of those from outside."""
    inside = numbers != OUTSIDE
    return names.gather(pl.select(pl.when(inside).then(numbers).otherwise(0)).to_series()).zip_with(
        inside, pl.Series([None], dtype=pl.String).new_from_index(0, len(numbers))
    )


def _called(options: SynthesizeOptions, lines: pl.DataFrame) -> pl.Series:
    return _interfaces(options).gather(lines["target"] * _INTERFACES + lines["called"])


def _twice(lines: pl.DataFrame, chance: Array, random: np.random.Generator) -> pl.DataFrame:
    """With some lines a second time, the log of a trace together and otherwise in no order."""
    again = lines.filter(pl.Series(random.random(len(lines)) < chance))
    both = pl.concat([lines, again])
    return both[random.permutation(len(both))].sort("traceid", maintain_order=True)


# -- 2021 ----------------------------------------------------------------------------------------------------

#: What a flow is called in 2021; there is none of caches and databases.
_METRICS_2021 = {
    "consumerrpc": "consumerRPC",
    "providerrpc": "providerRPC",
    "http": "HTTP",
    "providermq": "providerMQ",
    "consumermq": "consumerMQ",
}
_KINDS = pl.Series([kind.name.lower() for kind in Kind])


def _resource_2021(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    return _instances(options, times, 30, ("instance_cpu_usage", "instance_memory_usage"), random)


def _node_2021(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    return _machines(options, times, 30, ("node_cpu_usage", "node_memory_usage"), random)


def _rates_2021(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    """A row for each metric; HTTP_RT has the values of HTTP_MCR, as published."""
    whose, counted = _counted(options, times, random)
    frames = []
    for flow, metric in _METRICS_2021.items():
        for ending in ("MCR", "RT"):
            source = "mcr" if metric == "HTTP" else ending.lower()
            frames.append(
                whose.with_columns(metric=pl.lit(f"{metric}_{ending}"), value=counted[f"{flow}_{source}"])
            )
    return pl.concat(frames).drop_nulls("value")


def _calls_2021(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    """A call is logged by its caller, by its callee with a negative time, or by both."""
    (minute,) = (times // MINUTE).tolist()
    lines = _lines(options, minute, random)
    names = service_names(options)
    at_root = pl.Series(lines["id"]) == "0"
    um, dm = _name_of(names, lines["source"]), names.gather(lines["target"])
    frame = pl.DataFrame(
        {
            "traceid": trace_names(options, minute, lines["trace"]),
            "timestamp": lines["timestamp"],
            "rpcid": lines["id"],
            "um": um.zip_with(lines["um_named"] | at_root, _same("(?)", lines)),
            "rpctype": _KINDS.gather(lines["kind"]).zip_with(~lines["own"], _same("userDefined", lines)),
            "dm": dm.zip_with(lines["dm_named"], _same("(?)", lines)),
            "interface": _called(options, lines).zip_with(
                (lines["kind"] <= Kind.RPC) & ~lines["own"], _same(None, lines)
            ),
            "rt": lines["rt"] * lines["sign"],
        }
    )
    return _twice(frame, np.full(len(frame), _TWICE), random)


def _same(text: str | None, lines: pl.DataFrame) -> pl.Series:
    return pl.Series([text], dtype=pl.String).new_from_index(0, len(lines))


# -- 2022 ----------------------------------------------------------------------------------------------------

_FLOWS_2022 = (
    "providerrpc",
    "consumerrpc",
    "writemc",
    "readmc",
    "writedb",
    "readdb",
    "consumermq",
    "providermq",
)
_NODELESS = 0.35


def _normalised(values: Array) -> Array:
    found: Array = np.clip((values - _LOWEST) / (_HIGHEST - _LOWEST), 0, 1)
    return found


def _normalised_usage(frame: pl.DataFrame) -> pl.DataFrame:
    names = ("cpu_utilization", "memory_utilization")
    return frame.with_columns(pl.Series(name, _normalised(frame[name].to_numpy())) for name in names)


def _instances_2022(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    names = ("cpu_utilization", "memory_utilization")
    return _normalised_usage(_instances(options, times, MINUTE, names, random))


def _nodes_2022(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    names = ("cpu_utilization", "memory_utilization")
    return _normalised_usage(_machines(options, times, MINUTE, names, random))


@lru_cache(maxsize=4)
def normalisers(options: SynthesizeOptions) -> dict[str, float]:
    """By what each flow's calls per second are divided: more than any container ever has."""
    mean = np.array([[profile(options, service).mean for service in range(options.service_count)]])
    everyone = replicas(options)
    nominal = np.ones(options.service_count)
    nominal[everyone.service] = everyone.nominal
    return {
        flow: _PEAK * float((often[0] / nominal).max()) or 1.0
        for flow, (often, _) in flows(options, mean).items()
    }


def _rates_2022(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    whose, counted = _counted(options, times, random)
    most = normalisers(options)
    scaled = {
        name: (values / most[name.removesuffix("_mcr")]).clip(0, 1) if name.endswith("_mcr") else values
        for name, values in counted.items()
    }
    return whose.with_columns(values.alias(name) for name, values in scaled.items())


def _calls_2022(options: SynthesizeOptions, times: Array, random: np.random.Generator) -> pl.DataFrame:
    """Both ends of a call log it alike; http calls mostly have two lines that do not differ."""
    (minute,) = (times // MINUTE).tolist()
    lines = _lines(options, minute, random)
    names, pods = service_names(options), replica_names(options)
    is_service = lines["target"] < options.service_count
    numbers = pl.select(pl.when(is_service).then(lines["target_replica"]).otherwise(0)).to_series()
    dm = names.gather(lines["target"])
    of_store = dm + "_POD_" + lines["target_replica"].cast(pl.String)
    of_store = of_store.zip_with(pl.Series(random.random(len(lines)) >= _NODELESS), _same("UNKNOWN", lines))
    pod = pods.gather(numbers).zip_with(is_service, of_store)
    outside, at_root = lines["source"] == OUTSIDE, lines["id"] == "0"
    unnamed = _same("UNKNOWN", lines).zip_with(~(outside & at_root), _same("USER", lines))
    absent = _same("UNAVAILABLE", lines).zip_with(~(outside & at_root), _same("USER", lines))
    inside = lines["um_named"] & ~outside
    own = lines["own"]
    frame = pl.DataFrame(
        {
            "timestamp": lines["timestamp"],
            "traceid": trace_names(options, minute, lines["trace"]),
            "service": [f"S_{1000 * root + 17}" for root in lines["root"].to_list()],
            "rpc_id": lines["id"] + pl.Series(["", ".0"]).gather(own.cast(pl.UInt32)),
            "rpctype": _KINDS.gather(lines["kind"]).zip_with(~own, _same("UNKNOWN", lines)),
            "um": _name_of(names, lines["source"]).zip_with(inside, unnamed),
            "uminstanceid": _name_of(pods, lines["source_replica"]).zip_with(inside, absent),
            "interface": _called(options, lines),
            "dm": dm.zip_with(lines["dm_named"], _same("UNKNOWN", lines)),
            "dminstanceid": pod.zip_with(lines["dm_named"], _same("UNKNOWN", lines)),
            "rt": lines["rt"].cast(pl.Float64),
        }
    )
    chance = np.where(lines["kind"].to_numpy() == Kind.HTTP, _HTTP_TWICE, _TWICE)
    return _twice(frame, chance, random)


# -- the files -----------------------------------------------------------------------------------------------

_OF_CALLS = ("traceid", "timestamp", "rpcid", "um", "rpctype", "dm", "interface", "rt")
_USAGE = ("cpu_utilization", "memory_utilization")
_OF_2022 = ("timestamp", "traceid", "service", "rpc_id", "rpctype", "um", "uminstanceid", "interface", "dm")
_WHOSE = ("timestamp", "msname", "msinstanceid", "nodeid")
_COUNTED = tuple(f"{flow}_{what}" for flow in _FLOWS_2022 for what in ("rt", "mcr"))

TABLES: dict[str, dict[str, Format]] = {
    "microservices-v2021": {
        "Node": Format(
            None, 30, True, ("timestamp", "nodeid", "node_cpu_usage", "node_memory_usage"), _node_2021
        ),
        "MSResource": Format(
            HOUR,
            30,
            True,
            ("msname", "msinstanceid", "nodeid", "instance_cpu_usage", "instance_memory_usage", "timestamp"),
            _resource_2021,
        ),
        "MSRTQps": Format(
            HOUR // 2, MINUTE, True, ("timestamp", "msname", "msinstanceid", "metric", "value"), _rates_2021
        ),
        "MSCallGraph": Format(5 * MINUTE, MINUTE, True, _OF_CALLS, _calls_2021),
    },
    "microservices-v2022": {
        "NodeMetrics": Format(12 * HOUR, MINUTE, False, ("timestamp", "nodeid", *_USAGE), _nodes_2022),
        "MSMetrics": Format(HOUR // 2, MINUTE, False, (*_WHOSE, *_USAGE), _instances_2022),
        "MSRTMCR": Format(
            3 * MINUTE, MINUTE, False, (*_WHOSE, *_COUNTED, "http_mcr", "http_rt"), _rates_2022
        ),
        "CallGraph": Format(3 * MINUTE, MINUTE, False, (*_OF_2022, "dminstanceid", "rt"), _calls_2022),
    },
}
_LOGS = ("MSCallGraph", "CallGraph")
#: A container has so many rows of a stamp, at most.
_MOST_ROWS = 2 * len(_METRICS_2021)


def file_count(options: SynthesizeOptions, table: str) -> int:
    """How many files a table has."""
    return -(-options.span // _file_span(options, table))


def _file_span(options: SynthesizeOptions, table: str) -> int:
    published = TABLES[options.trace][table].span
    return options.span if published is None else options.file_span or published


def header(options: SynthesizeOptions, table: str) -> str:
    """The first line of a table's files."""
    spec = TABLES[options.trace][table]
    return ",".join(["", *spec.columns] if spec.numbered else spec.columns) + "\n"


def frames(options: SynthesizeOptions, table: str, index: int, block_rows: int) -> Iterator[pl.DataFrame]:
    """The rows of a file, in blocks; of the log, a minute each."""
    spec, span = TABLES[options.trace][table], _file_span(options, table)
    first, stop = index * span, min((index + 1) * span, options.span)
    if table in _LOGS:
        first_minute, size = max(0, first - MINUTE), 1  # what began before may go on
    else:
        first_minute, size = (
            first,
            max(1, block_rows // (_MOST_ROWS * max(options.container_count, options.machines))),
        )
    times = np.arange(first_minute, stop, spec.step)
    blocks = [times[at : at + size] for at in range(0, len(times), size)]
    order = generator(options, Stream.ROWS, _number(options, table), index).permutation(len(blocks))
    rows = 0
    for block in (blocks[at] for at in order):
        random = generator(options, Stream.ROWS, _number(options, table), 1, int(block[0]))
        frame = spec.make(options, block, random)
        if table in _LOGS:
            frame = frame.filter(pl.col("timestamp").is_between(first * 1000, stop * 1000, closed="left"))
        else:
            frame = frame[random.permutation(len(frame))]
        frame = frame.select(spec.columns)
        yield frame.with_row_index("", offset=rows) if spec.numbered else frame
        rows += len(frame)


def _number(options: SynthesizeOptions, table: str) -> int:
    return list(TABLES[options.trace]).index(table)
