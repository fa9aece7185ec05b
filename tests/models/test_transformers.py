"""The attention models of single sequences: Transformer, BERT, Informer."""

import dataclasses

import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import build
from fleetcast.models.base import Model, Output
from fleetcast.models.geometry import Geometry
from fleetcast.models.informer import Distilling, ProbSparseAttention
from fleetcast.models.transformer import sinusoids
from fleetcast.windows.batch import Batch
from samples import GEOMETRY, PATH, affected, assert_same, batch, forecast, window
from torch.nn.functional import scaled_dot_product_attention

NAMES = ["transformer", "bert", "informer"]
DECODERS = ["transformer", "informer"]
#: Long enough for Informer to leave queries out: 20 of 48 are kept, then 20 of 24.
LONG = GEOMETRY.model_copy(update={"history": 48, "horizon": 8})


def model(name: str, geometry: Geometry = GEOMETRY, **options) -> Model:
    torch.manual_seed(0)
    return build(name, {"hidden": 8, "dropout": 0, **options}, geometry)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_is_a_sequence_of_its_own(name):
    assert affected(model(name), PATH, 2) == {2}


@pytest.mark.parametrize("history", [6, 48])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_the_look_back_and_its_time_reach_every_step_of_the_horizon(name, history):
    geometry = GEOMETRY.model_copy(update={"history": history})
    module, inputs = model(name, geometry, residual=False).eval(), batch(1, 1, geometry)
    given = [inputs.x.requires_grad_(), inputs.time_x.requires_grad_(), inputs.time_y.requires_grad_()]
    steps = module(inputs).mean[0, :, 0, 0]
    for step, value in enumerate(steps):
        x, time_x, time_y = torch.autograd.grad(value, given, retain_graph=True)
        assert (x.abs().sum((0, 2, 3)) > 0).all()
        assert (time_x.abs().sum((0, 2)) > 0).all()
        assert time_y[0, step].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_length_is_deterministic_and_independent_of_batch_mates(name):
    module, whole = model(name, LONG), batch(3, geometry=LONG)
    together = forecast(module, whole)
    assert torch.equal(together.mean, forecast(module, whole).mean)
    for b in range(3):
        alone = forecast(module, window(whole, b))
        assert_same(Output(together.mean[b : b + 1], together.quantiles[b : b + 1]), alone)


@pytest.mark.parametrize(("name", "options"), [("transformer", {"label": 1}), ("bert", {"patch": 4})])
def test_the_order_of_earlier_steps_matters(name, options):
    module, inputs = model(name, LONG, residual=False, **options), batch(geometry=LONG)
    order = torch.cat([torch.arange(4, 44), torch.arange(4), torch.arange(44, 48)])  # whole patches
    moved = {key: getattr(inputs, key)[:, order] for key in ("x", "mask", "time_x")}
    before, after = forecast(module, inputs).mean, forecast(module, dataclasses.replace(inputs, **moved)).mean
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_starts_from_the_last_values_and_has_placeholders_for_the_horizon(name):
    module, inputs = model(name, label=2), batch(2)
    seen = []
    module.known.register_forward_pre_hook(lambda _, given: seen.append(given))
    forecast(module, inputs)
    values, time = seen[0]
    past = torch.cat([inputs.x, inputs.mask.float()], dim=-1)[1, -2:, 3]
    torch.testing.assert_close(values.unflatten(0, (2, 5))[1, 3, :2], past)
    assert not values[:, 2:].any()
    torch.testing.assert_close(time, torch.cat([inputs.time_x[:, -2:], inputs.time_y], dim=1))


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_is_causal(name):
    module = model(name, LONG, decoder_layers=2).eval()
    random = torch.Generator().manual_seed(2)
    values = torch.randn(3, 32, 4, generator=random)
    time = torch.randn(3, 32, 3, generator=random)
    memory = torch.randn(3, 12, 8, generator=random)
    later = (torch.arange(32) >= 20)[:, None]

    def decoded(values, time):
        with torch.no_grad():
            return module.decode(module.known(values, time), memory)

    moved = (decoded(values, time) - decoded(values + later, time - 1.0 * later)).abs().amax((0, 2))
    assert moved[:20].max() < 1e-6
    assert moved[20:].min() > 1e-3


def test_positions_are_sinusoids():
    positions = sinusoids(50, 6)
    expected = [f(torch.tensor(7 / 10_000 ** (i / 6))) for i in (0, 2, 4) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(positions[7], torch.stack(expected))
    assert sinusoids(3, 5).shape == (3, 5)


def attention(factor: int, dropout: float = 0.0) -> ProbSparseAttention:
    torch.manual_seed(0)
    return ProbSparseAttention(hidden=8, heads=2, factor=factor, dropout=dropout).eval()


def steps(length: int, sequences: int = 3) -> torch.Tensor:
    return 3 * torch.randn(sequences, length, 8, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("length", "factor", "plain"),
    [(1, 5, True), (11, 5, True), (15, 5, True), (48, 12, True), (16, 5, False), (48, 5, False)],
)
def test_attention_is_plain_where_all_queries_are_kept(length, factor, plain):
    sparse, h = attention(factor), steps(length)
    reference = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": sparse.project.weight,
            "in_proj_bias": sparse.project.bias,
            "out_proj.weight": sparse.out.weight,
            "out_proj.bias": sparse.out.bias,
        }
    )
    assert torch.allclose(sparse(h), reference(h, h, h)[0], atol=1e-5) == plain


def test_a_head_attends_with_its_queries_of_largest_measure_and_gives_the_others_the_mean_value():
    sparse, h = attention(factor=2).requires_grad_(False), steps(48)
    torch.nn.init.eye_(sparse.out.weight)
    torch.nn.init.zeros_(sparse.out.bias)
    given = sparse(h).unflatten(-1, (2, 4))
    kept = 2 * 4  # 2 · ⌈ln 48⌉
    sampled = [round(i * 47 / 7) for i in range(kept)]  # evenly spaced keys
    choices = set()
    for b in range(3):
        for head in range(2):
            q, k, v = (part[:, 4 * head : 4 * head + 4] for part in sparse.project(h[b]).chunk(3, dim=-1))
            measure = [float((s := k[sampled] @ query).max() - s.mean()) for query in q]
            active = sorted(range(48), key=measure.__getitem__)[-kept:]
            expected = v.mean(0).repeat(48, 1)
            expected[active] = scaled_dot_product_attention(q[active], k, v)
            torch.testing.assert_close(given[b, :, head], expected)
            choices.add(tuple(active))
    assert len(choices) == 6  # each head of each sequence chose for itself


def test_training_draws_the_keys_and_drops_attention_weights():
    h = steps(48)
    assert torch.equal(attention(2)(h), attention(2)(h))
    for module, given in ((attention(2), h), (attention(5, dropout=0.5), steps(15))):
        module.train()
        assert not torch.equal(module(given), module(given))
        assert torch.equal(module.eval()(given), module(given))


@pytest.mark.parametrize("length", [1, 2, 5, 6, 47, 48])
def test_distilling_halves_a_sequence(length):
    halved = Distilling(8)(steps(length))
    assert halved.shape == (3, (length - 1) // 2 + 1, 8)


@pytest.mark.parametrize(("options", "length"), [({}, 12), ({"distil": False}, 48)])
def test_informer_distils_between_its_layers(options, length):
    assert model("informer", LONG, layers=3, **options).encoder(steps(48)).shape == (3, length, 8)


def test_a_sparse_informer_has_no_idle_parameter_and_runs_in_bfloat16():
    module, inputs = model("informer", LONG), batch(2, geometry=LONG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs)
    assert output.mean.dtype == torch.float32
    (output.mean.square().sum() + output.quantiles.square().sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in module.parameters())


def test_bert_masks_patches_in_training_only():
    module, inputs = model("bert", masked=0.5), batch()
    assert torch.equal(forecast(module, inputs).mean, forecast(module, inputs).mean)
    module.train()
    assert not torch.equal(module(inputs).mean, module(inputs).mean)
    module = model("bert", masked=0).train()
    assert torch.equal(module(inputs).mean, module(inputs).mean)


def test_a_masked_patch_of_bert_shows_its_time_and_none_of_its_values(monkeypatch):
    module, inputs = model("bert", masked=0.5, residual=False).train(), batch()
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.zeros(*shape, device=device))
    before = module(inputs).mean
    other = dataclasses.replace(inputs, x=inputs.x + 1, mask=~inputs.mask)
    assert torch.equal(module(other).mean, before)
    assert not torch.equal(module(dataclasses.replace(inputs, time_x=inputs.time_x + 1)).mean, before)


def test_bert_reads_the_forecast_off_the_masked_tokens_of_the_horizon():
    module, inputs = model("bert", patch=3), batch(1, 1)
    seen = []
    module.encoder.register_forward_hook(lambda _, given, encoded: seen.append(encoded))
    mean = forecast(module, inputs).mean - module.blend(inputs)
    tokens = module.head(seen[0])[0, 2:]  # two patches of the look-back, two of the horizon, four steps
    torch.testing.assert_close(mean[0, :, 0], tokens.reshape(6, 2, 4)[:4, :, 0])


def test_a_patch_is_no_longer_than_look_back_and_horizon():
    assert [model("bert", patch=patch).patch for patch in (3, 4, 24)] == [3, 4, 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_look_back_of_one_step_works(name):
    short = GEOMETRY.model_copy(update={"history": 1})
    assert forecast(model(name, short), batch(geometry=short)).mean.isfinite().all()


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"option label: 7, expected at most history \(6\)"):
        model("transformer", label=7)
    with pytest.raises(InputError, match=r"option heads: .*a divisor of hidden \(10\) \(got 4\)"):
        model("bert", hidden=10)


def sines(windows: int, geometry: Geometry, seed: int) -> Batch:
    """A sine of period 12 at random phases."""
    phase = 12 * torch.rand(windows, 1, generator=torch.Generator().manual_seed(seed))
    times = phase + torch.arange(geometry.history + geometry.horizon)
    values = (torch.pi / 6 * times).sin()[..., None, None]
    whole = batch(windows, 1, geometry)
    return dataclasses.replace(
        whole,
        x=values[:, : geometry.history],
        mask=torch.ones_like(whole.mask),
        time_x=torch.zeros_like(whole.time_x),
        time_y=torch.zeros_like(whole.time_y),
        y=values[:, geometry.history :],
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_sine_that_the_last_value_cannot_follow(name):
    geometry = Geometry(
        history=24, horizon=6, metrics=("cpu",), lags=(), calendar=1, quantiles=(), entities=("a",)
    )
    module = model(name, geometry, hidden=16, residual=False).train()
    training, test = sines(32, geometry, seed=3), sines(64, geometry, seed=4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.005)
    for _ in range(60):
        optimizer.zero_grad()
        (module(training).mean - training.y).square().mean().backward()
        optimizer.step()
    error = (forecast(module, test).mean - test.y).square().mean()
    last = (test.x[:, -1:] - test.y).square().mean()
    assert error < 0.25 * last
