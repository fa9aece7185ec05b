"""The training loop: it learns, counts observed targets only, stops when it should, on one rank or two."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fleetcast import models
from fleetcast.models.base import Output
from fleetcast.models.geometry import Geometry
from fleetcast.store import Store
from fleetcast.training import checkpoints, loop
from fleetcast.training.loop import DivergedError, Run, loss_sum, train, validate
from fleetcast.training.options import FitOptions
from fleetcast.windows import order
from fleetcast.windows.batch import Batch, Edges
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest
from fleetcast.windows.views import OpenShard


def ignore(run: Run, figures: dict[str, float]) -> None:
    """A `save` that saves nothing."""


def targets(y: list[float], observed: list[bool]) -> Batch:
    """One window of one entity with these targets, and nothing else."""
    nothing = torch.zeros(0)
    return Batch(
        **dict.fromkeys(
            (f.name for f in dataclasses.fields(Batch) if f.name not in ("edges", "y", "y_mask")), nothing
        ),
        edges=Edges(nothing, nothing),
        y=torch.tensor(y)[None, :, None, None],
        y_mask=torch.tensor(observed)[None, :, None, None],
    )


# -- the loss ----------------------------------------------------------------------------------------------


def test_the_loss_is_the_squared_error_of_the_mean_and_the_pinball_loss_of_the_quantiles():
    mean = torch.tensor([1.0, 2.0])[None, :, None, None]
    quantiles = torch.tensor([[1.0, 6.0], [3.0, 3.0]])[None, :, None, None]
    batch = targets([4.0, 2.0], [True, True])
    assert [float(v) for v in loss_sum(Output(mean, None), batch, ())] == [9, 2]
    # y = 4: 0.9 · (6 − 4) / 10 = 0.1 · 2 above, 0.1 · (4 − 1) below; y = 2: 0.9 · 1 and 0.1 · 1 above.
    pinball = (0.1 * 3 + 0.1 * 2 + 0.9 * 1 + 0.1 * 1) / 2
    loss, count = loss_sum(Output(mean, quantiles), batch, (0.1, 0.9))
    assert float(loss) == pytest.approx(9 + pinball)
    assert int(count) == 2


def test_targets_that_were_not_observed_do_not_contribute():
    def with_filling(filling: float) -> tuple[float, int, torch.Tensor]:
        mean = torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].requires_grad_()
        quantiles = mean[..., None] + torch.tensor([-1.0, 1.0])
        batch = targets([4.0, filling, 2.0], [True, False, True])
        loss, count = loss_sum(Output(mean, quantiles), batch, (0.1, 0.9))
        loss.backward()
        assert mean.grad is not None
        return loss.item(), int(count), mean.grad.flatten()

    loss, count, gradient = with_filling(0)
    other_loss, other_count, other_gradient = with_filling(1e6)
    assert (loss, count) == (other_loss, other_count)
    assert count == 2
    assert torch.equal(gradient, other_gradient)
    assert gradient[1] == 0
    assert (gradient[[0, 2]] != 0).all()


# -- epochs ------------------------------------------------------------------------------------------------


def test_the_loss_falls(small, new_run):
    run = new_run(*small, epochs=8, learning_rate=1e-2)
    train(run, ignore)
    history = run.progress.history
    assert len(history) == run.progress.epoch == 8
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["val_loss"] < 0.8 * history[0]["val_loss"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(small, new_run):
    def weights(seed: int) -> torch.Tensor:
        run = new_run(*small, epochs=2, seed=seed)
        torch.rand(seed + 3)  # whatever was drawn before does not matter
        train(run, ignore)
        return torch.cat([value.flatten() for value in run.model.state_dict().values()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_every_epoch_is_saved_with_its_figures_and_the_rate_falls_along_a_cosine(small, new_run):
    saved = []

    def save(run: Run, figures: dict[str, float]) -> None:
        saved.append((run.progress.epoch, run.optimizer.param_groups[0]["lr"], figures))

    run = new_run(*small, epochs=4, learning_rate=1e-3, patience=9)
    train(run, save)
    assert [epoch for epoch, _, _ in saved] == [1, 2, 3, 4]
    rates = [1e-3 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 1 / 4, 1 / 2, 3 / 4)]
    assert [rate for _, rate, _ in saved] == pytest.approx(rates)
    assert [figures for _, _, figures in saved] == run.progress.history
    train(run, save)  # a finished run has nothing left to do
    assert len(saved) == 4


def test_validation_is_the_mean_over_every_target_whatever_the_batch_size(small, new_run):
    store, m = small
    run = new_run(store, m)
    total, count = 0.0, 0
    run.model.eval()
    for shard in m.shards:
        if len(origins := m.origins(shard, "val")):
            batch = OpenShard.read(store, m, shard).batch(origins)
            loss, seen = loss_sum(run.model(batch), batch, run.levels)
            total, count = total + loss.item(), count + int(seen)
    for batch_size in (1, 7, 1000):
        assert validate(new_run(store, m, batch_size=batch_size)) == pytest.approx(total / count, rel=1e-5)


def test_training_stops_after_patience_epochs_without_a_better_validation_loss(small, new_run, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    monkeypatch.setattr(loop, "validate", lambda run: next(losses))
    weights = []
    run = new_run(*small, epochs=20, patience=3, steps_per_epoch=2)
    train(run, lambda run, _: weights.append({k: v.clone() for k, v in run.model.state_dict().items()}))
    assert [epoch["val_loss"] for epoch in run.progress.history] == [3, 2, 2.5, 2, 2.1]
    assert (run.progress.best_loss, run.progress.best_epoch) == (2, 1)
    assert all(torch.equal(run.best[name], weights[1][name]) for name in run.best)
    assert any(not torch.equal(run.best[name], weights[4][name]) for name in run.best)


# -- waiting -----------------------------------------------------------------------------------------------


def test_the_share_of_an_epoch_that_is_spent_waiting_for_batches_is_measured(small, new_run, monkeypatch):
    """By a clock that a batch moves by three seconds, and a forward pass by one."""
    now = 0.0

    class Slow(Shards):
        def batches(self, *args):
            nonlocal now
            for batch in super().batches(*args):
                now += 3
                yield batch

    def forward(*_) -> None:
        nonlocal now
        now += 1

    store, m = small
    run = new_run(store, m, epochs=2, steps_per_epoch=5)
    run.shards = Slow(store, m)
    run.net.register_forward_hook(forward)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    train(run, ignore)
    validation = sum(-(-len(m.origins(shard, "val")) // 8) for shard in m.shards)
    windows = sum(len(origins) for _, origins in order.training(m, 8, seed=0, epoch=0, most=5))
    first = run.progress.history[0]
    assert first["seconds"] == 4 * (5 + validation)
    assert first["wait_share"] == 3 / 4
    assert first["windows_per_s"] == windows / 20
    assert run.progress.wait_share == 3 / 4


# -- divergence --------------------------------------------------------------------------------------------


def spoil(run: Run, call: int, training: bool, factor: float = math.nan) -> None:
    """Multiplies the mean of the model's `call`-th training or validation batch."""
    calls = 0

    def hook(net: torch.nn.Module, _: tuple, output: Output) -> Output:
        nonlocal calls
        calls += net.training == training
        wrong = net.training == training and calls == call
        return Output(output.mean * factor, output.quantiles) if wrong else output

    run.net.register_forward_hook(hook)


def test_a_loss_that_is_not_a_number_is_an_error_with_epoch_and_step(small, new_run):
    run = new_run(*small, steps_per_epoch=5)
    spoil(run, call=5 + 3, training=True)
    with pytest.raises(DivergedError, match=r"^epoch 2, step 3: the loss is nan, expected less than 1e\+04"):
        train(run, ignore)
    assert run.progress.epoch == 1


def test_a_run_that_diverges_leaves_no_thread_that_reads(dataset, new_run):
    values = np.random.default_rng(0).normal(size=(160, 2, 2)).astype(np.float32)
    run = new_run(*dataset(values, groups=(("e0",), ("e1",)), width=24, history=8))
    spoil(run, call=2, training=True)
    with pytest.raises(DivergedError) as held:  # as long as the error is held, so is the loop's frame
        train(run, ignore)
    assert held.tb is not None
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")] == []


def test_a_validation_loss_that_is_not_a_number_is_an_error_with_its_epoch(small, new_run):
    run = new_run(*small, steps_per_epoch=1)
    spoil(run, call=1, training=False)
    with pytest.raises(DivergedError, match=r"^epoch 1: the validation loss is nan, expected"):
        train(run, ignore)


def test_a_loss_that_explodes_is_an_error_though_it_is_a_number(small, new_run):
    run = new_run(*small, steps_per_epoch=5)
    spoil(run, call=2, training=True, factor=1e6)
    with pytest.raises(DivergedError, match=r"^epoch 1, step 2: the loss is \d\.\d*e\+\d+, expected"):
        train(run, ignore)


# -- models that are fitted at once ------------------------------------------------------------------------


def ridge(store: Store, m: Manifest, **options) -> Run:
    model = models.build("ridge", {}, Geometry.of(m, (0.1, 0.9)))
    return Run.start(model, Shards(store, m), FitOptions(**options))


def test_a_fitted_model_has_one_epoch_over_all_windows_whatever_the_options(small):
    saved = []
    run = ridge(*small, epochs=7, steps_per_epoch=1, learning_rate=1e9)
    train(run, lambda run, figures: saved.append(figures))
    assert len(saved) == len(run.progress.history) == run.progress.epoch == 1
    assert run.progress.best_epoch == 0
    assert run.progress.best_loss == saved[0]["val_loss"] == pytest.approx(validate(run))
    other = ridge(*small, batch_size=3)
    train(other, ignore)
    torch.testing.assert_close(run.best, other.best)

    train(run, lambda run, figures: saved.append(figures))
    assert len(saved) == 1, "a finished run has nothing left to do"


def test_a_fit_whose_validation_loss_is_not_a_number_is_an_error(small):
    run = ridge(*small)
    spoil(run, call=1, training=False)
    run.model.eval()
    with pytest.raises(DivergedError, match=r"^the validation loss is nan, expected less than"):
        train(run, ignore)


# -- several ranks -----------------------------------------------------------------------------------------


def test_two_ranks_take_the_step_that_one_rank_takes_with_both_batches(dataset, new_run, tmp_path):
    """Of 85 training windows one rank gets 80 and the other 5, so their targets are as unequal."""
    values = np.random.default_rng(0).normal(size=(160, 2, 2)).cumsum(0).astype(np.float32)
    values[np.random.default_rng(1).random(values.shape) < 0.1] = np.nan
    store, m = dataset(values, history=8)
    options = {"epochs": 3, "stgnn": {"hidden": 8, "dropout": 0}, "seed": 1}
    one = new_run(store, m, batch_size=85, **options)
    train(one, ignore)

    ranks = []
    for rank in range(2):
        (out := tmp_path / f"rank-{rank}").mkdir()
        arguments = [str(rank), str(tmp_path / "rendezvous"), store.uri, str(out)]
        script = Path(__file__).with_name("two_ranks.py")
        command = [sys.executable, str(script), *arguments, json.dumps({**options, "batch_size": 80})]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment))
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]

    for rank in range(2):
        progress = checkpoints.read_progress(tmp_path / f"rank-{rank}")
        for ours, alone in zip(progress.history, one.progress.history, strict=True):
            assert ours["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
            assert ours["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
        best = checkpoints.read_best(tmp_path / f"rank-{rank}")
        for name, value in one.best.items():
            torch.testing.assert_close(best[name], value, rtol=1e-3, atol=1e-5)
