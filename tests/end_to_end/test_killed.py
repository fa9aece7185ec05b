"""A nightly run that is killed and repeated publishes what an undisturbed run publishes, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NIGHTLY = [
    *("--trace", "alibaba-2018", "--ingest.chunk-mb", "1"),
    *("--shard.step", "30min", "--shard.history", "4h", "--shard.horizon", "4h", "--shard.group-size", "2"),
    *("--train.epochs", "4", "--train.batch-size", "4", "--train.steps-per-epoch", "20"),
    *("--train.stgnn.hidden", "8", "--train.workers", "2"),
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw trace of 8 machines and 4 days in plain csv, which is read in chunks."""
    out = tmp_path_factory.mktemp("raw")
    command = [sys.executable, "jobs/synthesize.py", "--out", str(out), "--machines", "8", "--days", "4"]
    subprocess.run([*command, "--format", "csv", "--seed", "3"], cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def undisturbed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nobody disturbed."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    subprocess.run(command(raw, store), cwd=ROOT, check=True, capture_output=True)
    return store


def command(raw: Path, store: Path) -> list[str]:
    """The nightly job."""
    return [sys.executable, "jobs/nightly.py", "--source", str(raw), "--store", str(store), *NIGHTLY]


def kill_at(line: str, raw: Path, store: Path) -> None:
    """Runs the job and sends SIGKILL to its driver as soon as it logs a line that contains `line`."""
    with subprocess.Popen(
        command(raw, store), cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        for logged in job.stdout:
            if line in logged:
                os.kill(job.pid, signal.SIGKILL)
                break
        else:
            pytest.fail(f"the job ended before it logged {line!r}")
    assert job.returncode == -signal.SIGKILL


def published(store: Path) -> pl.DataFrame:
    """All forecasts of a store."""
    return pl.read_parquet(store / "forecasts" / "*" / "*.parquet").sort("entity", "metric", "time")


@pytest.mark.parametrize(
    "moment",
    ["ingest: chunks 1/", "ingest: days", "shard: split", "epoch 2/4", "evaluation of the val", "— forecast"],
)
def test_a_killed_run_goes_on_and_publishes_the_same(
    moment: str, raw: Path, undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    kill_at(moment, raw, store)
    assert not list(store.glob("forecasts/*")), "nothing may be published by a run that did not end"
    done = subprocess.run(command(raw, store), cwd=ROOT, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ok"]
    assert_frame_equal(published(store), published(undisturbed), check_exact=True)


def test_a_run_repeated_on_the_same_files_does_nothing(raw: Path, undisturbed: Path) -> None:
    before = published(undisturbed)
    done = subprocess.run(command(raw, undisturbed), cwd=ROOT, check=True, capture_output=True, text=True)
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert {stage["status"] for stage in stages.values()} == {"skipped"}
    assert_frame_equal(published(undisturbed), before, check_exact=True)
