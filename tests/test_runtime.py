"""How every job runs: exit code, last line, and work spread over Ray."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleetcast import provenance, runtime
from fleetcast.config import BaseJobConfig
from fleetcast.errors import InputError
from fleetcast.runtime import Failed, run_job, spread, tasks

log = logging.getLogger("fleetcast")
INGEST = Path(__file__).parents[1] / "jobs" / "ingest.py"


class Config(BaseJobConfig):
    """A job for the tests."""

    size: int = 1
    """How much."""


@pytest.fixture
def job(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, dict[str, Any], str]]]:
    """`job(main, arguments…)` → exit code, last line of standard output, standard error. Without Ray."""

    def run(main: Callable[[Config], dict[str, Any]], *arguments: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(runtime, "ray_session", lambda *_: contextlib.nullcontext())
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


_NO_SOURCE = "expected exactly one of --source and --tabular.table"


def test_as_a_command_the_last_line_is_json_and_the_log_is_on_standard_error(tmp_path):
    command = [sys.executable, str(INGEST), "--store", str(tmp_path / "store")]
    missing = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert missing.returncode == 2
    assert json.loads(missing.stdout) == {"job": "ingest", "ok": False, "error": _NO_SOURCE}
    assert f"ERROR   {_NO_SOURCE}" in missing.stderr
    unknown = subprocess.run([*command, "--colour", "red"], capture_output=True, text=True, env=os.environ)
    assert unknown.returncode == 2
    assert "unrecognized arguments: --colour red" in unknown.stderr
    assert not (tmp_path / "store").exists()


def test_the_peak_of_memory_is_that_of_the_time_since_it_was_made():
    code = """
import numpy as np
from fleetcast.runtime import PeakMemory

np.ones(40 << 20, np.uint8).sum()  # given back before
peak = PeakMemory()
before = peak.bytes()
np.ones(80 << 20, np.uint8).sum()
print(peak.bytes() - before)
"""
    # In a process of its own: what other tests have left to this one, it may give back meanwhile.
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 60 << 20 < int(grown) < 120 << 20


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


def test_tasks_come_back_in_order_and_what_fails_says_why_and_stops_no_other(ray_cluster, tmp_path):
    def work(item: int) -> int:
        with (tmp_path / str(item)).open("a") as runs:
            runs.write("x")
        if item == 1:
            raise InputError("item 1 is empty")
        if item == 2 or (item == 3 and (tmp_path / "3").read_text() == "x"):
            os._exit(1)
        return item * item

    found = tasks(list(range(5)), work, "squares", str)
    assert found[1] == Failed("InputError: item 1 is empty")
    assert isinstance(found[2], Failed)
    assert found[2].reason.startswith("WorkerCrashedError: ")
    assert [found[0], *found[3:]] == [0, 9, 16]
    runs = [(tmp_path / str(item)).read_text() for item in range(5)]
    assert runs == ["x", "x", "xx", "xx", "x"], "what was killed is tried once more, what failed is not"
    assert tasks([], work, "nothing", str) == []


def test_tasks_share_a_cpu_by_fractions(ray_cluster, tmp_path):
    def work(item: int) -> bool:
        (tmp_path / str(item)).touch()
        until = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        return time.monotonic() < until

    assert tasks([0, 1, 2], work, "waits", str, cpus=0.5) == [True] * 3, "three at once on two CPUs"


def test_no_more_tasks_run_at_once_than_are_wanted(ray_cluster, tmp_path):
    def work(item: int) -> int:
        (tmp_path / str(item)).touch()
        seen = []
        for _ in range(5):
            seen.append(len(list(tmp_path.iterdir())))
            time.sleep(0.02)
        (tmp_path / str(item)).unlink()
        return max(seen)

    assert tasks(list(range(4)), work, "waits", str, cpus=0.5, most=1) == [1, 1, 1, 1]


def test_tasks_that_log_are_no_more_at_once_than_there_are_cpus(ray_cluster):
    """Ray takes a task that waits for an answer to use no CPU, and starts the next one."""

    def work(item: int) -> tuple[float, float]:
        started = time.monotonic()
        for line in range(300):
            log.info("line %d", line)
        return started, time.monotonic()

    spans = tasks(list(range(8)), work, "logs", str)
    assert max(sum(start <= at < end for start, end in spans) for at, _ in spans) <= 2


def test_what_tasks_log_arrives_whole_and_with_their_names(ray_cluster, caplog):
    def work(item: int) -> None:
        for line in range(50):
            log.info("line %d", line)

    log.addHandler(caplog.handler)
    try:
        tasks([0, 1], work, "logs", lambda item: f"item {item}")
    finally:
        log.removeHandler(caplog.handler)
    for item in (0, 1):
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"item {item}: line")]
        assert lines == [f"item {item}: line {line}" for line in range(50)]


def test_tasks_that_no_node_can_run_are_not_waited_for_in_silence(ray_cluster, monkeypatch, caplog):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    with caplog.at_level("WARNING", "fleetcast"):
        tasks([0], lambda item: item, "trial", str, cpus=2)
    assert "trial: no node has 2 CPUs and 0 GPUs; waiting for one that has" in caplog.text


def test_a_job_uses_the_ray_that_it_finds_and_leaves_it_running(ray_cluster):
    import ray

    with runtime.ray_session(num_cpus=64):
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()


def test_a_result_says_which_code_made_it(monkeypatch, tmp_path):
    found = provenance.provenance()
    assert found["command"] == sys.argv
    assert {"fleetcast", "python", "torch", "ray"} <= found["versions"].keys()

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True)

    code = tmp_path / "provenance.py"
    code.write_text("as committed")
    (tmp_path / "installed.py").write_text("in a folder of somebody's checkout")
    git("init")
    git("add", "provenance.py")
    git("commit", "-m", "code")
    monkeypatch.setattr(provenance, "__file__", str(code))
    commit = provenance.provenance()["commit"]
    assert len(commit) == 40
    code.write_text("changed")
    assert provenance.provenance()["commit"] == f"{commit}-dirty"
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "installed.py"))
    assert provenance.provenance()["commit"] is None


def test_a_task_is_given_its_memory_or_all_that_the_largest_node_lends(ray_cluster, caplog, monkeypatch):
    import ray

    monkeypatch.setattr(logging.getLogger("fleetcast"), "propagate", True)
    (node,) = ray.nodes()
    largest = int(node["Resources"]["memory"])

    def given(_: Any) -> dict[str, Any]:
        found: Any = ray.get_runtime_context().get_assigned_resources()
        return {"memory": found.get("memory")}

    assert runtime.spread([0, 1], given, "small", memory=1 << 20)[1]["memory"] == 1 << 20
    assert "may need" not in caplog.text
    (receipt,) = runtime.spread([0], given, "large", memory=2 * largest)
    assert receipt["memory"] == largest
    assert "large: a task may need" in caplog.text
