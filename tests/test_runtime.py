"""How every job runs: exit code, last line, and work spread over Ray."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fleetcast import runtime
from fleetcast.config import BaseJobConfig
from fleetcast.errors import InputError
from fleetcast.runtime import PeakMemory, run_job, spread

INGEST = Path(__file__).parents[1] / "jobs" / "ingest.py"


class Config(BaseJobConfig):
    """A job for the tests."""

    size: int = 1
    """How much."""


@pytest.fixture
def job(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, dict[str, Any], str]]]:
    """`job(main, arguments…)` → exit code, last line of standard output, standard error. Without Ray."""

    def run(main: Callable[[Config], dict[str, Any]], *arguments: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(runtime, "ray_session", lambda num_cpus, everything: contextlib.nullcontext())
        monkeypatch.setattr(sys, "argv", ["jobs/sizes.py", *arguments])
        with pytest.raises(SystemExit) as end:
            run_job(main, Config)
        shown = capsys.readouterr()
        return end.value.code, json.loads(shown.out.splitlines()[-1]), shown.err

    log = logging.getLogger("fleetcast")
    before = log.handlers, log.propagate, log.level
    yield run
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


def test_a_whole_result_ends_with_its_figures_and_0(job):
    def main(config: Config) -> dict[str, Any]:
        print("something on the way")
        return {"rows": config.size * 2}

    code, last, _ = job(main, "--size", "21")
    assert code == 0
    assert last.pop("seconds") >= 0
    assert last == {"job": "sizes", "ok": True, "rows": 42}


def test_what_the_user_can_mend_is_one_line_and_1(job):
    def main(config: Config) -> dict[str, Any]:
        raise InputError("raw.csv: the file is empty, expected rows")

    code, last, log = job(main)
    assert code == 1
    assert last == {"job": "sizes", "ok": False, "error": "raw.csv: the file is empty, expected rows"}
    assert "Traceback" not in log
    assert log.count("raw.csv: the file is empty") == 1


def test_our_own_fault_is_a_traceback_and_1(job):
    def main(config: Config) -> dict[str, Any]:
        return {"rows": 1 // 0}

    code, last, log = job(main)
    assert code == 1
    assert last["error"].startswith("ZeroDivisionError: ")
    assert "Traceback" in log


def test_an_interrupted_job_is_not_whole(job):
    def main(config: Config) -> dict[str, Any]:
        raise KeyboardInterrupt

    assert job(main)[:2] == (1, {"job": "sizes", "ok": False, "error": "interrupted"})


def test_a_wrong_value_is_2_and_names_the_option(job):
    code, last, _ = job(lambda config: {}, "--size", "much")
    assert code == 2
    assert last["error"].startswith("--size: ")
    assert job(lambda config: {}, "--log-level", "loud")[1]["error"] == (
        "--log-level: expected DEBUG, INFO, WARNING or ERROR, got 'loud'"
    )


def test_as_a_command_the_last_line_is_json_and_the_log_is_on_standard_error(tmp_path):
    command = [sys.executable, str(INGEST), "--store", str(tmp_path / "store")]
    missing = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert missing.returncode == 2
    assert json.loads(missing.stdout) == {"job": "ingest", "ok": False, "error": "--source is required"}
    assert "ERROR   --source is required" in missing.stderr
    unknown = subprocess.run([*command, "--colour", "red"], capture_output=True, text=True, env=os.environ)
    assert unknown.returncode == 2
    assert "unrecognized arguments: --colour red" in unknown.stderr
    assert not (tmp_path / "store").exists()


def test_the_peak_of_memory_is_that_of_the_time_since_it_was_made():
    np.ones(40 << 20, np.uint8).sum()  # given back before
    peak = PeakMemory()
    before = peak.bytes()
    np.ones(80 << 20, np.uint8).sum()
    assert 60 << 20 < peak.bytes() - before < 120 << 20


def test_receipts_come_back_in_the_order_of_the_items(ray_cluster):
    receipts = spread(list(range(9)), lambda item: {"rows": item * item}, "squares")
    assert [receipt["rows"] for receipt in receipts] == [item * item for item in range(9)]
    assert all(receipt["seconds"] >= 0 and receipt["peak_bytes"] > 1 << 20 for receipt in receipts)
    assert spread([], lambda item: {}, "nothing") == []


def test_every_item_is_tried_and_what_went_wrong_is_told_together(ray_cluster, tmp_path):
    def work(item: int) -> dict[str, Any]:
        (tmp_path / str(item)).touch()
        if item % 2:
            raise InputError(f"file {item} is empty")
        return {}

    with pytest.raises(InputError) as failure:
        spread(list(range(14)), work, "files")
    assert str(failure.value).count(" is empty") == 5
    assert str(failure.value).endswith("; and 2 more")
    assert len(list(tmp_path.iterdir())) == 14


def test_a_job_uses_the_ray_that_it_finds_and_leaves_it_running(ray_cluster):
    import ray

    with runtime.ray_session(num_cpus=64):
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()
