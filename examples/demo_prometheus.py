"""Starts a Prometheus that has watched a small cluster for a week, and runs the nightly job on it.

    python examples/demo_prometheus.py out/demo-prometheus

Needs `prometheus` and `promtool` on PATH (Debian's package `prometheus`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from fleetcast.traces.synthesis.prometheus import DAY, Cluster

ADDRESS = "127.0.0.1:9099"
DAYS = 7


def main(folder: Path) -> int:
    """Runs the demo in a folder that is made anew; returns the job's exit code."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        print("prometheus and promtool are not on PATH (Debian: apt-get install prometheus)", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    past = folder / "past.txt"
    past.write_text(Cluster(int(time.time()) // DAY * DAY - DAYS * DAY, DAYS).openmetrics())
    create = ["promtool", "tsdb", "create-blocks-from", "openmetrics", past, folder / "data"]
    subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
    (folder / "prometheus.yml").write_text("{}")
    server = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={ADDRESS}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        running = subprocess.Popen(server, stdout=log, stderr=log)
    try:  # the first request is tried until the server is there
        job = ["jobs/nightly.py", "--source", f"http://{ADDRESS}", "--trace", "prometheus"]
        job += ["--store", f"{folder}/store", "--config", "examples/demo-prometheus.yaml"]
        print("$ python", *job, flush=True)
        return subprocess.run([sys.executable, *job], check=False).returncode
    finally:
        running.terminate()
        running.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
