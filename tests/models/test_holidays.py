"""What is known of future days is an input: a model that sees the holidays forecasts them better."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fleetcast import models
from fleetcast.errors import InputError
from fleetcast.models import MODELS
from fleetcast.models.geometry import Geometry
from fleetcast.store import Store
from fleetcast.training.loop import Run, train
from fleetcast.training.options import TrainOptions
from fleetcast.windows import order
from fleetcast.windows.calendar import Calendar, Mark
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest

DAY, DAYS = 96, 30
HOLIDAYS = (3, 8, 13, 17, 26)


@pytest.fixture
def data(dataset) -> tuple[Store, Manifest]:
    """A month of two entities with a daily cycle, much lower on holidays, the last of which is in the test
    part; without a calendar."""
    step = np.arange(DAYS * DAY)
    load = 2 + np.sin(2 * np.pi * step / DAY)
    load[np.isin(step // DAY, HOLIDAYS)] -= 1.5
    noise = np.random.default_rng(0).normal(0, 0.05, (len(step), 2))
    values = (load[:, None] * [1, 2] + noise)[..., None].astype(np.float32)
    return dataset(values, history=16, horizon=4, lags=(DAY,), width=960, metrics=("cpu",))


def marked(manifest: Manifest) -> Manifest:
    """The same data with the calendar."""
    second = manifest.step * DAY
    spans = tuple((manifest.start + day * second, manifest.start + (day + 1) * second) for day in HOLIDAYS)
    return manifest.model_copy(update={"calendar": Calendar(marks=(Mark(name="holiday", spans=spans),))})


def error(store: Store, manifest: Manifest, model: str) -> float:
    """Mean absolute error, scaled, of the last holiday."""
    options = TrainOptions(model=model, epochs=2, batch_size=64, steps_per_epoch=20, patience=2)
    torch.manual_seed(0)
    config = getattr(options, model).model_dump() | ({"num_threads": 1} if model == "lightgbm" else {})
    net = models.build(model, config, Geometry.of(manifest, (0.1, 0.5, 0.9)))
    shards = Shards(store, manifest)
    train(Run.start(net, shards, options), lambda run, figures: None)
    total = count = 0.0
    first, last = HOLIDAYS[-1] * DAY - 4, (HOLIDAYS[-1] + 1) * DAY
    with torch.no_grad():
        for batch in shards.batches(order.evaluation(manifest, "test", 64)):
            on = torch.from_numpy(np.isin(batch.origins.numpy(), np.arange(first, last)))
            wrong = (net.eval()(batch).mean - batch.y).abs()[on]
            total, count = total + wrong.sum().item(), count + wrong.numel()
    return total / count


@pytest.mark.parametrize("model", ["ridge", "lightgbm", "mlp"])
def test_a_model_that_sees_the_calendar_is_better_on_a_holiday(data, model):
    store, plain = data
    assert error(store, marked(plain), model) < 0.9 * error(store, plain, model)


@pytest.mark.parametrize("model", list(MODELS))
def test_every_model_takes_features_of_the_calendar(data, model):
    store, plain = data
    manifest = marked(plain)
    geometry = Geometry.of(manifest, (0.5,))
    assert (geometry.calendar, geometry.marks) == (7, ("holiday",))
    batch = next(iter(Shards(store, manifest).batches(order.training(manifest, 8, seed=0, epoch=0))))
    assert batch.time_y.shape[-1] == 7
    net = models.build(model, {}, geometry)
    if not MODELS[model].fitted:
        assert net(batch).mean.shape == batch.y.shape
    geometry.check(batch)
    with pytest.raises(InputError, match="time_x"):
        Geometry.of(plain, (0.5,)).check(batch)
