"""A training run on disk: tensors as safetensors, the rest as JSON. No pickle is written or read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fleetcast.training.loop import Progress, Run

_TENSORS = "tensors.safetensors"
_PROGRESS = "progress.json"


def write(run: Run, folder: Path) -> None:
    """Weights, best weights, optimizer moments and progress of a run."""
    tensors = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in run.best.items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(contiguous, folder / _TENSORS)
    (folder / _PROGRESS).write_text(json.dumps(run.progress.to_json()))


def restore(run: Run, folder: Path) -> None:
    """Sets a run to where it was written."""
    tensors = load_file(folder / _TENSORS)
    run.model.load_state_dict(_below(tensors, "model."))
    run.best = _below(tensors, "best.")
    optimizer = run.optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    run.optimizer.load_state_dict({**optimizer, "state": state})
    run.progress = read_progress(folder)


def read_progress(folder: Path) -> Progress:
    """How far a written run is."""
    return Progress.from_json(json.loads((folder / _PROGRESS).read_text()))


def read_best(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the best epoch of a written run."""
    return _below(load_file(folder / _TENSORS), "best.")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
