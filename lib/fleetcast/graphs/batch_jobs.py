"""Dependencies between machines from the task graphs of batch jobs.

A task waits for others of its job and reads what they wrote, so load moves from the machines of the upstream
task to those of the downstream task. Task records carry the graph, instance records carry the machines.
"""

from __future__ import annotations

from datetime import datetime

import polars as pl

from fleetcast.graphs import dependencies

_TASK = ["job_name", "task_name"]


def edges(
    tasks: pl.DataFrame, placements: pl.DataFrame, max_machines: int = 64, since: datetime | None = None
) -> tuple[pl.DataFrame, int]:
    """The batch edges of whole jobs, and how many (task, machine) were cut to bound the number of pairs.

    `tasks` holds `job_name`, `task_name`, the task's `number` in its job and `upstream`, the list of the
    numbers that it waits for; `placements` holds `job_name`, `task_name`, `machine`, `slice` (start of the
    slice in which they started) and `instances`, how many of the task's. For each pair of an upstream and a
    downstream task, and each slice in which downstream instances started,

        weight(m → m') = share of the upstream instances so far that ran on m · downstream instances on m',

    summed over pairs: how many downstream instances on m' are expected to be fed from m. "So far" is up to
    and including the slice, for a slow upstream task feeds later slices. Of a task only the `max_machines`
    machines with the most instances take part (ties by name); shares are of all its instances. Edges of
    slices before `since` are left out.
    """
    pairs = _task_pairs(tasks)
    on_machines = placements.join(pairs.select(_both_sides()).explode("task_name").unique(), on=_TASK)
    ranked = _by_machine(on_machines)
    kept = on_machines.join(ranked.filter(pl.col("rank") < max_machines), on=[*_TASK, "machine"], how="semi")

    started = kept if since is None else kept.filter(pl.col("slice") >= since)
    downstream = started.rename({"machine": "target"}).join(pairs, on=_TASK)
    slices = downstream.select("job_name", "upstream", "slice").unique()
    shares = _shares(slices, on_machines, kept)
    fed = downstream.lazy().join(shares.lazy(), on=["job_name", "upstream", "slice"])
    terms = fed.select(
        "target",
        time="slice",
        source="machine",
        weight=pl.col("share") * pl.col("instances").cast(pl.Float64),
    )
    return dependencies.of_kind("batch", terms), ranked.filter(pl.col("rank") >= max_machines).height


def _task_pairs(tasks: pl.DataFrame) -> pl.DataFrame:
    """`job_name`, `task_name` and the name of one task it waits for as `upstream`; a row for each."""
    waiting = tasks.explode("upstream").drop_nulls("upstream")
    return (
        waiting.join(
            tasks.select("job_name", "number", other="task_name"),
            left_on=["job_name", "upstream"],
            right_on=["job_name", "number"],
        )
        .filter(pl.col("task_name") != pl.col("other"))
        .select(*_TASK, upstream="other")
        .unique()
    )


def _both_sides() -> list[pl.Expr]:
    return [pl.col("job_name"), pl.concat_list("task_name", "upstream").alias("task_name")]


def _by_machine(placements: pl.DataFrame) -> pl.DataFrame:
    """Each task's machines with their `rank` by instances over all slices, 0 for the most."""
    return (
        placements.group_by([*_TASK, "machine"])
        .agg(pl.col("instances").sum())
        .sort([*_TASK, "instances", "machine"], descending=[False, False, True, False])
        .with_columns(rank=pl.int_range(pl.len()).over(_TASK))
    )


def _shares(slices: pl.DataFrame, placements: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
    """Per wanted (`job_name`, `upstream`, `slice`) the `share` of the instances so far on each machine."""
    keys = ["job_name", "upstream", "slice"]
    per_slice = placements.group_by([*_TASK, "slice"]).agg(pl.col("instances").sum())

    def so_far(started: pl.DataFrame, by: list[str]) -> pl.DataFrame:
        before = started.rename({"task_name": "upstream", "slice": "started"})
        return (
            slices.join(before, on=["job_name", "upstream"])
            .filter(pl.col("started") <= pl.col("slice"))
            .group_by(by)
            .agg(pl.col("instances").sum())
        )

    counts = so_far(kept, [*keys, "machine"]).rename({"instances": "count"})
    shares = counts.join(so_far(per_slice, keys), on=keys)
    return shares.select(*keys, "machine", share=pl.col("count") / pl.col("instances"))
