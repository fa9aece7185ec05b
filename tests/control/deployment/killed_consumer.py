"""Runs a consumer until it is killed; a process of a test.

python killed_consumer.py URL PREFIX CLUSTER.json OPTIONS.json STORE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fleetcast.control.deployment.broker import RedisStreams
from fleetcast.control.deployment.consumer import Consumer
from fleetcast.control.deployment.decider import Decider, DeciderOptions
from fleetcast.control.deployment.messages import Description
from fleetcast.store import Store

url, prefix, cluster, options, store = sys.argv[1:]
torch.set_num_threads(1)
about = Description.model_validate_json(Path(cluster).read_text())
decider = Decider(about, DeciderOptions.model_validate_json(options), Store(store))
consumer = Consumer(RedisStreams(url, prefix), decider)
while True:
    consumer.step(wait=0.01)
