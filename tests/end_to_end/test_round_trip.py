"""From a running Prometheus to a published forecast by one command, and back to whoever asks in PromQL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from fleetcast.serving.api import application
from fleetcast.serving.local import Local
from fleetcast.serving.options import ServeOptions
from fleetcast.traces.synthesis.prometheus import DAY, MACHINES, Cluster
from real_prometheus import needs_prometheus

pytestmark = [needs_prometheus, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_the_nightly_job_forecasts_what_a_prometheus_has_scraped(
    scraped_cluster: Cluster, prometheus_server: str, tmp_path: Path
) -> None:
    options = (
        f"--source {prometheus_server} --trace prometheus --store {tmp_path}/store --num-cpus 2 "
        "--shard.step 1h --shard.history 4h --shard.horizon 4h --shard.lags 1d --shard.metrics cpu "
        "--shard.metrics memory --train.epochs 1 --train.steps-per-epoch 5 --train.batch-size 4 "
        "--train.stgnn.hidden 4"
    )
    done = subprocess.run(
        [sys.executable, "jobs/nightly.py", *options.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "lib")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    end = scraped_cluster.start + scraped_cluster.days * DAY
    service = Local(ServeOptions(store=f"{tmp_path}/store", clock="trace"))
    with TestClient(application(service)) as peer:
        for name in MACHINES:
            asked = {"start": end - DAY, "end": end + 4 * 3600, "step": 3600}
            queries = {
                "observed": f'fleetcast_observed{{entity="{name}",metric="cpu"}}',
                "median": f'fleetcast_forecast{{entity="{name}",metric="cpu",quantile="0.5"}}',
            }
            found = {
                what: dict(
                    peer.post("/api/v1/query_range", data={**asked, "query": query}).json()["data"]["result"][
                        0
                    ]["values"]
                )
                for what, query in queries.items()
            }
            load = scraped_cluster.load(name, "cpu").reshape(-1, 12).mean(1)
            assert float(found["observed"][end - 3600]) == pytest.approx(load[-1], abs=1e-4)
            ahead = [float(found["median"][end + hour * 3600]) for hour in range(4)]
            assert ahead == pytest.approx(load[-24:-20], abs=0.3)
    assert figures["entities"] == len(MACHINES)
