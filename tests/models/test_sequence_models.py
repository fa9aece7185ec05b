"""The sequence baselines: what is particular to each of them."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import build
from fleetcast.models.base import Model, Output
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch
from samples import GEOMETRY, NO_EDGES, NODES, affected, batch, forecast, window
from torch.nn.functional import scaled_dot_product_attention

SMALL: dict[str, dict[str, Any]] = {
    "bilstm": {"hidden": 8},
    "dlinear": {},
    "itransformer": {"hidden": 8, "heads": 2, "feedforward": 8},
    "lstm": {"hidden": 8},
    "mlp": {"hidden": 8},
    "patchtst": {"hidden": 8, "heads": 2, "feedforward": 8},
    "stid": {"embedding": 4},
}
NORMALISED = ["itransformer", "patchtst"]


def model(name: str, geometry: Geometry = GEOMETRY, **options: Any) -> Model:
    torch.manual_seed(0)
    return build(name, SMALL[name] | options, geometry)


def observed(inputs: Batch) -> Batch:
    return dataclasses.replace(inputs, mask=torch.ones_like(inputs.mask))


def with_x(inputs: Batch, x: torch.Tensor) -> Batch:
    return dataclasses.replace(inputs, x=x)


@pytest.mark.parametrize("name", SMALL.keys() - {"itransformer"})
def test_nodes_never_mix(name):
    assert affected(model(name), NO_EDGES, 2) == {2}


def test_itransformer_mixes_all_series():
    module, inputs = model("itransformer"), batch(1)
    assert affected(module, NO_EDGES, 2) == set(range(NODES))
    x = inputs.x.clone()
    x[:, 0, 2, 0] += 1
    moved = forecast(module, inputs).mean != forecast(module, with_x(inputs, x)).mean
    assert moved.any(1).all()  # both metrics of all nodes


@pytest.mark.parametrize("name", ["dlinear", "patchtst"])
def test_channel_independent_models_do_not_mix_metrics(name):
    module, inputs = model(name), batch(1)
    x = inputs.x.clone()
    x[:, 0, :, 0] += 1
    moved = forecast(module, inputs).mean != forecast(module, with_x(inputs, x)).mean
    assert moved[..., 0].any()
    assert not moved[..., 1].any()


# dlinear


def test_dlinear_is_linear_where_all_was_observed():
    module, first = model("dlinear", residual=False), observed(batch())
    other = torch.randn(first.x.shape, generator=torch.Generator().manual_seed(2))

    def outputs(x: torch.Tensor) -> torch.Tensor:
        forecasts = forecast(module, with_x(first, x))
        return torch.cat([forecasts.mean[..., None], forecasts.quantiles], dim=-1)

    bias = outputs(torch.zeros_like(other))
    expected = 2 * (outputs(first.x) - bias) - 3 * (outputs(other) - bias) + bias
    torch.testing.assert_close(outputs(2 * first.x - 3 * other), expected, rtol=0, atol=1e-5)


def test_dlinear_is_the_trends_map_and_the_remainders():
    geometry = GEOMETRY.model_copy(update={"quantiles": (), "metrics": ("cpu",)})
    module = model("dlinear", geometry, residual=False, kernel=3)
    x = torch.tensor([3.0, 0, 6, 3, 9, 0])
    inputs = observed(with_x(batch(1, 1, geometry), x.view(1, 6, 1, 1)))
    trend = torch.tensor([2.0, 3, 3, 6, 4, 3])  # the first and the last value count twice
    expected = module.trend(trend) + module.remainder(x - trend)
    torch.testing.assert_close(forecast(module, inputs).mean.flatten(), expected)


@pytest.mark.parametrize(("history", "kernel", "steps"), [(96, 25, 25), (12, 25, 11), (7, 25, 7), (12, 4, 3)])
def test_the_trend_of_dlinear_is_a_centred_average_that_fits_the_look_back(history, kernel, steps):
    geometry = GEOMETRY.model_copy(update={"history": history})
    assert model("dlinear", geometry, kernel=kernel).kernel == steps


# patchtst and itransformer


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", NORMALISED)
def test_the_forecast_shifts_and_scales_with_the_level_of_its_series(name, residual):
    module, inputs = model(name, residual=residual), batch()
    times, by = 2.0, torch.arange(10.0).view(NODES, 2)  # each series its own level
    other = dataclasses.replace(
        inputs, x=times * inputs.x + by, seasonal=times * inputs.seasonal + by[..., None]
    )
    before, after = forecast(module, inputs), forecast(module, other)
    torch.testing.assert_close(after.mean, times * before.mean + by, rtol=0, atol=1e-3)
    expected = times * before.quantiles + by[..., None]
    torch.testing.assert_close(after.quantiles, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NORMALISED)
def test_the_level_is_that_of_what_was_observed(name):
    module, inputs = model(name), batch()
    filled = with_x(inputs, torch.where(inputs.mask, inputs.x, 99.0))
    assert torch.equal(forecast(module, inputs).mean, forecast(module, filled).mean)


@pytest.mark.parametrize("name", NORMALISED)
def test_a_series_that_never_moved_or_was_never_seen_is_forecast_at_its_level(name):
    module, inputs = model(name, residual=False), observed(batch())
    flat = torch.full_like(inputs.x, 3.0)
    torch.testing.assert_close(forecast(module, with_x(inputs, flat)).mean, flat[:, :4], rtol=0, atol=0.05)
    unseen = dataclasses.replace(inputs, x=flat, mask=torch.zeros_like(inputs.mask))
    torch.testing.assert_close(forecast(module, unseen).mean, torch.zeros(3, 4, 5, 2), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("history", "patch", "stride", "patches"),
    [(12, 4, 2, 6), (96, 16, 8, 12), (336, 16, 8, 42), (1, 1, 1, 2)],
)
def test_patches_follow_the_look_back(history, patch, stride, patches):
    module = model("patchtst", GEOMETRY.model_copy(update={"history": history}))
    assert (module.patch, module.stride, len(module.position)) == (patch, stride, patches)


def test_patches_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"patchtst: option patch: 7, expected at most the look-back of 6"):
        model("patchtst", patch=7)
    with pytest.raises(InputError, match=r"patchtst: option stride: 3, expected at most the patch of 2"):
        model("patchtst", patch=2, stride=3)


@pytest.mark.parametrize("name", NORMALISED)
def test_heads_share_the_width(name):
    with pytest.raises(InputError, match=rf"model {name}: option heads: .*divisor of hidden \(8\)"):
        model(name, heads=3)


def test_patches_overlap_and_the_last_step_is_repeated():
    module = model("patchtst", patch=4, stride=2)
    steps = torch.tensor([0.0, 1, 2, 3, 4, 5])
    inputs = observed(with_x(batch(1), steps[:, None, None].expand(1, 6, NODES, 2)))
    seen = []
    module.values.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    forecast(module, inputs)
    level = (steps - 2.5) / (35 / 12) ** 0.5  # mean and population deviation
    expected = torch.stack([level[:4], level[2:], level[[4, 5, 5, 5]]])
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=0)


def test_attention_scores_are_carried_from_layer_to_layer():
    module = model("patchtst", dropout=0)
    first, second, _ = module.encoder
    outputs, received = [], []
    first.register_forward_hook(lambda *args: outputs.append(args[-1][1]))
    second.register_forward_pre_hook(lambda _, args: received.append(args[1]))
    forecast(module, batch())
    assert received[0] is outputs[0]


def test_attention_adds_the_scores_of_the_layer_before():
    layer = model("patchtst", dropout=0, norm="layer").encoder[1]
    random = torch.Generator().manual_seed(3)
    h, carried = torch.randn(2, 6, 8, generator=random), torch.randn(2, 2, 6, 6, generator=random)
    _, own = layer(h, None)
    after, scores = layer(h, carried)
    torch.testing.assert_close(scores, own + carried)
    query, key, value = (
        part.unflatten(-1, (2, 4)).transpose(1, 2) for part in layer.attention(h).split(8, dim=-1)
    )
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=carried).transpose(1, 2).flatten(2)
    state = layer.norms[0](h + layer.mix(mixed))
    torch.testing.assert_close(after, layer.norms[1](state + layer.feedforward(state)))


@pytest.mark.parametrize(("norm", "alone"), [("layer", True), ("batch", False)])
def test_only_batch_normalisation_makes_training_depend_on_batch_mates(norm, alone):
    module, whole = model("patchtst", norm=norm, dropout=0).train(), batch()
    same = torch.allclose(module(whole).mean[:1], module(window(whole, 0)).mean, atol=1e-5)
    assert same == alone


def test_series_of_itransformer_meet_in_attention_only():
    module = model("itransformer")
    for layer in module.encoder[:-1]:
        torch.nn.init.zeros_(layer.mix[0].weight)
    assert affected(module, NO_EDGES, 2) == {2}


def test_time_features_are_tokens_of_itransformer():
    module, inputs = model("itransformer"), batch()
    other = dataclasses.replace(inputs, time_x=inputs.time_x + torch.arange(6.0)[:, None])
    assert not torch.allclose(forecast(module, inputs).mean, forecast(module, other).mean)


# stid


def test_stid_tells_alike_nodes_apart_and_takes_the_mean_for_unknown_ones():
    module, inputs = model("stid"), batch()
    alike = dataclasses.replace(
        inputs,
        **{
            key: getattr(inputs, key)[:, :, :1].expand_as(getattr(inputs, key))
            for key in ("x", "mask", "seasonal", "seasonal_mask")
        },
    )
    known = forecast(module, alike).mean
    assert not torch.allclose(known[:, :, 0], known[:, :, 1])
    unknown = forecast(module, dataclasses.replace(alike, nodes=torch.full((NODES,), -1))).mean
    with torch.no_grad():
        module.node.table[:] = module.node.table.mean(0)
    torch.testing.assert_close(forecast(module, alike).mean, unknown)


def test_stid_reads_the_clock_of_the_last_step_only():
    module, inputs = model("stid"), batch()

    def clock_changed_at(step: int) -> Output:
        time = inputs.time_x.clone()
        time[:, step] += 1
        return forecast(module, dataclasses.replace(inputs, time_x=time))

    before = forecast(module, inputs).mean
    assert torch.equal(clock_changed_at(-2).mean, before)
    assert not torch.allclose(clock_changed_at(-1).mean, before)


def test_the_blocks_of_stid_add_to_their_input():
    module, inputs = model("stid"), batch()
    for block in module.blocks:
        for parameter in block.inner[-1].parameters():
            torch.nn.init.zeros_(parameter)
    silenced = forecast(module, inputs).mean
    module.blocks = torch.nn.Identity()
    assert torch.equal(silenced, forecast(module, inputs).mean)


# lstm and bilstm


def test_the_state_of_bilstm_is_that_of_both_directions_at_their_ends():
    module, inputs = model("bilstm", layers=2), batch(1, 1)
    states = []
    module.head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    forecast(module, inputs)
    features = torch.cat([inputs.x[:, :, 0], inputs.mask[:, :, 0].float(), inputs.time_x], dim=-1)
    with torch.no_grad():
        steps, _ = module.lstm(features)  # forward half, backward half
    torch.testing.assert_close(states[0][:, 0], torch.cat([steps[:, -1, :8], steps[:, 0, 8:]], dim=-1))


def test_lstm_without_the_seasonal_values_and_the_blend_reads_none():
    module, inputs = model("lstm", seasonal=False, residual=False), batch()
    other = dataclasses.replace(inputs, seasonal=inputs.seasonal + 1, seasonal_mask=~inputs.seasonal_mask)
    assert torch.equal(forecast(module, inputs).mean, forecast(module, other).mean)


# all of them learn


WAVES = Geometry(
    history=12, horizon=4, metrics=("cpu",), lags=(), calendar=2, quantiles=(), entities=("a", "b")
)


def waves(windows: int, seed: int) -> Batch:
    """Two nodes, each a sine of 12 steps per cycle, at a random phase in each window; all observed."""
    phase = torch.rand(windows, 1, 2, generator=torch.Generator().manual_seed(seed)) * math.tau
    series = torch.sin(math.tau / 12 * torch.arange(16)[:, None] + phase)[..., None]
    whole = observed(batch(windows, 2, WAVES, NO_EDGES))
    return dataclasses.replace(
        whole,
        x=series[:, :12],
        y=series[:, 12:],
        y_mask=torch.ones(windows, 4, 2, 1, dtype=torch.bool),
        time_x=torch.zeros_like(whole.time_x),
        time_y=torch.zeros_like(whole.time_y),
    )


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_it_learns_a_sine_that_the_last_value_misses(name, residual):
    options = {"hidden": 16} if "hidden" in SMALL[name] else {}
    module = model(name, WAVES, residual=residual, **options).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    training, test = waves(64, seed=3), waves(64, seed=4)
    for _ in range(40):
        optimizer.zero_grad()
        (module(training).mean - training.y).square().mean().backward()
        optimizer.step()
    naive = (test.x[:, -1:] - test.y).square().mean()
    assert (forecast(module, test).mean - test.y).square().mean() < 0.2 * naive
