"""What a search may change of a model and of its fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from pydantic import ValidationError

from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.models import MODELS
from fleetcast.training.options import FitOptions

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

    Raises InputError for a name that is neither, a choice that it does not take, or a model that is fitted at
    once and has no learning rate.
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
        for choice in choices:
            _check(model, name, choice, given)
        domains[name] = tune.choice(list(choices))
    return domains


def _check(model: str, name: str, choice: Any, given: Mapping[str, Sequence[Any]]) -> None:
    """Raises InputError if no combination of the other options' choices goes with this one."""
    of_fit = name in FIT
    names = [other for other in given if not of_fit and other not in FIT and other != name]
    build: type[Options] = FitOptions if of_fit else MODELS[model]
    wrong = ""
    for combination in product(*(given[other] for other in names)):
        try:
            build(**dict(zip(names, combination, strict=True)), **{name: choice})
            return
        except ValidationError as error:
            wrong = str(error.errors()[0]["msg"])
    raise InputError(f"--space {name}: {wrong} (got {choice!r})")
