"""The synthetic trace has the format and the quirks of the real one, and load that travels as recorded."""

import gzip
import io
import tarfile
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fleetcast.traces.alibaba_2018 import TABLES
from fleetcast.traces.raw import parse
from fleetcast.traces.synthesis import Part, SynthesizeOptions, frames, parts, write_part
from fleetcast.traces.synthesis.cluster import DAY, KNOT, LAYERS, home_machines, hosted, placement, upstream
from fleetcast.traces.synthesis.tables import CONTAINER_DELAY, HOLE, LATE_START
from pydantic import ValidationError

REAL = Path(__file__).parents[3] / "shared" / "data" / "alibaba-2018"

OPTIONS = SynthesizeOptions(machines=12, services=4, days=3, seed=7)


def content(options: SynthesizeOptions, part: Part) -> bytes:
    file = io.BytesIO()
    write_part(options, part, file)
    return file.getvalue()


@cache
def table(name: str, options: SynthesizeOptions = OPTIONS) -> pl.DataFrame:
    """All rows of a table, as a reader of the raw files gets them."""
    found = []
    for part in parts(options):
        if part.table == name:
            parsed = parse(content(options, part), TABLES[name])
            assert set(parsed.rejected["reason"]) <= {"container_id is empty"}
            found.append(parsed.frame)
    return pl.concat(found)


def lines(name: str) -> list[list[str]]:
    """The fields of every row of a table's first part, as text."""
    return [line.split(",") for line in content(OPTIONS, Part(name, 0)).decode().splitlines()]


# -- the format ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_there_headerless_with_the_columns_and_types_of_its_schema(name):
    rows = lines(name)
    assert {len(row) for row in rows} == {len(TABLES[name].columns)}
    assert table(name).schema == pl.Schema(TABLES[name].columns)
    assert rows[0] != list(TABLES[name].columns)
    assert not any('"' in field for row in rows for field in row)


@pytest.mark.skipif(not REAL.is_dir(), reason="no rows of the real trace here")
@pytest.mark.parametrize("name", ["machine_meta", "machine_usage", "container_usage", "batch_task"])
def test_the_real_trace_has_as_many_columns_with_values_written_the_same_way(name):
    """A column that is a number, an id or text in the one is so in the other, with as many decimals."""

    def kinds(rows: list[list[str]]) -> list[set[str]]:
        columns = zip(*rows, strict=True)
        return [{kind(field) for field in column if field} for column in columns]

    def kind(field: str) -> str:
        if field[:2] in ("m_", "c_", "j_"):
            return field[:2]
        return "number" if field.removeprefix("-").replace(".", "", 1).isdigit() else "text"

    def decimals(rows: list[list[str]]) -> list[int]:
        return [max(len(f.partition(".")[2]) for f in column) for column in zip(*rows, strict=True)]

    with (REAL / f"{name}.csv").open() as file:
        real = [line.rstrip("\n").split(",") for line in islice(file, 20_000)]
    ours = lines(name)[::10]
    assert kinds(ours) == kinds(real)
    assert decimals(ours) == decimals(real)


def test_levels_are_near_those_of_the_real_fleet():
    usage = table("machine_usage", SynthesizeOptions(machines=200, days=7, sample_interval=3600))
    means = usage.select(pl.col("cpu_util_percent", "mem_util_percent", "net_in", "net_out").mean()).row(0)
    assert means == pytest.approx((40.2, 88.0, 41.0, 32.5), abs=10)


def test_a_csv_gz_and_a_tar_gz_hold_the_csv():
    part = Part("machine_usage", 0)
    text = content(OPTIONS, part)
    gz = content(OPTIONS.model_copy(update={"format": "csv.gz"}), part)
    tar = content(OPTIONS.model_copy(update={"format": "tar.gz"}), part)
    assert gzip.decompress(gz) == text
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:gz") as archive:
        assert archive.getnames() == ["machine_usage-00000.csv"]
        assert archive.extractfile("machine_usage-00000.csv").read() == text


# -- the quirks ----------------------------------------------------------------------------------------------


def test_samples_are_10_s_apart_with_one_in_ten_missing():
    gaps = table("machine_usage").sort("machine_id", "time_stamp")
    gap = gaps.select(pl.col("time_stamp").diff().over("machine_id"))["time_stamp"].drop_nulls()
    assert (gap % 10 == 0).all()
    shares = gap.value_counts(normalize=True).sort("time_stamp")["proportion"]
    assert shares.head(3).to_list() == pytest.approx([0.9, 0.09, 0.009], abs=0.005)


def test_rows_are_neither_in_time_order_nor_one_block_a_machine():
    usage = table("machine_usage").with_columns(block=pl.col("machine_id").rle_id())
    blocks = usage.group_by("machine_id", "block", maintain_order=True).agg(pl.col("time_stamp").first())
    assert blocks.group_by("machine_id").len()["len"].min() > 1
    backwards = pl.col("time_stamp").diff() < 0
    assert blocks.select(backwards.sum())["time_stamp"].item() > 0.2 * len(blocks)
    assert blocks.select(backwards.over("machine_id").sum())["time_stamp"].item() > 0


@pytest.mark.parametrize("name", ["machine_usage", "container_usage"])
def test_nobody_reports_in_the_hole_of_day_2(name):
    time = table(name)["time_stamp"]
    assert not ((time > HOLE[0]) & (time < HOLE[1])).any()
    interval = OPTIONS.sample_interval if name == "machine_usage" else OPTIONS.container_interval
    assert time.filter(time <= HOLE[0]).max() > HOLE[0] - 2 * interval
    assert time.filter(time >= HOLE[1]).min() < HOLE[1] + 2 * interval


def test_minus_1_and_101_are_rare_and_in_disk_io_only():
    for name in ("machine_usage", "container_usage"):
        others = table(name).drop("machine_id", "container_id", "time_stamp", "disk_io_percent", strict=False)
        assert others.min_horizontal().min() >= 0
        assert others.max_horizontal().max() <= 100
    disk = [row[-1] for row in lines("machine_usage")]
    for invalid in ("-1", "101"):
        assert 2e-5 < disk.count(invalid) / len(disk) < 5e-4


def test_late_starting_columns_are_empty_before_four_fifths_of_the_trace():
    begin = LATE_START * OPTIONS.span
    for name, columns in {
        "machine_usage": ["mem_gps", "mkpi"],
        "container_usage": ["cpi", "mem_gps", "mpki"],
    }.items():
        usage = table(name)
        late = usage["time_stamp"] >= begin
        for column in columns:
            assert (usage[column].is_not_null() == late).all(), column
        assert 0 < late.mean() < 1


def test_some_container_rows_have_no_container_id():
    rows = lines("container_usage")
    empty = [row for row in rows if not row[0]]
    assert 0 < len(empty) < 0.03 * len(rows)
    assert all(row[1].startswith("m_") for row in empty)


def test_container_stamps_run_a_day_late():
    machine, container = table("machine_usage")["time_stamp"], table("container_usage")["time_stamp"]
    assert (machine.min(), machine.max()) == (0, OPTIONS.span - 10)
    assert (container.min(), container.max()) == (CONTAINER_DELAY, OPTIONS.span + CONTAINER_DELAY - 300)


def test_running_and_waiting_tasks_have_not_ended():
    tasks = table("batch_task")
    unfinished = tasks["status"].is_in(["Running", "Waiting"])
    assert (tasks["end_time"] == 0).to_list() == unfinished.to_list()
    waiting = tasks.filter(pl.col("status") == "Waiting")
    assert len(waiting) > 0
    assert waiting["instance_num"].is_null().all()
    assert (waiting["start_time"] == 0).all()
    assert 0 < tasks["plan_cpu"].null_count() == tasks["plan_mem"].null_count() < len(tasks) * 0.05
    ended = tasks.filter(~unfinished)
    assert (ended["end_time"] >= ended["start_time"]).all()


def test_task_names_take_every_form():
    names = table("batch_task")["task_name"]
    for form in (r"^M1$", r"^[RJ]2_1$", r"^task_[A-Za-z0-9+/]+=*$", r"^MergeTask$", r"^R2_1_Stg8$"):
        assert names.str.contains(form).any(), form
    wider = SynthesizeOptions(machines=30, services=30, days=1)
    assert table("batch_task", wider)["task_name"].str.contains(r"^J4_1_2_3$").any()


# -- the tables agree with each other ------------------------------------------------------------------------


def test_meta_tables_name_every_entity_that_reports():
    machines = set(table("machine_meta")["machine_id"])
    assert machines == set(table("machine_usage")["machine_id"]) == {f"m_{i}" for i in range(1, 13)}
    meta, usage = table("container_meta"), table("container_usage")
    home = meta.select("container_id", "machine_id").unique()
    assert len(home) == OPTIONS.container_count
    assert set(home.rows()) == set(usage.select("container_id", "machine_id").unique().rows())
    assert set(meta["machine_id"]) <= machines
    assert (meta["cpu_request"] % 100 == 0).all()


def test_instances_are_those_that_the_tasks_announce():
    tasks = table("batch_task").filter(pl.col("status") != "Waiting")
    counted = (
        table("batch_instance")
        .group_by("job_name", "task_name")
        .agg(pl.len().alias("instances"), pl.col("seq_no").max(), pl.col("total_seq_no").first())
    )
    joined = tasks.join(counted, on=["job_name", "task_name"], how="full", validate="1:1")
    assert joined.null_count().select("instances", "job_name").row(0) == (0, 0)
    for column in ("instances", "seq_no", "total_seq_no"):
        assert (joined["instance_num"] == joined[column]).all()


def test_a_machine_hosts_one_to_three_services_and_its_containers_are_replicas_of_them():
    options = SynthesizeOptions(machines=60)
    services = [{service for service, _ in hosted(options, machine)} for machine in range(60)]
    assert {len(some) for some in services} == {1, 2, 3}
    assert all(sum(share for _, share in hosted(options, m)) == pytest.approx(1) for m in range(60))
    for container in range(options.container_count):
        machine, service = placement(options, container)
        assert service in services[machine]


def test_services_form_an_acyclic_graph_with_two_parents_on_average_and_at_most_four_layers():
    options = SynthesizeOptions(machines=600)

    def layer(service: int) -> int:
        return 1 + max((layer(parent) for parent, _ in upstream(options, service)), default=0)

    count = options.service_count
    assert {layer(service) for service in range(count)} == set(range(1, LAYERS + 1))
    parents = [len(upstream(options, service)) for service in range(count)]
    assert np.mean([number for number in parents if number]) == pytest.approx(2, abs=0.15)
    delays = {delay * KNOT for service in range(count) for _, delay in upstream(options, service)}
    assert delays == set(range(1800, 3601, KNOT))


def test_batch_records_tell_the_graph_along_which_load_travels():
    """Machines of a task's upstream tasks → its own machines: exactly the services' dependencies."""
    options = SynthesizeOptions(machines=30, services=10, days=1)
    ran = table("batch_instance", options).filter(
        pl.col("task_name").str.contains(r"^[A-Z]\d+(_\d+)*(_Stg8)?$")
    )
    numbers = pl.col("task_name").str.replace("_Stg8", "").str.extract_all(r"\d+").cast(pl.List(pl.Int64))
    ran = ran.select("job_name", "machine_id", number=numbers.list.first(), waits=numbers.list.slice(1))
    edges = (
        ran.explode("waits", empty_as_null=True)
        .drop_nulls("waits")
        .join(ran, left_on=["job_name", "waits"], right_on=["job_name", "number"])
        .select("machine_id_right", "machine_id")
        .unique()
    )
    recorded = {(int(s[2:]) - 1, int(t[2:]) - 1) for s, t in edges.rows()}
    true = {
        (source, target)
        for service in range(10)
        for parent, _ in upstream(options, service)
        for source in home_machines(options, parent)
        for target in home_machines(options, service)
    }
    assert recorded == true


# -- the load ------------------------------------------------------------------------------------------------


#: The cluster whose load is looked at; two weeks, so that the second can be forecast from the first.
FLEET = SynthesizeOptions(machines=24, services=8, days=14, sample_interval=100, seed=1)
QUARTER = 900
QUARTERS = DAY // QUARTER


@cache
def cpu(coupling: float, step: int) -> np.ndarray:
    """[steps, machines] mean cpu of every step of so many seconds; nan in the hole."""
    usage = table("machine_usage", FLEET.model_copy(update={"coupling": coupling}))
    bins = usage.group_by("machine_id", pl.col("time_stamp") // step).agg(pl.col("cpu_util_percent").mean())
    grid = np.full((FLEET.span // step, FLEET.machines), np.nan)
    grid[bins["time_stamp"], bins["machine_id"].str.slice(2).cast(pl.Int64) - 1] = bins["cpu_util_percent"]
    return grid


def calendar(times: np.ndarray) -> np.ndarray:
    """[times, 6] one, two harmonics of the day and the weekend's dip, at times in days: all that repeats."""
    harmonics = [wave(2 * np.pi * k * times) for k in (1, 2) for wave in (np.sin, np.cos)]
    weekend = np.sin(np.pi * np.clip(times % 7 - 5, 0, 2) / 2) ** 2
    return np.column_stack([np.ones(len(times)), *harmonics, weekend])


def shocks(load: np.ndarray) -> np.ndarray:
    """What is left of the load when least squares have taken away what repeats; nan stays nan."""
    repeats = calendar(np.arange(len(load)) * FLEET.days / len(load))
    known = np.isfinite(load).all(axis=1)
    return load - repeats @ np.linalg.lstsq(repeats[known], load[known])[0]


def correlations(coupling: float, lags: int) -> np.ndarray:
    """Of each machine with the mean of its upstream machines `lags` × the delay earlier; per dependency."""
    load = shocks(cpu(coupling, KNOT))
    found = []
    for service in range(FLEET.service_count):
        for parent, delay in upstream(FLEET, service):
            source = load[:, home_machines(FLEET, parent)].mean(axis=1)
            for machine in home_machines(FLEET, service):
                earlier = np.roll(source, lags * delay)[2 * delay : -2 * delay]
                now = load[2 * delay : -2 * delay, machine]
                both = np.isfinite(earlier) & np.isfinite(now)
                found.append(np.corrcoef(earlier[both], now[both])[0, 1])
    return np.array(found)


def gain_from_upstream(coupling: float) -> float:
    """By which share the upstream machines' last 3 h lower the error of ridge, one hour ahead.

    With and without them, it sees the machine's own last 3 h, its load a day before and the calendar, and
    learns from the first ten days. Machines that have nothing upstream count too.
    """
    load, ahead = cpu(coupling, QUARTER), 3600 // QUARTER
    issued = np.arange(QUARTERS, len(load) - ahead)
    repeats = calendar((issued + ahead) / QUARTERS)

    def last_3_hours(series: np.ndarray) -> np.ndarray:
        return np.column_stack([series[issued - lag] for lag in range(12)])

    def error(features: np.ndarray, target: np.ndarray) -> float:
        known = np.isfinite(features).all(axis=1) & np.isfinite(target)
        learn, test = known & (issued + ahead < 10 * QUARTERS), known & (issued >= 10 * QUARTERS)
        # Ridge as least squares: one more row per feature that asks for its weight to be 0.
        scaled = (features - features[learn].mean(axis=0)) / features[learn].std(axis=0)
        level, penalty = target[learn].mean(), np.sqrt(30) * np.eye(features.shape[1])
        asked = np.concatenate([target[learn] - level, np.zeros(len(penalty))])
        weights = np.linalg.lstsq(np.concatenate([scaled[learn], penalty]), asked)[0]
        return float(np.abs(target[test] - level - scaled[test] @ weights).mean())

    alone, helped = 0.0, 0.0
    for machine, own in enumerate(load.T):
        features = np.column_stack([last_3_hours(own), own[issued + ahead - QUARTERS], repeats[:, 1:]])
        parents = [parent for parent, _ in upstream(FLEET, machine % FLEET.service_count)]
        above = [last_3_hours(load[:, home_machines(FLEET, parent)].mean(axis=1)) for parent in parents]
        alone += error(features, own[issued + ahead])
        helped += error(np.column_stack([features, *above]), own[issued + ahead])
    return 1 - helped / alone


def test_half_of_a_machines_variance_is_its_daily_and_weekly_cycle_and_a_third_is_shocks():
    load = cpu(0.8, QUARTER)
    left = shocks(load)
    variance = np.nanvar(load, axis=0)
    cycle = (1 - np.nanvar(left, axis=0) / variance).mean()
    # Shocks are smooth and noise is not: second differences, of 6 times its variance, hold hardly but noise.
    noise = (np.nanvar(np.diff(left, n=2, axis=0), axis=0) / 6 / variance).mean()
    assert 0.5 < cycle < 0.65
    assert 0.3 < 1 - cycle - noise < 0.45
    assert noise < 0.1


def test_tomorrow_is_rather_like_today_than_like_now():
    """Same time yesterday is clearly better than the last value over the 24 h ahead, though not at once."""
    load = cpu(0.8, QUARTER)

    def errors(lead: int) -> tuple[float, float]:
        target = load[QUARTERS + lead :]
        last, yesterday = load[QUARTERS:-lead], load[lead:-QUARTERS]
        known = np.isfinite(target) & np.isfinite(last) & np.isfinite(yesterday)
        return np.abs(target - last)[known].mean(), np.abs(target - yesterday)[known].mean()

    last, yesterday = np.mean([errors(lead) for lead in range(1, QUARTERS + 1)], axis=0)
    assert yesterday < 0.85 * last
    assert errors(2)[1] > errors(2)[0]


def test_weekends_are_lower():
    days = np.nanmean(cpu(0.8, QUARTER).reshape(FLEET.days, QUARTERS, -1), axis=1)
    weekend = np.isin(np.arange(FLEET.days) % 7, [5, 6])
    dip = days[~weekend].mean(axis=0) - days[weekend].mean(axis=0)
    assert dip.mean() > 2
    assert (dip > 0).mean() > 0.9


def test_load_varies_as_much_whatever_the_coupling():
    deviations = [np.nanstd(shocks(cpu(coupling, KNOT)), axis=0).mean() for coupling in (0.0, 0.5, 1.0)]
    assert deviations == pytest.approx([5.5] * 3, rel=0.1)


def test_knowing_upstream_load_helps_to_forecast_the_next_hour_as_far_as_coupled():
    assert gain_from_upstream(0.0) < 0.01
    assert gain_from_upstream(0.8) > 0.10
    assert gain_from_upstream(1.0) > 0.20


def test_coupled_machines_follow_their_upstream_machines_one_delay_later():
    following, together, leading = (correlations(1.0, lags) for lags in (1, 0, -1))
    assert following.min() > 0.3
    assert following.mean() > together.mean() > leading.mean()
    assert following.mean() > leading.mean() + 0.2


def test_more_coupling_means_more_following():
    means = [correlations(coupling, 1).mean() for coupling in (0.0, 0.5, 1.0)]
    assert means[0] + 0.2 < means[1] < means[2] - 0.1


def test_uncoupled_machines_do_not_follow():
    for lags in (-1, 0, 1):
        assert abs(correlations(0.0, lags).mean()) < 0.15


def test_containers_share_the_shocks_of_their_machine_when_coupled():
    """Load is one world: the containers of a machine and the machine itself rise together."""
    options = SynthesizeOptions(machines=6, services=6, days=6, coupling=1.0, sample_interval=60, seed=3)
    machine = table("machine_usage", options).group_by("machine_id", pl.col("time_stamp") // 3600 * 3600)
    container = table("container_usage", options).group_by("machine_id", pl.col("time_stamp") // 3600 * 3600)
    cpu = pl.col("cpu_util_percent").mean()
    both = machine.agg(machine=cpu).join(container.agg(container=cpu), on=["machine_id", "time_stamp"])
    hour = pl.col("time_stamp") % DAY
    shocks = both.with_columns(
        pl.col("machine", "container") - pl.col("machine", "container").mean().over("machine_id", hour)
    )
    assert shocks.select(pl.corr("machine", "container")).item() > 0.5


# -- parts ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_in_any_order():
    some = [part for part in parts(OPTIONS) if part.index == 0]
    forwards = {part: content(OPTIONS, part) for part in some}
    again = OPTIONS.model_copy()
    assert {part: content(again, part) for part in reversed(some)} == forwards
    packed = content(OPTIONS.model_copy(update={"format": "tar.gz"}), some[0])
    assert packed[3:8] == bytes(5), "a gzip header with neither a name nor a time"


def test_another_seed_gives_other_rows():
    other = OPTIONS.model_copy(update={"seed": 8})
    for part in (Part(name, 0) for name in TABLES):
        assert content(other, part) != content(OPTIONS, part)


def test_no_part_and_no_block_in_memory_exceeds_its_limit():
    options = SynthesizeOptions(machines=20, days=2, rows_per_part=25_000, job_interval=300)
    for part in parts(options):
        blocks = [len(frame) for frame in frames(options, part, block_rows=10_000)]
        assert 0 < sum(blocks) <= options.rows_per_part
        assert max(blocks) <= 10_000


def test_the_parts_together_hold_every_entity_and_time_once():
    options = SynthesizeOptions(machines=7, days=2, rows_per_part=25_000)
    assert len([part for part in parts(options) if part.table == "machine_usage"]) > 3
    usage = table("machine_usage", options)
    assert not usage.select("machine_id", "time_stamp").is_duplicated().any()
    possible = (DAY * 2 - (HOLE[1] - HOLE[0])) / 10 * 7
    assert len(usage) == pytest.approx(0.9 * possible, rel=0.01)


@pytest.mark.parametrize(
    ("name", "change", "factor"),
    [
        ("machine_usage", {"machines": 24}, 2),
        ("machine_usage", {"sample_interval": 20}, 1 / 2),
        ("machine_usage", {"days": 6}, (6 * DAY - 19_240) / (3 * DAY - 19_240)),
        ("container_usage", {"containers": 12}, 1 / 4),
        ("container_usage", {"container_interval": 60}, 5),
        ("container_usage", {"containers": 96}, 2),
        ("batch_task", {"job_interval": 900}, 2),
        ("batch_instance", {"days": 1}, 1 / 3),
    ],
)
def test_row_counts_scale_with_the_options(name, change, factor):
    grown = OPTIONS.model_copy(update=change)
    rows, before = (
        sum(len(frame) for part in parts(some) if part.table == name for frame in frames(some, part))
        for some in (grown, OPTIONS)
    )
    assert rows / before == pytest.approx(factor, rel=0.1)


def test_the_smallest_cluster_has_all_tables():
    options = SynthesizeOptions(machines=1, days=1)
    assert {part.table for part in parts(options)} == set(TABLES)
    assert all(len(table(name, options)) for name in TABLES)


def test_a_part_of_a_huge_trace_costs_no_more_than_of_a_small_one():
    """10⁹ rows: the hundredth part is made without its predecessors and without a list of all shards."""
    huge = SynthesizeOptions(machines=14_000, days=10, rows_per_part=25_000)
    assert sum(part.table == "machine_usage" for part in parts(huge)) > 40_000
    rows = sum(len(frame) for frame in frames(huge, Part("machine_usage", 40_000)))
    assert 0 < rows <= huge.rows_per_part


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"machines": 4, "services": 5}, "expected at most one service a machine, with machines = 4"),
        ({"sample_interval": 7}, "expected seconds that divide 6 h"),
        ({"container_interval": 0}, "expected seconds that divide 6 h"),
        ({"job_interval": 5000}, "expected seconds that divide a day"),
        ({"coupling": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_wrong_option_is_refused_with_what_was_expected(wrong, why):
    with pytest.raises(ValidationError, match=why):
        SynthesizeOptions(**wrong)
