"""The selected model's forecast of every entity, published as `forecasts/issued=…`.

    python jobs/forecast.py --store ./store

Intervals are calibrated on the validation part. An entity that the model cannot forecast gets the naive
forecast of the ladder, and the reason in the column `fallback`.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.forecasting.predict import ForecastOptions
from fleetcast.forecasting.run import forecast
from fleetcast.runtime import run_job
from fleetcast.store import Store


class Config(ForecastOptions, JobConfig):
    __doc__ = __doc__


def main(config: Config) -> dict[str, Any]:
    """Runs the forecast."""
    return forecast(Store(config.store), config.only(ForecastOptions))


if __name__ == "__main__":
    run_job(main, Config)
