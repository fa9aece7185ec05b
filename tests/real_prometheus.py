"""A real Prometheus for tests: its past is made of OpenMetrics text, or it scrapes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus and promtool on PATH (Debian: apt-get install prometheus)",
)


@contextmanager
def running(folder: Path, config: dict | None = None, *arguments: str) -> Iterator[str]:
    """The address of a Prometheus whose data are in `folder/data`, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    (folder / "prometheus.yml").write_text(json.dumps(config or {}))  # JSON is YAML
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        *arguments,
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code in (200, 401):
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def backfill(folder: Path, text: str) -> None:
    """Makes OpenMetrics text the past of the Prometheus of a folder."""
    (folder / "past.txt").write_text(text)
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics"]
    done = subprocess.run(
        [*command, str(folder / "past.txt"), str(folder / "data")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
