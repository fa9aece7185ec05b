"""On Ray Serve, the store on S3: live requests find the model, overload is refused at once, a reload fails no
request."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml
from fleetcast.config import S3Options
from fleetcast.errors import InputError
from fleetcast.serving import app
from fleetcast.serving.app import build, checked
from fleetcast.store import Store
from night import NIGHT, republish
from object_store import BUCKET
from ray import serve
from ray.serve.schema import ServeDeploySchema

LIVE = {"entities": ["m_1"], "hours": 1, "quantiles": [0.5]}


def test_the_config_file_is_valid_and_names_what_there_is(repository):
    config = yaml.safe_load((repository / "serve_config.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "fleetcast.serving.app:build"
    checked(application.args)
    assert {one.name for one in application.deployments} == {"Api", "Live"}


def test_a_wrong_argument_is_named():
    with pytest.raises(InputError, match=r"args\.clock: .*'wall' or 'trace', got 'sun'"):
        build({"store": "s", "clock": "sun"})
    with pytest.raises(InputError, match=r"args\.store: Field required, .*; args\.stroe: Extra inputs"):
        build({"stroe": "s"})


@pytest.fixture(scope="module")
def args(night: Store, use_s3: Callable[..., S3Options]) -> dict[str, Any]:
    """Arguments of the application, for a copy of the night on S3."""
    reached = use_s3()
    store = Store(f"s3://{BUCKET}/serve/store")
    for path in night.list(""):
        store.fs.put_file(night.path(path), store.path(path))
    return {"store": store.uri, "s3": reached.model_dump(mode="json"), "clock": "trace"}


@pytest.fixture(scope="module")
def shared_store(args: dict[str, Any]) -> Store:
    return Store(args["store"])


@pytest.fixture(scope="module")
def address(args: dict[str, Any]) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({**args, "refresh_seconds": 0.2}), name="fleetcast")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_stored_and_live_forecasts_of_the_same_telemetry_agree(address):
    stored = httpx.get(f"{address}/v1/forecasts/m_1?hours=1&quantile=0.5").json()
    answer = httpx.post(f"{address}/v1/live", json=LIVE, timeout=60)
    assert answer.status_code == 200, answer.text
    for mine, theirs in zip(
        answer.json()["forecasts"][0]["series"], stored["forecasts"][0]["series"], strict=True
    ):
        assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-3, abs=1e-4)


def test_beyond_what_may_wait_the_answer_is_429_at_once(address, args, tmp_path):
    """A model that takes its time: as many requests wait as may, the others are refused meanwhile."""
    gate = tmp_path / "open"

    class Slow(app.Live):
        async def ask(self, asked):
            while not gate.exists():
                await asyncio.sleep(0.01)
            return self.models.forecast([asked])[0]

    few = {"num_cpus": 0.1}
    live = serve.deployment(max_ongoing_requests=4, max_queued_requests=8, ray_actor_options=few)(Slow)
    api = serve.deployment(max_ongoing_requests=100, ray_actor_options=few)(app.Api)
    serve.run(api.bind(args, live.bind(args)), name="slow", route_prefix="/slow")

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            asked = [asyncio.ensure_future(client.post("/slow/v1/live", json=LIVE)) for _ in range(60)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert {one.result().status_code for one in done} == {429}
            gate.touch()
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 8, "those that could wait"
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert "too many live requests wait" in refused.json()["error"]
    serve.delete("slow")


def test_a_newer_forecast_and_another_model_are_taken_up_without_a_failed_request(address, shared_store):
    """Requests of both kinds go on all the while; the new forecast and the new model answer in the end."""
    stop, codes, errors = threading.Event(), set(), []

    def load() -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                try:
                    codes.add(client.get("/v1/forecasts/m_1").status_code)
                    codes.add(client.post("/v1/live", json=LIVE).status_code)
                except httpx.TransportError as error:
                    errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert httpx.get(f"{address}/readyz").json()["forecast"] == NIGHT
        selected = shared_store.read_json("models/selected.json")
        shared_store.write_json("models/selected.json", {**selected, "rung": selected["naive"]})
        folder = republish(shared_store, 1)
        _until(lambda: httpx.get(f"{address}/readyz").json()["forecast"] == folder)
        _until(
            lambda: (
                httpx.post(f"{address}/v1/live", json=LIVE, timeout=60).json()["model"] == selected["naive"]
            )
        )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert codes == {200}


def _until(holds) -> None:
    """Asks again and again; each question is a request, so this does not spin."""
    for _ in range(2000):
        if holds():
            return
    raise AssertionError("did not come")
