"""What requests may ask and what answers say: the HTTP contract, validated where it enters.

Times are UTC. A value that is not known is null; no answer holds a number that is not finite.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from fleetcast.schemas import QUANTILES

#: Most of what one request may ask for.
MOST_ENTITIES = 5_000
MOST_POINTS = 5_000_000
MOST_LISTED = 1_000


class Model(BaseModel):
    """Base of requests and answers: nothing unknown, nothing that is not a finite number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _known_level(level: float) -> float:
    if not any(abs(level - known) < 1e-9 for known in QUANTILES):
        raise ValueError(f"expected one of {', '.join(map(str, QUANTILES))}")
    return level


Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Level = Annotated[float, Field(gt=0, lt=1), AfterValidator(_known_level)]
Hours = Annotated[float, Field(gt=0, le=24 * 366)]


class Problem(Model):
    """What is wrong with a request, or why there is no answer."""

    error: str
    """In words: what was given and what was expected."""
    field: str | None = None
    """The parameter or the part of the body that is wrong."""


class Metric(Model):
    """A metric that is forecast."""

    name: str
    unit: str
    """What it measures, in words."""


class Issue(Model):
    """Which forecast an answer is of."""

    issued: datetime
    """The time of the first step that is forecast."""
    valid_until: datetime
    """The end of the last step; past it the forecast is stale."""
    stale: bool
    """Whether its horizon is over, by the clock of the trace or by the server's."""
    model: str
    """What forecasts: a model or a naive rung."""


class Cluster(Issue):
    """What there is to ask for."""

    level: str
    """What an entity is: machine, container or service."""
    entities: int
    metrics: list[Metric]
    step: int
    """Width of a step [s]."""
    horizon: int
    """Steps that are forecast."""
    quantiles: list[float]
    fallbacks: dict[str, int]
    """Why entities have a naive forecast in place of the model's → how many."""


class Entity(Model):
    """One machine, container or service."""

    entity: str
    parent: str | None = None
    """The machine of a container."""
    service: str | None = None
    """The application of a container."""
    cpu_capacity: float | None = None
    memory_capacity: float | None = None


class Entities(Model):
    """A page of entities."""

    total: int
    """How many match."""
    entities: list[Entity]


class Series(Model):
    """One metric of one entity over the horizon."""

    metric: str
    unit: str
    mean: list[float]
    quantiles: dict[str, list[float]]
    """Quantile level → value at each step."""


class EntityForecast(Model):
    """The forecast of one entity."""

    entity: str
    fallback: str | None
    """Why a naive forecast stands in for the model's, or null."""
    series: list[Series]


class Forecasts(Issue):
    """Forecasts of some entities, all over the same steps."""

    times: list[datetime]
    """Start of each step."""
    forecasts: list[EntityForecast]


class ForecastRequest(Model):
    """Many entities at once."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"entities": ["m_1", "m_2"], "metrics": ["cpu"], "hours": 6, "quantiles": [0.5, 0.95]}
            ]
        }
    )
    entities: list[Name] = Field(min_length=1, max_length=MOST_ENTITIES)
    metrics: list[Name] | None = None
    """All of them if not given."""
    hours: Hours | None = None
    """How far ahead; the whole horizon if not given."""
    quantiles: list[Level] | None = None
    """All of them if not given."""


class History(Model):
    """What was observed of an entity before the forecast."""

    entity: str
    times: list[datetime]
    values: dict[str, list[float | None]]
    """Metric → value at each time; null in gaps."""


class Total(Issue):
    """The sum over entities."""

    entities: int
    metric: str
    unit: str
    times: list[datetime]
    mean: list[float]
    quantiles: dict[str, list[float]]
    how: str
    """How the interval of the sum was made."""
    history: list[float | None]
    """The sum before the forecast, step by step up to it; null where most were not observed. Only of the
    whole cluster."""


class TotalRequest(Model):
    """A sum over some entities."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"metric": "cpu", "entities": ["m_1", "m_2"]}]})
    metric: Name
    entities: list[Name] = Field(min_length=1, max_length=MOST_ENTITIES)


class Peak(Model):
    """The highest expected load of an entity."""

    entity: str
    metric: str
    time: datetime
    mean: float
    value: float
    """The quantile, at that time."""


class Peaks(Issue):
    """The highest peaks, highest first."""

    quantile: float
    peaks: list[Peak]


class Limit(Model):
    """When an entity is expected to pass a limit."""

    entity: str
    metric: str
    hours: float | None
    """From now until the quantile first passes the limit; null if it does not within the horizon."""
    time: datetime | None
    highest: float
    """The largest value of the quantile over the horizon."""


class Limits(Issue):
    """Who passes a limit, soonest first."""

    quantile: float
    limit: float
    horizon_hours: float
    limits: list[Limit]


class Neighbour(Model):
    """An edge of the graph at the forecast's beginning."""

    entity: str
    direction: Literal["upstream", "downstream"]
    """upstream: its load comes to the entity; downstream: the entity's goes to it."""
    weight: float


class Neighbours(Model):
    """The graph around an entity."""

    entity: str
    neighbours: list[Neighbour]


class MetricAccuracy(Model):
    """What an earlier forecast of one metric was worth."""

    mean_absolute_error: float
    inside_90: float
    """Share of what was observed that lay inside the 90 % interval."""
    observations: int


class Accuracy(Model):
    """An earlier forecast of an entity against what then was observed."""

    entity: str
    issued: datetime | None
    """Of the forecast that was looked at; null if there is none that is old enough."""
    metrics: dict[str, MetricAccuracy]


class Card(Model):
    """What is known of the model that forecasts."""

    model: str
    folder: str
    reason: str
    """Why it was selected."""
    trained_on: dict[str, Any]
    figures: dict[str, Any]
    """Errors on the validation and test part beside the naive rungs', and coverages."""
    options: dict[str, Any]
    provenance: dict[str, Any]


_EXAMPLE: dict[str, Any] = {
    "entity": "m_1",
    "times": ["2018-01-08T23:30:00Z", "2018-01-08T23:45:00Z"],
    "values": {"cpu": [0.41, None]},
}


class Telemetry(Model):
    """Observations of one entity; times in any order, gaps allowed."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})
    entity: Name
    times: list[datetime] = Field(min_length=1, max_length=100_000)
    values: dict[Name, list[float | None]] = Field(min_length=1, max_length=64)
    """Metric → a value for each time, in the model's units; null where nothing was observed."""


class LiveRequest(Model):
    """A forecast from now on of the model that is served."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "telemetry": [_EXAMPLE],
                    "hours": 2,
                    "quantiles": [0.5, 0.95],
                }
            ]
        }
    )
    telemetry: list[Telemetry] = Field(default_factory=list, max_length=MOST_ENTITIES)
    """Used for this request alone, over what the server has."""
    entities: list[Name] | None = Field(None, min_length=1, max_length=MOST_ENTITIES)
    """What to forecast; those of the telemetry if not given."""
    origin: datetime | None = None
    """Time of the first step to forecast; the step after the newest observation if not given."""
    hours: Hours | None = None
    quantiles: list[Level] | None = None


class LiveForecasts(Model):
    """Forecasts that were made for this request."""

    origin: datetime
    model: str
    times: list[datetime]
    forecasts: list[EntityForecast]


class TelemetryRequest(Model):
    """New observations to keep, so that a live forecast needs only the newest ones."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"telemetry": [_EXAMPLE]}]})
    telemetry: list[Telemetry] = Field(min_length=1, max_length=MOST_ENTITIES)


class TelemetryAnswer(Model):
    """What became of new observations."""

    accepted: int
    """Values that are kept."""
    rejected: dict[str, int]
    """Reason → values that are not."""


class Scaling(Model):
    """How many replicas a workload needs, for an autoscaler."""

    workload: str
    required_replicas: int
    load: float
    """The highest value of the quantile in the time asked for."""
    metric: str
    quantile: float
    start: datetime
    end: datetime
    """Which steps were looked at."""
    capacity_model: str
    """How replicas follow from load."""
    generated_at: datetime
    valid_until: datetime
    model: str
    fallback: bool


class Health(Model):
    """Whether the server works."""

    status: Literal["ok", "not ready"]
    reason: str | None = None
    forecast: str | None = None
    model: str | None = None
