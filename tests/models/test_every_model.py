"""What every model of the registry must be, whatever it has learnt."""

import dataclasses
from typing import Any

import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import MODELS, build, fusion
from fleetcast.models.base import Fitted, Model, Output
from fleetcast.models.geometry import Geometry
from fleetcast.models.layers import NaiveBlend
from fleetcast.windows.batch import Edges
from samples import GEOMETRY, NO_EDGES, NODES, assert_same, batch, forecast, window

#: Options with which a model is small enough to test; its defaults are for real data.
SMALL: dict[str, dict[str, Any]] = {
    "ast_gcn": {"hidden": 8},
    "astgcn": {"hidden": 8},
    "bert": {"hidden": 8, "dropout": 0, "masked": 0},
    "bilstm": {"hidden": 8},
    "dgcrn": {"hidden": 8, "rank": 4},
    "dlinear": {},
    "fusion": {"hidden": 8, "identity": 4, "dropout": 0},
    "graph_wavenet": {"hidden": 8, "skip": 8, "end": 8, "dropout": 0, "norm": "layer"},
    "informer": {"hidden": 8, "dropout": 0},
    "itransformer": {"hidden": 8, "heads": 2, "feedforward": 8, "dropout": 0},
    "lightgbm": {"trees": 5},
    "lstm": {"hidden": 8},
    "mlp": {"hidden": 8, "dropout": 0},
    "patchtst": {"hidden": 8, "heads": 2, "feedforward": 8, "dropout": 0, "norm": "layer"},
    "ridge": {},
    "stgnn": {"hidden": 8, "direct": 8, "dropout": 0},
    "stid": {"embedding": 4, "dropout": 0},
    "transformer": {"hidden": 8, "dropout": 0},
}
#: What a batch has for each node.
BY_NODE = ("x", "mask", "seasonal_x", "seasonal_x_mask", "seasonal", "seasonal_mask", "y", "y_mask")
#: Further forms of a model, beside the default one.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("ast_gcn", {"static": 0}),
    ("ast_gcn", {"window": 2}),
    ("astgcn", {"order": 4, "blocks": 1}),
    ("bert", {"patch": 3, "masked": 0.3, "dropout": 0.1}),
    ("bilstm", {"layers": 2, "dropout": 0.1}),
    ("dgcrn", {"hops": 1}),
    ("dlinear", {"kernel": 1}),
    ("fusion", {"heads": 1, "sparsity": 0, "layers": 1}),
    ("fusion", {"heads": 2, "sparsity": 0.9, "dropout": 0.1}),
    ("fusion", {"neighbours": 0}),
    ("fusion", fusion.PLAIN),
    ("graph_wavenet", {"blocks": 1, "hops": 1, "norm": "batch"}),
    ("informer", {"distil": False, "decoder_layers": 2}),
    ("informer", {"layers": 1, "dropout": 0.1}),
    ("itransformer", {"dropout": 0.1}),
    ("lstm", {"layers": 2, "dropout": 0.1}),
    ("lstm", {"seasonal": False}),
    ("mlp", {"dropout": 0.1}),
    ("patchtst", {"norm": "batch", "dropout": 0.1}),
    ("patchtst", {"patch": 6, "stride": 4}),
    ("stgnn", {"seasonal": False, "own": False}),
    ("stgnn", {"gru_layers": 2, "direct": 0}),
    ("stid", {"dropout": 0.1}),
    ("transformer", {"label": 1}),
    ("transformer", {"layers": 1, "decoder_layers": 2, "dropout": 0.1}),
]
#: Options with which a model has no edges but the dependencies.
ONLY_DEPENDENCIES: dict[str, dict[str, Any]] = {"fusion": {"neighbours": 0}}
GRAPHS = [name for name, config in MODELS.items() if "graph" in config.model_fields]
FITTED = [name for name in MODELS if isinstance(build(name, SMALL.get(name, {}), GEOMETRY), Fitted)]
LEARNED = [name for name in MODELS if name not in FITTED]


def model(name: str, geometry: Geometry = GEOMETRY, **options: Any) -> Model:
    torch.manual_seed(0)
    module = build(name, SMALL[name] | options, geometry)
    if isinstance(module, Fitted):
        given = [batch(8, geometry=geometry)]
        module.fit(lambda: given, lambda: given)
    return module


def test_every_model_is_tested():
    assert SMALL.keys() == MODELS.keys()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", LEARNED)
def test_shapes_and_no_parameter_without_a_gradient(name, residual):
    _check_gradients(model(name, residual=residual), GEOMETRY)


@pytest.mark.parametrize("name", LEARNED)
def test_a_point_forecast_without_lags_has_no_idle_parameter_either(name):
    geometry = GEOMETRY.model_copy(update={"quantiles": (), "lags": ()})
    _check_gradients(model(name, geometry), geometry)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_other_forms_have_no_idle_parameter(name, options):
    _check_gradients(model(name, **options), GEOMETRY)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("graph", ["identity", "shuffled", "learned"])
def test_other_graphs_leave_no_idle_parameter(name, graph):
    _check_gradients(model(name, graph=graph), GEOMETRY)


def _check_gradients(module: Model, geometry: Geometry) -> None:
    output = module.train()(batch(8, geometry=geometry))
    assert output.mean.shape == (8, 4, NODES, 2)
    loss = output.mean.square().sum()
    if geometry.quantiles:
        assert output.quantiles.shape == (8, 4, NODES, 2, 3)
        loss = loss + output.quantiles.square().sum()
    else:
        assert output.quantiles is None
    loss.backward()
    dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_model_has_no_parameters_and_the_same_shapes(name):
    module = model(name)
    assert not list(module.parameters())
    output = forecast(module, batch())
    assert (output.mean.shape, output.quantiles.shape) == ((3, 4, NODES, 2), (3, 4, NODES, 2, 3))
    geometry = GEOMETRY.model_copy(update={"quantiles": (), "lags": ()})
    output = forecast(model(name, geometry), batch(geometry=geometry))
    assert output.mean.shape == (3, 4, NODES, 2) and output.quantiles is None
    with pytest.raises(InputError, match=f"model {name}: option residual: "):
        model(name, residual=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_fixes_the_initial_weights(name):
    a, b = (model(name).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_deterministic(name):
    module = model(name)
    assert torch.equal(forecast(module, batch()).mean, forecast(module, batch()).mean)


@pytest.mark.parametrize("name", MODELS)
def test_a_window_gets_the_same_answer_alone_as_among_others(name):
    module, whole = model(name), batch(4)
    together = forecast(module, whole)
    for b in range(4):
        alone = forecast(module, window(whole, b))
        assert_same(Output(together.mean[b : b + 1], together.quantiles[b : b + 1]), alone)


@pytest.mark.parametrize("name", MODELS)
def test_no_target_reaches_an_output(name):
    module, inputs = model(name), batch()
    changed = dataclasses.replace(inputs, y=inputs.y + 1, y_mask=~inputs.y_mask, origins=inputs.origins + 7)
    for mode in (module.eval, module.train):
        mode()
        outputs = []
        for given in (inputs, changed):
            torch.manual_seed(0)  # the same dropout
            outputs.append(module(given))
        assert torch.equal(outputs[0].mean, outputs[1].mean)
        assert torch.equal(outputs[0].quantiles, outputs[1].quantiles)


@pytest.mark.parametrize("name", MODELS)
def test_relabelling_the_nodes_permutes_the_output(name):
    module, inputs = model(name), batch(2)
    new = torch.tensor([3, 0, 4, 1, 2])  # node n of the relabelled batch is node new[n] of the first
    old = torch.argsort(new)
    index = inputs.edges.index
    relabelled = dataclasses.replace(
        inputs,
        **{key: getattr(inputs, key)[:, :, new] for key in BY_NODE},
        nodes=inputs.nodes[new],
        edges=Edges(index // NODES * NODES + old[index % NODES], inputs.edges.weight),
    )
    first, second = forecast(module, inputs), forecast(module, relabelled)
    assert_same(Output(first.mean[:, :, new], first.quantiles[:, :, new]), second)


@pytest.mark.parametrize("name", MODELS)
def test_a_group_of_some_entities_works_and_one_without_edges(name):
    module = model(name)
    some = dataclasses.replace(batch(2, 3, edges=NO_EDGES), nodes=torch.tensor([4, 0, 2]))
    assert forecast(module, some).mean.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_knows_what_was_observed(name):
    module, inputs = model(name, residual=False), batch()
    other = dataclasses.replace(inputs, mask=~inputs.mask)
    assert not torch.allclose(forecast(module, inputs).mean, forecast(module, other).mean)


@pytest.mark.parametrize("name", MODELS)
def test_fillings_among_the_seasonal_values_are_neutral(name):
    module, inputs = model(name), batch()
    filled = torch.where(inputs.seasonal_mask, inputs.seasonal, 99.0)
    before = torch.where(inputs.seasonal_x_mask, inputs.seasonal_x, 99.0)
    other = dataclasses.replace(inputs, seasonal=filled, seasonal_x=before)
    assert torch.equal(forecast(module, inputs).mean, forecast(module, other).mean)


@pytest.mark.parametrize("name", ["fusion", "ridge", "stgnn"])
def test_the_season_of_the_look_back_is_read(name):
    """How far a load is from where it was a day ago says how far it will be."""
    module, inputs = model(name), batch()
    other = dataclasses.replace(inputs, seasonal_x=inputs.seasonal_x + 1)
    assert not torch.allclose(forecast(module, inputs).mean, forecast(module, other).mean)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_model_sees_the_graph_it_is_told_to(name):
    given = batch(2)
    none = dataclasses.replace(given, edges=NO_EDGES)
    options = ONLY_DEPENDENCIES.get(name, {})
    outputs = {
        kind: forecast(model(name, graph=kind, **options), given).mean
        for kind in ("true", "identity", "shuffled")
    }
    assert not torch.allclose(outputs["true"], outputs["identity"])
    assert not torch.allclose(outputs["true"], outputs["shuffled"])
    torch.testing.assert_close(outputs["identity"], forecast(model(name, graph="true", **options), none).mean)
    learned = model(name, graph="learned", **options)
    assert torch.equal(forecast(learned, given).mean, forecast(learned, none).mean)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast_runs_and_stays_close(name):
    module, inputs = model(name), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs)
    if name in LEARNED:
        (output.mean.mean() + output.quantiles.mean()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert output.mean.dtype == torch.float32
    torch.testing.assert_close(output.mean, forecast(module, inputs).mean, rtol=0, atol=0.05)


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"batch: x of shape \(3, 6, 5, 1\), expected \(3, 6, 5, 2\)"):
        model("stgnn")(dataclasses.replace(batch(), x=torch.zeros(3, 6, NODES, 1)))
    with pytest.raises(InputError, match=f"model 'gru', expected one of {', '.join(sorted(MODELS))}"):
        build("gru", {}, GEOMETRY)
    with pytest.raises(InputError, match=r"model stgnn: option hidden: .*greater than or equal to 1"):
        build("stgnn", {"hidden": 0}, GEOMETRY)
    with pytest.raises(InputError, match="model stgnn: option depth: "):
        build("stgnn", {"depth": 2}, GEOMETRY)


def test_the_blend_is_convex_over_what_was_observed():
    geometry = GEOMETRY.model_copy(update={"metrics": ("cpu",)})
    blend, inputs = NaiveBlend(geometry), batch(1, 1, geometry)
    x = torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1, 1)
    mask = torch.tensor([True, True, True, True, False, False]).view(1, 6, 1, 1)
    seasonal = torch.tensor([7.0, 13.0]).expand(1, 4, 1, 1, 2)
    there = torch.tensor([[True, True], [True, False], [False, True], [False, False]]).view(1, 4, 1, 1, 2)

    def blended(mask):
        inputs_ = dataclasses.replace(inputs, x=x, mask=mask, seasonal=seasonal, seasonal_mask=there)
        return blend(inputs_).flatten().tolist()

    assert blended(mask) == pytest.approx([(4 + 7 + 13) / 3, (4 + 7) / 2, (4 + 13) / 2, 4])
    assert blended(torch.zeros_like(mask)) == pytest.approx([10, 7, 13, 0])
