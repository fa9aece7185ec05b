"""One rank of two under gloo, as a process of its own: `two_ranks.py RANK RENDEZVOUS STORE OUT OPTIONS`."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from conftest import build_run
from fleetcast.store import Store
from fleetcast.training import checkpoints
from fleetcast.training.loop import train
from fleetcast.windows import manifest
from torch.nn.parallel import DistributedDataParallel

rank, rendezvous, uri, out, options = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
store = Store(uri)
run = build_run(store, manifest.load(store, "test"), **json.loads(options))
run.rank, run.world = int(rank), 2
run.net = DistributedDataParallel(run.net)
train(run, lambda run, figures: None)
checkpoints.write(run, Path(out))
dist.destroy_process_group()
