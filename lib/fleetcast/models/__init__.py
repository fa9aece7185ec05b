"""The models by name: `build("stgnn", {"hidden": 32}, geometry)`.

One file per model; each has its `ModelConfig` and its `Model`, and is entered here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fleetcast.errors import InputError
from fleetcast.models.ast_gcn import AstGcnConfig
from fleetcast.models.astgcn import AstgcnConfig
from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.bert import BertConfig
from fleetcast.models.boosting import LightgbmConfig
from fleetcast.models.dgcrn import DgcrnConfig
from fleetcast.models.dlinear import DlinearConfig
from fleetcast.models.fusion import FusionConfig
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph_wavenet import GraphWavenetConfig
from fleetcast.models.informer import InformerConfig
from fleetcast.models.itransformer import ItransformerConfig
from fleetcast.models.lstm import BilstmConfig, LstmConfig
from fleetcast.models.mlp import MlpConfig
from fleetcast.models.patchtst import PatchtstConfig
from fleetcast.models.ridge import RidgeConfig
from fleetcast.models.stgnn import StgnnConfig
from fleetcast.models.stid import StidConfig
from fleetcast.models.transformer import TransformerConfig

MODELS: dict[str, type[ModelConfig]] = {
    "ast_gcn": AstGcnConfig,
    "astgcn": AstgcnConfig,
    "bert": BertConfig,
    "bilstm": BilstmConfig,
    "dgcrn": DgcrnConfig,
    "dlinear": DlinearConfig,
    "fusion": FusionConfig,
    "graph_wavenet": GraphWavenetConfig,
    "informer": InformerConfig,
    "itransformer": ItransformerConfig,
    "lightgbm": LightgbmConfig,
    "lstm": LstmConfig,
    "mlp": MlpConfig,
    "patchtst": PatchtstConfig,
    "ridge": RidgeConfig,
    "stgnn": StgnnConfig,
    "stid": StidConfig,
    "transformer": TransformerConfig,
}


def configure(name: str, options: Mapping[str, Any]) -> ModelConfig:
    """The options of a model, checked. Raises InputError for an unknown model or a wrong option."""
    if name not in MODELS:
        raise InputError(f"model {name!r}, expected one of {', '.join(sorted(MODELS))}")
    try:
        return MODELS[name](**options)
    except ValidationError as error:
        wrong = (
            f"option {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise InputError(f"model {name}: {'; '.join(wrong)}") from error


def build(name: str, options: Mapping[str, Any], geometry: Geometry) -> Model:
    """A new model with its initial weights, drawn from torch's global generator. Raises as `configure`."""
    return configure(name, options).build(geometry)
