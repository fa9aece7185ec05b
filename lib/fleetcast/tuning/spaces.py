"""What a search may change of a model and of its fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fleetcast.errors import InputError
from fleetcast.models import MODELS

#: Of the fit, whatever the model: (low, high), searched on a logarithmic scale.
FIT = {"learning_rate": (2e-4, 1e-2), "weight_decay": (1e-6, 1e-1)}
#: Of options that models share, by their names: choices, or factors of the model's default.
_CHOICES: dict[str, tuple[Any, ...]] = {"layers": (1, 2, 3, 4), "direct": (64, 128, 256)}
_FACTORS = (0.5, 1, 2)
_WIDTHS = ("hidden", "embedding")
_DROPOUT = (0.0, 0.5)


def space(model: str, given: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Name → Ray Tune's domain: those of FIT, and of the options of `model` its width, layers, dropout and
    head. `given` has choices of any option, or of FIT's, in their place.

    Raises InputError for a name that is neither, or a model that is fitted at once and has no learning rate.
    """
    from ray import tune

    config = MODELS[model]
    if config.fitted:
        raise InputError(f"--search {model}: is fitted at once, there is nothing to search")
    domains: dict[str, Any] = {name: tune.loguniform(*bounds) for name, bounds in FIT.items()}
    for name, field in config.model_fields.items():
        if name in _WIDTHS:
            domains[name] = tune.choice([max(1, int(factor * field.default)) for factor in _FACTORS])
        elif name in _CHOICES and field.default is not None:
            domains[name] = tune.choice(list(_CHOICES[name]))
        elif name == "dropout":
            domains[name] = tune.uniform(*_DROPOUT)
    for name, choices in given.items():
        if name not in config.model_fields and name not in FIT:
            known = ", ".join(sorted({*config.model_fields, *FIT}))
            raise InputError(f"--space {name}: is nothing of {model}, expected some of {known}")
        if not choices:
            raise InputError(f"--space {name}: expected at least one choice")
        domains[name] = tune.choice(list(choices))
    return domains
