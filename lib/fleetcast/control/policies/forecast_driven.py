"""Scaling by a forecast: forecast → capacity curve → limits, so that only the forecast differs.

A forecast answers with the calls per second to provision for, [E, S], NaN where it knows nothing: then the
latest measurement stands in, and without any the replicas stay.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import polars as pl
import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.control.interface import Action, Observation
from fleetcast.control.policies.capacity import CapacityCurve
from fleetcast.control.policies.limits import Behaviour, Limits
from fleetcast.control.traffic import AHEAD, Traffic
from fleetcast.errors import InputError
from fleetcast.models import build
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch, Edges


class ForecastOptions(Options):
    """What is made of a forecast."""

    stretch: float = Field(1.5, gt=1)
    """Objective of the capacity curve: mean time of a call, in times without waiting."""
    lead: int = Field(4, ge=1, le=AHEAD)
    """Decision intervals from now on that are provisioned for; a replica must be able to start in them."""
    behaviour: Behaviour = Behaviour()


class Forecast(Protocol):
    """Knows a load ahead."""

    truth: bool
    """Whether it needs what no autoscaler can see."""

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""

    def highest(self, observation: Observation, lead: int) -> Tensor:
        """[E, S]. The highest load of the next `lead` intervals [1/s]."""


class ForecastPolicy:
    """Scales by a forecast."""

    def __init__(self, forecast: Forecast, options: ForecastOptions | None = None) -> None:
        self.forecast, self.options = forecast, options or ForecastOptions()

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        least, most = (torch.as_tensor(one) for one in (cluster.min_replicas, cluster.max_replicas))
        self._limits = Limits(self.options.behaviour, least, most)
        self._curve = CapacityCurve.of(cluster, self.options.stretch)
        self.forecast.reset(cluster, environments)

    def act(self, observation: Observation) -> Action:
        """Replicas alone."""
        rate = self.forecast.highest(observation, self.options.lead)
        asked = self._curve.replicas(torch.where(rate.isnan(), observation.rate, rate))
        current = observation.wanted.double()
        recommended = torch.where(asked.isnan(), current, asked)
        return Action(self._limits.apply(observation.time, current, recommended).float())


class LastValue:
    """What was measured last goes on."""

    truth = False

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""

    def highest(self, observation: Observation, lead: int) -> Tensor:
        """[E, S]."""
        return observation.rate


class Clairvoyant:
    """What will come: a bound."""

    truth = True

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""

    def highest(self, observation: Observation, lead: int) -> Tensor:
        """[E, S]."""
        if observation.truth is None:
            raise InputError("clairvoyant: expected an observation with the truth")
        return observation.truth.ahead[:, :lead].amax(1)


class SameTimeYesterday:
    """What was measured one period ago."""

    truth = False

    def __init__(self, period: float) -> None:
        """`period` in seconds: a day, or what takes its place in the traffic."""
        self._period = period

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        measure = cluster.measure
        # The latest measurement is of the interval that ended `lag` ago; the first of the next intervals
        # began now. A period before that one are so many later measurements.
        self._back = round((self._period - measure.lag) / measure.interval) - 1
        if self._back < AHEAD:
            raise InputError(f"a period of {self._period} s, expected more than {AHEAD} intervals")
        self._seen: deque[Tensor] = deque(maxlen=self._back)

    def highest(self, observation: Observation, lead: int) -> Tensor:
        """[E, S]."""
        self._seen.append(observation.rate)
        if len(self._seen) < self._back:
            return torch.full_like(observation.rate, torch.nan)
        ahead = torch.stack([self._seen[step] for step in range(lead)])
        return torch.where(ahead.isnan().all(0), torch.nan, ahead.nan_to_num(0).amax(0))


class PublishedQuantile:
    """What a nightly forecast publishes where no model is better: same time yesterday, with the quantile of
    what came beyond it on training traffic, as the forecasts of a store have it."""

    truth = False

    def __init__(self, period: float, quantile: float, training: Traffic, cluster: Cluster) -> None:
        """`period` in seconds, as of `SameTimeYesterday`. Raises InputError if training is no longer."""
        self._yesterday = SameTimeYesterday(period)
        series, back = _measured(training, cluster, 0), round(period / cluster.measure.interval)
        if back >= series.shape[1]:
            raise InputError(
                f"traffic of {series.shape[1]} intervals, expected more than the period of {back}"
            )
        beyond = (series[:, back:] - series[:, :-back]).flatten(0, 1).double()
        self._beyond = beyond.quantile(quantile, 0).float() * _scale(cluster)

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        self._yesterday.reset(cluster, environments)

    def highest(self, observation: Observation, lead: int) -> Tensor:
        """[E, S]."""
        return (self._yesterday.highest(observation, lead) + self._beyond).clamp(min=0)


class Schedule:
    """Rates known in advance for each time, such as a published forecast's quantile."""

    truth = False

    def __init__(self, rates: Tensor, step: float) -> None:
        """`rates` [T, S] from the episode's start on, each for one step [s]; NaN where there is none."""
        self._rates, self._step = rates, step

    @classmethod
    def of_forecast(
        cls, forecast: pl.DataFrame, observed: pl.DataFrame, quantile: str, mean: float, cluster: Cluster
    ) -> Schedule:
        """A forecast of a store beside the series that is replayed, scaled alike.

        `forecast` has `time` and the column `quantile`, `observed` `time` and `request_rate`, from the same
        start on; `mean` is the mean rate [1/s] that `traffic.replay` gives the observed series.
        """
        joined = observed.join(forecast.select("time", quantile), on="time", how="left").sort("time")
        if joined[quantile].null_count() == len(joined):
            raise InputError(f"forecast: no {quantile} for any time that is replayed")
        step = float(joined["time"].diff().drop_nulls().min().total_seconds())  # type: ignore[union-attr]
        scale = mean / max(float(observed["request_rate"].mean() or 0), 1e-9)  # type: ignore[arg-type]
        rate = torch.tensor(joined[quantile].cast(pl.Float64).fill_null(float("nan")).to_list())
        by_service = torch.as_tensor(cluster.share @ cluster.visits)
        return cls(scale * rate.double().unsqueeze(1) * by_service, step)

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        self._environments = environments

    def highest(self, observation: Observation, lead: int) -> Tensor:
        """[E, S]."""
        first = int(observation.time / self._step)
        last = int((observation.time + lead * observation.interval - 1e-9) / self._step)
        ahead = self._rates[first : last + 1]
        if not len(ahead):
            return torch.full_like(observation.rate, torch.nan)
        return ahead.amax(0).float().repeat(self._environments, 1)


class LstmOptions(Options):
    """The LSTM of LSTM-Auto: the ladder's model on measured rates."""

    history: int = Field(32, ge=1)
    """Measurements that it sees."""
    horizon: int = Field(8, ge=1)
    """Decision intervals that it forecasts."""
    hidden: int = Field(32, ge=1)
    quantile: float = Field(0.9, gt=0, lt=1)
    """What is provisioned of its forecast."""
    steps: int = Field(600, ge=1)
    """Training steps."""
    batch: int = Field(64, ge=1)
    """Windows of all services in a step."""
    rate: float = Field(3e-3, gt=0)
    """Learning rate, falling to 0."""
    seed: int = Field(0, ge=0)


class LstmForecast:
    """LSTM-Auto's forecast, trained on the rates of training traffic."""

    truth = False

    def __init__(self, options: LstmOptions, training: Traffic, cluster: Cluster) -> None:
        """Trains at once; seconds to a minute on one core."""
        self.options = options
        torch.manual_seed(options.seed)
        self._model = _lstm(options, len(cluster.names), _delay(cluster))
        _train(self._model, options, _measured(training, cluster, options.seed), _delay(cluster))

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        self._delay = _delay(cluster)
        self._scale = _scale(cluster)
        self._seen: deque[Tensor] = deque(maxlen=self.options.history)

    @torch.no_grad()
    def highest(self, observation: Observation, lead: int) -> Tensor:
        """[E, S]. NaN until its look-back is full."""
        if lead > self.options.horizon:
            raise InputError(
                f"a lead of {lead} intervals, expected at most the horizon {self.options.horizon}"
            )
        self._seen.append(observation.rate / self._scale)
        if len(self._seen) < self.options.history:
            return torch.full_like(observation.rate, torch.nan)
        x = torch.stack(tuple(self._seen), 1)
        output = self._model(_batch(x, self._delay + self.options.horizon))
        ahead = output.quantiles[:, self._delay : self._delay + lead, :, 0, 0]
        return ahead.amax(1).clamp(min=0) * self._scale


def _delay(cluster: Cluster) -> int:
    """Intervals between the latest measurement's end and now."""
    return round(cluster.measure.lag / cluster.measure.interval)


def _scale(cluster: Cluster) -> Tensor:
    return torch.as_tensor(cluster.rate * (cluster.share @ cluster.visits), dtype=torch.float32).clamp(
        min=1e-6
    )


def _lstm(options: LstmOptions, services: int, delay: int) -> Model:
    geometry = Geometry(
        history=options.history,
        horizon=delay + options.horizon,
        metrics=("request_rate",),
        lags=(),
        calendar=1,
        quantiles=(options.quantile,),
        entities=tuple(str(number) for number in range(services)),
    )
    return build("lstm", {"hidden": options.hidden}, geometry)


def _measured(training: Traffic, cluster: Cluster, seed: int) -> Tensor:
    """[E, T, S]. What would be measured of the traffic per interval, in scales of each service."""
    per = round(cluster.measure.interval / training.step)
    visits = torch.as_tensor(cluster.visits, dtype=torch.float32)
    whole = training.rates.shape[1] // per * per
    rates = (training.rates[:, :whole] @ visits).unflatten(1, (-1, per)).mean(2)
    generator = torch.Generator().manual_seed(seed)
    counted = torch.poisson(rates * cluster.measure.interval, generator=generator) / cluster.measure.interval
    noise = cluster.measure.noise * torch.randn(counted.shape, generator=generator)
    return counted * noise.exp() / _scale(cluster)


def _train(model: Model, options: LstmOptions, series: Tensor, delay: int) -> None:
    """Adam on the pinball loss of the quantile and the squared error of the mean, over random windows."""
    horizon = delay + options.horizon
    places = series.shape[1] - options.history - horizon + 1
    if places < 1:
        raise InputError(f"traffic of {series.shape[1]} intervals, expected {options.history + horizon}")
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(model.parameters(), options.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    within = torch.arange(options.history + horizon)
    model.train()
    for _ in range(options.steps):
        which = torch.randint(len(series), (options.batch, 1), generator=generator)
        start = torch.randint(places, (options.batch, 1), generator=generator)
        windows = series[which, start + within]
        y = windows[:, options.history :]
        output = model(_batch(windows[:, : options.history], horizon))
        gap = y - output.quantiles[..., 0, 0]
        pinball = torch.maximum(options.quantile * gap, (options.quantile - 1) * gap).mean()
        loss = pinball + (y - output.mean[..., 0]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _batch(x: Tensor, horizon: int) -> Batch:
    """A look-back [B, L, S] as the models take it; missing values filled with 0 and masked."""
    windows, history, services = x.shape

    def nothing(steps: int) -> Tensor:
        return torch.zeros(windows, steps, services, 1, 0)

    return Batch(
        x=x.nan_to_num(0).unsqueeze(-1),
        mask=~x.isnan().unsqueeze(-1),
        time_x=torch.zeros(windows, history, 1),
        time_y=torch.zeros(windows, horizon, 1),
        seasonal_x=nothing(history),
        seasonal_x_mask=nothing(history).bool(),
        seasonal=nothing(horizon),
        seasonal_mask=nothing(horizon).bool(),
        edges=Edges(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0)),
        nodes=torch.arange(services),
        y=torch.zeros(windows, horizon, services, 1),
        y_mask=torch.zeros(windows, horizon, services, 1, dtype=torch.bool),
        origins=torch.zeros(windows, dtype=torch.int64),
    )
