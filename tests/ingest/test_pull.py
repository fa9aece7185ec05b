"""A Prometheus server as a source: what is pulled is what was measured, and nothing is asked for twice."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import runpy
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from fleetcast.config import parse
from fleetcast.errors import InputError
from fleetcast.ingest import prometheus
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.prometheus import Server
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.store import Store
from fleetcast.traces.prometheus import MACHINE, TABLES, PrometheusOptions
from fleetcast.traces.synthesis.prometheus import (
    BORN,
    BROKEN,
    CALLS,
    DAY,
    GAP,
    MACHINES,
    PODS,
    SERVER_TIME,
    STEP,
    Cluster,
)
from fleetcast.windows import manifest as manifests
from fleetcast.windows.manifest import ShardOptions
from object_store import BUCKET
from pydantic import ValidationError
from real_prometheus import backfill, needs_prometheus, running

pytestmark = needs_prometheus

SLICE = 3600

#: Instead of the defaults.
NO_MACHINE = dict.fromkeys(("cpu", "memory", "disk_io", "net_in", "net_out"))
NO_POD = dict.fromkeys(("cpu", "memory", "net_in", "net_out"))


@pytest.fixture(scope="module")
def cluster(scraped_cluster: Cluster) -> Cluster:
    return scraped_cluster


@pytest.fixture(scope="module")
def server(prometheus_server: str) -> str:
    return prometheus_server


def options(**asked: Any) -> IngestOptions:
    """What a job is told; `step` and `slice` of itself, the rest of the server."""
    of_job = {name: asked.pop(name) for name in ("step", "slice") if name in asked}
    return IngestOptions.model_validate({"trace": "prometheus", **of_job, "prometheus": asked})


def at(cluster: Cluster, hours: float) -> datetime:
    return datetime.fromtimestamp(cluster.start + hours * 3600, UTC)


@pytest.fixture(scope="module")
def night(
    ray_cluster: None, server: str, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, dict[str, Any]]:
    """A store that everything was pulled into, and the figures."""
    store = Store(str(tmp_path_factory.mktemp("night") / "store"))
    return store, ingest(store, server, options(since=at(cluster, 0)))


@pytest.fixture
def pulled(tasks: Any, cluster: Cluster, tmp_path: Path) -> Callable[..., Store]:
    """`pulled(url, option=…)` → a store with the cluster's first six hours, if nothing else is said."""

    def work(url: str, store: str = "store", **asked: Any) -> Store:
        made = Store(str(tmp_path / store))
        ingest(made, url, options(**{"since": at(cluster, 0), "until": at(cluster, 6), **asked}))
        return made

    return work


def written(store: Store) -> dict[str, int]:
    """Raw file → when it was written."""
    return {name: Path(store.path(name)).stat().st_mtime_ns for name in store.list("raw")}


def raw(store: Store, table: str) -> pl.DataFrame:
    """All raw rows of a table, in order."""
    files = [name for name in store.list("raw/prometheus") if f"/{table}-" in name]
    text = b"".join(gzip.decompress(store.read_bytes(name)) for name in files)
    return pl.read_csv(text, has_header=False, schema=dict(TABLES[table].columns))


def test_telemetry_is_the_load_of_every_machine_and_pod(night, table, cluster):
    store, figures = night
    rows = table(store, "telemetry")
    for name in (*MACHINES, *PODS):
        found = rows.filter(pl.col("entity") == name).sort("time")
        bins = (found["time"].dt.epoch("s") - cluster.start).to_numpy() // STEP
        expected = np.arange(cluster.bins)
        if name == "node-2":  # no sample, no row
            expected = np.delete(expected, np.arange(*GAP))
        if name.endswith("bbbbb"):
            expected = expected[BORN:]
        assert bins.tolist() == expected.tolist(), name
        for metric in ("cpu", "memory", *(["disk_io", "net_out"] if name in MACHINES else []), "net_in"):
            load = cluster.load(name, metric)[bins]
            values = found[metric].to_numpy().copy()
            if (name, metric) == ("data/store-0", "memory"):
                assert np.isnan(values[BROKEN])
                values[BROKEN] = load[BROKEN]
            assert values == pytest.approx(load, abs=1e-5), (name, metric)
            assert found[f"{metric}_max"].null_count() == found[metric].null_count()
    assert figures["values_nulled"] == {"container": {"memory": 1}}
    assert figures["rows_rejected"] == {}


def test_services_have_their_requests_and_pods_their_places(night, table, cluster):
    store, _ = night
    rows = table(store, "telemetry")
    for source, target in CALLS:
        name = {"front": "shop/front", "cart": "shop/cart", "store": "data/store"}[target]
        found = rows.filter(pl.col("entity") == name).sort("time")
        assert found["request_rate"].to_numpy() == pytest.approx(cluster.rate((source, target)), rel=1e-4)
        assert found["latency"].to_numpy() == pytest.approx(SERVER_TIME[target], rel=1e-4)
    entities = {(row["kind"], row["entity"]): row for row in table(store, "entities").to_dicts()}
    for pod, (machine, service) in PODS.items():
        found = entities["container", pod]
        assert (found["parent"], found["service"], found["measured"]) == (machine, service, True)
        assert entities["service", service]["measured"]
    last = datetime.fromtimestamp(cluster.start + cluster.days * DAY - STEP, UTC)
    assert entities["machine", "node-1"]["last_measured"] == last


def test_calls_are_between_the_services_that_have_pods(night, cluster):
    store, _ = night
    rows = raw(store, "calls")
    full = {"user": "user", "front": "shop/front", "cart": "shop/cart", "store": "data/store"}
    assert len(rows) == len(CALLS) * cluster.days * DAY // SLICE
    for source, target in CALLS:
        found = rows.filter((pl.col("source") == full[source]) & (pl.col("target") == full[target])).sort(
            "time"
        )
        assert found["time"].to_list() == list(
            range(cluster.start, cluster.start + cluster.days * DAY, SLICE)
        )
        expected = cluster.rate((source, target)).reshape(-1, SLICE // STEP).mean(1)
        assert found["weight"].to_numpy() == pytest.approx(expected, rel=0.02)  # rates of a slice's two ends


def test_windows_of_services_have_the_load_of_their_pods_and_their_requests(night, cluster):
    store, _ = night
    metrics = ("cpu", "request_rate")
    windows = {"windows": "services", "level": "service", "metrics": metrics, "step": STEP}
    shard(store, ShardOptions.model_validate({**windows, "history": "1h", "horizon": "1h", "lags": ()}))
    data = manifests.load(store, "services")
    assert data.groups == (("data/store", "shop/cart", "shop/front"),)
    (part,) = data.shards
    rows = pl.read_parquet(store.read_bytes(part.path))
    cpu, rate = (rows[metric].to_numpy().reshape(-1, 3)[:, 1] for metric in metrics)
    assert rate == pytest.approx(cluster.rate(("front", "cart")), rel=1e-4)
    one, other = (cluster.load(pod, "cpu") for pod, (_, service) in PODS.items() if service == "shop/cart")
    both = np.where(np.arange(cluster.bins) < BORN, one, (one + other) / 2)
    assert cpu == pytest.approx(both, abs=1e-5)


def test_windows_of_services_have_their_calls_as_edges(night, cluster):
    store, _ = night
    windows = {"windows": "called", "level": "service", "metrics": ("cpu",), "history": "1h", "horizon": "1h"}
    shard(store, ShardOptions.model_validate(windows))
    data = manifests.load(store, "called")
    (part,) = data.shards
    edges = pl.read_parquet(store.read_bytes(part.edges))
    names = data.members(0)
    pairs = {
        (names[source], names[target]) for source, target in edges.select("source", "target").iter_rows()
    }
    assert pairs == {("shop/front", "shop/cart"), ("shop/cart", "data/store")}  # users have no pods
    for (begun,), calls in edges.group_by("time"):
        hour = (int(begun.timestamp()) - cluster.start) // SLICE
        rates = {
            (full, into): cluster.rate(pair).reshape(-1, SLICE // STEP).mean(1)[hour]
            for pair, full, into in (
                (("front", "cart"), "shop/front", "shop/cart"),
                (("cart", "store"), "shop/cart", "data/store"),
            )
        }
        most = calls["weight"].max()
        found = {
            (names[s], names[t]): w / most for s, t, w in calls.select("source", "target", "weight").rows()
        }
        assert found == pytest.approx({p: r / max(rates.values()) for p, r in rates.items()}, rel=0.04)


def test_windows_of_containers_are_of_pods_alone(night):
    store, _ = night
    windows = {"windows": "pods", "level": "container", "metrics": ("cpu",), "history": "1h", "horizon": "1h"}
    shard(store, ShardOptions.model_validate(windows))
    assert manifests.load(store, "pods").groups == (tuple(sorted(PODS)),)


def test_what_was_pulled_is_not_asked_for_again(night, server, cluster):
    store, _ = night
    before = written(store)
    again = ingest(store, server, options(since=at(cluster, 0)))
    assert again["skipped"]
    assert written(store) == before


def test_nights_give_what_one_pull_gives(pulled, server, table, cluster):
    once = pulled(server, "once", until=at(cluster, 30))
    nights = pulled(server, "nights", until=at(cluster, 7.1))
    first = written(nights)
    pulled(server, "nights", until=at(cluster, 30))
    assert len(written(nights)) > len(written(once))  # cut elsewhere too
    assert first.items() <= written(nights).items()
    for noun in ("telemetry", "entities"):
        assert table(nights, noun).equals(table(once, noun)), noun
    assert raw(nights, "calls").equals(raw(once, "calls"))


def test_what_a_night_that_died_did_not_write_is_pulled_by_the_next(pulled, server):
    store = pulled(server, stretch=3600)
    files = written(store)
    lost = [name for name in files if "/machine-" in name][2]
    text = store.read_bytes(lost)
    store.remove(lost)
    pulled(server, stretch=3600)
    assert store.read_bytes(lost) == text
    assert written(store) == files | {lost: written(store)[lost]}


@pytest.mark.slow
def test_a_store_on_s3_has_the_same_raw_files(pulled, server, cluster, use_s3):
    here, there = pulled(server), Store(f"s3://{BUCKET}/pulled")
    asked = options(since=at(cluster, 0), until=at(cluster, 6))
    ingest(there, server, asked)
    assert {name: there.read_bytes(name) for name in there.list("raw")} == {
        name: here.read_bytes(name) for name in here.list("raw")
    }
    assert ingest(there, server, asked)["skipped"]


def test_no_answer_has_more_points_than_prometheus_gives(pulled, server, cluster, table):
    query = {
        "query": "node_memory_MemTotal_bytes",
        "start": cluster.start,
        "end": cluster.start + DAY,
        "step": 5,
    }
    refused = httpx.post(f"{server}/api/v1/query_range", data=query)
    assert "11,000" in refused.json()["error"]
    store = pulled(
        server,
        until=at(cluster, 24),
        stretch="1d",
        resolution=5,
        machine={**NO_MACHINE, "memory": "node_memory_MemTotal_bytes"},
        container=NO_POD,
        graph="none",
    )
    assert len([name for name in store.list("raw") if "/machine-" in name]) == 1
    rows = raw(store, "machine").filter(pl.col("entity") == "10.0.0.0:9100")
    assert len(rows) == DAY // 5 - 5  # none before the first scrape
    assert table(store, "telemetry")["samples"].max() == STEP // 5


def test_answers_are_cut_into_pieces_that_say_the_same(pulled, server, tmp_path, cluster):
    whole = pulled(server, "whole")
    pieces = pulled(server, "pieces", values=50)
    assert all(pieces.read_bytes(name) == whole.read_bytes(name) for name in whole.list("raw"))


def test_a_server_that_finds_a_range_too_long_is_asked_for_less(pulled, cluster, tmp_path):
    backfill(
        tmp_path,
        "".join(f'load{{instance="m"}} {n % 7} {cluster.start + 60 * n}\n' for n in range(720)) + "# EOF\n",
    )
    asked = {"machine": {**NO_MACHINE, "cpu": 'sum_over_time(load{instance="m"}[1h])'}}
    with running(tmp_path, None, "--query.max-samples=100") as url:
        store = pulled(url, **asked, container=NO_POD)
    assert len(raw(store, "machine")) == 6 * 3600 // STEP


def test_a_query_can_be_replaced_or_left_out(pulled, server):
    store = pulled(
        server, machine={"cpu": 'label_replace(vector(0.25), "node", "here", "", "")', "memory": None}
    )
    rows = raw(store, "machine")
    assert rows.filter(pl.col("entity") == "here")["cpu"].unique().to_list() == [0.25]
    assert rows["memory"].null_count() == len(rows)
    assert rows.filter(pl.col("entity") == "node-1")["disk_io"].null_count() == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"machine": {"cpu": "sum(("}}, r"127.0.0.1.*400, bad_data: .*parse error.*sum"),
        ({"machine": {"cpu": "node_uname_info * on (x) node_cpu_seconds_total"}}, "422, execution: .*many"),
        ({"machine": {"cpu": "vector(1)"}}, "machine.cpu: .*expected nodename or node or instance"),
        ({"machine": {"cpu": "node_cpu_seconds_total"}}, "machine.cpu: .* are both about .*sum by"),
        ({"calls": "vector(1)"}, "calls: .* does not say who calls whom"),
    ],
)  # fmt: skip
def test_what_a_query_does_wrong_is_said_in_one_line(pulled, server, asked, message):
    with pytest.raises(InputError, match=message) as failure:
        pulled(server, **asked)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["prometheus", "demo-prometheus"])
def test_the_examples_are_nights(name):
    root = Path(__file__).parents[2]
    job = runpy.run_path(str(root / "jobs" / "nightly.py"))["Config"]
    given = ["--store", "s", "--source", "http://prometheus:9090", "--trace", "prometheus"]
    config = parse(job, ["--config", str(root / "examples" / f"{name}.yaml"), *given])
    assert config.ingest.prometheus.queries("machine", None)["cpu"] == MACHINE["cpu"]


def test_an_unknown_metric_is_refused_at_the_door():
    with pytest.raises(ValidationError, match="unknown metric cup, expected some of cpu"):
        options(machine={"cup": "up"})


def test_a_time_that_is_not_over_is_refused(pulled, server):
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    with pytest.raises(InputError, match=f"prometheus.since {re.escape(str(tomorrow))}: is not over yet"):
        pulled(server, since=tomorrow, until=None)
    with pytest.raises(ValueError, match=r"since .* must be before until"):
        PrometheusOptions(since="2026-11-05", until="2026-11-01")


def test_servers_that_cannot_be_asked_are_named(pulled, tasks, tmp_path, answering):
    with pytest.raises(InputError, match=r"http://127.0.0.1:1: .*refused \(tried 2 times\)"):
        pulled("http://127.0.0.1:1", attempts=2)
    with pytest.raises(InputError, match="expected JSON, got '<html>"):
        pulled(answering(lambda path, key: (200, "<html></html>")))
    with pytest.raises(InputError, match="expected a Prometheus server, got another answer"):
        pulled(answering(lambda path, key: (200, "{}")))
    with pytest.raises(InputError, match="is a server, expected --trace prometheus"):
        ingest(Store(str(tmp_path / "other")), "http://127.0.0.1:1", IngestOptions())
    for address, wrong in {"http://": "names no host", "http://a:b": "Invalid port"}.items():
        with pytest.raises(InputError, match=f"{address}: {wrong}.*expected http://host:port"):
            pulled(address)
    with pytest.raises(InputError, match="has a user in its address") as failure:
        pulled("http://fleet:secret@127.0.0.1:1")
    assert "secret" not in str(failure.value)


def test_a_server_without_samples_says_what_is_expected(pulled, tmp_path):
    with (
        running(tmp_path) as url,
        pytest.raises(InputError, match=r"no samples .*machine cpu: 0 series.*node-exporter"),
    ):
        pulled(url)


def test_keys_come_from_the_environment_and_are_never_told(pulled, server, tmp_path, monkeypatch, caplog):
    # Of "a-secret-word", by bcrypt.
    web = {"basic_auth_users": {"fleet": "$2b$04$abcdefghijklmnopqrstuu9wJzIfVX5zu/TEFqOICOXqBmiCxCJV2"}}
    (tmp_path / "web.yml").write_text(json.dumps(web))
    backfill(tmp_path, Cluster(int(time.time()) // DAY * DAY - 3 * DAY, days=1).openmetrics())
    with running(tmp_path, None, f"--web.config.file={tmp_path}/web.yml") as url:
        with pytest.raises(InputError, match="401 Unauthorized; expected FLEETCAST_PROMETHEUS_TOKEN, or"):
            pulled(url, "without")
        monkeypatch.setenv("FLEETCAST_PROMETHEUS_USERNAME", "fleet")
        monkeypatch.setenv("FLEETCAST_PROMETHEUS_PASSWORD", "a-secret-word")
        store = pulled(url)
    assert len(raw(store, "machine"))
    assert "a-secret-word" not in caplog.text
    assert not any(b"a-secret-word" in store.read_bytes(name) for name in store.list(""))


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """`answering(answer)` → the address of a server whose answers have the status and the body that `answer`
    gives for their path and the key that came with it."""
    servers = []

    def start(answer: Callable[[str, str | None], tuple[int, str]]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body = answer(self.path, self.headers.get("Authorization"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(found)
        threading.Thread(target=found.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{found.server_port}"

    yield start
    for found in servers:
        found.shutdown()
        found.server_close()


def test_a_token_is_sent_to_prometheus(answering, monkeypatch):
    monkeypatch.setenv("FLEETCAST_PROMETHEUS_TOKEN", "a-secret-word")
    now = '{"data": {"result": [{"metric": {}, "value": [7, "0"]}]}}'
    url = answering(lambda path, key: (200, now) if key == "Bearer a-secret-word" else (403, "no"))
    with Server(url, PrometheusOptions()) as found:
        assert found.now() == 7
    with (
        Server(url, PrometheusOptions(), keys=False) as found,
        pytest.raises(InputError, match="403 Forbidden"),
    ):
        found.now()


def test_a_server_that_stumbles_is_asked_again(monkeypatch, answering):
    monkeypatch.setattr(prometheus, "_PAUSE", 0.0)
    answers = iter(
        [
            (503, "busy"),
            (429, "slow down"),
            (200, '{"data": {"result": [{"metric": {}, "value": [7, "0"]}]}}'),
        ]
    )
    with Server(answering(lambda path, key: next(answers)), PrometheusOptions()) as found:
        assert found.now() == 7
    with Server(answering(lambda path, key: (502, "no")), PrometheusOptions(attempts=3)) as found:
        with pytest.raises(InputError, match=r"502 Bad Gateway \(tried 3 times\)"):
            found.now()


def test_istio_knows_who_calls_whom_with_their_namespaces(pulled, cluster, tmp_path):
    """Both ends of a call report it; one of them is counted."""
    text = ""
    for name, value in (("istio_requests_total", 3.0), ("istio_request_duration_milliseconds_sum", 60.0),
                        ("istio_request_duration_milliseconds_count", 3.0)):  # fmt: skip
        for reporter in ("destination", "source"):
            labels = (
                f'reporter="{reporter}",source_workload="front",source_workload_namespace="shop",'
                'destination_workload="cart",destination_workload_namespace="shop"'
            )
            text += "".join(
                f"{name}{{{labels}}} {value * at} {cluster.start + at}\n" for at in range(30, 6 * SLICE, 60)
            )
    backfill(tmp_path, text + "# EOF\n")
    with running(tmp_path) as url:
        store = pulled(url, machine=NO_MACHINE, container=NO_POD)
    calls = raw(store, "calls")
    assert set(calls.select("source", "target").rows()) == {("shop/front", "shop/cart")}
    assert calls["weight"].to_list() == pytest.approx([3.0] * 6, rel=1e-3)
    services = raw(store, "service")
    assert set(services["entity"]) == {"shop/cart"}
    assert services["request_rate"].to_list() == pytest.approx([3.0] * 72, rel=1e-3)
    assert services["latency"].to_list() == pytest.approx([0.02] * 72, rel=1e-3)


def test_jaeger_knows_who_calls_whom(pulled, server, cluster, answering, monkeypatch):
    monkeypatch.setenv("FLEETCAST_PROMETHEUS_TOKEN", "of Prometheus alone")
    asked = []

    def answer(path: str, key: str | None) -> tuple[int, str]:
        asked.append(path)
        assert key is None
        return 200, json.dumps({"data": [{"parent": "front", "child": "cart", "callCount": 7200}]})

    store = pulled(server, graph="none", jaeger=answering(answer))
    slices = range(cluster.start, cluster.start + 6 * SLICE, SLICE)
    assert asked == [f"/api/dependencies?endTs={(t + SLICE) * 1000}&lookback={SLICE * 1000}" for t in slices]
    assert raw(store, "calls").rows() == [(t, "shop/front", "shop/cart", 2.0) for t in slices]


@pytest.mark.slow
def test_a_running_server_is_followed(pulled, tmp_path, answering, table):
    """Scraped five times a second, in bins of a second: what is over is pulled, and then what came since."""
    exporter = answering(lambda path, key: (200, "load 0.5\n")).removeprefix("http://")
    job = {
        "job_name": "test",
        "scrape_interval": "200ms",
        "scrape_timeout": "200ms",
        "static_configs": [{"targets": [exporter]}],
    }
    asked = {
        "step": 1, "slice": 2, "window": 1, "delay": 1, "since": datetime.now(UTC), "until": None,
        "graph": "none",
        "machine": {**NO_MACHINE, "cpu": "avg_over_time(load[$window])"},
        "container": NO_POD,
    }  # fmt: skip
    with running(tmp_path, {"scrape_configs": [job]}) as url:

        def wait_for(samples: int) -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                found = httpx.get(f"{url}/api/v1/query", params={"query": "count_over_time(load[1h])"}).json()
                if any(int(item["value"][1]) >= samples for item in found["data"]["result"]):
                    return
                time.sleep(0.1)
            raise AssertionError((tmp_path / "log").read_text()[-2000:])

        wait_for(12)
        store = pulled(url, **asked)
        first = written(store)
        before = table(store, "telemetry")
        wait_for(20)
        pulled(url, **asked)
    assert first.items() < written(store).items()
    after = table(store, "telemetry")
    assert len(before) < len(after)
    assert after.head(len(before)).equals(before)
    assert set(after["entity"]) == {exporter}
    assert set(after["cpu"]) == {0.5}
    times = after["time"].dt.epoch("s")
    assert (times.diff().drop_nulls() == 1).all()
