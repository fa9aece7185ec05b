"""Actions as others take them: numbers for KEDA, a route of the Gateway API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fleetcast.control.deployment.messages import ServiceAction

#: The sum of a route's weights.
_WHOLE = 1000


def route(action: ServiceAction, zones: Sequence[str], port: int, gateway: str) -> dict[str, Any]:
    """An HTTPRoute (gateway.networking.k8s.io/v1) that shares a service's calls among its backends
    `<service>-<zone>`, one for each class of nodes; all alike where no weights were given."""
    shares = action.weights or (1.0,) * len(zones)
    total = sum(shares)
    weights = [round(_WHOLE * share / total) for share in shares]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": action.service, "labels": {"app.kubernetes.io/managed-by": "fleetcast"}},
        "spec": {
            "parentRefs": [{"name": gateway}],
            "rules": [
                {
                    "backendRefs": [
                        {"name": f"{action.service}-{zone}", "port": port, "weight": weight}
                        for zone, weight in zip(zones, weights, strict=True)
                    ]
                }
            ],
        },
    }
