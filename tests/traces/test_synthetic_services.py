"""The synthetic services: requests that cross the paper's levels, calls on the graph, load that travels."""

import io
from functools import cache

import numpy as np
import polars as pl
from fleetcast.evaluation.levels import LEVELS
from fleetcast.traces.synthesis import SynthesizeOptions, parts, write_part
from fleetcast.traces.synthesis.cluster import KNOT, upstream
from fleetcast.traces.synthesis.services import name, request_rate

OPTIONS = SynthesizeOptions(trace="services", services=24, days=14, seed=7, requests=3000)


@cache
def files(options: SynthesizeOptions = OPTIONS) -> dict[str, bytes]:
    found = {}
    for part in parts(options):
        file = io.BytesIO()
        write_part(options, part, file)
        found[part.file(options)] = file.getvalue()
    return found


def services() -> pl.DataFrame:
    return pl.read_parquet(files()["services.parquet"])


def test_there_are_two_files_the_same_bytes_every_time():
    first = files()
    assert sorted(first) == ["calls.parquet", "services.parquet"]
    again = OPTIONS.model_copy()
    files.cache_clear()
    assert files(again) == first
    other = files(OPTIONS.model_copy(update={"seed": 8}))
    assert other["services.parquet"] != first["services.parquet"]


def test_every_service_has_a_row_each_five_minutes_but_for_a_hundredth():
    found = services()
    expected = OPTIONS.days * 86_400 // KNOT * 24
    assert found["service"].unique().sort().to_list() == sorted(name(service) for service in range(24))
    assert 0.985 < len(found) / expected < 0.995
    assert found.select("service", "time").is_duplicated().sum() == 0
    assert found.null_count().row(0) == (0, 0, 0, 0, 0)
    assert found["cpu"].is_between(0, 1).all()
    assert (found["request_rate"] > 0).all()
    assert (found["latency"] > 0).all()


def test_the_cluster_is_at_every_level_of_the_paper_at_some_time():
    total = services().group_by("time").agg(pl.col("request_rate").sum())["request_rate"]
    assert set(np.searchsorted(list(LEVELS), total.to_numpy())) == set(range(len(LEVELS)))
    assert 0.6 * OPTIONS.requests < total.mean() < 1.6 * OPTIONS.requests


def test_processors_are_busier_and_answers_slower_when_there_are_more_requests():
    for _, rows in services().group_by("service"):
        assert rows.select(pl.corr("request_rate", "cpu", method="spearman")).item() > 0.9
        assert rows.select(pl.corr("request_rate", "latency", method="spearman")).item() > 0.3


def test_a_service_receives_what_its_callers_send():
    calls = pl.read_parquet(files()["calls.parquet"])
    pairs = {
        (name(caller), name(service)) for service in range(24) for caller, _ in upstream(OPTIONS, service)
    }
    assert set(calls.select("source", "target").unique().iter_rows()) == pairs
    assert len(calls) == len(pairs) * OPTIONS.days * 24
    (target, *_) = sorted(target for _, target in pairs)
    of_hour = calls.filter(target=target).group_by("time").agg(pl.col("weight").sum()).sort("time")
    rates = np.concatenate(
        [request_rate(OPTIONS, int(target.removeprefix("s_")) - 1, day) for day in range(OPTIONS.days)]
    )
    np.testing.assert_allclose(of_hour["weight"], rates.reshape(-1, 12).mean(1), rtol=1e-5)


def test_shocks_reach_a_service_after_its_callers_where_the_cluster_is_coupled():
    """What is left of the logarithm after the season: a caller's past says it, where coupling says so."""

    def correlation(coupling: float) -> float:
        options = OPTIONS.model_copy(update={"coupling": coupling, "days": 28, "seed": 3})
        found = []
        for service in range(24):
            for caller, delay in upstream(options, service):
                left = []
                for one in (caller, service):
                    rate = np.log([request_rate(options, one, day) for day in range(options.days)])
                    weekly = rate.reshape(4, 7, -1)
                    left.append((weekly - weekly.mean(0)).ravel())
                found.append(np.corrcoef(left[0][:-delay], left[1][delay:])[0, 1])
        return float(np.mean(found))

    # Flash crowds, which are not shocks, reach all of them in either case.
    assert correlation(1.0) > correlation(0.0) + 0.15


def test_a_trace_of_services_needs_no_machines():
    assert SynthesizeOptions(trace="services", machines=1, services=50).service_count == 50
