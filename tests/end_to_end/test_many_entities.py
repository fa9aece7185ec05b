"""More entities than a graph holds: shard, train and forecast in groups, every entity exactly once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl
import pytest
from fleetcast.forecasting.predict import ForecastOptions
from fleetcast.forecasting.run import forecast
from fleetcast.ingest.shards import shard
from fleetcast.store import Store
from fleetcast.training.options import TrainOptions
from fleetcast.training.run import train_model
from fleetcast.windows import manifest
from fleetcast.windows.manifest import ShardOptions
from many_entities import METRICS, STEP, names, write

pytestmark = pytest.mark.usefixtures("ray_cluster")

HORIZON = 4
TRAINING = TrainOptions(
    epochs=1, steps_per_epoch=5, batch_size=8, stgnn={"hidden": 4, "direct": 8, "layers": 1}
)


@pytest.mark.parametrize(
    ("entities", "size"), [(120, 40), pytest.param(5_000, 64, marks=pytest.mark.slow)], ids=str
)
def test_every_entity_is_forecast_and_counted_once_however_many_groups_see_it(tmp_path, entities, size):
    store = write(Store(str(tmp_path)).open_or_create(), entities)
    options = {"step": STEP, "history": 4 * STEP, "horizon": HORIZON * STEP, "lags": (86_400,)}
    figures = shard(store, ShardOptions(metrics=METRICS, group_size=size, border=8, **options))
    data = manifest.load(store, "default")
    assert Counter(data.names) == Counter(names(entities))
    assert figures["entities"] == entities
    assert figures["border"] == sum(map(len, data.borders)) == 8 * figures["groups"] > 8
    for group, border in zip(data.groups, data.borders, strict=True):
        assert len(border) == len(set(border) - set(group))
    assert data.observed == (1, 1, 1)

    trained = train_model(store, TRAINING)
    tested = store.read_json(f"{trained['model']}/scores.json")["stgnn"]["n"]
    assert tested == [[entities * data.windows("test")] * len(METRICS)] * HORIZON

    made = forecast(store, ForecastOptions())
    table: Any = pl.read_parquet(f"{store.root}/{made['forecast']}/*.parquet")
    assert made["entities"] == entities
    assert made["rows"] == table.height == entities * len(METRICS) * HORIZON
    assert table.unique(["entity", "metric", "time"]).height == table.height
    assert set(table["entity"].cast(pl.String)) == set(names(entities))
    total = store.read_json(f"{made['forecast']}/overview.json")["total"]
    for metric in METRICS:
        rows = table.filter(pl.col("metric").cast(pl.String) == metric)
        sums = rows.group_by("time").agg(pl.col("mean").cast(pl.Float64).sum()).sort("time")["mean"]
        assert total[metric]["forecast"]["mean"] == pytest.approx(sums.to_list(), rel=1e-5)
