"""The cluster: services depend on services, machines host services, containers are replicas of them.

    service    depends on one to three services of the layer above; there are at most four layers, no circles
    machine    hosts a main service and up to two guests
    container  a replica of one of its machine's services

Nothing is stored: everything is drawn anew, the same every time, from the options and a counter.
"""

from __future__ import annotations

from datetime import date
from enum import IntEnum
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationInfo, field_validator, model_validator

from fleetcast.config import Options, Seconds

Array = npt.NDArray[Any]
#: Services and how much of the variance of their load is theirs; sums to 1.
Shares = tuple[tuple[int, float], ...]

DAY = 86_400
#: A shard is one entity in a quarter of a day; the shards of a table lie in its files in no order.
SHARD = DAY // 4
#: Load is drawn at knots so far apart [s] and is linear in between.
KNOT = 300
KNOTS = DAY // KNOT


class SynthesizeOptions(Options):
    """What the synthetic cluster is like and how its files are cut."""

    trace: Literal["alibaba-2018", "microservices-v2021", "microservices-v2022", "services"] = "alibaba-2018"
    """What is written: the six tables of cluster-trace-v2018; the four of a microservice trace, calls among
    them; or services.parquet (time, service, request_rate, latency, cpu, every 5 min) and calls.parquet
    (time, source, target, weight: requests per second, every hour), which need only services, days, seed,
    coupling and requests."""
    machines: int = Field(100, ge=1)
    """Machines, of 96 cores each."""
    containers: int | None = Field(None, ge=1)
    """Containers; four a machine if not given."""
    services: int | None = Field(None, ge=1)
    """Applications, at most one a machine; a third of the machines, but at least two, if not given."""
    days: int = Field(8, ge=1)
    """Length of the trace [days]."""
    seed: int = Field(0, ge=0)
    """The same seed and options give the same bytes."""
    coupling: float = Field(0.8, ge=0, le=1)
    """Share of the shocks' variance that travels along dependencies [0-1]; at 0 machines are independent."""
    sample_interval: Seconds = 10
    """Time between two samples of a machine [s]; must divide 6 h. One in ten samples is missing."""
    container_interval: Seconds = 300
    """The same of a container. 10 s, as in the real trace, makes container_usage much the largest table."""
    job_interval: Seconds = Field(1800, ge=60)
    """Every service runs its batch job once in this time [s, or 30min]; must divide a day."""
    requests: float = Field(2500, gt=0)
    """Mean requests that all services together receive [1/s]; not in alibaba-2018. A microservice trace has
    rows of one call in two hundred."""
    churn: float = Field(0, ge=0, le=1)
    """Share of the containers that a rollout replaces by new ones on a day [0-1]; as large a share is started
    or stopped for good at some time, and some services begin in the middle. Only in microservice traces."""
    holidays: tuple[date, ...] = ()
    """Days on which services receive fewer requests. Not in alibaba-2018."""
    holiday_load: float = Field(0.4, gt=0)
    """How much of a usual day's load they receive then."""
    format: Literal["csv", "csv.gz", "tar.gz"] = "csv"
    """Of the files that are not Parquet; an archive holds one csv."""
    rows_per_part: int = Field(1_000_000, ge=25_000)
    """Most rows in a file of alibaba-2018 [rows]: 35 to 110 MB of text a million."""
    file_span: Seconds | None = None
    """Time in a file of a microservice trace [s, or 1h]; must divide a day. If not given, each table's as
    published: 3 min to 12 h, or all of it."""

    @field_validator("services")
    @classmethod
    def _at_most_one_a_machine(cls, services: int | None, info: ValidationInfo) -> int | None:
        machines = info.data.get("machines")  # missing if it is wrong itself
        if info.data.get("trace") == "services":
            return services
        if services is not None and machines is not None and services > machines:
            raise ValueError(f"expected at most one service a machine, with machines = {machines}")
        return services

    @field_validator("sample_interval", "container_interval")
    @classmethod
    def _divides_a_shard(cls, interval: int) -> int:
        if interval < 1 or SHARD % interval:
            raise ValueError("expected seconds that divide 6 h")
        return interval

    @field_validator("job_interval")
    @classmethod
    def _divides_a_day(cls, interval: int) -> int:
        if DAY % interval:
            raise ValueError("expected seconds that divide a day")
        return interval

    @field_validator("file_span")
    @classmethod
    def _minutes_that_divide_a_day(cls, span: int | None) -> int | None:
        if span is not None and (span < 60 or span % 60 or DAY % span):
            raise ValueError("expected minutes that divide a day")
        return span

    @model_validator(mode="after")
    def _a_container_for_each_service(self) -> SynthesizeOptions:
        if self.trace.startswith("microservices") and self.container_count < self.service_count:
            raise ValueError(
                f"containers ({self.container_count}) must be at least as many as services "
                f"({self.service_count})"
            )
        return self

    @property
    def container_count(self) -> int:
        """Containers, given or derived."""
        return self.containers or 4 * self.machines

    @property
    def service_count(self) -> int:
        """Services, given or derived."""
        return self.services or min(self.machines, max(2, self.machines // 3))

    @property
    def span(self) -> int:
        """Length of the trace [s]."""
        return self.days * DAY


class Stream(IntEnum):
    """What a random generator is for; no two share their numbers."""

    DEPENDENCIES = 0
    HOSTING = 1
    SERVICE = 2
    MACHINE = 3
    CONTAINER = 4
    BATCH = 5
    ROWS = 6
    REQUESTS = 7
    CROWDS = 8
    EDGES = 9
    REPLICA = 10
    ROLLOUTS = 11
    CALLS = 12


def generator(options: SynthesizeOptions, stream: Stream, *counter: int) -> np.random.Generator:
    """The generator of one place in the trace, the same in whatever process and order it is asked for."""
    return np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=(stream, *counter)))


#: Services stand in so many layers; a service depends on services of the layer above.
LAYERS = 4
#: A shock needs 30 to 60 min from a service to the next.
DELAYS = (1800, 3600)


@lru_cache(maxsize=1 << 16)
def upstream(options: SynthesizeOptions, service: int) -> tuple[tuple[int, int], ...]:
    """The services whose load reaches a service, with their delays in knots: none of a root, else 1 to 3."""
    first = layer_starts(options)
    layer = service * (len(first) - 1) // options.service_count
    if layer == 0:
        return ()
    random = generator(options, Stream.DEPENDENCIES, service)
    above = np.arange(first[layer - 1], first[layer])
    chosen = random.choice(above, min(int(random.integers(1, 4)), len(above)), replace=False)
    delays = random.integers(DELAYS[0] // KNOT, DELAYS[1] // KNOT, len(chosen), endpoint=True)
    return tuple((int(parent), int(delay)) for parent, delay in zip(chosen, delays, strict=True))


def home_machines(options: SynthesizeOptions, service: int) -> range:
    """The machines whose main service it is; its batch tasks run there."""
    return range(service, options.machines, options.service_count)


@lru_cache(maxsize=1 << 16)
def hosted(options: SynthesizeOptions, machine: int) -> Shares:
    """The 1 to 3 services on a machine, the main one first, with their shares of its shared variance."""
    random = generator(options, Stream.HOSTING, machine)
    main = machine % options.service_count
    number = min(int(random.integers(0, 3)), options.service_count - 1)
    # Steps from the main service around all services that never come back to it.
    steps = random.permutation(options.service_count - 1)[:number] + 1
    guests = [(main + step) % options.service_count for step in steps.tolist()]
    share = 0.8 if guests else 1.0
    return ((main, share), *((guest, (1 - share) / len(guests)) for guest in guests))


def placement(options: SynthesizeOptions, container: int) -> tuple[int, int]:
    """A container's machine and service."""
    turn, machine = divmod(container, options.machines)
    services = hosted(options, machine)
    return machine, services[turn % len(services)][0]


def layer_starts(options: SynthesizeOptions) -> list[int]:
    """Layer k is services `starts[k]` … `starts[k + 1]` − 1."""
    layers = min(LAYERS, options.service_count)
    return [-(-layer * options.service_count // layers) for layer in range(layers + 1)]
