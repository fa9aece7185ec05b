"""How every job runs: parse, log, connect to Ray, work, print the figures, exit.

Without an address Ray is started on this machine; with RAY_ADDRESS, or under `ray job submit`, the running
cluster is used. The last line on standard output is one JSON object with the run's figures; everything else
is logged to standard error. Exit codes: 0 the result is whole, 1 it is not, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

import psutil

from fleetcast.config import BaseJobConfig, parse
from fleetcast.errors import InputError, in_one_line
from fleetcast.store import s3_settings, use_s3

log = logging.getLogger("fleetcast")

Config = TypeVar("Config", bound=BaseJobConfig)

#: Set before Ray is imported. A task has one core, so the libraries inside it have one thread; the rest is
#: Ray's noise, or a start-up cost that a short job would pay for nothing.
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output is silent where it is told to be
    "RAY_task_oom_retries": "5",  # or Ray tries for ever what its node has no memory for
}
WORKER_ENVIRONMENT = {
    "POLARS_MAX_THREADS": "1",
    # Blocks of raw rows come and go; huge pages that are kept for a while spare a sixth of ingest's time.
    "_RJEM_MALLOC_CONF": "thp:always,dirty_decay_ms:10000,muzzy_decay_ms:10000",
}
#: A Ray Data task costs some 25 ms, so many small items share tasks; each CPU still gets several.
_TASKS_PER_CPU = 4
_LEAST_TASKS = 16


def run_job(main: Callable[[Config], dict[str, Any]], config_class: type[Config]) -> None:
    """Runs a job's `main` on the config of the command line and leaves the process with its exit code."""
    name = Path(sys.argv[0]).stem
    started = time.monotonic()
    set_up_logging("INFO")
    try:
        config = parse(config_class, sys.argv[1:])
        set_up_logging(config.log_level)
    except InputError as error:
        log.error("%s", error)
        _finish({"job": name, "ok": False, "error": str(error)}, 2)
    try:
        use_s3(config.s3)
        everything = config.log_level.upper() == "DEBUG"
        with ray_session(config.num_cpus, everything, config.object_store_gb, config.spill_folder):
            figures = main(config)
    except KeyboardInterrupt:
        _finish({"job": name, "ok": False, "error": "interrupted"}, 1)
    except Exception as error:  # the last line is JSON even where the fault is ours
        if (told := in_one_line(error)) is not None:
            log.debug("%s failed", name, exc_info=True)
            log.error("%s", told)
            _finish({"job": name, "ok": False, "error": told}, 1)
        log.exception("%s failed", name)
        _finish({"job": name, "ok": False, "error": f"{type(error).__name__}: {error}"}, 1)
    _finish({"job": name, "ok": True, **figures, "seconds": round(time.monotonic() - started, 2)}, 0)


def _finish(figures: dict[str, Any], code: int) -> NoReturn:
    print(json.dumps(figures), flush=True)
    sys.exit(code)


def set_up_logging(level: str) -> None:
    """The one logging set-up: time, level, message on standard error.

    Raises InputError for an unknown level.
    """
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise InputError(f"--log-level: expected DEBUG, INFO, WARNING or ERROR, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    # Ours alone: the root logger is left to the libraries, whose chatter is not the user's.
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(level.upper())


@contextmanager
def ray_session(
    num_cpus: int | None = None,
    everything: bool = False,
    object_store_gb: float | None = None,
    spill_folder: str | None = None,
) -> Iterator[None]:
    """Ray for the length of the block; one that is already connected is used and left alone.

    The arguments are those of `BaseJobConfig`. One that is started here lends its tasks what memory the
    machine has free, less the object store. What its processes print is shown only if `everything` is asked
    for: their own logs come through `worker_logs`, and errors as exceptions.
    """
    for key, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield
        return
    connection: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        connection = {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": _object_store(object_store_gb),
            **({"object_spilling_directory": spill_folder} if spill_folder else {}),
        }
    ray.init(
        **connection,
        log_to_driver=everything,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    try:
        yield
    finally:
        ray.shutdown()


def _object_store(gigabytes: float | None) -> int:
    if gigabytes is not None:
        return round(gigabytes * 1e9)
    return max(psutil.virtual_memory().total // 10, 100 << 20)


@contextmanager
def worker_logs() -> Iterator[Any]:
    """A queue to give to Ray workers for `log_to`; what they log there appears in this process's log."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver, so that no other node takes the log with it when it dies.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    listener = logging.handlers.QueueListener(queue, *log.handlers)
    listener.start()
    try:
        yield queue
    finally:
        listener.stop()
        queue.shutdown()


def log_to(queue: Any, name: str = "") -> logging.handlers.QueueListener:
    """Sends the log of this worker process to the driver's, each line with the name of what it works on.

    What is logged last is on its way until the listener that is returned has been stopped.
    """
    # By a thread: while the task itself waits for an answer, Ray lends its CPUs to another one.
    here: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = logging.handlers.QueueHandler(here)
    if name:
        handler.setFormatter(logging.Formatter(f"{name.replace('%', '%%')}: %(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel("INFO")
    sender = logging.handlers.QueueListener(here, logging.handlers.QueueHandler(queue))
    sender.start()
    return sender


class PeakMemory:
    """The largest resident memory of this process since the object was made, in bytes.

    Linux keeps a high-water mark that can be reset; elsewhere the mark of the whole process life is given.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            log.debug("the memory high-water mark cannot be reset here")

    def bytes(self) -> int:
        """High-water mark so far."""
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(psutil.Process().memory_info().rss)


def scratch(place: str | None = None) -> tempfile.TemporaryDirectory[str]:
    """A folder on the local disk of this node, below `place` if given, that goes away with the block."""
    return tempfile.TemporaryDirectory(prefix="fleetcast-", dir=place)


def spread(
    items: list[Any],
    work: Callable[[Any], dict[str, Any]],
    what: str,
    measure: str = "rows",
    memory: int = 0,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Runs `work` on every item as Ray Data tasks and returns their receipts, in the order of the items.

    Items and receipts are small and JSON-like; the data itself goes through the store. A task is given
    `memory` bytes of its node, or all that the largest node lends, so no node runs more of them than it has
    memory for; no more than `most` run at once. Receipts gain `seconds` and `peak_bytes`, the high-water mark
    of the task's process. Progress is logged with the sum of `measure`. All items are tried; then InputError
    is raised with what went wrong, if anything did: input that cannot be used, files and objects that cannot
    be read or written.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray Data would hold tasks back to make room for their output, which here is a line of JSON each.
    ray.data.DataContext.get_current().op_resource_reservation_enabled = False
    if not items:
        return []

    s3 = s3_settings()

    def task(batch: dict[str, Any]) -> dict[str, list[str]]:
        use_s3(s3)
        index, item = json.loads(batch["item"][0])
        started, peak = time.monotonic(), PeakMemory()
        try:
            receipt = work(item)
        except (InputError, OSError) as error:
            receipt = {"error": in_one_line(error)}
        receipt |= {"seconds": time.monotonic() - started, "peak_bytes": peak.bytes()}
        return {"receipt": [json.dumps([index, receipt])]}

    rows = [{"item": json.dumps([index, item])} for index, item in enumerate(items)]
    receipts: dict[int, dict[str, Any]] = {}
    started = last = time.monotonic()
    tasks = max(_LEAST_TASKS, round(_TASKS_PER_CPU * ray.cluster_resources().get("CPU", 1)))
    limit = None if most is None else ray.data.TaskPoolStrategy(size=most)
    results = ray.data.from_items(rows, override_num_blocks=min(len(rows), tasks)).map_batches(
        task, batch_size=1, zero_copy_batch=True, memory=lent(memory, what), compute=limit
    )
    done = 0
    for row in results.iter_rows():
        index, receipt = json.loads(row["receipt"])
        receipts[index] = receipt
        done += receipt.get(measure, 0)
        now = time.monotonic()
        if now - last > 2 or len(receipts) == len(items):
            last = now
            rate = f": {done:,} {measure}, {done / (now - started):,.0f}/s" if done else ""
            log.info("%s %d/%d%s", what, len(receipts), len(items), rate)
    errors = [receipt["error"] for receipt in receipts.values() if "error" in receipt]
    if errors:
        errors = list(dict.fromkeys(errors))  # many tasks may say the same
        raise InputError("; ".join(errors[:5]) + (f"; and {len(errors) - 5} more" if len(errors) > 5 else ""))
    return [receipts[index] for index in range(len(items))]


def lent(memory: int, what: str) -> int | None:
    """`memory`, or what the largest node lends if that is less; None for none."""
    import ray

    largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if memory > largest > 0:
        log.warning(
            "%s: a task may need %.1f GB, the largest node lends %.1f GB", what, memory / 1e9, largest / 1e9
        )
    return int(min(memory, largest)) or None


@dataclass(frozen=True)
class Failed:
    """Why an item of `tasks` gave nothing."""

    reason: str


def tasks(
    items: list[Any],
    work: Callable[[Any], Any],
    what: str,
    name: Callable[[Any], str],
    cpus: float = 1,
    gpus: float = 0,
    most: int | None = None,
) -> list[Any]:
    """Runs `work` on every item, each as a Ray task with a share of CPUs and GPUs, at most `most` at once.

    For long pieces of work of any kind, where `spread` is for many small ones. Returns what each gave, in the
    order of the items, or `Failed`: an item that fails does not stop the others. One whose process is killed
    is tried once more. Progress is logged.
    """
    import ray

    if not items:
        return []
    if not any(_has(node, cpus, gpus) for node in ray.nodes()):
        log.warning("%s: no node has %g CPUs and %g GPUs; waiting for one that has", what, cpus, gpus)

    s3 = s3_settings()

    # Tried again here: Ray would retry for ever what it kills for memory.
    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    def task(item: Any, queue: Any) -> Any:
        use_s3(s3)
        sender = log_to(queue, name(item))
        try:
            return work(item)
        finally:
            sender.stop()

    found: list[Any] = [None] * len(items)
    waiting = list(enumerate(items))
    running: dict[Any, int] = {}
    killed: set[int] = set()
    with worker_logs() as queue:
        while waiting or running:
            while waiting and (most is None or len(running) < most):
                index, item = waiting.pop(0)
                running[task.remote(item, queue)] = index
            (done,), _ = ray.wait(list(running))
            index = running.pop(done)
            try:
                found[index] = ray.get(done)
                remark = "done"
            except ray.exceptions.RayTaskError as error:
                found[index] = Failed(f"{type(error.cause).__name__}: {error.cause}")
                remark = found[index].reason
            except ray.exceptions.RayError as error:  # its process was killed, for memory perhaps
                if index not in killed:
                    killed.add(index)
                    waiting.append((index, items[index]))
                    log.warning("%s: %s: its process was killed, it is tried again", what, name(items[index]))
                    continue
                first, *_ = str(error).splitlines() or [""]
                found[index] = Failed(f"{type(error).__name__}: {first}")
                remark = found[index].reason
            left = len(waiting) + len(running)
            log.info("%s %d/%d: %s: %s", what, len(items) - left, len(items), name(items[index]), remark)
    return found


def _has(node: dict[str, Any], cpus: float, gpus: float) -> bool:
    resources = node["Resources"]
    return bool(node["Alive"]) and resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus
