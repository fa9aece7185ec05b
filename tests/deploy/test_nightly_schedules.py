"""The nightly job on Kubernetes and with cron: submitted once a night, and what becomes of a failed one.

Both commands are run as they are, on the same day, with a `ray` that only keeps a list of jobs.
"""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from fleetcast.config import parse
from resources import ROOT, load, of_kubernetes

RAY = '''#!{python}
"""`ray job`, for what the schedules do with it. jobs.json: id → how it ended; outcomes.json: of the next."""
import json, pathlib, sys, time
home = pathlib.Path(__file__).parent
jobs, outcomes = (json.loads((home / name).read_text()) for name in ("jobs.json", "outcomes.json"))
command, arguments = sys.argv[2], sys.argv[3:]
with (home / "calls").open("a") as calls:
    print(json.dumps([command, *arguments]), file=calls)
own, _, entrypoint = " ".join(arguments).partition(" -- ")
if command == "submit":
    name = arguments[arguments.index("--submission-id") + 1]
    if name in jobs:
        sys.exit(f"ValueError: Job with submission_id {{name}} already exists.")
    jobs[name] = outcomes.pop(0)
    (home / "jobs.json").write_text(json.dumps(jobs))
    (home / "outcomes.json").write_text(json.dumps(outcomes))
elif command == "stop":
    jobs[arguments[-1]] = "was stopped"
    (home / "jobs.json").write_text(json.dumps(jobs))
elif command == "logs":
    while json.loads((home / "jobs.json").read_text())[arguments[-1]] == "goes on":
        time.sleep(0.05)
elif jobs[arguments[-1]] == "is out of reach":
    sys.exit("ConnectionError: Failed to connect to Ray")
else:
    print(f"Job '{{arguments[-1]}}' {{jobs[arguments[-1]]}}")
'''


DATE = '#!/bin/sh\ntest "$*" = "-u +%F" && echo 2026-01-31\n'


class Ray:
    """A folder with a `ray` in it and what it was told."""

    def __init__(self, folder):
        self.folder = folder
        self.program("ray", RAY.format(python=sys.executable))
        self.program("date", DATE)
        (folder / "calls").touch()
        self.set({}, [])

    def program(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def set(self, jobs, outcomes):
        (self.folder / "jobs.json").write_text(json.dumps(jobs))
        (self.folder / "outcomes.json").write_text(json.dumps(outcomes))

    @property
    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def started(self):
        """Suffix of the id of each job that was started: what follows nightly-DATE."""
        jobs = json.loads((self.folder / "jobs.json").read_text())
        return [name.removeprefix("nightly-2026-01-31") for name in jobs]

    def environment(self):
        return os.environ | {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def ray(tmp_path):
    return Ray(tmp_path)


@pytest.fixture
def cron_job():
    manifest = load("deploy/kuberay/nightly.yaml")
    of_kubernetes(manifest)
    return manifest


@pytest.fixture
def script(cron_job):
    (container,) = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    (text,) = container["args"]
    return text


def run(ray, script):
    return subprocess.run(
        ["bash", "-c", script], env=ray.environment(), capture_output=True, timeout=60
    ).returncode


def check_options(command):
    """The job takes the options that it is given."""
    arguments = shlex.split(command)
    assert arguments[0] == "python"
    file = ROOT / "jobs" / arguments[1].partition("jobs/")[2]
    config = parse(runpy.run_path(str(file))["Config"], arguments[2:])
    assert config.store.startswith("s3://")


# -- Kubernetes --------------------------------------------------------------------------------------------


def test_a_field_that_kubernetes_does_not_know_is_seen(cron_job):
    cron_job["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(ValueError, match="concurencyPolicy"):
        of_kubernetes(cron_job)


def test_nights_do_not_overlap_and_keep_their_date(cron_job):
    spec = cron_job["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["timeZone"] == "Etc/UTC"
    minute, hour, *days = spec["schedule"].split()
    assert days == ["*", "*", "*"]
    longest = spec["startingDeadlineSeconds"] + spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert int(hour) * 3600 + int(minute) * 60 + longest < 86_400


def test_submits_to_the_cluster_of_the_jobs_with_its_token(cron_job):
    (container,) = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    name = load("deploy/kuberay/raycluster.yaml")["metadata"]["name"]
    assert environment["RAY_API_SERVER_ADDRESS"] == f"http://{name}-head-svc:8265"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" in environment


def test_a_night_is_submitted_and_waited_for(ray, script):
    ray.set({}, ["succeeded"])
    assert run(ray, script) == 0
    assert ray.started() == [""]
    assert [call[0] for call in ray.calls] == ["submit", "logs", "status"]
    check_options(shlex.join(ray.calls[0][ray.calls[0].index("--") + 1 :]))


@pytest.mark.parametrize("outcome", ["failed", "was stopped"])
def test_a_night_that_failed_is_tried_again(ray, script, outcome):
    ray.set({}, [outcome, "succeeded"])
    assert run(ray, script) == 0
    assert ray.started() == ["", "-second"]


def test_a_night_fails_after_three_tries(ray, script):
    ray.set({}, ["failed"] * 4)
    assert run(ray, script) == 1
    assert ray.started() == ["", "-second", "-third"]


def test_a_second_pod_goes_on_with_what_the_first_began(ray, script):
    ray.set({}, ["failed", "is out of reach"])
    assert run(ray, script) == 1
    assert ray.started() == ["", "-second"], "a job whose end is not known is not started beside itself"

    first, second = json.loads((ray.folder / "jobs.json").read_text())
    ray.set({first: "failed", second: "succeeded"}, ["succeeded"])
    assert run(ray, script) == 0
    assert ray.started() == ["", "-second"]


def test_a_pod_that_is_ended_ends_its_job(ray, script):
    ray.set({}, ["goes on"])
    pod = subprocess.Popen(["bash", "-c", script], env=ray.environment(), stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 30
        while ["logs"] not in [call[:1] for call in ray.calls] and time.monotonic() < until:
            time.sleep(0.05)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(timeout=30) == 1
    finally:
        pod.kill()
        pod.stderr.close()
    assert ray.calls[-1][0] == "stop"
    assert list(json.loads((ray.folder / "jobs.json").read_text()).values()) == ["was stopped"]


# -- cron --------------------------------------------------------------------------------------------------


@pytest.fixture
def cron():
    """The variables and the fields of the only command: five of time, the user, the command."""
    lines = (ROOT / "deploy/cron/nightly.cron").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    variables = dict(line.split("=", 1) for line in lines[:-1])
    return variables, lines[-1].split(maxsplit=6)


def test_cron_runs_once_a_day(cron):
    _, (minute, hour, *days, user, _) = cron
    assert minute.isdigit() and hour.isdigit()
    assert days == ["*"] * 3
    assert user != "root"


def test_cron_gets_the_whole_command(cron):
    _, fields = cron
    assert "%" not in fields[-1].replace(r"\%", ""), "cron ends a command at %"


def test_cron_submits_the_night_once(cron, ray):
    variables, (*_, command) = cron
    assert variables.keys() == {"SHELL", "RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"}
    checkout = ray.folder / "checkout"
    (checkout / ".venv").mkdir(parents=True)
    (checkout / ".venv/bin").symlink_to(ray.folder)
    ray.program("logger", "#!/bin/sh\ncat\n")
    command = command.replace(r"\%", "%").replace("/srv/fleetcast", str(checkout))

    ray.set({}, ["succeeded", "succeeded"])
    for _ in range(2):
        ran = subprocess.run(
            ["bash", "-c", command], env=ray.environment(), capture_output=True, text=True, timeout=60
        )
    assert "already exists" in ran.stdout
    assert ray.started() == [""]

    (submit, *arguments), _ = ray.calls
    assert submit == "submit"
    environment = ROOT / arguments[arguments.index("--runtime-env") + 1]
    assert yaml.safe_load(environment.read_text())["py_modules"] == ["lib/fleetcast"]
    check_options(shlex.join(arguments[arguments.index("--") + 1 :]))
