"""The tables: rows sampled from the load, with the gaps, invalid values and disorder of the real files.

A table consists of shards: a machine or container in a quarter of a day, or for good in the meta tables; a
service on a day in the batch tables. One function per table makes all rows of the shards that it is given.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fleetcast.traces.synthesis.cluster import (
    DAY,
    KNOT,
    SHARD,
    Array,
    Stream,
    SynthesizeOptions,
    generator,
    placement,
    upstream,
)
from fleetcast.traces.synthesis.load import CONTAINER, MACHINE, Kind, load

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
    kind: Kind,
    entities: Array,
    starts: Array,
    interval: int,
    random: np.random.Generator,
) -> tuple[Array, pl.DataFrame]:
    """Samples of S shards: the shard of each row, and the columns that both usage tables have."""
    loads = load(options, kind, entities, starts, random)
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

    cpu, network, time = sampled(loads.cpu), sampled(loads.network), time[reported]
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
        "mem_util_percent": _percent(sampled(loads.memory) + noise(0.7)),
        "mem_gps": _hundredths(0.12 * cpu + noise(0.5)),
        "mkpi": _percent(0.01 * cpu + noise(0.5)),
        "net_in": _hundredths(network + noise(0.3)),
        "net_out": _hundredths(0.78 * network + noise(0.3)),
        "disk_io_percent": disk,
    }
    frame = pl.DataFrame(columns).with_columns(pl.when(late).then(pl.col("mem_gps", "mkpi")))
    shard = np.broadcast_to(np.arange(len(entities), dtype=np.uint32)[:, None], reported.shape)[reported]
    return shard, frame


def machine_usage(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
    stretch, machines = np.divmod(shards, options.machines)
    shard, frame = _usage(options, MACHINE, machines, stretch * SHARD, options.sample_interval, random)
    return frame.with_columns(_names("m", machines).gather(shard).alias("machine_id"))


def container_usage(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
    stretch, containers = np.divmod(shards, options.container_count)
    starts = CONTAINER_DELAY + stretch * SHARD
    shard, frame = _usage(options, CONTAINER, containers, starts, options.container_interval, random)
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


def machine_meta(options: SynthesizeOptions, machines: Array, random: np.random.Generator) -> pl.DataFrame:
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


def container_meta(
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
    random = generator(options, Stream.BATCH, service, day)
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


def batch_task(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
    return _tasks(options, shards)


def batch_instance(options: SynthesizeOptions, shards: Array, random: np.random.Generator) -> pl.DataFrame:
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


# -- how they are cut ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a table is cut: it consists of `shards`, of at most `rows` rows each."""

    shards: int
    rows: int
    make: Callable[[SynthesizeOptions, Array, np.random.Generator], pl.DataFrame]


def plan(options: SynthesizeOptions, table: str) -> Plan:
    """How one of the six tables is cut."""
    quarters = options.span // SHARD
    batch = options.service_count * options.days
    tasks = DAY // options.job_interval * _TASKS
    plans = {
        "machine_meta": Plan(options.machines, 2, machine_meta),
        "machine_usage": Plan(options.machines * quarters, SHARD // options.sample_interval, machine_usage),
        "container_meta": Plan(options.container_count, 2, container_meta),
        "container_usage": Plan(
            options.container_count * quarters, SHARD // options.container_interval, container_usage
        ),
        "batch_task": Plan(batch, tasks, batch_task),
        "batch_instance": Plan(batch, tasks * _INSTANCES, batch_instance),
    }
    return plans[table]
