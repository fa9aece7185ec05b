"""What a Prometheus has scraped of a small Kubernetes cluster: node-exporter, cAdvisor, kube-state-metrics
and OpenTelemetry's service graph, as OpenMetrics text: what `promtool tsdb create-blocks-from` takes.

Every load is constant within a bin, so it is known what any query gives. What goes wrong in every cluster
goes wrong here: a node that is not scraped for a while, a pod that comes later, a value that is NaN, and a
counter that starts anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

SCRAPE, STEP, DAY = 60, 300, 86_400
MACHINES = ("node-1", "node-2")
CORES, MEMORY = 2, 8e9
#: Pod → its machine and its service.
PODS = {
    "shop/cart-5d4f-aaaaa": ("node-1", "shop/cart"),
    "shop/cart-5d4f-bbbbb": ("node-2", "shop/cart"),
    "shop/front-77c9-ccccc": ("node-1", "shop/front"),
    "data/store-0": ("node-2", "data/store"),
}
#: The pods of one service have limits; the others may use what their machine has.
LIMITED, CPU_LIMIT, MEMORY_LIMIT = "shop/cart", 0.5, 1e9
#: Who calls whom, as tracing calls them: by the workload alone; nobody knows who `user` is.
CALLS = (("user", "front"), ("front", "cart"), ("cart", "store"))
SERVER_TIME = {"front": 0.2, "cart": 0.05, "store": 0.01}


#: Bins in which node-2 was not scraped; from which on the second pod of the cart was there; in which the
#: memory of data/store-0 is NaN; in which its CPU counter starts anew.
GAP, BORN, BROKEN, RESET = (100, 124), 300, 200, 210


@dataclass(frozen=True)
class Cluster:
    """Two machines, four pods and three services."""

    start: int
    """Unix time of the first scrape, at midnight."""
    days: int = 2

    @property
    def bins(self) -> int:
        """How many bins there are."""
        return self.days * DAY // STEP

    def load(self, name: str, metric: str) -> _Array:
        """[bins] in (0, 1)."""
        seed = sum(map(ord, name + metric))
        noise = np.random.default_rng(seed).uniform(-0.1, 0.1, self.bins)
        time = np.arange(self.bins) * STEP % DAY / DAY
        load: _Array = 0.4 + 0.25 * np.sin(2 * np.pi * (time + seed % 7 / 7)) + noise
        return load

    def rate(self, edge: tuple[str, str]) -> _Array:
        """[bins] calls per second."""
        return 40 * self.load("→".join(edge), "calls")

    def openmetrics(self) -> str:
        """What Prometheus scraped of it."""
        times = self.start + SCRAPE // 2 + np.arange(0, self.days * DAY, SCRAPE)  # none on a bin's border
        seen = np.ones(len(times), bool)
        per_bin = STEP // SCRAPE
        hole = seen.copy()
        hole[GAP[0] * per_bin : GAP[1] * per_bin] = False
        young = np.arange(len(times)) >= BORN * per_bin
        families: dict[str, list[str]] = {}

        def put(
            name: str, labels: dict[str, str], values: _Array | float, there: NDArray[np.bool_] = seen
        ) -> None:
            text = ",".join(f'{key}="{value}"' for key, value in labels.items())
            values = np.broadcast_to(values, times.shape)
            lines = families.setdefault(name, [])
            lines += [
                f"{name}{{{text}}} {value:.9g} {at}"
                for value, at in zip(values[there].tolist(), times[there].tolist(), strict=True)
            ]

        def counter(rate: _Array) -> _Array:
            within = SCRAPE // 2 + SCRAPE * np.arange(per_bin)
            value: _Array = (STEP * (np.cumsum(rate) - rate)[:, None] + rate[:, None] * within).ravel()
            return value

        def gauge(load: _Array) -> _Array:
            return np.repeat(load, per_bin)

        for number, name in enumerate(MACHINES):
            at = {"instance": f"10.0.0.{number}:9100"}
            there = hole if name == "node-2" else seen
            put("node_uname_info", {**at, "nodename": name}, 1, there)
            for cpu in range(CORES):
                idle = counter(1 - self.load(name, "cpu"))
                put("node_cpu_seconds_total", {**at, "cpu": str(cpu), "mode": "idle"}, idle, there)
                busy = counter(self.load(name, "cpu"))
                put("node_cpu_seconds_total", {**at, "cpu": str(cpu), "mode": "user"}, busy, there)
            put("node_memory_MemTotal_bytes", at, MEMORY, there)
            free = MEMORY * (1 - self.load(name, "memory"))
            put("node_memory_MemAvailable_bytes", at, gauge(free), there)
            put(
                "node_disk_io_time_seconds_total",
                {**at, "device": "sda"},
                counter(self.load(name, "disk_io")),
                there,
            )
            for direction, metric in (("receive", "net_in"), ("transmit", "net_out")):
                traffic = counter(1.25e9 * self.load(name, metric))
                put(f"node_network_{direction}_bytes_total", {**at, "device": "eth0"}, traffic, there)
            for resource, amount in (("cpu", CORES), ("memory", MEMORY)):
                put("kube_node_status_capacity", {"node": name, "resource": resource}, amount)
        for pod, (node, service) in PODS.items():
            namespace, name = pod.split("/")
            labels = {"namespace": namespace, "pod": name}
            there = young if name.endswith("bbbbb") else seen
            cores, memory = (CPU_LIMIT, MEMORY_LIMIT) if service == LIMITED else (CORES, MEMORY)
            used = counter(cores * self.load(pod, "cpu"))
            kept = memory * self.load(pod, "memory")
            if name == "store-0":
                kept[BROKEN] = np.nan
                last = RESET * per_bin + 2
                used = np.where(np.arange(len(used)) > last, used - used[last], used)
            put("container_cpu_usage_seconds_total", {**labels, "container": "main"}, used, there)
            put("container_memory_working_set_bytes", {**labels, "container": "main"}, gauge(kept), there)
            put("container_memory_working_set_bytes", {**labels, "container": ""}, 1e12, there)
            traffic = counter(1.25e9 * self.load(pod, "net_in"))
            put("container_network_receive_bytes_total", {**labels, "interface": "eth0"}, traffic, there)
            put("kube_pod_info", {**labels, "node": node, "pod_ip": "10.1.0.1"}, 1, there)
            put("kube_pod_container_info", {**labels, "container": "main"}, 1, there)
            if service == LIMITED:
                for resource, amount in (("cpu", CPU_LIMIT), ("memory", MEMORY_LIMIT)):
                    limit = {**labels, "container": "main", "resource": resource}
                    put("kube_pod_container_resource_limits", limit, amount, there)
            kind, owner = (
                ("StatefulSet", "store") if name == "store-0" else ("ReplicaSet", name.rsplit("-", 1)[0])
            )
            put("kube_pod_owner", {**labels, "owner_kind": kind, "owner_name": owner}, 1, there)
        for name in ("cart-5d4f", "front-77c9"):
            of = {"namespace": "shop", "replicaset": name}
            put(
                "kube_replicaset_owner",
                {**of, "owner_kind": "Deployment", "owner_name": name.split("-")[0]},
                1,
            )
        for source, target in CALLS:
            labels = {"client": source, "server": target}
            calls = counter(self.rate((source, target)))
            put("traces_service_graph_request_total", labels, calls)
            put("traces_service_graph_request_server_seconds_sum", labels, calls * SERVER_TIME[target])
            put("traces_service_graph_request_server_seconds_count", labels, calls)
        return (
            "".join("\n".join([f"# TYPE {name} unknown", *lines, ""]) for name, lines in families.items())
            + "# EOF\n"
        )
