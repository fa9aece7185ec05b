"""Scrapes: what monitoring sends is what a policy sees."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from fleetcast.control.deployment.decider import REPEATED, Decider, DeciderOptions
from fleetcast.control.deployment.messages import Description, Entry, Scrape, read_scrape
from fleetcast.control.engine import FluidEngine


def test_a_scrape_of_a_cluster_is_seen_as_the_cluster_is(
    engine: Callable[[], FluidEngine], about: Description
) -> None:
    running = engine()
    seen = running.observe()
    body = Scrape.of(seen, about, start=1000).model_dump_json().encode()
    scrape = read_scrape(body)
    assert isinstance(scrape, Scrape)
    again, strangers = scrape.observation(about)
    assert strangers == []
    assert again.time == seen.time + 1000
    for name, value in vars(seen).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(again, name), value, equal_nan=True, msg=name)


def test_services_come_in_any_order_and_those_of_others_are_named(
    about: Description, scrapes: list[bytes]
) -> None:
    whole = json.loads(scrapes[10])
    order = [3, 0, 2]
    part = {
        name: [value[n] for n in order] + [None if name != "services" else "elsewhere"]
        if isinstance(value, list) and len(value) == len(about.services)
        else value
        for name, value in whole.items()
    }
    for name in ("ready_by_class", "cpu_by_class", "latency_by_class"):
        part[name][-1] = [None] * len(about.zones)
    scrape = read_scrape(json.dumps(part).encode())
    assert isinstance(scrape, Scrape), scrape
    seen, strangers = scrape.observation(about)
    assert strangers == ["elsewhere"]
    assert seen.ready[0, order].tolist() == [whole["ready"][n] for n in order]
    assert seen.rate[0].isnan().tolist() == [n not in order for n in range(len(about.services))]
    entry = Decider(about, DeciderOptions()).answer("1-0", json.dumps(part).encode(), False)
    assert isinstance(entry, Entry)
    assert {action.service for action in entry.actions} == {about.services[n] for n in order}


def test_what_monitoring_does_not_know_is_left_out(about: Description) -> None:
    body = {"time": 5, "services": about.services, "wanted": [3] * 6, "ready": [3] * 6, "cpu": [0.9] * 6}
    entry = Decider(about, DeciderOptions()).answer("1-0", json.dumps(body).encode(), False)
    assert isinstance(entry, Entry)
    assert [action.replicas for action in entry.actions] == [4] * 6  # 0.9 ÷ 0.7 · 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"time": None}, "time: Input should be a valid number"),
        ({"wanted": [1]}, "wanted: 1 values, expected one for each of 6 services"),
        ({"load": []}, "load: Extra inputs are not permitted"),
        ({"services": ["a"] * 6}, "services: expected each name once"),
        ({"cpu_by_class": [[1]] * 6}, "values of shape (6, 1), expected (6, 3)"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_in_one_line(
    about: Description, scrapes: list[bytes], change: dict, words: str
) -> None:
    body = json.dumps(json.loads(scrapes[0]) | change).encode()
    found = Decider(about, DeciderOptions()).answer("1-0", body, False)
    assert isinstance(found, str)
    assert words in found
    assert "\n" not in found


def test_what_is_no_json_or_comes_twice_is_not_used(about: Description, scrapes: list[bytes]) -> None:
    decider = Decider(about, DeciderOptions())
    assert "JSON" in str(decider.answer("1-0", b"{", False))
    assert isinstance(decider.answer("2-0", scrapes[5], False), Entry)
    assert decider.answer("3-0", scrapes[5], False) == REPEATED
    assert decider.answer("4-0", scrapes[4], False) == REPEATED
    assert isinstance(decider.answer("5-0", scrapes[6], False), Entry)
