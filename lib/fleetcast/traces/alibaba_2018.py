"""Alibaba cluster-trace-v2018: six headerless tables of machines, containers and batch jobs.

Times are seconds from the trace's start. Container stamps run one day later than machine stamps; the
publisher says that both are right, so they are used as they are. Utilisations, network and bandwidth are
percent of capacity (0-100); -1 and 101 mark invalid values. A file is in no order, so order is never relied
on.
"""

from __future__ import annotations

import polars as pl

from fleetcast.traces.raw import Binning, Table
from fleetcast.traces.usage import LARGEST, bins, clock, entities, missing, unix

#: Metric → raw column, and what to divide it by to reach our unit.
Usage = dict[str, tuple[str, float]]
_USAGE: Usage = {
    "cpu": ("cpu_util_percent", 100.0),
    "memory": ("mem_util_percent", 100.0),
    "disk_io": ("disk_io_percent", 100.0),
    "net_in": ("net_in", 100.0),
    "net_out": ("net_out", 100.0),
    "memory_bandwidth": ("mem_gps", 100.0),
}
_MACHINE_USAGE = {**_USAGE, "mpki": ("mkpi", 1.0)}  # spelt so in the schema
_CONTAINER_USAGE = {**_USAGE, "mpki": ("mpki", 1.0), "cpi": ("cpi", 1.0)}

#: Every metric that this source has, in the order of the telemetry's columns, and what to divide it by.
METRICS = {metric: divisor for metric, (_, divisor) in _CONTAINER_USAGE.items()}

#: The tables that telemetry is made of.
TELEMETRY = ("machine_usage", "container_usage")

#: The letter means nothing; then the task's number, the numbers it waits for, and maybe a suffix (`_Stg8`).
_TASK_NAME = r"^[A-Za-z](\d+)((?:_\d+)*)_?(?:_[A-Za-z].*)?$"
#: Names are cut off here, so a last number that ends here may be the stump of a longer one.
_TASK_NAME_LIMIT = 50

_text, _integer, _real = pl.String, pl.Int64, pl.Float32


#: Running and Waiting records carry end_time 0; any other end before the start is a clock that ran backwards.
_ENDS_EARLY = {
    "end_time is before start_time": (pl.col("end_time") != 0) & (pl.col("end_time") < pl.col("start_time"))
}


def _invalid(usage: Usage) -> dict[str, pl.Expr]:
    """Present values that no fraction of capacity, and no count, can have; nan and inf are among them."""
    return {
        column: ~pl.col(column).is_between(0, 100 if divisor == 100.0 else LARGEST)
        for column, divisor in usage.values()
    }


_SECOND = pl.col("time_stamp")


def _bins(frame: pl.DataFrame, entity: str, usage: Usage, binning: Binning) -> pl.DataFrame:
    columns = {metric: column for metric, (column, _) in usage.items()}
    return bins(frame, entity, _SECOND, columns, binning)


def _machine_meta(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    machines = entities(
        frame,
        _SECOND,
        entity=pl.col("machine_id"),
        kind=pl.lit("machine"),
        cpu_capacity=pl.col("cpu_num"),
        memory_capacity=pl.col("mem_size"),
    )
    return {"entities": machines}


def _machine_usage(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    bins = _bins(frame, "machine_id", _MACHINE_USAGE, binning)
    names = bins.group_by("entity").agg(pl.col("time").max().dt.epoch("s") - binning.start)
    machines = entities(
        names, pl.col("time"), entity=pl.col("entity"), kind=pl.lit("machine"), measured=pl.lit(True)
    )
    return {"machine": bins, "entities": machines}


def _container_meta(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    containers = entities(
        frame,
        _SECOND,
        entity=pl.col("container_id"),
        kind=pl.lit("container"),
        parent=pl.col("machine_id"),
        service=pl.col("app_du"),
        cpu_capacity=pl.col("cpu_limit") / 100,  # 100 = one core
        memory_capacity=pl.col("mem_size"),
    )
    placed = frame.drop_nulls(["machine_id", "app_du"]).select(
        container="container_id",
        machine="machine_id",
        service="app_du",
        start=unix(_SECOND, binning, 1),
        running=pl.col("status").ne_missing("stopped"),
    )
    return {"entities": containers, "hosted": placed}


def _container_usage(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    names = frame.group_by("container_id", "machine_id").agg(pl.col("time_stamp").max())
    containers = entities(
        names,
        _SECOND,
        entity=pl.col("container_id"),
        kind=pl.lit("container"),
        parent=pl.col("machine_id"),
        measured=pl.lit(True),
    )
    return {"container": _bins(frame, "container_id", _CONTAINER_USAGE, binning), "entities": containers}


def parse_task_names(names: pl.Series) -> pl.DataFrame:
    """Task names → `number` (int64, null where the task stands alone) and `upstream` (list of int64).

    `M1` waits for nothing, `M5_3_4` for 3 and 4, `R2_1_Stg8` for 1; `MergeTask` and `task_<base64>` stand
    alone.
    """
    name = pl.col("name")
    waits = name.str.extract(_TASK_NAME, 2)
    cut_off = (name.str.len_chars() >= _TASK_NAME_LIMIT) & name.str.contains(r"\d$")
    whole = pl.when(cut_off).then(waits.str.replace(r"_\d+$", "")).otherwise(waits)
    number = name.str.extract(_TASK_NAME, 1).cast(pl.Int64, strict=False)
    upstream = (
        whole.str.extract_all(r"\d+").list.eval(pl.element().cast(pl.Int64, strict=False)).list.drop_nulls()
    )
    parsed = names.alias("name").cast(pl.String).to_frame().select(number=number, upstream=upstream)
    alone = pl.col("number").is_null() | pl.col("upstream").is_null()
    return parsed.with_columns(upstream=pl.when(alone).then([]).otherwise(pl.col("upstream")))


def _batch_task(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    named = frame.select("job_name", "task_name", slice=unix(pl.col("start_time"), binning, binning.slice))
    tasks = pl.concat([named, parse_task_names(named["task_name"])], how="horizontal")
    return {"tasks": tasks.drop_nulls("number")}


def _batch_instance(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    started = frame.filter(pl.col("machine_id").is_not_null() & (pl.col("start_time") > 0)).select(
        "job_name",
        "task_name",
        machine="machine_id",
        slice=unix(pl.col("start_time"), binning, binning.slice),
    )
    keys = ["job_name", "task_name", "machine", "slice"]
    return {"instances": started.group_by(keys).agg(pl.len().cast(pl.Int64).alias("instances"))}


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "machine_meta",
            {
                "machine_id": _text,
                "time_stamp": _integer,
                "failure_domain_1": _text,
                "failure_domain_2": _text,
                "cpu_num": _integer,
                "mem_size": _real,
                "status": _text,
            },
            missing("machine_id") | clock("time_stamp"),
            {},
            _machine_meta,
        ),
        Table(
            "machine_usage",
            {
                "machine_id": _text,
                "time_stamp": _integer,
                "cpu_util_percent": _real,
                "mem_util_percent": _real,
                "mem_gps": _real,
                "mkpi": _real,
                "net_in": _real,
                "net_out": _real,
                "disk_io_percent": _real,
            },
            missing("machine_id") | clock("time_stamp"),
            _invalid(_MACHINE_USAGE),
            _machine_usage,
        ),
        Table(
            "container_meta",
            {
                "container_id": _text,
                "machine_id": _text,
                "time_stamp": _integer,
                "app_du": _text,
                "status": _text,
                "cpu_request": _real,
                "cpu_limit": _real,
                "mem_size": _real,
            },
            missing("container_id") | clock("time_stamp"),
            {},
            _container_meta,
        ),
        Table(
            "container_usage",
            {
                "container_id": _text,
                "machine_id": _text,
                "time_stamp": _integer,
                "cpu_util_percent": _real,
                "mem_util_percent": _real,
                "cpi": _real,
                "mem_gps": _real,
                "mpki": _real,
                "net_in": _real,
                "net_out": _real,
                "disk_io_percent": _real,
            },
            missing("container_id") | clock("time_stamp"),
            _invalid(_CONTAINER_USAGE),
            _container_usage,
        ),
        Table(
            "batch_task",
            {
                "task_name": _text,
                "instance_num": _real,
                "job_name": _text,
                "task_type": _text,
                "status": _text,
                "start_time": _integer,
                "end_time": _integer,
                "plan_cpu": _real,
                "plan_mem": _real,
            },
            missing("job_name") | missing("task_name") | clock("start_time") | _ENDS_EARLY,
            {},
            _batch_task,
        ),
        Table(
            "batch_instance",
            {
                "instance_name": _text,
                "task_name": _text,
                "job_name": _text,
                "task_type": _text,
                "status": _text,
                "start_time": _integer,
                "end_time": _integer,
                "machine_id": _text,
                "seq_no": _real,
                "total_seq_no": _real,
                "cpu_avg": _real,
                "cpu_max": _real,
                "mem_avg": _real,
                "mem_max": _real,
            },
            missing("job_name") | missing("task_name") | clock("start_time") | _ENDS_EARLY,
            {},
            _batch_instance,
        ),
    )
}
