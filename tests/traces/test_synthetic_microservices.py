"""The synthetic microservice traces: the published formats with their oddities, over one true load."""

import gzip
import io
import re
import tarfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fleetcast.traces.synthesis import Part, SynthesizeOptions, frames, microservices, parts, write_part
from fleetcast.traces.synthesis.calls import OUTSIDE, SAMPLED, Kind, edge_rates, edges, rates, traces
from fleetcast.traces.synthesis.replicas import MINUTE, born, replicas
from pydantic import ValidationError
from raw_counts import RawCounts

REAL = Path(__file__).parents[3] / "shared" / "data"
HOUR = 3600
V21 = SynthesizeOptions(
    trace="microservices-v2021", machines=6, services=6, containers=18, days=1, seed=7, requests=300
)
V22 = V21.model_copy(update={"trace": "microservices-v2022"})
CHURNED = V21.model_copy(update={"churn": 0.5, "services": 4, "days": 2})


@cache
def content(options: SynthesizeOptions, part: Part) -> bytes:
    file = io.BytesIO()
    write_part(options, part, file)
    return file.getvalue()


@cache
def table(options: SynthesizeOptions, name: str, files: int = 1) -> pl.DataFrame:
    """The first files of a table, all text, as any reader of csv gets them."""
    texts = [content(options, Part(name, index)) for index in range(files)]
    return pl.concat([pl.read_csv(text, infer_schema=False) for text in texts])


# -- the formats ---------------------------------------------------------------------------------------------

_FORMS = {
    "id": r"[0-9a-f]{64}|\(\?\)",
    "trace id": r"0b[0-9a-f]{6}\d{13}\d{4}[0-9a-f]{5}|T_\d+",
    "call id": r"0(\.\d+)*",
    "whole number": r"-?\d+",
    "number": r"\d+\.\d+(e-\d+)?",
    "node": r"NODE_\d+",
    "service": r"MS_\d+|UNKNOWN|USER|UNAVAILABLE",
    "pod": r"(MS_\d+|UNKNOWN)_POD_\d+|UNKNOWN|USER|UNAVAILABLE",
    "kind": r"rpc|mc|db|http|mq|userDefined|UNKNOWN",
    "scenario": r"S_\d+",
}


def forms(column: pl.Series) -> str:
    """The name of the form that every value of a column has; empty ones do not count."""
    found = [name for name, form in _FORMS.items() if all(re.fullmatch(form, v) for v in column if v)]
    return found[0] if found else "text"


@pytest.mark.skipif(not REAL.is_dir(), reason="no rows of the real traces here")
@pytest.mark.parametrize(
    ("options", "name", "sample"),
    [
        (V21, "Node", "alibaba-microservices-2021/Node_head.csv"),
        (V21, "MSResource", "alibaba-microservices-2021/MSResource_head.csv"),
        (V21, "MSCallGraph", "alibaba-microservices-2021/MSCallGraph_head.csv"),
        (V22, "CallGraph", "alibaba-microservices-2022/CallGraph_sample.csv.gz"),
    ],
)
def test_the_real_files_have_the_same_header_and_write_every_column_alike(options, name, sample):
    text = (REAL / sample).read_bytes()
    text = gzip.decompress(text) if sample.endswith(".gz") else text
    real, ours = pl.read_csv(text, infer_schema=False), table(options, name)
    assert content(options, Part(name, 0)).splitlines()[0] == text.splitlines()[0]
    assert {c: forms(ours[c]) for c in ours.columns} == {c: forms(real[c]) for c in real.columns}
    if "rt" in real.columns:
        assert set(ours["rpctype"]) == set(real["rpctype"])
        of_kind = [
            frame.group_by("rpctype").agg(pl.col("interface").is_null().all()).sort("rpctype")
            for frame in (ours, real)
        ]
        assert of_kind[0].equals(of_kind[1])


def test_files_are_named_and_cut_as_published():
    names = {trace: [part.file(options) for part in parts(options)] for trace, options in FILES.items()}
    assert len(names["2021"]) == 1 + 24 + 48 + 288
    assert {"Node_0.csv", "MSResource_23.csv", "MSRTQps_47.csv", "MSCallGraph_287.csv"} < set(names["2021"])
    assert len(names["2022"]) == 2 + 48 + 480 + 480
    assert {"NodeMetrics_1.csv", "MSMetrics_47.csv", "MSRTMCR_479.csv", "CallGraph_0.csv"} < set(
        names["2022"]
    )


FILES = {"2021": V21, "2022": V22}


def test_lines_of_2021_are_numbered_and_a_tar_gz_holds_the_csv():
    lines = table(V21, "MSCallGraph")
    assert lines[""].to_list() == [str(number) for number in range(len(lines))]
    packed = content(V21.model_copy(update={"format": "tar.gz"}), Part("MSCallGraph", 0))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        (member,) = archive
        assert member.name == "MSCallGraph_0.csv"
        assert archive.extractfile(member).read() == content(V21, Part("MSCallGraph", 0))


def test_the_same_options_give_the_same_bytes_in_any_order_and_another_seed_others():
    some = [Part("MSCallGraph", 3), Part("MSResource", 1), Part("MSRTQps", 2)]
    first = [content(V21, part) for part in some]
    content.cache_clear()
    again = V21.model_copy()
    assert [content(again, part) for part in reversed(some)] == first[::-1]
    other = V21.model_copy(update={"seed": 8})
    assert all(content(other, part) != text for part, text in zip(some, first, strict=True))


def test_another_cut_holds_the_same_log():
    long = table(V21.model_copy(update={"file_span": HOUR}), "MSCallGraph")
    short = table(V21, "MSCallGraph", files=12)
    assert long.drop("").sort(long.columns[1:]).equals(short.drop("").sort(short.columns[1:]))


def test_no_block_in_memory_exceeds_its_limit():
    for name in ("Node", "MSResource", "MSRTQps"):
        sizes = [len(frame) for frame in frames(V21, Part(name, 0), block_rows=2000)]
        assert max(sizes) <= 2000
        assert len(sizes) > 2


# -- the log of calls ----------------------------------------------------------------------------------------


def truth(options: SynthesizeOptions, minutes: range) -> pl.DataFrame:
    return pl.concat([traces(options, minute).with_columns(minute=minute) for minute in minutes])


def test_calls_are_sampled_in_proportion_to_the_true_rate_of_every_edge_and_hour():
    hours, e = 4, edges(V21)
    calls = truth(V21, range(9 * 60, (9 + hours) * 60)).filter(pl.col("source") != OUTSIDE)
    counted = calls.group_by("source", "target", hour=pl.col("minute") // 60 - 9).len()
    position = {(s, t): i for i, (s, t) in enumerate(zip(e.source.tolist(), e.target.tolist(), strict=True))}
    count = np.zeros((hours, len(position)))
    for source, target, hour, number in counted.iter_rows():
        count[hour, position[source, target]] = number
    times = np.arange(9 * HOUR, (9 + hours) * HOUR, MINUTE) + MINUTE / 2
    true = edge_rates(V21, rates(V21, times)).reshape(hours, 60, -1).sum(axis=1) * MINUTE
    assert true.min() > 0
    assert count.sum() / true.sum() == pytest.approx(SAMPLED, rel=0.03)
    assert np.corrcoef(count.ravel(), true.ravel())[0, 1] > 0.98
    # A trace's calls come together, so they scatter more than single ones would, but without a tendency.
    expected = SAMPLED * true
    assert np.abs(count / expected - 1)[expected > 400].max() < 0.3


def test_a_trace_is_a_tree_whose_ids_extend_those_of_their_callers():
    calls = truth(V21, range(600, 605))
    roots = calls.filter(pl.col("source") == OUTSIDE)
    assert set(roots["id"]) == {"0", "0.1"}
    assert set(roots["kind"]) == {Kind.HTTP}
    assert len(roots) == len(calls.unique(["minute", "trace"]))
    inner = calls.filter(pl.col("source") != OUTSIDE)
    above = calls.select("minute", "trace", id="id", source="target", source_replica="target_replica")
    callers = inner.with_columns(id=pl.col("id").str.replace(r"\.\d+$", "")).join(
        above.unique(), on=["minute", "trace", "id", "source", "source_replica"], how="semi"
    )
    assert len(callers) == len(inner)
    assert inner["id"].str.count_matches(r"\.").max() >= 3


def test_the_log_of_2021_has_one_or_both_sides_of_a_call_and_lines_twice():
    lines = table(V21, "MSCallGraph", files=6).drop("")
    rt = pl.col("rt").cast(pl.Int64)
    assert 0.1 < lines.select((rt < 0).mean()).item() < 0.4
    sides = lines.filter(rpctype="rpc").group_by("traceid", "rpcid").agg((rt < 0).any() & (rt > 0).any())
    assert 0.3 < sides["rt"].mean() < 0.6
    assert 0.02 < lines.is_duplicated().mean() < 0.3
    assert lines.filter(pl.col("rpctype").is_in(["mc", "db"])).select((rt >= 0).all()).item()


def test_the_log_of_2021_lacks_names_and_repeats_ids():
    lines = table(V21, "MSCallGraph", files=6).drop("")
    for end in ("um", "dm"):
        assert 0.02 < (lines[end] == "(?)").mean() < 0.2
    assert lines["um"].null_count() > 0
    own = lines.filter(rpctype="userDefined")
    assert (own["um"] == own["dm"]).all()
    stores = lines.filter(pl.col("rpctype").is_in(["mc", "db"]))
    targets = stores.group_by("traceid", "rpcid").agg(pl.col("dm").n_unique())
    assert targets["dm"].max() == 2


@pytest.mark.parametrize("options", [V21, V22], ids=["2021", "2022"])
def test_an_independent_count_of_the_log_finds_the_calls_that_truly_happened(options, tmp_path):
    """Per edge and slice; but those of which no line has both names, which are beyond counting."""
    minutes, slice = 30, 600
    for part in parts(options):
        span = microservices.TABLES[options.trace][part.table].span
        if part.table in ("MSCallGraph", "CallGraph") and part.index * span < minutes * MINUTE:
            (tmp_path / part.file(options)).write_bytes(content(options, part))
    known = (pl.col("by_caller") & pl.col("target_named")) | (pl.col("by_callee") & pl.col("source_named"))
    names, expected, unknown = microservices.service_names(options), Counter(), 0
    for minute in range(minutes):
        calls = traces(options, minute).filter(pl.col("source") != OUTSIDE)
        unknown += calls.select((~known).sum()).item()
        calls = calls.filter(known, pl.col("time") < minutes * MINUTE * 1000)
        start = calls["time"] // 1000 // slice * slice
        expected.update(zip(start, *(names.gather(calls[end]) for end in ("source", "target")), strict=True))
    assert unknown > 0.01 * expected.total()
    found = RawCounts(tmp_path, options.trace).calls(slice)
    assert found.keys() == expected.keys()
    # A callee's line is up to 2 ms late; where there is no other, the call may fall into the next slice.
    off = {key: number - expected[key] for key, number in found.items() if number != expected[key]}
    assert sum(map(abs, off.values())) <= 4


def test_traces_go_on_in_the_next_file():
    ids = [set(pl.read_csv(content(V21, Part("MSCallGraph", index)))["traceid"]) for index in (0, 1)]
    assert ids[0] & ids[1]


def test_the_log_of_2022_has_its_own_ways_not_to_know():
    lines = table(V22, "CallGraph", files=10)
    http = lines.filter(rpctype="http")
    assert 0.4 < http.is_duplicated().mean() < 0.95
    assert set(http.filter(um="USER")["rpc_id"]) == {"0"}
    assert set(http.filter(um="UNKNOWN")["uminstanceid"]) == {"UNAVAILABLE"}
    assert set(lines.filter(dm="UNKNOWN")["dminstanceid"]) == {"UNKNOWN"}
    own = lines.filter(rpctype="UNKNOWN")
    assert (own["um"] == own["dm"]).all()
    assert own["rpc_id"].str.ends_with(".0").all()
    assert lines["rt"].cast(pl.Float64).min() >= 0
    rpc = lines.filter(rpctype="rpc").unique()
    assert rpc.group_by("traceid", "rpc_id").agg(pl.col("rt").n_unique())["rt"].max() == 2


# -- what is measured ----------------------------------------------------------------------------------------


def counted(options: SynthesizeOptions, name: str, files: int) -> pl.DataFrame:
    """A table with numbers as numbers and the stamp in seconds."""
    texts = [content(options, Part(name, index)) for index in range(files)]
    frames = [pl.read_csv(text, infer_schema_length=None) for text in texts]
    return pl.concat(frames, how="vertical_relaxed").with_columns(pl.col("timestamp") // 1000)


@pytest.mark.parametrize(
    ("options", "name", "step"),
    [
        (V21, "Node", 30),
        (V21, "MSResource", 30),
        (V21, "MSRTQps", 60),
        (V22, "NodeMetrics", 60),
        (V22, "MSMetrics", 60),
        (V22, "MSRTMCR", 60),
    ],
)
def test_nearly_every_stamp_of_everything_has_a_row_in_no_order(options, name, step):
    rows = counted(options, name, 1)
    key = [c for c in ("nodeid", "msinstanceid", "metric") if c in rows.columns]
    assert not rows.select(*key, "timestamp").is_duplicated().any()
    assert (rows["timestamp"] % step == 0).all()
    assert not rows["timestamp"].is_sorted()
    span = microservices.TABLES[options.trace][name].span or options.span
    whole = rows.select(pl.struct(key).n_unique()).item() * span // step
    assert 0.98 < len(rows) / whole < 1


@pytest.mark.parametrize("trace", ["microservices-v2021", "microservices-v2022"])
def test_an_independent_count_of_the_tables_finds_what_was_written(trace, tmp_path):
    span, step = 3 * HOUR, 900
    options = SynthesizeOptions(
        trace=trace, machines=3, services=3, containers=7, days=1, requests=60, file_span=span
    )
    written: Counter[str] = Counter()
    for part in parts(options):
        if part.index == 0:
            with (tmp_path / part.file(options)).open("wb") as file:
                written[part.table] += write_part(options, part, file)
    raw, names = RawCounts(tmp_path, trace), microservices.service_names(options)
    assert raw.rows() == written
    assert raw.entities() == {"machine": 3, "container": 7, "service": 3}

    received = (
        rates(options, np.maximum(np.arange(0, span, 60) - 30.0, 0)).reshape(-1, step // 60, 3).mean(axis=1)
    )
    requests, cpu = raw.requests(step), raw.cpu(step)
    for service in range(options.service_count):
        keys = [(start, names[service]) for start in range(0, span, step)]
        counted, true = np.array([requests[key] for key in keys]), received[:, service]
        if trace == "microservices-v2022":  # in an unknown unit
            counted *= true.mean() / counted.mean()
        np.testing.assert_allclose(counted, true, rtol=0.05)
        assert np.corrcoef([cpu[key] for key in keys], true)[0, 1] > 0.9


def test_containers_of_a_service_share_its_requests_and_each_of_its_callees_the_calls():
    rows = counted(V21, "MSRTQps", 4).filter(pl.col("metric").str.ends_with("_MCR"))
    # A missing row is as good as the mean of the others.
    mean = rows.group_by("msname", "msinstanceid", "metric").agg(pl.col("value").mean())
    found = mean.group_by("msname", "metric").agg(pl.col("value").sum())
    times = np.arange(0, 2 * HOUR, MINUTE) - MINUTE / 2
    received = rates(V21, np.maximum(times, 0))
    names = microservices.service_names(V21)
    inward = found.filter(pl.col("metric").is_in(["HTTP_MCR", "providerRPC_MCR", "consumerMQ_MCR"]))
    of_service = dict(inward.group_by("msname").agg(pl.col("value").sum()).iter_rows())
    for service in range(V21.service_count):
        assert of_service[names[service]] == pytest.approx(received[:, service].mean(), rel=0.03)
    outward = {
        kind: found.filter(metric=kind)["value"].sum() for kind in ("consumerRPC_MCR", "providerRPC_MCR")
    }
    assert outward["consumerRPC_MCR"] == pytest.approx(outward["providerRPC_MCR"], rel=0.02)


def test_the_published_mix_up_of_http_is_there():
    rows = counted(V21, "MSRTQps", 1).pivot("metric", index=["timestamp", "msinstanceid"], values="value")
    http = rows.drop_nulls("HTTP_MCR")
    assert len(http) > 0
    assert http["HTTP_RT"].equals(http["HTTP_MCR"], null_equal=True)
    assert not rows["providerRPC_RT"].drop_nulls().equals(rows["providerRPC_MCR"].drop_nulls())


def test_rates_and_usage_of_2022_are_shares_of_an_unknown_most():
    rows = counted(V22, "MSRTMCR", 4)
    shares = [column for column in rows.columns if column.endswith("_mcr")]
    assert all(rows[column].drop_nulls().is_between(0, 1).all() for column in shares)
    assert rows.columns[4:6] == ["providerrpc_rt", "providerrpc_mcr"]
    assert rows.columns[-2:] == ["http_mcr", "http_rt"]
    usage = counted(V22, "MSMetrics", 1)
    assert usage["cpu_utilization"].is_between(0, 1).all()
    ours = counted(V21, "MSResource", 1).group_by("msname").agg(pl.col("instance_cpu_usage").mean())
    assert len(ours) == usage["msname"].n_unique() == V21.service_count


def test_processors_of_containers_and_of_their_machines_follow_the_requests():
    day = SynthesizeOptions(**V21.model_dump() | {"file_span": 86_400})
    every = pl.col("timestamp") // 900
    cpu = counted(day, "MSResource", 1).group_by("msname", every).agg(pl.col("instance_cpu_usage").mean())
    received = rates(day, np.arange(0, 86_400, 900) + 450.0)
    for service, name in enumerate(microservices.service_names(day)[: day.service_count]):
        load = cpu.filter(msname=name).sort("timestamp")["instance_cpu_usage"].to_numpy()
        assert np.corrcoef(load, received[:, service])[0, 1] > 0.95
    of_machine = counted(day, "Node", 1).group_by("nodeid", every).agg(pl.col("node_cpu_usage").mean())
    hosted = counted(day, "MSResource", 1).group_by("nodeid", every).agg(pl.col("instance_cpu_usage").mean())
    both = of_machine.join(hosted, on=["nodeid", "timestamp"])
    assert (
        both.select(pl.corr("node_cpu_usage", "instance_cpu_usage").over("nodeid")).to_series().min() > 0.95
    )


# -- what comes and goes -------------------------------------------------------------------------------------


def test_without_churn_every_container_runs_all_the_time():
    who = replicas(V21)
    assert len(who.start) == V21.container_count
    assert set(who.start.tolist()) == {0}
    assert set(who.stop.tolist()) == {V21.span}


def test_rollouts_replace_a_services_containers_by_new_ones_at_their_place():
    who = replicas(CHURNED)
    assert len(who.start) > CHURNED.container_count
    ends = {(s, m, t) for s, m, t in zip(who.service, who.machine, who.stop, strict=True) if t < CHURNED.span}
    starts = {(s, m, t) for s, m, t in zip(who.service, who.machine, who.start, strict=True) if t > 0}
    assert ends & starts
    assert ends - starts, "some stop for good"
    assert starts - ends, "some are started in between"
    pairs = list(zip(who.service.tolist(), who.number.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    begun = [born(CHURNED, service) for service in range(CHURNED.service_count)]
    at = np.arange(0, CHURNED.span, MINUTE)
    running = who.running(at)
    for service, since in enumerate(begun):
        assert (running[:, who.service == service].any(axis=1) == (at >= since)).all()


def test_a_service_that_begins_in_the_middle_has_neither_rows_nor_calls_before():
    last = CHURNED.service_count - 1
    since = born(CHURNED, last)
    assert 0.3 * CHURNED.span <= since <= 0.7 * CHURNED.span
    name, part = microservices.service_names(CHURNED)[last], since // HOUR
    before, after = (
        pl.read_csv(content(CHURNED, Part("MSResource", index))) for index in (part - 1, part + 1)
    )
    assert name not in before["msname"]
    assert name in after["msname"]
    minute = since // MINUTE
    assert last not in truth(CHURNED, range(minute - 5, minute))["target"]
    assert last in truth(CHURNED, range(minute, minute + 20))["target"]


def test_requests_of_a_service_are_all_answered_while_its_containers_change():
    who = replicas(CHURNED)
    changes = who.start[(who.start > 0) & (who.start < CHURNED.span)]
    hour = int(changes.min()) // HOUR
    rows = [counted(CHURNED.model_copy(update={"file_span": HOUR}), "MSRTQps", hour + 1)]
    inward = pl.concat(rows).filter(
        pl.col("metric").is_in(["HTTP_MCR", "providerRPC_MCR", "consumerMQ_MCR"]),
        pl.col("timestamp") >= hour * HOUR,
    )
    seen = inward.group_by("msname", "timestamp").agg(pl.col("value").sum()).group_by("msname").mean()
    times = np.arange(hour * HOUR, (hour + 1) * HOUR, MINUTE) - MINUTE / 2
    received = rates(CHURNED, np.maximum(times, 0)).mean(axis=0)
    names = microservices.service_names(CHURNED)
    for name, _, value in seen.iter_rows():
        assert value == pytest.approx(received[names.to_list().index(name)], rel=0.05)


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"file_span": 7}, "expected minutes that divide a day"),
        ({"containers": 5}, r"containers \(5\) must be at least as many as services \(6\)"),
        ({"churn": 1.5}, "less than or equal to 1"),
        ({"services": 7}, "expected at most one service a machine, with machines = 6"),
    ],
)
def test_a_wrong_option_is_refused_with_what_was_expected(wrong, why):
    with pytest.raises(ValidationError, match=why):
        SynthesizeOptions(**V21.model_dump() | wrong)
