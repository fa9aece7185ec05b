"""What goes through the stream: scrapes of telemetry, and the actions that come of them. Both are JSON.

A scrape holds all services at once, as columns, so that 500 of them are one message. What is not known is
null, or left out; the order of services is the message's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.control.features import Scales
from fleetcast.control.interface import Observation

Known = tuple[float | None, ...]
Mode = Literal["observe", "recommend", "act"]

#: Columns of services in a scrape, and of requests.
_OF_SERVICES = (
    "wanted", "ready", "starting", "pending", "measured", "rate", "latency_p50", "latency_p95", "cpu",
    "memory", "queue", "errors",
)  # fmt: skip
_BY_CLASS = ("ready_by_class", "cpu_by_class", "latency_by_class")
_OF_REQUESTS = ("offered", "request_p95", "missed")
#: What is counted by the cluster itself: 0 where it is left out.
_COUNTS = frozenset({"ready", "starting", "pending", "measured", "ready_by_class"})


class Description(Options):
    """The cluster that scrapes are of: `control/cluster.json` of the store."""

    services: tuple[str, ...] = Field(min_length=1)
    """S names."""
    requests: tuple[str, ...] = ()
    """K classes of requests."""
    zones: tuple[str, ...] = Field(("nodes",), min_length=1)
    """Z classes of nodes."""
    scales: Scales
    """What its numbers are measured by, in the same order."""
    interval: float = Field(15, gt=0)
    """Time between two scrapes [s]."""

    @model_validator(mode="after")
    def _same_size(self) -> Description:
        sizes = {
            "services": (len(self.services), len(self.scales.rate)),
            "requests": (len(self.requests), len(self.scales.class_rate)),
            "zones": (len(self.zones), self.scales.zones),
        }
        for name, (given, expected) in sizes.items():
            if given != expected:
                raise ValueError(f"{given} {name}, expected {expected} as in the scales")
        if len(set(self.services)) < len(self.services):
            raise ValueError("services: expected each name once")
        return self

    @classmethod
    def of(cls, cluster: Cluster) -> Description:
        """Of a simulated cluster."""
        return cls(
            services=cluster.names,
            requests=tuple(f"requests-{k}" for k in range(len(cluster.share))),
            zones=tuple(one.name for one in cluster.node_classes),
            scales=Scales.of(cluster),
            interval=cluster.measure.interval,
        )


class Scrape(Options):
    """One message of telemetry."""

    time: float = Field(ge=0)
    """When it was taken [Unix s]."""
    lag: float = Field(0, ge=0)
    """Age of what is measured in it [s]."""
    services: tuple[str, ...] = Field(min_length=1)
    """Whose the columns are."""
    wanted: Known
    """Replicas that are asked for."""
    ready: Known = ()
    starting: Known = ()
    pending: Known = ()
    """Replicas that take calls; that do not yet; of these, without a node."""
    measured: Known = ()
    """Ready replicas of which `cpu` is the mean; `ready` if left out."""
    rate: Known = ()
    """Calls [1/s]."""
    latency_p50: Known = ()
    latency_p95: Known = ()
    """[s]."""
    cpu: Known = ()
    """Share of what the replicas request."""
    memory: Known = ()
    """Share of its limit, of the replica that uses most."""
    queue: Known = ()
    """Calls in work or waiting."""
    errors: Known = ()
    """Calls that failed [1/s]."""
    ready_by_class: tuple[Known, ...] = ()
    cpu_by_class: tuple[Known, ...] = ()
    latency_by_class: tuple[Known, ...] = ()
    """As `ready`, `cpu` and the latency of a call itself: a row for each service, a column for each class of
    nodes."""
    offered: Known = ()
    """Requests of each class of requests [1/s]."""
    request_p95: Known = ()
    """[s]."""
    missed: Known = ()
    """Share that failed or came too late."""

    @model_validator(mode="after")
    def _whole(self) -> Scrape:
        count = len(self.services)
        for name in (*_OF_SERVICES, *_BY_CLASS):
            given = len(getattr(self, name))
            if given not in (0, count):
                raise ValueError(f"{name}: {given} values, expected one for each of {count} services")
        if len(set(self.services)) < count:
            raise ValueError("services: expected each name once")
        return self

    def observation(self, about: Description) -> tuple[Observation, list[str]]:
        """What a policy sees, of one environment, in the description's order; and services that are not of
        this cluster."""
        place = {name: n for n, name in enumerate(about.services)}
        at = [place.get(name, -1) for name in self.services]
        strangers = [name for name in self.services if name not in place]
        zones = len(about.zones)
        columns: dict[str, Tensor] = {}
        for name in (*_OF_SERVICES, *_BY_CLASS):
            given = getattr(self, name)
            shape = (len(place), zones) if name in _BY_CLASS else (len(place),)
            values = np.full(shape, np.nan, np.float32)
            if given:
                rows = _array(given, (len(given), *shape[1:]))
                known = np.array(at) >= 0
                values[np.array(at)[known]] = rows[known]
            columns[name] = torch.from_numpy(values)
        if not self.measured:
            columns["measured"] = columns["ready"].clone()
        for name in _COUNTS:
            columns[name] = columns[name].nan_to_num(0)
        # The scale of a service that is not in the scrape is not known: its least is what it has surely.
        least = torch.tensor(about.scales.least, dtype=torch.float32)
        columns["wanted"] = torch.where(columns["wanted"].isnan(), least, columns["wanted"])
        requests = {name: _requests(getattr(self, name), len(about.requests)) for name in _OF_REQUESTS}
        batched: dict[str, Any] = {name: values.unsqueeze(0) for name, values in (columns | requests).items()}
        return Observation(self.time, about.interval, self.lag, **batched), strangers

    @property
    def unknown(self) -> set[str]:
        """Services without a number of replicas."""
        return {name for name, n in zip(self.services, self.wanted, strict=True) if n is None}

    @classmethod
    def of(cls, seen: Observation, about: Description, start: float = 0.0) -> Scrape:
        """What a simulated cluster's monitoring would send; `start` is when its time began [Unix s]."""
        columns = {name: _list(getattr(seen, name)[0]) for name in (*_OF_SERVICES, *_BY_CLASS, *_OF_REQUESTS)}
        return cls(time=start + seen.time, lag=seen.lag, services=about.services, **columns)


def read_scrape(body: bytes) -> Scrape | str:
    """A message, or in one line what is wrong with it."""
    try:
        return Scrape.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


class ServiceAction(Options):
    """What shall be of one service, and why."""

    service: str
    before: int
    """Replicas that were wanted."""
    replicas: int
    """Replicas from now on."""
    proposed: int
    """What the policy alone would have."""
    reactive: int
    """What the reactive rule alone would have."""
    reasons: tuple[str, ...] = ()
    """Why it is not what the policy would have."""
    weights: tuple[float, ...] = ()
    """Of each class of nodes, for the router; none where the policy does not route."""
    restart: bool = False
    """Whether its oldest-looking replica should be started anew."""


class Entry(Options):
    """The actions of one scrape: an entry of the stream of actions, under the scrape's own offset."""

    id: str
    """The offset of the scrape that it rests on."""
    time: float
    """Of that scrape [Unix s]."""
    mode: Mode
    policy: str
    """Who proposed it."""
    latent_age: float | None = None
    """How old the latent states were that it rests on [s]; None without any."""
    fallback: str | None = None
    """Why the reactive rule decided alone, or None."""
    actions: tuple[ServiceAction, ...]


def _array(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    found = np.array(values, dtype=np.float32)  # None becomes NaN
    if found.shape != shape:
        raise ValueError(f"values of shape {found.shape}, expected {shape}")
    return found


def _requests(values: Known, count: int) -> Tensor:
    if len(values) != count:
        return torch.full((count,), torch.nan)
    return torch.tensor([float("nan") if one is None else one for one in values], dtype=torch.float32)


def _list(values: Tensor) -> Any:
    rows = values.tolist()
    return [[_known(x) for x in row] if isinstance(row, list) else _known(row) for row in rows]


def _known(value: float) -> float | None:
    return None if value != value else value
