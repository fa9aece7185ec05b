"""A saved model is the model, and what is not it is refused by name."""

import json

import pytest
import safetensors.torch
import torch
from fleetcast.errors import InputError
from fleetcast.models import MODELS, saving
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.store import Store

GEOMETRY = Geometry(
    history=4, horizon=3, metrics=("cpu",), lags=(5,), calendar=2, quantiles=(0.1, 0.9), entities=("a",)
)
FOLDER = "models/stgnn/1"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def saved(store) -> Model:
    options = MODELS["stgnn"](hidden=6, layers=3, residual=False)
    torch.manual_seed(0)
    module = options.build(GEOMETRY)
    saving.save(store, FOLDER, "stgnn", options, GEOMETRY, module.state_dict())
    return module


def test_a_round_trip_is_exact_and_ready_for_evaluation(store, saved):
    loaded = saving.load(store, FOLDER)
    assert not loaded.training
    assert loaded.geometry == GEOMETRY
    expected, found = saved.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_loading_uses_up_no_random_numbers(store, saved):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    saving.load(store, FOLDER)
    assert torch.equal(torch.rand(1), expected)


def rewrite_weights(store: Store, change) -> None:
    state = safetensors.torch.load(store.read_bytes(f"{FOLDER}/{saving.WEIGHTS}"))
    change(state)
    with store.write(f"{FOLDER}/{saving.WEIGHTS}") as file:
        file.write(safetensors.torch.save(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("time.weight"), "tensor time.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "tensor extra is not one of the model's"),
        (
            lambda s: s.update({"time.weight": torch.ones(6, 3)}),
            r"tensor time.weight is torch.float32 \(6, 3\), expected torch.float32 \(6, 2\)",
        ),
        (lambda s: s.update({"time.weight": s["time.weight"].half()}), "tensor time.weight is torch.float16"),
    ],
)
def test_other_tensors_are_refused(store, saved, change, message):
    rewrite_weights(store, change)
    with pytest.raises(InputError, match=rf"{FOLDER}/weights.safetensors: {message}"):
        saving.load(store, FOLDER)


def test_missing_and_broken_files_are_named(store, saved):
    with store.write(f"{FOLDER}/{saving.WEIGHTS}") as file:
        file.write(b"half a file")
    with pytest.raises(InputError, match=r"weights.safetensors: not a whole safetensors file"):
        saving.load(store, FOLDER)
    store.remove(f"{FOLDER}/{saving.WEIGHTS}")
    with pytest.raises(InputError, match=r"weights.safetensors: no such file"):
        saving.load(store, FOLDER)
    store.remove(f"{FOLDER}/{saving.CONFIG}")
    with pytest.raises(InputError, match=r"config.json: no such file"):
        saving.load(store, FOLDER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "oracle"}, "model 'oracle', expected one of"),
        ({"options": {"hidden": "wide"}}, "model stgnn: option hidden: "),
        ({"geometry": {}}, "geometry.history: Field required"),
        ({"more": 1}, "expected an object of model, options and geometry"),
    ],
)
def test_a_wrong_config_is_refused(store, saved, change, message):
    config = store.read_json(f"{FOLDER}/{saving.CONFIG}")
    store.write_json(f"{FOLDER}/{saving.CONFIG}", config | change)
    with pytest.raises(InputError, match=rf"config.json: {message}"):
        saving.load(store, FOLDER)


def test_the_config_is_plain_json(store, saved):
    config = json.loads(store.read_bytes(f"{FOLDER}/{saving.CONFIG}"))
    assert config["model"] == "stgnn"
    assert config["options"]["layers"] == 3
    assert config["geometry"]["metrics"] == ["cpu"]
