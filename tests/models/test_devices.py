"""What a model must be to run on a GPU, as far as a machine without one can tell.

A tensor that is made without saying where lands on the default device, on a GPU's machine the CPU. Here all
that is given lies on the CPU, and the default is torch's `meta` device, whose tensors have no data: one that
is made without its device changes the result or raises. Of the backward pass this sees what the forward pass
left for it: torch runs backward passes, also those written in Python, without the default device.
"""

import dataclasses
from typing import Any

import pytest
import torch
from fleetcast.models import MODELS, build
from fleetcast.models.base import Fitted
from fleetcast.training.loop import Run, loss_sum
from fleetcast.training.options import FitOptions
from fleetcast.windows.batch import Batch
from samples import GEOMETRY, NO_EDGES, batch, forecast
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: So many steps that Informer chooses among its queries.
LONG = GEOMETRY.model_copy(update={"history": 24})
GRAPHS = ("true", "identity", "shuffled", "learned")
FORMS = [
    (name, {"graph": graph} if graph else {})
    for name, config in MODELS.items()
    if name != "lightgbm"  # its trees are on the CPU, wherever the batch is
    for graph in (GRAPHS if "graph" in config.model_fields else (None,))
]

OTHERS = [("fusion", {"neighbours": 0}), ("ridge", {"others": True})]


def step(name: str, options: dict[str, Any], default: str) -> list[Tensor]:
    """Forecasts in training and in evaluation, and gradients, where `default` is the default device."""
    torch.manual_seed(0)
    model, inputs = build(name, options, LONG), batch(geometry=LONG)
    if isinstance(model, Fitted):
        model.fit(lambda: [inputs], lambda: [inputs])
    with torch.device(default):
        output = model.train()(inputs)
        loss = loss_sum(output, inputs, LONG.quantiles)[0]
        if not isinstance(model, Fitted):
            loss.backward()
        later = forecast(model, inputs)
    return [output.mean, output.quantiles, loss, later.mean, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(("name", "options"), [*FORMS, *OTHERS])
def test_every_tensor_of_a_step_is_made_where_the_batch_is(name, options):
    torch.testing.assert_close(step(name, options, "meta"), step(name, options, "cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_where_its_model_is_whether_it_has_parameters_or_is_fitted(name):
    model = build(name, {}, GEOMETRY)
    assert model.device.type == "cpu"
    model.to("meta")
    run = Run.start(model, shards=None, options=FitOptions())
    assert model.device.type == run.device.type == "meta"


@pytest.mark.parametrize("graph", ["true", "learned"])
def test_mixed_precision_does_not_choose_the_edges_of_fusion(graph):
    model, inputs = build("fusion", {"graph": graph, "neighbours": 2}, GEOMETRY), near_ties()
    exact = model.candidates(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.candidates(inputs)
    assert torch.equal(mixed.index, exact.index)
    assert torch.equal(mixed.relevance, exact.relevance)


def near_ties() -> Batch:
    """Entities whose series differ by less than bfloat16 can tell."""
    inputs = batch(edges=NO_EDGES)
    x = inputs.x[:, :, :1] + 0.01 * inputs.x
    return dataclasses.replace(inputs, x=x, mask=torch.ones_like(inputs.mask))


@pytest.mark.parametrize(("device", "later"), [("cpu", False), ("meta", True)])
def test_a_batch_on_the_cpu_is_complete_when_its_copy_returns(device, later):
    with Copies() as copies:
        moved = batch().to(device)
    assert {t.device.type for t in (moved.x, moved.nodes, moved.edges.index, moved.edges.weight)} == {device}
    assert set(copies.later) == {later}


class Copies(TorchFunctionMode):
    """Records of each copy of a tensor whether it may be complete after its call returns."""

    def __init__(self):
        super().__init__()
        self.later = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.to:
            self.later.append(kwargs["non_blocking"])
        return func(*args, **(kwargs or {}))
