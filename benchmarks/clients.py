"""Requests to a server, and how long each took.

    hammer   as many as it answers, over many connections at once: wrk
    pace     so many a second, whether the earlier ones are answered or not; a late start counts as waiting
    ask      one after the other, from one or from several clients

The latter two run in a process that holds nothing but this file, which is why it imports no other: what the
measuring process does must not be taken for the server's time.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import math
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

HOST = "127.0.0.1"
_HERE = Path(__file__).parent
#: Seconds until an answer that does not come is a failure.
_PATIENCE = 60


@dataclass(frozen=True)
class Load:
    """What came of many requests."""

    requests: int
    """That were answered."""
    seconds: float
    p50: float
    """[ms]."""
    p99: float
    """[ms]."""
    longest: float
    """[ms]."""
    failed: int
    """Answers that are not 2xx, and connections that broke."""
    milliseconds: tuple[float, ...] = ()
    """Of each request, where they are told one by one."""

    @property
    def rate(self) -> float:
        """Requests answered per second."""
        return self.requests / self.seconds


def has_wrk() -> bool:
    """Whether wrk is installed."""
    return shutil.which("wrk") is not None


def start_hammer(port: int, paths: Path, connections: int, seconds: float) -> subprocess.Popen[str]:
    """wrk at work on the paths in a file, each in turn; `finish` waits for its end."""
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={max(1, round(seconds))}s"]
    command += [f"--timeout={_PATIENCE}s", f"--script={_HERE / 'paths.lua'}", f"http://{HOST}:{port}"]
    return subprocess.Popen([*command, "--", str(paths)], stdout=subprocess.PIPE, text=True)


def finish(wrk: subprocess.Popen[str]) -> Load:
    """What wrk measured. Its percentiles count an answer that took long once more for each request that
    could have been sent meanwhile."""
    text, _ = wrk.communicate()
    if wrk.returncode:
        raise RuntimeError(f"wrk: exit code {wrk.returncode}: {text}")
    found = json.loads(text.splitlines()[-1])
    refused, broken = found.pop("refused"), found.pop("broken")
    return Load(**{**found, "requests": found["requests"] - refused}, failed=refused + broken)


def hammer(port: int, paths: Path, connections: int, seconds: float) -> Load:
    """As many requests as are answered."""
    return finish(start_hammer(port, paths, connections, seconds))


def pace(port: int, paths: Path, connections: int, seconds: float, rate: float) -> Load:
    """`rate` requests a second; what takes longer than its turn does not delay the next ones."""
    return load_of(**_apart("pace", port, str(paths), connections, seconds, rate))


def ask(port: int, path: str, body: Path, clients: int, seconds: float, least: int) -> Load:
    """POSTs of a file's content, each client's in turn: for so long, but at least so many each."""
    return load_of(**_apart("ask", port, path, str(body), clients, seconds, least))


def load_of(milliseconds: Sequence[float], failed: int, seconds: float) -> Load:
    """Of what each answer took; of fewer than 100, p99 is the longest."""
    times = sorted(milliseconds)
    if not times:
        raise RuntimeError(f"none of {failed} requests was answered")
    p50, p99, longest = (times[max(0, math.ceil(len(times) * share) - 1)] for share in (0.5, 0.99, 1))
    return Load(len(times), seconds, p50, p99, longest, failed, tuple(times))


def together(loads: Sequence[Load]) -> Load:
    """All requests of several loads that were told one by one."""
    times = [time for load in loads for time in load.milliseconds]
    return load_of(times, sum(load.failed for load in loads), sum(load.seconds for load in loads))


def _apart(kind: str, *arguments: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.clients"],
        input=json.dumps([kind, *arguments]),
        stdout=subprocess.PIPE,
        text=True,
        cwd=_HERE.parent,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- in the other process ------------------------------------------------------------------------------------


def _pace(port: int, paths: str, connections: int, seconds: float, rate: float) -> dict[str, Any]:
    lines = Path(paths).read_text().split()
    requests = [f"GET {line} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode() for line in lines]

    async def paced() -> dict[str, Any]:
        return await _Pace(port, requests).run(connections, round(seconds * rate), rate)

    gc.disable()
    return asyncio.run(paced())


class _Pace:
    """Requests at fixed times; one that finds no connection free waits for one, and that counts."""

    def __init__(self, port: int, requests: list[bytes]) -> None:
        self._port, self._requests = port, requests
        self._free: list[_Connection] = []
        self._waiting: deque[tuple[float, bytes]] = deque()
        self.milliseconds: list[float] = []
        self.failed = 0
        self.now = asyncio.get_running_loop().time

    async def run(self, connections: int, count: int, rate: float) -> dict[str, Any]:
        """`milliseconds` of those that were answered, `failed` and `seconds`."""
        for _ in range(connections):
            await self._connect()
        start = self.now() + 0.2
        for number in range(count):
            due = start + number / rate
            if (early := due - self.now()) > 0:
                await asyncio.sleep(early)
            self._waiting.append((due, self._requests[number % len(self._requests)]))
            self.go_on()
        end = self.now() + _PATIENCE
        while len(self.milliseconds) + self.failed < count and self.now() < end:
            await asyncio.sleep(0.005)
        seconds = max(self.now() - start, count / rate)
        return {
            "milliseconds": self.milliseconds,
            "failed": count - len(self.milliseconds),
            "seconds": seconds,
        }

    def go_on(self, free: _Connection | None = None) -> None:
        """Sends what waits, as long as connections are free."""
        if free is not None:
            self._free.append(free)
        while self._free and self._waiting:
            self._free.pop().send(*self._waiting.popleft())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), HOST, self._port)
        self.go_on(connection)

    def replace(self, broken: _Connection) -> None:
        """Another connection for one that the server closed."""
        if broken in self._free:
            self._free.remove(broken)
        else:
            self.failed += 1
        self._again = asyncio.ensure_future(self._connect())


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, pace: _Pace) -> None:
        self._pace, self._due, self._got = pace, 0.0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, due: float, request: bytes) -> None:
        self._due, self._got = due, b""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, found, body = self._got.partition(b"\r\n\r\n")
        if not found or len(body) < _length(head):
            return
        if head.split(b" ", 2)[1].startswith(b"2"):
            self._pace.milliseconds.append(1e3 * (self._pace.now() - self._due))
        else:
            self._pace.failed += 1
        self._pace.go_on(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._pace.replace(self)


def _length(head: bytes) -> int:
    lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    return next(int(value) for name, _, value in lines if name == b"content-length")


def _ask(port: int, path: str, body: str, clients: int, seconds: float, least: int) -> dict[str, Any]:
    content = Path(body).read_bytes()
    start = time.monotonic()

    def client(_: int) -> tuple[list[float], int]:
        connection = http.client.HTTPConnection(HOST, port, timeout=_PATIENCE)
        times: list[float] = []
        failed = 0
        while time.monotonic() - start < seconds or len(times) + failed < least:
            began = time.perf_counter()
            try:
                connection.request("POST", path, content, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                good = 200 <= answer.status < 300
            except (OSError, http.client.HTTPException):
                connection.close()
                good = False
            if good:
                times.append(1e3 * (time.perf_counter() - began))
            failed += not good
        return times, failed

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(client, range(clients)))
    return {
        "milliseconds": [one for times, _ in found for one in times],
        "failed": sum(failed for _, failed in found),
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    kind, *arguments = json.load(sys.stdin)
    json.dump(_pace(*arguments) if kind == "pace" else _ask(*arguments), sys.stdout)
