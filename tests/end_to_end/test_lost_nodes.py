"""A cluster of four Ray nodes whose only common place is S3: nodes die in the middle of stages, so does the
driver, and what is published equals the undisturbed run's to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue

import polars as pl
import psutil
import pytest
from object_store import BUCKET, ObjectStore
from polars.testing import assert_frame_equal
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
WORKERS = 3
NIGHTLY = [
    *("--trace", "alibaba-2018", "--ingest.chunk-mb", "1"),
    *("--shard.step", "30min", "--shard.history", "4h", "--shard.horizon", "4h", "--shard.group-size", "1"),
    *("--train.epochs", "4", "--train.batch-size", "4", "--train.steps-per-epoch", "20"),
    *("--train.stgnn.hidden", "8", "--train.workers", "2"),
]
#: Seconds in which the job must come to the moment that is waited for.
PATIENCE = 600
#: How Ray names the processes of a Ray Data task and of a Ray Train worker.
TASK, TRAINER = "ray::MapBatches", "TrainWorker"


class Nodes:
    """A head without CPUs for tasks, where the driver is, and workers of one CPU each."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=200 << 20)
        for _ in range(WORKERS):
            self.add()

    def add(self) -> None:
        """One more worker."""
        self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20)

    def kill_one_that_runs(self, what: str, job: Job) -> str:
        """SIGKILL to all processes of a worker as soon as one of them runs `what`; returns its name."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            assert job.process.poll() is None, f"the job ended before a node ran {what}\n{job.text()}"
            for node in self.cluster.worker_nodes:
                for title in _titles(node):
                    if what in title:
                        self.cluster.remove_node(node, allow_graceful=False)
                        return title.split("(")[0].strip()
            time.sleep(0.02)
        pytest.fail(f"no node ran {what}\n{job.text()}")


def _titles(node: object) -> Iterator[str]:
    """The names of the processes that a node's raylet has started."""
    (raylet,) = node.all_processes["raylet"]  # type: ignore[attr-defined]
    for child in psutil.Process(raylet.process.pid).children():
        try:
            yield " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue


class Job:
    """A nightly job whose driver runs on the head, and its log so far."""

    def __init__(self, command: list[str], nodes: Nodes) -> None:
        environment = {**os.environ, "RAY_ADDRESS": nodes.cluster.address}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._new: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._new.put(line)
        self._new.put(None)

    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        """Returns when a line with this text is logged."""
        try:
            while (line := self._new.get(timeout=PATIENCE)) is not None:
                if text in line:
                    return
        except Empty:
            pass
        pytest.fail(f"the job did not log {text!r}\n{self.text()}")

    def finish(self) -> dict:
        """The figures of a job that ends well."""
        assert self.process.wait(PATIENCE) == 0, self.text()
        self._reader.join()
        return json.loads(self.lines[-1])

    def kill(self) -> None:
        """SIGKILL to the driver."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, object_store: ObjectStore) -> str:
    """A raw trace of 8 machines and 4 days in plain csv, which is read in chunks, on S3."""
    out = tmp_path_factory.mktemp("raw")
    command = [sys.executable, "jobs/synthesize.py", "--out", str(out), "--machines", "8", "--days", "4"]
    subprocess.run([*command, "--format", "csv", "--seed", "3"], cwd=ROOT, check=True, capture_output=True)
    object_store.fs().put(f"{out}/", f"{BUCKET}/chaos/raw", recursive=True)
    return f"s3://{BUCKET}/chaos/raw"


@pytest.fixture(scope="module")
def nodes(object_store: ObjectStore) -> Iterator[Nodes]:
    """The cluster; nothing of S3 is known to its nodes but through their environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        started = Nodes()
        yield started
        started.cluster.shutdown()


@pytest.fixture(scope="module")
def start(nodes: Nodes, raw: str) -> Callable[[str], Job]:
    """Starts the nightly job with a store of this name."""

    def job(name: str) -> Job:
        store = f"s3://{BUCKET}/chaos/{name}"
        return Job([sys.executable, "jobs/nightly.py", "--source", raw, "--store", store, *NIGHTLY], nodes)

    return job


@pytest.fixture(scope="module")
def undisturbed(start: Callable[[str], Job]) -> dict:
    """The figures of a run that nobody disturbed."""
    return start("undisturbed").finish()


def results(object_store: ObjectStore, name: str) -> dict[str, pl.DataFrame]:
    """Everything that a store has to show: what was read, what is forecast, how good it was."""
    fs = object_store.fs()

    def table(pattern: str) -> pl.DataFrame:
        files = sorted(fs.glob(f"{BUCKET}/chaos/{name}/{pattern}"))
        frame = pl.concat([pl.read_parquet(fs.cat_file(file)) for file in files])
        return frame.sort(frame.columns)

    (scores,) = fs.glob(f"{BUCKET}/chaos/{name}/models/stgnn/*/scores.json")
    return {
        "telemetry": table("telemetry/*/*.parquet"),
        "dependencies": table("dependencies/*/*.parquet"),
        "entities": table("entities/*.parquet"),
        "forecasts": table("forecasts/*/*.parquet"),
        "scores": pl.DataFrame({"scores": [fs.cat_file(scores).decode()]}),
    }


def check(object_store: ObjectStore, name: str, figures: dict, undisturbed: dict, what: str) -> None:
    """Compares a disturbed run with the undisturbed one, and says so."""
    found, wanted = results(object_store, name), results(object_store, "undisturbed")
    for table, frame in wanted.items():
        assert_frame_equal(found[table], frame, check_exact=True)
    for name_of in ("rows_read", "rows_rejected", "values_nulled", "entities", "windows", "test_error"):
        assert figures[name_of] == undisturbed[name_of], name_of
    rows = ", ".join(f"{table} {len(frame):,}" for table, frame in wanted.items() if table != "scores")
    print(f"{name}: {what}; equal to the bit: {rows} rows, and all scores")


@pytest.mark.parametrize(
    ("stage", "moment", "runs"),
    [
        ("ingest", "ingest: chunks 1/", TASK),
        ("training", "epoch 2/4", TRAINER),
        ("forecast", "— forecast", TASK),
    ],
)
def test_a_node_that_dies_costs_no_data_and_no_wrong_result(
    stage: str, moment: str, runs: str, nodes: Nodes, start, undisturbed: dict, object_store: ObjectStore
) -> None:
    job = start(f"node-{stage}")
    job.wait_for(moment)
    killed = nodes.kill_one_that_runs(runs, job)
    figures = job.finish()
    nodes.add()
    log = [line for line in job.lines if "epoch" in line or "rank" in line or "chunks" in line]
    print("".join(log[-12:]))
    check(object_store, f"node-{stage}", figures, undisturbed, f"killed the node of {killed!r} at {moment!r}")
    if stage == "training":
        assert any("goes on after epoch" in line for line in job.lines), "training began anew"


@pytest.mark.parametrize("moment", ["ingest: chunks 1/", "epoch 2/4", "— forecast"])
def test_a_driver_that_dies_and_is_started_again_goes_on(
    moment: str, start, undisturbed: dict, object_store: ObjectStore
) -> None:
    name = f"driver-{moment.split()[0].strip(':—') or 'forecast'}"
    first = start(name)
    first.wait_for(moment)
    first.kill()
    assert not object_store.fs().glob(f"{BUCKET}/chaos/{name}/forecasts/*"), "published by a run that died"
    figures = start(name).finish()
    check(object_store, name, figures, undisturbed, f"killed the driver at {moment!r}")
