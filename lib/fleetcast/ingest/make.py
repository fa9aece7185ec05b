"""Files built from files: only what is stale is built, and what was complete before a crash stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fleetcast.runtime import spread
from fleetcast.store import Store, fingerprint


def make(
    store: Store,
    plan: dict[str, dict[str, Any]],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    receipts: str,
    what: str,
    memory: int = 0,
) -> dict[str, dict[str, Any]]:
    """Builds each target of `plan` (target file → all that it is made of) whose inputs have changed.

    `work` gets the inputs and `target`, writes that file, and returns a receipt of small figures; it is given
    `memory` bytes. Receipts of
    a job that is under way are files below the folder `receipts`; those of finished ones are together in
    `<receipts>.json`, so what a job asks of the store depends on what it builds. Returns the receipts of all
    targets, old and new.
    """
    finished = f"{receipts}.json"
    saved: dict[str, dict[str, Any]] = store.read_json(finished) or {}
    under_way = {path[len(receipts) + 1 : -len(".json")]: path for path in store.list(receipts, ".json")}
    known = saved | {target: store.read_json(path) for target, path in under_way.items() if target in plan}
    folder = os.path.commonpath([target.rpartition("/")[0] for target in plan]) if plan else ""
    there = set(store.list(folder)) if known and plan else set()
    outputs: dict[str, dict[str, Any]] = {}
    stale = []
    for target, item in plan.items():
        digest = fingerprint(item)
        receipt = known.get(target)
        if receipt is None or receipt["inputs"] != digest or target not in there:
            stale.append({**item, "target": target, "digest": digest})
        else:
            outputs[target] = receipt

    def build(item: dict[str, Any]) -> dict[str, Any]:
        receipt = {**work(item), "inputs": item["digest"]}
        store.write_json(f"{receipts}/{item['target']}.json", receipt)
        return receipt

    built = spread(stale, build, what, memory=memory)
    fresh = {item["target"]: receipt for item, receipt in zip(stale, built, strict=True)}
    measured = ("seconds", "peak_bytes")  # of the task, not of what it made
    kept = {target: {k: v for k, v in r.items() if k not in measured} for target, r in fresh.items()}
    if outputs | kept != saved:
        store.write_json(finished, outputs | kept)
    if fresh or under_way:
        store.remove(receipts)
    return outputs | fresh
