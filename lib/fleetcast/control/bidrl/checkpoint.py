"""A training run in the store: weights and optimiser as safetensors, progress as JSON. No pickle is read."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fleetcast.store import Store

#: What Adam keeps of each parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Checkpoint:
    """The latest state of a run in a folder of the store."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder

    def write(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, progress: dict[str, Any], number: int
    ) -> None:
        """Takes the place of the one before. Tensors are written first under a name of their own, so a death
        in between leaves the one before as it was."""
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for moment, tensor in optimiser.state.get(parameter, {}).items():
                state[f"optimiser.{moment}.{name}"] = tensor
        file = f"{self._folder}/state-{number:06d}.safetensors"
        with self._store.write(file) as written:
            written.write(
                safetensors.torch.save({key: one.detach().contiguous() for key, one in state.items()})
            )
        self._store.write_json(f"{self._folder}/progress.json", {"state": file, "progress": progress})
        for old in self._store.list(self._folder, ".safetensors"):
            if old != file:
                self._store.remove(old)

    def read(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Puts model and optimiser back where they were and returns the progress; None if there is none."""
        saved = self._store.read_json(f"{self._folder}/progress.json")
        if saved is None:
            return None
        state = safetensors.torch.load(self._store.read_bytes(saved["state"]))
        model.load_state_dict(
            {name[len("model.") :]: one for name, one in state.items() if name.startswith("model.")}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for number, (name, _) in enumerate(model.named_parameters()):
            known = {one: state.get(f"optimiser.{one}.{name}") for one in _MOMENTS}
            found = {one: tensor for one, tensor in known.items() if tensor is not None}
            if found:
                moments[number] = found
        optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        return dict(saved["progress"])
