"""Checkpoints: a run that was interrupted ends as if it had not been, and nothing is pickled."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from fleetcast.training import checkpoints
from fleetcast.training.loop import Progress, Run, train
from fleetcast.windows.order import POOL


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


class Interrupted(Exception):
    pass


def written_after(epochs: int, folder):
    """A `save` that writes every epoch over the last, and dies once `epochs` are complete."""

    def save(run: Run, figures: dict[str, float]) -> None:
        checkpoints.write(run, folder)
        if run.progress.epoch == epochs:
            raise Interrupted

    return save


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(history: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(epoch["train_loss"], epoch["val_loss"]) for epoch in history]


@pytest.mark.parametrize("epochs_before", [1, 2, 3])
def test_an_interrupted_run_ends_like_an_uninterrupted_one_bit_for_bit(small, new_run, folder, epochs_before):
    whole = new_run(*small)
    train(whole, lambda run, figures: None)

    with pytest.raises(Interrupted):
        train(new_run(*small), written_after(epochs_before, folder))
    torch.manual_seed(123)  # another process
    resumed = new_run(*small)
    checkpoints.restore(resumed, folder)
    assert resumed.progress.epoch == epochs_before
    train(resumed, lambda run, figures: None)

    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert same_tensors(resumed.best, whole.best)
    ours, theirs = (run.optimizer.state_dict()["state"] for run in (resumed, whole))
    assert all(same_tensors(ours[index], theirs[index]) for index in ours.keys() | theirs.keys())
    assert losses(resumed.progress.history) == losses(whole.progress.history)
    assert resumed.progress.best_loss == whole.progress.best_loss
    assert resumed.progress.best_epoch == whole.progress.best_epoch


def test_a_run_from_s3_resumed_there_ends_like_one_from_a_local_store(dataset, new_run, folder, on_s3):
    values = np.random.default_rng(0).normal(size=(160, 2, 2)).cumsum(0).astype(np.float32)
    store, m = dataset(values, groups=(("e0",), ("e1",)), width=24, history=8)
    assert len(m.shards) > 2 * POOL
    local = new_run(store, m, epochs=3)
    train(local, lambda run, figures: None)

    far = on_s3(store)
    with pytest.raises(Interrupted):
        train(new_run(far, m, epochs=3), written_after(1, folder))
    resumed = new_run(far, m, epochs=3)
    checkpoints.restore(resumed, folder)
    train(resumed, lambda run, figures: None)
    assert same_tensors(resumed.model.state_dict(), local.model.state_dict())
    assert losses(resumed.progress.history) == losses(local.progress.history)


def test_restoring_sets_everything_that_was_written(small, new_run, folder):
    run = new_run(*small, epochs=2)
    train(run, lambda run, figures: None)
    checkpoints.write(run, folder)
    state = copy.deepcopy(run.optimizer.state_dict()["state"])

    other = new_run(*small, epochs=2, seed=5)
    checkpoints.restore(other, folder)
    assert same_tensors(other.model.state_dict(), run.model.state_dict())
    assert same_tensors(other.best, run.best)
    assert other.progress == run.progress
    restored = other.optimizer.state_dict()["state"]
    assert restored.keys() == state.keys() == set(range(len(list(run.model.parameters()))))
    for index in state:
        assert state[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert same_tensors(restored[index], state[index])


def test_the_best_weights_are_kept_beside_the_last(small, new_run, folder):
    run = new_run(*small, epochs=2)
    train(run, lambda run, figures: None)
    run.best = {name: value + 1 for name, value in run.model.state_dict().items()}
    checkpoints.write(run, folder)
    assert same_tensors(checkpoints.read_best(folder), run.best)
    assert checkpoints.read_progress(folder) == run.progress


def test_a_checkpoint_is_safetensors_and_json_only(small, new_run, folder):
    run = new_run(*small, epochs=1)
    train(run, lambda run, figures: checkpoints.write(run, folder))
    files = sorted(folder.iterdir())
    assert sorted(path.suffix for path in files) == [".json", ".safetensors"]
    for path in files:
        content = path.read_bytes()
        start = 8 if path.suffix == ".safetensors" else 0
        size = int.from_bytes(content[:8], "little") if start else len(content)
        json.loads(content[start : start + size])


def test_progress_without_a_best_epoch_is_still_json():
    progress = Progress(epoch=1, history=[{"train_loss": 1.0}])
    text = json.dumps(progress.to_json(), allow_nan=False)
    assert Progress.from_json(json.loads(text)) == progress
    assert progress.best_loss == math.inf


def test_progress_of_a_time_before_waiting_was_measured_can_be_read():
    saved = {"epoch": 1, "best_loss": 0.5, "best_epoch": 0, "history": [{"val_loss": 0.5, "seconds": 3.0}]}
    progress = Progress.from_json(saved)
    assert progress.wait_share is None
    progress.history += [
        {"seconds": 1.0, "wait_share": 0.5, "val_loss": 0.4},
        {"seconds": 3.0, "wait_share": 0.1, "val_loss": 0.3},
    ]
    assert progress.wait_share == pytest.approx((0.5 + 0.3) / 4)
