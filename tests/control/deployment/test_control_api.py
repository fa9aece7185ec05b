"""What the deployment says over HTTP, in each of its modes."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import pytest
from fastapi.testclient import TestClient
from filling import fill
from fleetcast.control.deployment.api import application
from fleetcast.control.deployment.app import build
from fleetcast.control.deployment.broker import RedisStreams
from fleetcast.control.deployment.consumer import Consumer
from fleetcast.control.deployment.decider import Decider, DeciderOptions
from fleetcast.control.deployment.messages import Description
from fleetcast.control.deployment.options import CLUSTER, DeployOptions
from fleetcast.control.policies.kubernetes import KubernetesOptions
from fleetcast.errors import InputError
from fleetcast.store import Store
from prometheus_client.parser import text_string_to_metric_families

TOKEN = "FLEETCAST_CONTROL_TOKEN"


@pytest.fixture
def served(
    broker: RedisStreams, about: Description, scrapes: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[TestClient, Consumer]]:
    """`served(mode, messages)`: a client of a server that has seen so many scrapes."""
    monkeypatch.setenv(TOKEN, "secret")

    def make(mode: str, messages: int = 30, clock: str = "trace", **options) -> tuple[TestClient, Consumer]:
        decide = DeciderOptions(mode=mode, rule=KubernetesOptions(target=40))
        consumer = Consumer(broker, Decider(about, decide))
        fill(broker, scrapes[:messages])
        if messages:
            consumer.step(0.01)
        given = DeployOptions(store="", decide=decide, clock=clock, **options)
        client = TestClient(application(consumer, given), raise_server_exceptions=False)
        client.headers["Authorization"] = "Bearer secret"
        return client, consumer

    return make


def test_in_mode_act_autoscalers_and_routers_get_the_newest_actions(served, about) -> None:
    client, consumer = served("act")
    entry = client.get("/v1/control/actions").json()
    assert entry["id"] == consumer.offset
    assert [one["service"] for one in entry["actions"]] == list(about.services)
    for one in entry["actions"]:
        keda = client.get(f"/v1/control/keda/{one['service']}").json()
        assert keda == {"service": one["service"], "replicas": one["replicas"]}
        single = client.get(f"/v1/control/actions/{one['service']}").json()
        assert single["action"] == one
        assert single["id"] == entry["id"]
    routes = client.get("/v1/control/routes").json()
    assert len(routes["items"]) == len(about.services)
    backends = routes["items"][0]["spec"]["rules"][0]["backendRefs"]
    assert [one["name"] for one in backends] == [f"{about.services[0]}-{zone}" for zone in about.zones]


@pytest.mark.parametrize("mode", ["observe", "recommend"])
def test_in_other_modes_they_get_nothing(served, about, mode) -> None:
    client, consumer = served(mode)
    for path in (f"keda/{about.services[0]}", "routes"):
        answer = client.get(f"/v1/control/{path}")
        assert answer.status_code == 409
        assert answer.json()["error"].startswith(f"mode {mode}, expected act")
    found = client.get("/v1/control/actions").json()["actions"]
    assert len(found) == (0 if mode == "observe" else len(about.services))
    single = client.get(f"/v1/control/actions/{about.services[0]}")
    assert single.status_code == (409 if mode == "observe" else 200)
    assert consumer.last is not None
    assert len(consumer.last.actions) == len(about.services), "it is recorded"


def test_old_telemetry_gives_no_action_so_that_others_fall_back(served, about) -> None:
    client, _ = served("act", clock="wall")  # the simulated cluster's time is long past
    answer = client.get(f"/v1/control/keda/{about.services[0]}")
    assert answer.status_code == 503
    assert "expected at most 120 s" in answer.json()["error"]
    assert client.get("/v1/control/actions").status_code == 200


def test_before_the_first_telemetry_there_is_nothing(served) -> None:
    client, _ = served("act", messages=0)
    assert client.get("/v1/control/actions").status_code == 503
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    assert client.get("/v1/control/status").json()["actions"] == 0


def test_everything_but_health_needs_the_token(served, broker) -> None:
    client, _ = served("act")
    for wrong in ("", "Bearer wrong"):
        client.headers["Authorization"] = wrong
        for path in ("v1/control/actions", "v1/control/routes", "metrics"):
            assert client.get(f"/{path}").status_code == 401, path
        assert client.post("/v1/control/kill", json={"on": True}).status_code == 401
        assert client.get("/healthz").status_code == 200
    assert not broker.killed()


def test_the_kill_switch_is_turned_on_and_off(served, broker) -> None:
    client, _ = served("act")
    assert client.post("/v1/control/kill", json={"on": True}).json() == {"killed": True}
    assert broker.killed()
    assert client.get("/v1/control/status").json()["killed"] is True
    assert client.post("/v1/control/kill", json={"on": "x"}).json()["field"] == "on"
    client.post("/v1/control/kill", json={"on": False})
    assert not broker.killed()


def test_without_a_token_nobody_turns_it(served, broker, monkeypatch) -> None:
    monkeypatch.delenv(TOKEN)
    client, _ = served("act")
    answer = client.post("/v1/control/kill", json={"on": True})
    assert answer.status_code == 403
    assert not broker.killed()


def test_a_service_that_is_not_there_is_named(served) -> None:
    client, _ = served("act")
    answer = client.get("/v1/control/keda/nobody")
    assert (answer.status_code, answer.json()["error"]) == (404, "service: 'nobody' is not in the telemetry")


def test_status_and_metrics_say_how_it_goes(served, about, broker, scrapes) -> None:
    client, consumer = served("act")
    broker.send(b"{}")
    consumer.step(0.01)
    found = client.get("/v1/control/status").json()
    assert found["mode"] == "act"
    assert found["actions"] == 30
    assert found["messages"] == {"telemetry": 31, "rejected": 1}
    assert 0 < found["delay_ms"]["p50"] <= found["delay_ms"]["p99"]
    assert found["failure"] is None
    families = {one.name: one for one in text_string_to_metric_families(client.get("/metrics").text)}
    replicas = {one.labels["service"]: one.value for one in families["fleetcast_control_replicas"].samples}
    assert consumer.last is not None
    assert replicas == {one.service: one.replicas for one in consumer.last.actions}
    assert families["fleetcast_control_rejected"].samples[0].value == 1


def test_routes_are_as_the_gateway_api_wants_them(served) -> None:
    """Weights are whole numbers of at least 0, names are DNS labels, as its CustomResourceDefinition says."""
    client, _ = served("act")
    schema = {
        "type": "object",
        "required": ["name", "port", "weight"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 253},
            "port": {"type": "integer", "minimum": 1, "maximum": 65535},
            "weight": {"type": "integer", "minimum": 0, "maximum": 1_000_000},
        },
    }
    for item in client.get("/v1/control/routes").json()["items"]:
        assert (item["apiVersion"], item["kind"]) == ("gateway.networking.k8s.io/v1", "HTTPRoute")
        for backend in item["spec"]["rules"][0]["backendRefs"]:
            jsonschema.validate(backend, schema)


def test_a_password_is_never_shown(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = redis_url.replace("redis://", "redis://:hidden@").replace(redis_url.rsplit(":", 1)[1], "1/0")
    monkeypatch.setenv("FLEETCAST_REDIS", wrong)
    with pytest.raises(InputError, match=r"redis redis://127.0.0.1:1/0: cannot be reached") as raised:
        DeployOptions(store="").broker()
    assert "hidden" not in str(raised.value)


def test_what_is_missing_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEETCAST_REDIS", raising=False)
    with pytest.raises(InputError, match="FLEETCAST_REDIS is not set"):
        DeployOptions(store=str(tmp_path)).broker()
    with pytest.raises(InputError, match=f"{CLUSTER}: no such file, expected the cluster's description"):
        DeployOptions(store=str(tmp_path)).decider()
    with pytest.raises(
        InputError, match=r"args.decide.mode: Input should be 'observe', 'recommend' or 'act'"
    ):
        build({"store": str(tmp_path), "decide": {"mode": "on"}})


def test_a_description_that_is_wrong_is_named_in_one_line(tmp_path) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_json(CLUSTER, {"services": ["a"], "scales": {}})
    with pytest.raises(InputError, match=r"control/cluster.json: scales.rate: Field required$"):
        DeployOptions(store=store.uri).decider()


def test_the_description_is_read_from_the_store(tmp_path, about: Description) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_json(CLUSTER, json.loads(about.model_dump_json()))
    assert DeployOptions(store=store.uri).decider().about == about
