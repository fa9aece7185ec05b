"""Files built from files: only what is stale is built, and what was complete before a crash stays."""

from __future__ import annotations

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
) -> dict[str, dict[str, Any]]:
    """Builds each target of `plan` (target file → all that it is made of) whose inputs have changed.

    `work` gets the inputs and `target`, writes that file, and returns a receipt of small figures, which is
    kept below the folder `receipts`. Returns the receipts of all targets, old and new.
    """
    outputs: dict[str, dict[str, Any]] = {}
    stale = []
    for target, item in plan.items():
        digest = fingerprint(item)
        receipt = store.read_json(f"{receipts}/{target}.json")
        if receipt is None or receipt["inputs"] != digest or not store.exists(target):
            stale.append({**item, "target": target, "digest": digest})
        else:
            outputs[target] = receipt

    def build(item: dict[str, Any]) -> dict[str, Any]:
        receipt = {**work(item), "inputs": item["digest"]}
        store.write_json(f"{receipts}/{item['target']}.json", receipt)
        return receipt

    built = spread(stale, build, what)
    return outputs | {item["target"]: receipt for item, receipt in zip(stale, built, strict=True)}
