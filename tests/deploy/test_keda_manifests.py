"""Autoscaling by forecast: what KEDA takes, asking what the server answers, and safe when it does not."""

import copy
import re
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import promql_parser
import pytest
from fleetcast.schemas import QUANTILES
from fleetcast.serving.api import application
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.schemas import Scaling
from pydantic import ValidationError
from resources import ScaledObject, TriggerAuthentication, load

CONTRACTS = {"replicas": "required_replicas", "load": "load"}


def scaled(name):
    return load(f"deploy/keda/scaledobject-{name}.yaml")


@pytest.fixture(params=CONTRACTS)
def spec(request):
    return ScaledObject.model_validate(scaled(request.param)).spec


def trigger(spec, kind):
    (found,) = (trigger for trigger in spec.triggers if trigger.type == kind)
    return found


def url(spec):
    parts = urlsplit(trigger(spec, "metrics-api").metadata.url)
    return parts, {name: value for name, (value,) in parse_qs(parts.query, strict_parsing=True).items()}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.fallbck", {}),
        ("spec.fallback.behavior", "currentReplicasIfHigh"),
        ("spec.fallback.replicas", 1000),
        ("spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleUp.tolerence", "0"),
        ("spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown.stabilizationWindowSeconds", "900"),
        ("spec.triggers.0.metadata.targetValue", 1),
        ("spec.triggers.0.metadata.valueLocaton", "load"),
        ("spec.triggers.1.type", "gpu"),
    ],
)
def test_a_slip_in_a_manifest_is_seen(path, value):
    broken = copy.deepcopy(scaled("load"))
    place = broken
    *way, last = path.split(".")
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    with pytest.raises(ValidationError):
        ScaledObject.model_validate(broken)


def test_asks_what_the_server_is_asked(spec):
    parts, query = url(spec)
    api = application(SimpleNamespace(options=ServeOptions(store="any"), snapshot=None, reason="")).openapi()
    parameters = {p["name"]: p for p in api["paths"]["/v1/scaling/{workload}"]["get"]["parameters"]}
    assert re.fullmatch(r"/v1/scaling/[^/]+", parts.path)
    assert query.keys() <= parameters.keys() - {"workload"}
    assert float(query["quantile"]) in QUANTILES
    assert float(query["lead_minutes"]) > 0


@pytest.mark.parametrize("name", CONTRACTS)
def test_reads_what_the_server_answers(name):
    metadata = trigger(ScaledObject.model_validate(scaled(name)).spec, "metrics-api").metadata
    assert metadata.valueLocation == CONTRACTS[name]
    assert Scaling.model_fields[metadata.valueLocation].annotation in (int, float)


def test_one_replica_for_each_that_is_required():
    spec = ScaledObject.model_validate(scaled("replicas")).spec
    _, query = url(spec)
    assert trigger(spec, "metrics-api").metadata.targetValue == "1"
    assert int(query["replicas"]) > 0


def test_the_load_of_a_replica_is_the_same_everywhere():
    spec = ScaledObject.model_validate(scaled("load")).spec
    _, query = url(spec)
    predicted = trigger(spec, "metrics-api").metadata
    observed = trigger(spec, "prometheus").metadata
    target = spec.advanced.scalingModifiers.target
    assert {query["per_replica"], predicted.targetValue, observed.threshold} == {target}
    promql_parser.parse(observed.query)


def test_shows_its_token(spec):
    authentication = TriggerAuthentication.model_validate(load("deploy/keda/authentication.yaml"))
    predicted = trigger(spec, "metrics-api")
    assert predicted.metadata.authMode == "bearer"
    assert predicted.authenticationRef.name == authentication.metadata.name
    (secret,) = authentication.spec.secretTargetRef
    assert (secret.parameter, secret.name, secret.key) == ("token", "fleetcast-api", "token")


def test_never_scales_in_on_a_forecast_alone(spec):
    trigger(spec, "cpu")  # HPA takes the larger of it and the forecast
    assert all(each.metricType != "Value" for each in spec.triggers)
    behavior = spec.advanced.horizontalPodAutoscalerConfig.behavior
    _, query = url(spec)
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 60 * float(query["lead_minutes"])
    assert spec.minReplicaCount > 0


def test_a_small_call_for_more_is_heard(spec):
    assert spec.advanced.horizontalPodAutoscalerConfig.behavior["scaleUp"]["tolerance"] == "0"


def test_without_a_forecast_the_count_does_not_fall():
    replicas = ScaledObject.model_validate(scaled("replicas")).spec
    assert replicas.fallback.behavior == "currentReplicasIfHigher"

    load_ = ScaledObject.model_validate(scaled("load")).spec
    assert load_.fallback.behavior == "scalingModifiers"
    assert trigger(load_, "prometheus").metadata.ignoreNullValues == "false"
    modifiers = load_.advanced.scalingModifiers
    terms = re.fullmatch(r"max\((.*), (.*)\)", modifiers.formula).groups()
    terms = dict(term.split(" ?? ") for term in terms)
    assert terms.keys() == {each.name for each in load_.triggers if each.type != "cpu"}
    assert {float(value) for value in terms.values()} == {
        load_.fallback.replicas * float(modifiers.target)
    }, "what is missing counts as the load of fallback.replicas"
