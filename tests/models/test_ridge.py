"""ridge is the exact least-squares map of what was observed, whatever the batches it came in."""

import dataclasses

import numpy as np
import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import build
from fleetcast.models.geometry import Geometry
from fleetcast.models.ridge import Ridge
from fleetcast.windows.batch import Batch
from samples import GEOMETRY, NODES, batch, forecast, window

POINT = GEOMETRY.model_copy(update={"quantiles": ()})


def fitted(train: list[Batch], validation: list[Batch], geometry: Geometry = POINT, **options) -> Ridge:
    module = build("ridge", options, geometry)
    module.fit(lambda: train, lambda: validation)
    return module


def where(there: torch.Tensor, values: torch.Tensor) -> list[float]:
    """Each value, 0 where it is not there, and whether it is not."""
    return [*(values * there).flatten().tolist(), *(~there).float().flatten().tolist()]


def features(given: Batch, metric: int, step: int, others: bool) -> np.ndarray:
    """[B · N, P] of one map, written down a second time; the intercept last."""
    rows = []
    for b, n in np.ndindex(given.x.shape[0], given.x.shape[2]):
        row = [*given.x[b, :, n, metric], *(~given.mask[b, :, n, metric]).float(), *given.time_y[b, step]]
        row += where(given.seasonal_x_mask[b, :, n, metric], given.seasonal_x[b, :, n, metric])
        if others:
            row += [given.x[b, -1, n, 1 - metric], (~given.mask[b, -1, n, 1 - metric]).float()]
        row += where(given.seasonal_mask[b, step, n, metric], given.seasonal[b, step, n, metric])
        rows.append([float(value) for value in row] + [1.0])
    return np.array(rows)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 20.0])
def test_each_map_solves_the_penalised_least_squares_of_its_observed_targets(alpha, others):
    given = batch(12)
    found = forecast(fitted([given], [given], alphas=(alpha,), others=others), given).mean
    for metric, step in np.ndindex(2, 4):
        x = features(given, metric, step, others)
        y = given.y[:, step, :, metric].flatten().double().numpy()
        seen = given.y_mask[:, step, :, metric].flatten().numpy()
        assert 0 < seen.sum() < len(seen)
        penalty = np.sqrt(alpha) * np.eye(x.shape[1])[:-1]  # as many more rows with target zero
        rows, targets = np.concatenate([x[seen], penalty]), np.append(y[seen], np.zeros(len(penalty)))
        weights = np.linalg.lstsq(rows, targets)[0]
        np.testing.assert_allclose(
            found[:, step, :, metric].flatten().numpy(), x @ weights, rtol=0, atol=1e-5
        )


def test_targets_that_were_not_observed_count_for_nothing():
    given = batch(12)
    other = dataclasses.replace(given, y=torch.where(given.y_mask, given.y, torch.nan))
    expected, found = fitted([given], [given]), fitted([other], [other])
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), found.buffers(), strict=True))


def test_batches_of_any_size_in_any_order_give_the_same_maps():
    given = batch(12)
    alone = [window(given, b) for b in torch.randperm(12, generator=torch.Generator().manual_seed(2))]
    one, many = fitted([given], [given]), fitted(alone, alone)
    assert one.weight.abs().max() > 0.1
    torch.testing.assert_close(one.weight, many.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.error, many.error, rtol=0, atol=1e-6)


def linear(windows: int, noise: float) -> Batch:
    """The target is 0.7 of the last value and 0.2 of the first season, plus 0.1 and noise."""
    given = batch(windows)
    last = given.x[:, -1:].expand_as(given.y)
    season = torch.where(given.seasonal_mask, given.seasonal, 0)[..., 0]
    random = torch.randn(given.y.shape, generator=torch.Generator().manual_seed(3))
    return dataclasses.replace(given, y=0.7 * last + 0.2 * season + 0.1 + noise * random)


def test_a_linear_process_is_recovered_with_the_width_of_its_noise():
    given = linear(400, 0.3)
    module = fitted([given], [given], GEOMETRY, alphas=(1e-3,))
    names = ["intercept", *(f"x{i}" for i in range(6)), *(f"missing{i}" for i in range(6))]
    names += [f"before {i}" for i in range(2 * 2 * 6)]
    names += ["t0", "t1", "t2", "season0", "season1", "missing season0", "missing season1"]
    expected = {"x5": 0.7, "season0": 0.2, "intercept": 0.1}
    truth = torch.tensor([expected.get(name, 0.0) for name in names]).expand_as(module.weight)
    torch.testing.assert_close(module.weight, truth, rtol=0, atol=0.06)
    torch.testing.assert_close(module.error, torch.full((2, 4), 0.3), rtol=0.05, atol=0)
    output = forecast(module, given)
    share = (given.y[..., None] <= output.quantiles)[given.y_mask].float().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.5, 0.9]), rtol=0, atol=0.01)


def test_the_penalty_is_chosen_on_the_validation_part_for_each_metric():
    few, many = linear(14, 0.7), linear(300, 0)
    noise = torch.randn(many.y.shape, generator=torch.Generator().manual_seed(4))
    metric = torch.tensor([True, False])
    validation = dataclasses.replace(many, y=torch.where(metric, many.y, 0.01 * noise))
    alphas = (0.01, 1.0, 30.0, 1e5)
    module = fitted([few], [validation], alphas=alphas)

    def error(alpha: float) -> torch.Tensor:
        mean = forecast(fitted([few], [many], alphas=(alpha,)), validation).mean
        squares = torch.where(validation.y_mask, (mean - validation.y).square(), 0)
        return squares.sum((0, 1, 2)) / validation.y_mask.sum((0, 1, 2))

    errors = torch.stack([error(alpha) for alpha in alphas])
    assert module.alpha.tolist() == pytest.approx([alphas[i] for i in errors.argmin(0)])
    assert module.alpha[0] != module.alpha[1]
    mean_square = module.error.square().mean(1)
    torch.testing.assert_close(mean_square, errors.min(0).values, rtol=0.05, atol=0)


def test_a_step_that_was_never_observed_is_forecast_as_the_mean():
    given = batch(12)
    given.y_mask[:, 2, :, 1] = False
    mean = forecast(fitted([given], [given]), given).mean
    assert (mean[:, 2, :, 1] == 0).all()
    assert (mean[:, 2, :, 0] != 0).all() and (mean[:, 3, :, 1] != 0).all()


def test_what_never_fails_gets_no_weight():
    given = batch(12)
    given.mask[:] = True
    weight = fitted([given], [given]).weight
    assert (weight[..., 7:13] == 0).all() and (weight[..., 1:7] != 0).all()


def test_before_the_fit_it_forecasts_zero():
    assert (forecast(build("ridge", {}, GEOMETRY), batch()).quantiles == 0).all()


def test_the_penalty_must_be_positive():
    with pytest.raises(InputError, match=r"model ridge: option alphas.0: Input should be greater than 0"):
        build("ridge", {"alphas": [0]}, POINT)
    with pytest.raises(InputError, match=r"model ridge: option alphas: "):
        build("ridge", {"alphas": []}, POINT)


def test_entities_it_was_not_trained_on_have_the_same_map():
    given = batch(12)
    module = fitted([given], [given])
    strangers = dataclasses.replace(given, nodes=torch.full((NODES,), -1))
    assert torch.equal(forecast(module, given).mean, forecast(module, strangers).mean)
