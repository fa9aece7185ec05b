"""Decisions deployed: the server's file, and what KEDA takes of it."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from fleetcast.control.cluster import ClusterOptions, generate
from fleetcast.control.deployment.api import application
from fleetcast.control.deployment.consumer import Consumer
from fleetcast.control.deployment.decider import Decider
from fleetcast.control.deployment.messages import Description, Entry
from fleetcast.control.deployment.options import DeployOptions
from ray.serve.schema import ServeDeploySchema
from resources import ScaledObject, TriggerAuthentication, load


class Quiet:
    """A stream on which nothing comes."""

    def offset(self):
        return "0-0"

    def before(self, offset, count):
        return []

    def last_action(self):
        return None

    def killed(self):
        return False


def scaled() -> ScaledObject:
    TriggerAuthentication.model_validate(load("deploy/control/authentication.yaml"))
    return ScaledObject.model_validate(load("deploy/control/scaledobject.yaml"))


@pytest.fixture
def options() -> DeployOptions:
    (found,) = ServeDeploySchema.model_validate(load("deploy/control/serve.yaml")).applications
    assert found.import_path == "fleetcast.control.deployment.app:build"
    assert {one.name: one.num_replicas for one in found.deployments} == {"Control": 1}
    return DeployOptions(**found.args)


def test_the_server_begins_by_watching(options):
    assert options.decide.mode == "observe"


def test_keda_reads_a_number_where_the_server_has_it(options):
    spec = scaled().spec
    (trigger,) = (one for one in spec.triggers if one.type == "metrics-api")
    path = urlsplit(trigger.metadata.url).path
    about = Description.of(generate(ClusterOptions(services=4, classes=1)))
    about = about.model_copy(update={"services": ("cart", *about.services[1:])})
    consumer = Consumer(Quiet(), Decider(about, options.decide))
    action = {"service": "cart", "before": 3, "replicas": 5, "proposed": 5, "reactive": 4}
    entry = {"id": "1-0", "time": 0, "mode": "act", "policy": "rule", "actions": [action]}
    consumer.last, consumer.heard = Entry.model_validate(entry), 4e9
    acting = options.decide.model_copy(update={"mode": "act"})
    client = TestClient(application(consumer, options.model_copy(update={"decide": acting})))
    assert client.get(path).json()[trigger.metadata.valueLocation] == 5
    watching = TestClient(application(consumer, options), raise_server_exceptions=False)
    assert watching.get(path).status_code == 409, "KEDA falls back"


def test_without_an_answer_keda_does_not_scale_in():
    spec = scaled().spec
    assert spec.fallback.behavior == "currentReplicasIfHigher"
    assert {one.type for one in spec.triggers} == {"metrics-api", "cpu"}, "CPU scales out beside it"
