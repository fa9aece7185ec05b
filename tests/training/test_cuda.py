"""On a GPU: the same training, in bfloat16, from batches that are copied while it computes."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from fleetcast import models
from fleetcast.models import MODELS
from fleetcast.models.geometry import Geometry
from fleetcast.training import checkpoints
from fleetcast.training.loop import Run, train
from fleetcast.training.options import TrainOptions
from fleetcast.windows import order
from fleetcast.windows.loader import Shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LEVELS = (0.1, 0.5, 0.9)
#: bfloat16 keeps 8 bits: losses of the same batches differ by less than this, relatively.
CLOSE = 0.03


def on(device: str, data, model: str = "stgnn", epochs: int = 3) -> Run:
    """A run at its start, on a device."""
    options = TrainOptions(model=model, epochs=epochs, batch_size=8, patience=epochs)
    torch.manual_seed(0)
    config = getattr(options, model).model_dump()
    if "dropout" in config:  # each device draws its own
        config["dropout"] = 0.0
    net = models.build(model, config, Geometry.of(data[1], LEVELS)).to(device)
    return Run.start(net, Shards(*data), options)


def ignore(run: Run, figures: dict[str, float]) -> None:
    """A `save` that saves nothing."""


@pytest.mark.parametrize("model", [name for name in MODELS if not MODELS[name].fitted])
def test_every_model_learns_on_a_gpu_what_it_learns_on_the_cpu(small, model):
    losses = {}
    for device in ("cpu", "cuda"):
        run = on(device, small, model)
        train(run, ignore)
        assert {parameter.device.type for parameter in run.model.parameters()} <= {device}
        losses[device] = [epoch["val_loss"] for epoch in run.progress.history]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=CLOSE)


def test_batches_for_a_gpu_are_pinned_and_the_same(small):
    plan = order.training(small[1], 8, seed=0, epoch=0)
    device = torch.device("cuda", 0)
    plain = Shards(*small).batches(plan)
    for pinned, other in zip(Shards(*small).batches(plan, device), plain, strict=True):
        assert pinned.x.is_pinned()
        assert pinned.edges.index.is_pinned()
        there = pinned.to(device)
        for field in fields(pinned):
            if field.name != "edges":
                assert torch.equal(getattr(there, field.name).cpu(), getattr(other, field.name))
        assert torch.equal(there.edges.weight.cpu(), other.edges.weight)


def test_a_run_goes_on_on_a_gpu_from_where_it_was_written(small, tmp_path):
    def save(run: Run, figures: dict[str, float]) -> None:
        if run.progress.epoch == 1:
            checkpoints.write(run, tmp_path)

    whole = on("cuda", small)
    train(whole, save)
    resumed = on("cuda", small)
    checkpoints.restore(resumed, tmp_path)
    train(resumed, ignore)
    ours, theirs = ([epoch["val_loss"] for epoch in run.progress.history] for run in (resumed, whole))
    assert ours == pytest.approx(theirs, rel=1e-3)  # sums over edges have no order on a GPU


def test_what_was_trained_on_a_gpu_forecasts_without_one(small, tmp_path):
    run = on("cuda", small)
    train(run, ignore)
    checkpoints.write(run, tmp_path)
    here = on("cpu", small).model
    here.load_state_dict(checkpoints.read_best(tmp_path))
    batch = next(iter(Shards(*small).batches(order.evaluation(small[1], "val", 8))))
    with torch.no_grad():
        run.model.load_state_dict(checkpoints.read_best(tmp_path))
        there = run.model.eval()(batch.to("cuda")).mean.cpu()
        assert torch.allclose(here.eval()(batch).mean, there, atol=1e-4)
