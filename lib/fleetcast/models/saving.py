"""A model in the store: `config.json`, what to build, and `weights.safetensors`. No pickle is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from fleetcast import models
from fleetcast.errors import InputError
from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.store import Store

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
#: How torch names what a module gives as its extra state: here uint8, as long as the fit made it.
_EXTRA = "_extra_state"


def save(
    store: Store,
    folder: str,
    name: str,
    options: ModelConfig,
    geometry: Geometry,
    state: Mapping[str, Tensor],
) -> None:
    """Writes the model called `name` in the registry, with `state` its `state_dict`."""
    config = {
        "model": name,
        "options": options.model_dump(mode="json"),
        "geometry": geometry.model_dump(mode="json"),
    }
    save_weights(store, f"{folder}/{WEIGHTS}", state)
    store.write_json(f"{folder}/{CONFIG}", config)


def load(store: Store, folder: str) -> Model:
    """The saved model in evaluation mode, on the CPU.

    Raises InputError naming the file, and the option or tensor in it, that is missing or not as expected.
    """
    model = _build(store, f"{folder}/{CONFIG}")
    file = f"{folder}/{WEIGHTS}"
    state = load_weights(store, file, model.state_dict())
    try:
        model.load_state_dict(state)
    except InputError as error:
        raise InputError(f"{store.uri}/{file}: {error}") from error
    return model.eval()


def save_weights(store: Store, file: str, state: Mapping[str, Tensor]) -> None:
    """Writes a `state_dict` as safetensors."""
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    with store.write(file) as written:
        written.write(safetensors.torch.save(weights))


def load_weights(store: Store, file: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with the names, shapes and types of those expected.

    Raises InputError naming the file, and the tensor in it, that is missing or not as expected.
    """
    try:
        state = safetensors.torch.load(store.read_bytes(file))
    except FileNotFoundError as error:
        raise InputError(f"{store.uri}/{file}: no such file, expected the model's weights") from error
    except SafetensorError as error:
        raise InputError(f"{store.uri}/{file}: not a whole safetensors file: {error}") from error
    _check(expected, state, f"{store.uri}/{file}")
    return state


@dataclass(frozen=True)
class Saved:
    """A model in the store that a task loads once, when it first needs it, for all the groups it works on."""

    store: Store
    folder: str

    @cached_property
    def model(self) -> Model:
        """As `load`, which raises InputError."""
        return load(self.store, self.folder)


def _build(store: Store, file: str) -> Model:
    """The module that a config file describes; its weights are still to come."""
    config = store.read_json(file)
    if config is None:
        raise InputError(f"{store.uri}/{file}: no such file, expected the model's config")
    if not isinstance(config, dict) or set(config) != {"model", "options", "geometry"}:
        raise InputError(f"{store.uri}/{file}: expected an object of model, options and geometry")
    try:
        geometry = Geometry.model_validate(config["geometry"])
        with torch.random.fork_rng(
            devices=[]
        ):  # initial weights that are replaced must not use up random numbers
            return models.build(config["model"], config["options"], geometry)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(
            f"{store.uri}/{file}: geometry.{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        ) from error
    except InputError as error:
        raise InputError(f"{store.uri}/{file}: {error}") from error


def _check(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], file: str) -> None:
    """Every tensor is there under its name with its shape and type, and no other.

    The length of an extra state is not known before; its module checks what it says.
    """
    for name in sorted(expected.keys() | given.keys()):
        if name not in given:
            raise InputError(f"{file}: tensor {name} is missing")
        if name not in expected:
            raise InputError(f"{file}: tensor {name} is not one of the model's")
        wanted, found = ((t.dtype, tuple(t.shape)) for t in (expected[name], given[name]))
        if name.endswith(_EXTRA) and (wanted[0], len(wanted[1])) == (found[0], len(found[1])):
            continue
        if wanted != found:
            raise InputError(
                f"{file}: tensor {name} is {found[0]} {found[1]}, expected {wanted[0]} {wanted[1]}"
            )
