"""What people and machines get over HTTP: answers that fit their schemas, and errors in one form."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator

import httpx
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import schemathesis
from fleetcast.schemas import QUANTILES
from fleetcast.serving import schemas
from fleetcast.serving.api import application
from fleetcast.serving.local import Local
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.routes import ARROW
from fleetcast.store import MANIFEST
from hypothesis import HealthCheck, given, settings
from night import MACHINES, METRICS, NIGHT, republish, serve

TIMES = ["2018-01-05T23:30:00Z", "2018-01-05T23:45:00Z"]
LIVE = {"telemetry": [{"entity": "m_1", "times": TIMES, "values": {"cpu": [0.4, None]}}]}

#: Every answer, by the schema that it must fit.
ANSWERS = [
    ("/healthz", schemas.Health),
    ("/readyz", schemas.Health),
    ("/v1/cluster", schemas.Cluster),
    ("/v1/entities?search=m_1", schemas.Entities),
    ("/v1/entities/m_1", schemas.Entity),
    ("/v1/forecasts/m_1", schemas.Forecasts),
    ("/v1/forecasts/m_1?metric=cpu&hours=2&quantile=0.5&quantile=0.95", schemas.Forecasts),
    ("/v1/history/m_1", schemas.History),
    ("/v1/totals?metric=cpu", schemas.Total),
    ("/v1/peaks?metric=memory&quantile=0.9", schemas.Peaks),
    ("/v1/limits?metric=cpu&limit=0.4", schemas.Limits),
    ("/v1/limits/m_2?metric=cpu&limit=5", schemas.Limits),
    ("/v1/neighbours/m_3", schemas.Neighbours),
    ("/v1/accuracy/m_3", schemas.Accuracy),
    ("/v1/model", schemas.Card),
    ("/v1/scaling/m_1?replicas=4", schemas.Scaling),
]


def finite(text: str) -> None:
    """No number of an answer is NaN, infinite, or negative."""

    def number(value: str) -> float:
        found = float(value)
        assert math.isfinite(found)
        assert found >= 0
        return found

    def constant(value: str) -> None:
        raise AssertionError(value)

    json.loads(text, parse_float=number, parse_int=number, parse_constant=constant)


@pytest.mark.parametrize(("path", "schema"), ANSWERS)
def test_every_answer_fits_its_schema(client, path, schema):
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    schema.model_validate_json(answer.content)
    finite(answer.text)


def test_a_forecast_is_what_was_published_as_json_and_as_arrow(client, night):
    rows = pl.read_parquet(f"{night.root}/{NIGHT}/*.parquet").with_columns(
        pl.col("entity", "metric").cast(pl.String)
    )
    mine = rows.filter(entity="m_5", metric="cpu").sort("time").head(8)
    answer = client.get("/v1/forecasts/m_5", params={"metric": "cpu", "hours": 2}).json()
    (series,) = answer["forecasts"][0]["series"]
    assert np.allclose(series["mean"], mine["mean"])
    assert series["quantiles"].keys() == {f"{q:g}" for q in QUANTILES}
    assert np.allclose(series["quantiles"]["0.95"], mine["q95"])
    assert answer["times"][1] == "2018-01-06T00:15:00Z"

    wanted = {"entities": ["m_5", "m_9"], "metrics": ["cpu"], "hours": 2}
    streamed = client.post("/v1/forecasts", json=wanted, headers={"Accept": ARROW})
    assert streamed.headers["content-type"] == ARROW
    table = pl.from_arrow(pa.ipc.open_stream(io.BytesIO(streamed.content)).read_all())
    assert len(table) == 16
    assert table.head(8)["q95"].to_list() == mine["q95"].to_list()


def test_a_live_forecast_and_telemetry(client):
    answer = client.post("/v1/live", json=LIVE | {"hours": 1, "quantiles": [0.5, 0.95]})
    assert answer.status_code == 200, answer.text
    found = schemas.LiveForecasts.model_validate_json(answer.content)
    assert [one.entity for one in found.forecasts] == ["m_1"]
    assert len(found.times) == 4
    assert found.forecasts[0].series[0].quantiles.keys() == {"0.5", "0.95"}
    finite(answer.text)

    told = {"entity": "m_1", "times": ["2018-01-05T23:50:00"], "values": {"cpu": [0.4], "other": [1]}}
    answer = client.post("/v1/telemetry", json={"telemetry": [told]}).json()
    assert answer == {"accepted": 1, "rejected": {"other is not a metric of the model": 1}}


def test_required_replicas_follow_from_the_capacity_that_is_stated(client):
    load = client.get("/v1/scaling/m_1", params={"replicas": 1}).json()["load"]
    for replicas, target in ((4, 0.5), (10, 0.9), (1, 1.0)):
        answer = client.get("/v1/scaling/m_1", params={"replicas": replicas, "target": target}).json()
        assert answer["required_replicas"] == max(1, math.ceil(replicas * load / target))
    answer = client.get("/v1/scaling/m_1", params={"per_replica": 0.1, "lead_minutes": 120}).json()
    assert answer["required_replicas"] == math.ceil(answer["load"] / 0.1)
    assert (answer["start"], answer["end"]) == ("2018-01-06T00:00:00Z", "2018-01-06T02:00:00Z")
    forecast = client.get("/v1/forecasts/m_1?metric=cpu&hours=2&quantile=0.95").json()
    highest = max(forecast["forecasts"][0]["series"][0]["quantiles"]["0.95"])
    assert answer["load"] == pytest.approx(highest)


def test_no_replicas_are_counted_by_a_metric_without_a_unit(store):
    """Its publisher has scaled it over the trace."""
    path = f"{NIGHT}/{MANIFEST}"
    store.write_json(path, {**store.read_json(path), "normalised": ["cpu"]})
    local = Local(ServeOptions(store=store.uri, clock="trace"))
    for address in serve(application(local)):
        answer = httpx.get(f"{address}/v1/scaling/m_1?metric=cpu&replicas=2")
        assert answer.status_code == 422
        assert (
            "cpu is normalised over the trace, expected one with a unit to scale by" in answer.json()["error"]
        )
        assert httpx.get(f"{address}/v1/scaling/m_1?metric=memory&replicas=2").status_code == 200
        shown = httpx.get(f"{address}/v1/forecasts/m_1?metric=cpu&hours=1").json()
        assert shown["forecasts"][0]["series"][0]["unit"] == "CPU time, normalised over the trace"


WRONG = [
    ("GET", "/v1/forecasts/nobody", None, 404, None, "nobody: no such machine"),
    ("GET", "/v1/totals?metric=cpu&service=x", None, 404, None, "service x: there is no such machine"),
    ("GET", "/v1/nothing", None, 404, None, "Not Found"),
    ("GET", "/v1/forecasts/m_1?metric=x", None, 422, "metric", "x, expected one of cpu, memory"),
    ("GET", "/v1/forecasts/m_1?hours=-1", None, 422, "hours", "greater than 0, got '-1'"),
    ("GET", "/v1/peaks?metric=cpu&quantile=0.3", None, 422, "quantile", "expected one of 0.05"),
    ("GET", "/v1/peaks", None, 422, "metric", "required"),
    ("GET", "/v1/scaling/m_1", None, 422, "replicas", "the present number is needed"),
    ("GET", "/v1/entities?limit=100000", None, 422, "limit", "less than or equal to 1000, got '100000'"),
    ("POST", "/v1/forecasts", {"entities": []}, 422, "entities", "at least 1"),
    ("POST", "/v1/forecasts", {"entities": ["m_1"], "x": 1}, 422, "x", "not permitted"),
    ("POST", "/v1/forecasts", {"entities": ["m_1"] * 5001}, 422, "entities", "at most 5000"),
    ("POST", "/v1/live", {}, 422, "entities", "expected some, or telemetry"),
    ("POST", "/v1/live", {"entities": ["nobody"]}, 422, "entities", "nobody is not known"),
    (
        "POST",
        "/v1/live",
        {"telemetry": [{"entity": "m_1", "times": TIMES, "values": {"cpu": [1]}}]},
        422,
        "telemetry.m_1.values.cpu",
        "1 values, expected 2, one for each time",
    ),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "field", "words"), WRONG)
def test_errors_have_one_form_and_name_the_field(client, method, path, body, status, field, words):
    answer = client.request(method, path, json=body)
    assert answer.status_code == status
    problem = schemas.Problem.model_validate_json(answer.content)
    assert problem.field == field
    assert words in problem.error


def test_a_body_beyond_the_limit_is_not_read(night):
    small = Local(ServeOptions(store=night.uri, clock="trace", max_body_mb=0.001))
    for address in serve(application(small)):
        answer = httpx.post(f"{address}/v1/live", content=b"x" * 2000)
        assert (answer.status_code, answer.json()["error"]) == (413, "the body is larger than 1,000 bytes")

        def chunks() -> Iterator[bytes]:
            yield from [b"x" * 500] * 4

        answer = httpx.post(f"{address}/v1/live", content=chunks())
        assert answer.status_code == 413, "without a length as well"


def test_with_a_token_nothing_but_health_and_the_page_is_open(night, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    closed = Local(ServeOptions(store=night.uri, clock="trace", token_variable="TOKEN"))
    for address in serve(application(closed)):
        with httpx.Client(base_url=address) as client:
            for path in ("/healthz", "/readyz", "/", "/page/app.js"):
                assert client.get(path).status_code == 200
            for path in ("/v1/cluster", "/metrics", "/api/v1/labels", "/openapi.json"):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
                    answer = client.get(path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
                assert client.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_a_token_that_should_be_there_and_is_not_stops_the_server(night):
    with pytest.raises(Exception, match="NO_SUCH_TOKEN is not set or empty"):
        application(Local(ServeOptions(store=night.uri, token_variable="NO_SUCH_TOKEN")))


def test_without_a_forecast_or_a_model_the_answer_is_503_with_the_reason(tmp_path):
    for address in serve(application(Local(ServeOptions(store=str(tmp_path))))):
        for path in ("/v1/cluster", "/v1/scaling/m_1?replicas=2", "/readyz"):
            answer = httpx.get(address + path)
            assert answer.status_code == 503
            assert "no forecast is published" in answer.json()["error"]
        answer = httpx.post(f"{address}/v1/live", json=LIVE)
        assert (answer.status_code, "no model is selected" in answer.text) == (503, True)
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert "fleetcast_forecast_issued" not in httpx.get(f"{address}/metrics").text


def test_a_stale_forecast_says_so_and_scales_nothing(night):
    for address in serve(application(Local(ServeOptions(store=night.uri, clock="wall")))):
        assert httpx.get(f"{address}/v1/cluster").json()["stale"] is True
        answer = httpx.get(f"{address}/v1/scaling/m_1?replicas=2")
        assert answer.status_code == 503
        assert answer.json()["error"] == "the forecast is stale: it was valid until 2018-01-06T06:00:00Z"
        metrics = httpx.get(f"{address}/metrics").text
        assert "fleetcast_forecast_stale 1.0" in metrics
        assert "fleetcast_peak{" not in metrics


def test_a_refused_forecast_is_said_while_the_old_one_answers(store):
    local = Local(ServeOptions(store=store.uri, clock="trace"))
    republish(store, 1, lambda rows: rows.head(3))
    local.refresh()
    for address in serve(application(local)):
        ready = httpx.get(f"{address}/readyz").json()
        assert ready["forecast"] == NIGHT
        assert "3 rows" in ready["reason"]
        assert "fleetcast_refused 1.0" in httpx.get(f"{address}/metrics").text


def test_another_model_is_taken_up_and_one_that_cannot_be_read_is_refused(store):
    local = Local(ServeOptions(store=store.uri, clock="trace"))
    first = local.models.live
    selected = store.read_json("models/selected.json")
    folder = f"{selected['model']}-copy"
    for path in store.list(selected["model"]):
        with store.write(path.replace(selected["model"], folder)) as file:
            file.write(store.read_bytes(path))
    with store.write(f"{folder}/weights.safetensors") as file:
        file.write(b"no weights")
    store.write_json("models/selected.json", {**selected, "model": folder})
    local.refresh()
    assert local.models.live is first
    assert "not a whole safetensors file" in local.models.reason
    with store.write(f"{folder}/weights.safetensors") as file:
        file.write(store.read_bytes(f"{selected['model']}/weights.safetensors"))
    local.refresh()
    assert local.models.live is not first
    assert local.models.live.selected.folder == folder
    assert local.models.reason == ""


def test_the_examples_of_the_openapi_document_are_answered(client):
    document = client.get("/openapi.json").json()
    assert document["paths"].keys() >= {
        "/v1/forecasts",
        "/v1/live",
        "/v1/telemetry",
        "/v1/scaling/{workload}",
    }
    for path in ("/v1/forecasts", "/v1/totals", "/v1/telemetry"):
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = document["components"]["schemas"][reference["$ref"].rsplit("/", 1)[1]]
        answer = client.post(path, json=schema["examples"][0])
        assert answer.status_code == 200, answer.text


def test_nothing_that_is_asked_breaks_the_server(service: Local):
    """Requests made up from the document, right and wrong ones: none is answered by 5xx."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", application(service))
    count = 0
    lenient = settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for operation in schema.get_all_operations():

        @lenient
        @given(operation.ok().as_strategy())
        def ask(case: schemathesis.Case) -> None:
            nonlocal count
            count += 1
            answer = case.call()
            assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.text}"

        ask()
    assert count > 200


def test_all_machines_and_metrics_are_there(client):
    found = client.get("/v1/cluster").json()
    assert found["entities"] == MACHINES
    assert [one["name"] for one in found["metrics"]] == list(METRICS)
    assert client.get("/v1/entities", params={"limit": 5, "offset": 10}).json()["total"] == MACHINES


def test_a_name_may_hold_a_slash(client):
    for path in ("/v1/forecasts/shop%2Fcart", "/v1/history/shop/cart"):
        assert client.get(path).json()["error"] == "shop/cart: no such machine"
