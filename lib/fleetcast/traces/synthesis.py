"""A synthetic cluster, written as a raw trace in the exact format of cluster-trace-v2018, quirks included.

Three layers, from top to bottom of this file:

    the cluster   services depend on services (acyclic, at most four layers), machines host one to three
                  services, containers are replicas of a service on a machine
    the load      cpu = level + daily and weekly cycle + shock + bursts, drawn at knots five minutes apart
    the tables    rows sampled from the load, with the gaps, invalid values and disorder of the real files

What makes the trace worth forecasting is the shock, hours long and about half of the variance. With
c = coupling, r the share that travels and n upstream services, each one delay ago:

    shock of a service  =  √(1 − r) · own + √(r / n) · Σ shocks of its upstream services
    shock of a machine  =  √(1 − c) · private + √c · blend of the shocks of the services that it hosts

All terms have unit variance, so coupling changes where load comes from, not how much it varies: at 1 the past
of the upstream machines tells a machine's future, at 0 it tells nothing, though the records show the same
dependencies.

Everything is a pure function of the options and of a counter (entity, day; table, part), so any part of any
table can be made anywhere, at any time, without the others.
"""

from __future__ import annotations

import base64
import gzip
import io
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from enum import IntEnum
from functools import lru_cache, partial
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field, ValidationInfo, field_validator
from scipy.signal import fftconvolve
from scipy.signal.windows import hann

from fleetcast.config import Options, Seconds
from fleetcast.traces.alibaba_2018 import TABLES

Array = npt.NDArray[Any]

DAY = 86_400
#: A shard is one entity in a quarter of a day; the shards of a table lie in its files in no order.
SHARD = DAY // 4
#: Load is drawn at knots so far apart [s] and is linear in between.
KNOT = 300
KNOTS = DAY // KNOT


class SynthesizeOptions(Options):
    """What the synthetic cluster is like and how its files are cut."""

    machines: int = Field(100, ge=1)
    """Machines, of 96 cores each."""
    containers: int | None = Field(None, ge=1)
    """Containers; four a machine if not given."""
    services: int | None = Field(None, ge=1)
    """Applications, at most one a machine; a third of the machines, but at least two, if not given."""
    days: int = Field(8, ge=1)
    """Length of the trace [days]."""
    seed: int = Field(0, ge=0)
    """The same seed and options give the same bytes."""
    coupling: float = Field(0.8, ge=0, le=1)
    """Share of the shocks' variance that travels along dependencies [0-1]; at 0 machines are independent."""
    sample_interval: Seconds = 10
    """Time between two samples of a machine [s]; must divide 6 h. One in ten samples is missing."""
    container_interval: Seconds = 300
    """The same of a container. 10 s, as in the real trace, makes container_usage much the largest table."""
    job_interval: Seconds = Field(1800, ge=60)
    """Every service runs its batch job once in this time [s, or 30min]; must divide a day."""
    format: Literal["csv", "csv.gz", "tar.gz"] = "csv"
    """Of the files; an archive holds one csv."""
    rows_per_part: int = Field(1_000_000, ge=25_000)
    """Most rows in a file [rows]: 35 to 110 MB of text a million."""

    @field_validator("services")
    @classmethod
    def _at_most_one_a_machine(cls, services: int | None, info: ValidationInfo) -> int | None:
        machines = info.data.get("machines")  # missing if it is wrong itself
        if services is not None and machines is not None and services > machines:
            raise ValueError(f"expected at most one service a machine, with machines = {machines}")
        return services

    @field_validator("sample_interval", "container_interval")
    @classmethod
    def _divides_a_shard(cls, interval: int) -> int:
        if interval < 1 or SHARD % interval:
            raise ValueError("expected seconds that divide 6 h")
        return interval

    @field_validator("job_interval")
    @classmethod
    def _divides_a_day(cls, interval: int) -> int:
        if DAY % interval:
            raise ValueError("expected seconds that divide a day")
        return interval

    @property
    def container_count(self) -> int:
        """Containers, given or derived."""
        return self.containers or 4 * self.machines

    @property
    def service_count(self) -> int:
        """Services, given or derived."""
        return self.services or min(self.machines, max(2, self.machines // 3))

    @property
    def span(self) -> int:
        """Length of the trace [s]."""
        return self.days * DAY


class _Stream(IntEnum):
    """What a random generator is for; no two share their numbers."""

    DEPENDENCIES = 0
    HOSTING = 1
    SERVICE = 2
    MACHINE = 3
    CONTAINER = 4
    BATCH = 5
    ROWS = 6


def _random(options: SynthesizeOptions, stream: _Stream, *counter: int) -> np.random.Generator:
    """The generator of one place in the trace, the same in whatever process and order it is asked for."""
    return np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=(stream, *counter)))


# -- the cluster ---------------------------------------------------------------------------------------------

#: Services stand in so many layers; a service depends on services of the layer above.
LAYERS = 4
#: A shock needs 30 to 60 min from a service to the next.
DELAYS = (1800, 3600)


@lru_cache(maxsize=1 << 16)
def upstream(options: SynthesizeOptions, service: int) -> tuple[tuple[int, int], ...]:
    """The services whose load reaches a service, with their delays in knots: none of a root, else 1 to 3."""
    layers = min(LAYERS, options.service_count)
    # Layer k is services first(k) … first(k + 1) − 1.
    first = [-(-layer * options.service_count // layers) for layer in range(layers + 1)]
    layer = service * layers // options.service_count
    if layer == 0:
        return ()
    random = _random(options, _Stream.DEPENDENCIES, service)
    above = np.arange(first[layer - 1], first[layer])
    chosen = random.choice(above, min(int(random.integers(1, 4)), len(above)), replace=False)
    delays = random.integers(DELAYS[0] // KNOT, DELAYS[1] // KNOT, len(chosen), endpoint=True)
    return tuple((int(parent), int(delay)) for parent, delay in zip(chosen, delays, strict=True))


def home_machines(options: SynthesizeOptions, service: int) -> range:
    """The machines whose main service it is; its batch tasks run there."""
    return range(service, options.machines, options.service_count)


@lru_cache(maxsize=1 << 16)
def hosted(options: SynthesizeOptions, machine: int) -> tuple[tuple[int, float], ...]:
    """The 1 to 3 services on a machine, the main one first, with their shares of its shared variance."""
    random = _random(options, _Stream.HOSTING, machine)
    main = machine % options.service_count
    number = min(int(random.integers(0, 3)), options.service_count - 1)
    # Steps from the main service around all services that never come back to it.
    steps = random.permutation(options.service_count - 1)[:number] + 1
    guests = [(main + step) % options.service_count for step in steps.tolist()]
    share = 0.8 if guests else 1.0
    return ((main, share), *((guest, (1 - share) / len(guests)) for guest in guests))


def placement(options: SynthesizeOptions, container: int) -> tuple[int, int]:
    """A container's machine and service."""
    turn, machine = divmod(container, options.machines)
    services = hosted(options, machine)
    return machine, services[turn % len(services)][0]


# -- the load ------------------------------------------------------------------------------------------------


def _hump(hours: float) -> Array:
    """A smoothing kernel of unit energy: white noise goes in, smooth noise of unit variance comes out."""
    kernel = hann(int(hours * 3600 / KNOT) + 1)
    return kernel / np.linalg.norm(kernel)


_SHOCK = _hump(3)
_DRIFT = _hump(12)
#: Share r of a service's shock that comes from upstream.
_TRAVELS = 0.8


@dataclass(frozen=True)
class _Levels:
    """How much load a kind of entity has [percent]; each entity draws its own within the ranges."""

    stream: _Stream
    level: tuple[float, float]
    swing: tuple[float, float]
    shock: float
    memory: tuple[float, float]


_MACHINE = _Levels(_Stream.MACHINE, level=(34, 50), swing=(5, 10), shock=8.0, memory=(70, 92))
_CONTAINER = _Levels(_Stream.CONTAINER, level=(10, 30), swing=(2, 6), shock=5.0, memory=(40, 85))


@dataclass(frozen=True)
class _Profile:
    """One entity's regular behaviour."""

    level: float
    """Mean cpu [percent]."""
    swing: float
    """Half of the way between the day's lowest and highest load [percent of cpu]."""
    peak: float
    """Time of day of the highest load [s]."""
    weekend: float
    """How much lower the load is in the middle of the weekend [percent of cpu]."""
    memory: float
    """Mean memory [percent]."""
    network: float
    """Percent of network per percent of cpu."""


@lru_cache(maxsize=1 << 16)
def _profile(options: SynthesizeOptions, levels: _Levels, entity: int) -> _Profile:
    random = _random(options, levels.stream, entity)
    swing = random.uniform(*levels.swing)
    return _Profile(
        level=random.uniform(*levels.level),
        swing=swing,
        peak=random.normal(15, 2.5) * 3600,
        weekend=swing * random.uniform(0.2, 1.0),
        memory=random.uniform(*levels.memory),
        network=random.uniform(0.7, 1.2),
    )


def _span(series: Callable[[int], Array], first: int, stop: int) -> Array:
    """Knots `first` … `stop` − 1, counted from the trace's start, of a series that is made day by day."""
    days = range(first // KNOTS, (stop - 1) // KNOTS + 1)
    skipped = first - days[0] * KNOTS
    return np.concatenate([series(day) for day in days])[skipped : skipped + stop - first]


def _innovations(options: SynthesizeOptions, stream: _Stream, entity: int, day: int) -> Array:
    """White noise of one day; what happened shortly before the trace counts too, so `day` may be negative."""
    before = LAYERS + 1  # a shock comes from at most one day back a layer
    return _random(options, stream, entity, before + day).standard_normal(KNOTS)


@lru_cache(maxsize=1 << 14)
def service_shock(options: SynthesizeOptions, service: int, day: int) -> Array:
    """[KNOTS] shock of a service on a day, in units of its standard deviation."""
    first, stop = day * KNOTS, (day + 1) * KNOTS
    innovations = partial(_innovations, options, _Stream.SERVICE, service)
    noise = _span(innovations, first - len(_SHOCK) + 1, stop)
    shock: Array = np.convolve(noise, _SHOCK, mode="valid")
    parents = upstream(options, service)
    if not parents:
        return shock
    arriving = sum(
        _span(partial(service_shock, options, parent), first - delay, stop - delay)
        for parent, delay in parents
    )
    return math.sqrt(1 - _TRAVELS) * shock + math.sqrt(_TRAVELS / len(parents)) * arriving


@dataclass(frozen=True)
class _Load:
    """Load of S shards at their K knots, [S, K] each, in percent."""

    cpu: Array
    memory: Array
    network: Array


def _load(
    options: SynthesizeOptions, levels: _Levels, entities: Array, starts: Array, random: np.random.Generator
) -> _Load:
    """Load of shards with an entity and a start [s] each; `random` draws only what nobody could foresee."""
    knots = SHARD // KNOT + 1
    private, drift = _private_shock_and_drift(options, levels, entities, starts, knots)
    shock = math.sqrt(1 - options.coupling) * private
    if options.coupling > 0:
        shock += math.sqrt(options.coupling) * _shared_shock(options, levels, entities, starts, knots)
    bursts = np.where(random.random(shock.shape) < 0.01, random.exponential(1.5, shock.shape), 0.0)

    profiles = [_profile(options, levels, entity) for entity in entities.tolist()]
    level, swing, peak, weekend, memory, network = np.array([astuple(p) for p in profiles]).T[:, :, None]
    time = starts[:, None] + KNOT * np.arange(knots)
    # The trace starts on a Monday; Saturday and Sunday are one smooth dip.
    into_weekend = np.clip(time / DAY % 7 - 5, 0, 2) / 2
    cycle = swing * np.cos(2 * np.pi * (time - peak) / DAY) - weekend * np.sin(np.pi * into_weekend) ** 2
    cpu = np.maximum(level + cycle + levels.shock * (shock + bursts), 0)
    return _Load(cpu=cpu, memory=memory + 3 * drift + 0.1 * cycle, network=network * cpu)


def _private_shock_and_drift(
    options: SynthesizeOptions, levels: _Levels, entities: Array, starts: Array, knots: int
) -> tuple[Array, Array]:
    """[S, K] each: the entity's own shock, and the same noise seen through a wider kernel."""
    history = len(_DRIFT) - 1
    noise = np.stack(
        [
            _span(partial(_innovations, options, levels.stream, entity), first - history, first + knots)
            for entity, first in zip(entities.tolist(), (starts // KNOT).tolist(), strict=True)
        ]
    )
    shock = fftconvolve(noise[:, history - len(_SHOCK) + 1 :], _SHOCK[None], mode="valid", axes=1)
    return shock, fftconvolve(noise, _DRIFT[None], mode="valid", axes=1)


def _shared_shock(
    options: SynthesizeOptions, levels: _Levels, entities: Array, starts: Array, knots: int
) -> Array:
    """[S, K]: the blend of the shocks of a machine's services, or the shock of a container's service."""
    shared = np.zeros((len(entities), knots))
    for row, entity, first in zip(shared, entities.tolist(), (starts // KNOT).tolist(), strict=True):
        machine = levels is _MACHINE
        services = hosted(options, entity) if machine else ((placement(options, entity)[1], 1.0),)
        for service, share in services:
            row += math.sqrt(share) * _span(partial(service_shock, options, service), first, first + knots)
    return shared


# -- the usage tables ----------------------------------------------------------------------------------------

#: Nobody reports between these two stamps [s], on day 2.
HOLE = (141_350, 160_590)
#: cpi, mem_gps, mkpi and mpki are empty before this share of the trace.
LATE_START = 553_250 / 691_200
#: Container stamps run one day later than machine stamps; both clocks are right.
CONTAINER_DELAY = DAY
_MISSING_SAMPLES = 0.1
_MISSING_IDS = 0.01
_INVALID = 1e-4

#: `_HUNDREDTHS[i]` is the text of i / 100, as short as in the trace; far faster than formatting floats.
_HUNDREDTHS = pl.Series([f"{i / 100:.2f}".rstrip("0").rstrip(".") for i in range(10_001)])


def _names(prefix: str, numbers: Array) -> pl.Series:
    """`m_1`, `m_2`, … of entities that are counted from 0 here."""
    return pl.Series([f"{prefix}_{number + 1}" for number in numbers.tolist()], dtype=pl.String)


def _percent(values: Array) -> Array:
    return np.clip(np.rint(values), 0, 100).astype(np.uint8)


def _hundredths(values: Array) -> pl.Series:
    return _HUNDREDTHS.gather(np.clip(np.rint(values * 100), 0, 10_000).astype(np.uint32))


def _usage(
    options: SynthesizeOptions,
    levels: _Levels,
    entities: Array,
    starts: Array,
    interval: int,
    random: np.random.Generator,
) -> tuple[Array, pl.DataFrame]:
    """Samples of S shards: the shard of each row, and the columns that both usage tables have."""
    load = _load(options, levels, entities, starts, random)
    offsets = np.arange(0, SHARD, interval)
    time = starts[:, None] + offsets
    reported = (random.random(time.shape, np.float32) >= _MISSING_SAMPLES) & (
        (time <= HOLE[0]) | (time >= HOLE[1])
    )
    knot = offsets // KNOT
    weight = (offsets % KNOT / KNOT).astype(np.float32)

    def sampled(values: Array) -> Array:
        """[S, K] at the knots → [rows] at the samples."""
        values = values.astype(np.float32)
        between: Array = values[:, knot] * (1 - weight) + values[:, knot + 1] * weight
        return between[reported]

    cpu, network, time = sampled(load.cpu), sampled(load.network), time[reported]
    rows = len(time)

    def noise(deviation: float) -> Array:
        return random.standard_normal(rows, np.float32) * np.float32(deviation)

    disk = _percent(0.08 * cpu + 4 * random.standard_exponential(rows, np.float32)).astype(np.int16)
    odd = random.random(rows, np.float32)
    disk[odd < _INVALID] = -1
    disk[odd >= 1 - _INVALID] = 101
    late = pl.Series(time >= LATE_START * options.span)
    columns = {
        "time_stamp": time.astype(np.int32),
        "cpu_util_percent": _percent(np.maximum(cpu + noise(2.5), 1)),
        "mem_util_percent": _percent(sampled(load.memory) + noise(0.7)),
        "mem_gps": _hundredths(0.12 * cpu + noise(0.5)),
        "mkpi": _percent(0.01 * cpu + noise(0.5)),
        "net_in": _hundredths(network + noise(0.3)),
        "net_out": _hundredths(0.78 * network + noise(0.3)),
        "disk_io_percent": disk,
    }
    frame = pl.DataFrame(columns).with_columns(pl.when(late).then(pl.col("mem_gps", "mkpi")))
    shard = np.broadcast_to(np.arange(len(entities), dtype=np.uint32)[:, None], reported.shape)[reported]
    return shard, frame


def _machine_usage(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
    stretch, machines = np.divmod(shards, options.machines)
    shard, frame = _usage(options, _MACHINE, machines, stretch * SHARD, options.sample_interval, random)
    return frame.with_columns(_names("m", machines).gather(shard).alias("machine_id"))


def _container_usage(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
    stretch, containers = np.divmod(shards, options.container_count)
    starts = CONTAINER_DELAY + stretch * SHARD
    shard, frame = _usage(options, _CONTAINER, containers, starts, options.container_interval, random)
    machines = np.array([placement(options, container)[0] for container in containers.tolist()])
    named = pl.Series(random.random(len(frame)) >= _MISSING_IDS)
    cpi = _hundredths(1.4 + 0.2 * random.standard_normal(len(frame), np.float32))
    return frame.rename({"mkpi": "mpki"}).with_columns(
        pl.when(named).then(_names("c", containers).gather(shard)).alias("container_id"),
        _names("m", machines).gather(shard).alias("machine_id"),
        pl.when(pl.col("mem_gps").is_not_null()).then(cpi).alias("cpi"),
    )


# -- the meta tables -----------------------------------------------------------------------------------------


def _first_and_later(
    options: SynthesizeOptions, entities: Array, random: np.random.Generator
) -> tuple[Array, Array]:
    """Entity and stamp of each record: one at 0, and of every second entity another some time later."""
    again = entities[random.random(len(entities)) < 0.5]
    later = random.integers(1, options.span, len(again))
    return np.concatenate([entities, again]), np.concatenate([np.zeros_like(entities), later])


def _machine_meta(options: SynthesizeOptions, machines: Array, random: np.random.Generator) -> pl.DataFrame:
    machines, times = _first_and_later(options, machines, random)
    count = len(machines)
    return pl.DataFrame(
        {
            "machine_id": _names("m", machines),
            "time_stamp": times,
            "failure_domain_1": machines // 14 + 1,
            "failure_domain_2": machines % 20 + 1,
            "cpu_num": np.full(count, 96),
            "mem_size": np.full(count, 100),
            "status": np.where(random.random(count) < 3e-4, "IMPORT_INSTALLING", "USING"),
        }
    ).with_columns(pl.when(pl.Series(random.random(count) >= 0.002)).then("failure_domain_2"))


def _container_meta(
    options: SynthesizeOptions, containers: Array, random: np.random.Generator
) -> pl.DataFrame:
    cores = random.choice([4, 8, 16], len(containers))
    size = dict(zip(containers.tolist(), cores.tolist(), strict=True))
    containers, times = _first_and_later(options, containers, random)
    cores = np.array([size[container] for container in containers.tolist()])
    placements = np.array([placement(options, container) for container in containers.tolist()])
    return pl.DataFrame(
        {
            "container_id": _names("c", containers),
            "machine_id": _names("m", placements[:, 0]),
            "time_stamp": times,
            "app_du": _names("app", placements[:, 1]),
            "status": np.full(len(containers), "started"),
            "cpu_request": cores * 100,  # 100 = one core
            "cpu_limit": cores * 100,
            "mem_size": _hundredths(cores * 0.39),
        }
    )


# -- the batch tables ----------------------------------------------------------------------------------------

#: Most instances of a task, and most tasks of a job: three upstream and the one that waits for them.
_INSTANCES = 3
_TASKS = 4
#: How the last task of a job stands when the trace ends.
_OUTCOMES = ("Terminated", "Running", "Waiting", "Failed")
_OUTCOME_SHARES = (0.957, 0.03, 0.01, 0.003)


def _jobs(options: SynthesizeOptions, service: int, day: int) -> dict[str, Any]:
    """The tasks of the jobs that a service runs on a day, by column, all as if they had ended well.

    A job's first tasks run where the upstream services live and its last task, which waits for them, where
    the service itself lives: so the recorded dependencies point the way in which shocks travel. A root has
    nothing to wait for; its jobs are single tasks. `runs_on` is the service on whose machines a task runs.
    """
    random = _random(options, _Stream.BATCH, service, day)
    parents = [parent for parent, _ in upstream(options, service)]
    jobs, width = DAY // options.job_interval, len(parents) + 1
    submitted = day * DAY + np.arange(jobs) * options.job_interval
    submitted += random.integers(0, options.job_interval // 2, jobs)
    lasting = random.geometric(1 / 90, (jobs, width))
    start = np.repeat(submitted[:, None], width, axis=1)
    if parents:
        start[:, -1] = (start + lasting)[:, :-1].max(axis=1) + random.integers(1, 30, jobs)
    outcome = np.zeros((jobs, width), dtype=np.uint8)
    outcome[:, -1] = random.choice(len(_OUTCOMES), jobs, p=_OUTCOME_SHARES)
    number = (day * jobs + np.arange(jobs)) * options.service_count + service + 1
    return {
        "task_name": [name for _ in range(jobs) for name in _task_names(len(parents), random)],
        "job_name": np.repeat(number, width),
        "instance_num": random.integers(1, _INSTANCES, jobs * width, endpoint=True),
        "outcome": outcome.ravel(),
        "start_time": start.ravel(),
        "end_time": (start + lasting).ravel(),
        "plan_cpu": random.choice([50, 100, 200], jobs * width),
        "plan_mem": random.uniform(0.1, 1.0, jobs * width),
        "unplanned": random.random(jobs * width) < 0.5,
        "runs_on": np.tile([*parents, service], jobs),
    }


def _task_names(parents: int, random: np.random.Generator) -> list[str]:
    """Names of a job's tasks, which hold the dependencies: `J3_1_2` waits for `M1` and `M2`."""
    if not parents:
        if random.random() < 0.2:
            return ["MergeTask"]
        return ["task_" + base64.b64encode(str(random.integers(1 << 62)).encode()).decode()]
    first = [f"M{number}" for number in range(1, parents + 1)]
    letter = "R" if parents == 1 else "J"
    stage = "_Stg8" if random.random() < 0.1 else ""
    return [*first, f"{letter}{parents + 1}_{'_'.join(name[1:] for name in first)}{stage}"]


def _tasks(options: SynthesizeOptions, shards: Array) -> pl.DataFrame:
    """The tasks of some service-days, with what the trace leaves out of those that have not ended."""
    jobs = [
        _jobs(options, shard % options.service_count, shard // options.service_count)
        for shard in shards.tolist()
    ]
    names = pl.Series([name for job in jobs for name in job.pop("task_name")])
    columns = {name: np.concatenate([job[name] for job in jobs]) for name in jobs[0]}
    status = pl.Series(_OUTCOMES).gather(columns["outcome"].astype(np.uint32))
    waiting, unfinished = pl.col("status") == "Waiting", pl.col("status").is_in(["Waiting", "Running"])
    return pl.DataFrame(
        {
            **columns,
            "task_name": names,
            "task_type": np.ones(len(names), dtype=np.uint8),
            "status": status,
            "plan_mem": _hundredths(columns["plan_mem"]),
        }
    ).with_columns(
        pl.format("j_{}", "job_name").alias("job_name"),
        pl.when(waiting).then(0).otherwise("start_time").alias("start_time"),
        pl.when(unfinished).then(0).otherwise("end_time").alias("end_time"),
        pl.when(~waiting).then("instance_num"),
        pl.when(~(unfinished & pl.col("unplanned"))).then(pl.col("plan_cpu", "plan_mem")),
    )


def _batch_task(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
    return _tasks(options, shards)


def _batch_instance(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
    """Every task's instances on machines of the service that the task runs on; waiting tasks have none."""
    tasks = _tasks(options, shards).filter(pl.col("status") != "Waiting")
    total = tasks["instance_num"].to_numpy()
    row = np.repeat(np.arange(len(tasks), dtype=np.uint32), total)
    sequence = np.arange(len(row)) - np.repeat(np.cumsum(total) - total, total)
    service = tasks["runs_on"].to_numpy()[row]
    homes = (options.machines - 1 - service) // options.service_count + 1
    machines = service + options.service_count * random.integers(0, homes)
    cpu = random.gamma(4, 20, len(row))
    memory = random.uniform(0.02, 0.8, len(row))
    return tasks[row].with_columns(
        pl.format("ins_{}", pl.Series(random.integers(1, 1 << 40, len(row)))).alias("instance_name"),
        _names("m", machines).alias("machine_id"),
        pl.Series(sequence + 1).alias("seq_no"),
        pl.Series(total[row]).alias("total_seq_no"),
        pl.Series(np.rint(cpu).astype(np.int32)).alias("cpu_avg"),
        pl.Series(np.rint(cpu * 1.4).astype(np.int32)).alias("cpu_max"),
        _hundredths(memory).alias("mem_avg"),
        _hundredths(memory * 1.2).alias("mem_max"),
    )


# -- parts and files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How a table is cut: it consists of `shards`, of at most `rows` rows each."""

    shards: int
    rows: int
    make: Callable[[SynthesizeOptions, Array, np.random.Generator], pl.DataFrame]


def _plan(options: SynthesizeOptions, table: str) -> _Plan:
    quarters = options.span // SHARD
    batch = options.service_count * options.days
    tasks = DAY // options.job_interval * _TASKS
    plans = {
        "machine_meta": _Plan(options.machines, 2, _machine_meta),
        "machine_usage": _Plan(options.machines * quarters, SHARD // options.sample_interval, _machine_usage),
        "container_meta": _Plan(options.container_count, 2, _container_meta),
        "container_usage": _Plan(
            options.container_count * quarters, SHARD // options.container_interval, _container_usage
        ),
        "batch_task": _Plan(batch, tasks, _batch_task),
        "batch_instance": _Plan(batch, tasks * _INSTANCES, _batch_instance),
    }
    return plans[table]


@dataclass(frozen=True)
class Part:
    """One file of the trace."""

    table: str
    index: int

    @property
    def name(self) -> str:
        """`machine_usage-00000`, without the format's ending."""
        return f"{self.table}-{self.index:05d}"


def parts(options: SynthesizeOptions) -> list[Part]:
    """All files of the trace."""
    found = []
    for table in TABLES:
        plan = _plan(options, table)
        count = -(-plan.shards // (options.rows_per_part // plan.rows))
        found += [Part(table, index) for index in range(count)]
    return found


def frames(options: SynthesizeOptions, part: Part, block_rows: int = 1 << 17) -> Iterator[pl.DataFrame]:
    """The rows of a part, in blocks small enough for the processor's caches; no order is kept anywhere."""
    plan = _plan(options, part.table)
    size = options.rows_per_part // plan.rows
    # Walking around the shards by a stride near the golden ratio scatters them without a list of them all.
    stride = max(1, round(0.618 * plan.shards))
    while math.gcd(stride, plan.shards) > 1:
        stride += 1
    order = np.arange(part.index * size, min((part.index + 1) * size, plan.shards))
    shards = order * stride % plan.shards
    random = _random(options, _Stream.ROWS, list(TABLES).index(part.table), part.index)
    step = max(1, block_rows // plan.rows)
    columns = list(TABLES[part.table].columns)
    for first in range(0, len(shards), step):
        yield plan.make(options, shards[first : first + step], random).select(columns)


def write_part(options: SynthesizeOptions, part: Part, file: IO[bytes]) -> int:
    """Writes one part in the options' format; returns its rows. The same bytes every time."""
    if options.format == "csv":
        return _write_csv(options, part, file)
    # Without a name and a time in its header a gzip stream depends on its content alone.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        if options.format == "csv.gz":
            return _write_csv(options, part, cast(IO[bytes], packed))
        text = io.BytesIO()  # an archive states the size before the content
        rows = _write_csv(options, part, text)
        member = tarfile.TarInfo(f"{part.name}.csv")
        member.size = text.tell()
        text.seek(0)
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.addfile(member, text)
        return rows


def _write_csv(options: SynthesizeOptions, part: Part, file: IO[bytes]) -> int:
    rows = 0
    for frame in frames(options, part):
        text = io.BytesIO()
        frame.write_csv(text, include_header=False, quote_style="never")
        file.write(text.getbuffer())
        rows += len(frame)
    return rows
