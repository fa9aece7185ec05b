"""A client of Prometheus' HTTP API, and of Jaeger's: asks, tries again, says in one line what is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray

from fleetcast.errors import InputError
from fleetcast.traces.prometheus import PrometheusOptions

#: Prometheus refuses a range with more points per series.
MOST_POINTS = 11_000
#: The first pause before a request is tried again [s]; each further one is twice as long.
_PAUSE = 0.5
_TOKEN = "FLEETCAST_PROMETHEUS_TOKEN"
_USERNAME, _PASSWORD = "FLEETCAST_PROMETHEUS_USERNAME", "FLEETCAST_PROMETHEUS_PASSWORD"


class Series(NamedTuple):
    """The samples of one series."""

    labels: dict[str, str]
    times: NDArray[np.int64]
    """[T] Unix seconds."""
    values: NDArray[np.float64]
    """[T], nan and inf among them."""

    @classmethod
    def of(cls, labels: dict[str, str], pairs: list[Any]) -> Series:
        """From pairs of a number and a text."""
        times = np.fromiter((pair[0] for pair in pairs), np.int64, len(pairs))
        return cls(labels, times, np.fromiter((float(pair[1]) for pair in pairs), np.float64, len(pairs)))


class TooMuch(Exception):
    """The server cannot answer so long a range; a shorter one it may."""


class Server:
    """One server, over one connection at a time; a context manager."""

    def __init__(self, url: str, options: PrometheusOptions, keys: bool = True) -> None:
        """Only who is to be given `keys` is told them. Raises InputError for an address that has some in it,
        which would be logged, or that is none."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InputError(f"{url}: {error}, expected http://host:port") from error
        if not parsed.host:
            raise InputError(f"{url}: names no host, expected http://host:port")
        if parsed.userinfo:
            raise InputError(
                f"--source {parsed.copy_with(username=None, password=None)}: has a user in its address, "
                f"expected {_USERNAME} and {_PASSWORD} in the environment"
            )
        self.url = url.rstrip("/")
        self.attempts = options.attempts
        self.values = options.values
        token, username = (os.environ.get(name) if keys else None for name in (_TOKEN, _USERNAME))
        self.client = httpx.Client(
            timeout=httpx.Timeout(options.timeout, connect=min(options.timeout, 10)),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            auth=(username, os.environ.get(_PASSWORD, "")) if username and not token else None,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()

    # -- Prometheus ----------------------------------------------------------------------------------------

    def now(self) -> int:
        """The server's own clock, in whole Unix seconds."""
        return int(self.query("vector(0)", None)[0].times[0])

    def query(self, promql: str, at: int | None) -> list[Series]:
        """The value of every series at a Unix time, or now."""
        form = {"query": promql} | ({} if at is None else {"time": str(at)})
        return [Series.of(item["metric"], [item["value"]]) for item in self._result("query", form)]

    def count(self, promql: str, at: int) -> int:
        """How many series a query has at a time."""
        return int(sum(series.values[0] for series in self.query(f"count({promql})", at)))

    def has(self, selector: str, first: int, last: int) -> bool:
        """Whether there is any series between two Unix times; asked of the index, no sample is read."""
        form = {"match[]": selector, "start": str(first), "end": str(last)}
        return bool(self._ask("POST", "/api/v1/labels", data=form).get("data"))

    def query_range(self, promql: str, first: int, last: int, step: int) -> Iterator[list[Series]]:
        """The values of every series at `first`, `first + step`, … up to `last`, in as many pieces of time as
        the server's limits ask for."""
        size = max(1, min(MOST_POINTS, self.values // max(1, self.count(promql, last))))
        for begin in range(first, last + 1, size * step):
            yield from self._piece(promql, begin, min(begin + (size - 1) * step, last), step)

    def _piece(self, promql: str, first: int, last: int, step: int) -> Iterator[list[Series]]:
        form = {"query": promql, "start": str(first), "end": str(last), "step": str(step)}
        try:
            result = self._result("query_range", form)
        except TooMuch as error:
            if last - first < step:
                raise InputError(f"{error} (of a single point, {promql})") from error
            middle = first + (last - first) // step // 2 * step
            yield from self._piece(promql, first, middle, step)
            yield from self._piece(promql, middle + step, last, step)
            return
        yield [Series.of(item["metric"], item["values"]) for item in result]

    def _result(self, path: str, form: dict[str, str]) -> Any:
        answer = self._ask("POST", f"/api/v1/{path}", data=form)
        try:
            return answer["data"]["result"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.url}: expected a Prometheus server, got another answer") from error

    # -- Jaeger --------------------------------------------------------------------------------------------

    def dependencies(self, first: int, last: int) -> list[tuple[str, str, float]]:
        """Jaeger: parent, child, and how many calls there were between two Unix times."""
        times = {"endTs": str(last * 1000), "lookback": str((last - first) * 1000)}
        answer = self._ask("GET", "/api/dependencies", params=times)
        try:
            return [
                (edge["parent"], edge["child"], float(edge["callCount"])) for edge in answer["data"] or ()
            ]
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.url}: expected a Jaeger server, got another answer") from error

    # -- HTTP ----------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, **given: Any) -> Any:
        """The answer as JSON. Raises InputError, or TooMuch."""
        why = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                answer = self.client.request(method, self.url + path, **given)
            except httpx.TimeoutException:
                why = f"no answer within {self.client.timeout.read:g} s"
                continue
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
                continue
            why = _explain(answer)
            if answer.status_code in (401, 403):
                keys = f"{_TOKEN}, or {_USERNAME} and {_PASSWORD}, in the environment"
                raise InputError(f"{self.url}: {why}; expected {keys}")
            if "too many samples" in why or "query timed out" in why:
                raise TooMuch(f"{self.url}: {why}")
            if answer.is_success:
                try:
                    return orjson.loads(answer.content)
                except orjson.JSONDecodeError as error:
                    raise InputError(f"{self.url}{path}: expected JSON, got {answer.text[:60]!r}") from error
            if answer.status_code < 500 and answer.status_code != 429:
                query = given.get("data", {}).get("query", path)
                raise InputError(" ".join(f"{self.url}: {why} ({query})".split()))
        times = "" if self.attempts == 1 else f" (tried {self.attempts} times)"
        raise InputError(f"{self.url}: {' '.join(why.split())}{times}")


def _explain(answer: httpx.Response) -> str:
    """The server's own words if it has any."""
    if answer.is_success:
        return ""
    try:
        said = orjson.loads(answer.content)
        return f"{answer.status_code}, {said['errorType']}: {said['error']}"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason_phrase}"
