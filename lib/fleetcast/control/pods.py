"""The life of replicas (pods) and nodes, for many environments.

    absent → pending → starting → ready → draining → absent
                          ↑_________|        (a crash, a full memory)

A service has room for R replicas, each in one of these phases; tensors are [E, S, R], and [E, M] for nodes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fleetcast.control.cluster import Cluster

ABSENT, PENDING, STARTING, READY, DRAINING = range(5)
#: Places beyond the most replicas, for those that drain.
_SPARE = 2
#: Replicas of one environment that are placed in one step.
_PLACED = 16
#: A replica with fewer calls has done its work.
_EMPTY = 0.5
_HOUR = 3600.0


class Pods:
    """What replicas and nodes there are, in which state."""

    def __init__(
        self, cluster: Cluster, environments: int, generator: torch.Generator, device: torch.device
    ) -> None:
        self.cluster, self._generator, self._device = cluster, generator, device
        services, most = len(cluster.names), int(cluster.max_replicas.max()) + _SPARE
        shape = (environments, services, most)

        def along(values: object, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(values, dtype=dtype, device=device)

        self._low, self._high = along(cluster.min_replicas), along(cluster.max_replicas)
        self._cores = along(cluster.cores)
        self._node_cores, self._node_speed = along(cluster.node_cores), along(cluster.node_speed)
        self._node_class = along(cluster.node_class, torch.int64)
        nodes = len(cluster.node_class)

        self.wanted = along(cluster.initial).repeat(environments, 1)
        self.phase = torch.zeros(shape, dtype=torch.int8, device=device)
        self.phase[torch.arange(most, device=device) < self.wanted.unsqueeze(2)] = PENDING
        self.timer = torch.zeros(shape, device=device)
        """Time waited while pending; left to start or drain; since it was ready [s]."""
        self.node = torch.zeros(shape, dtype=torch.int64, device=device)
        self.memory = torch.full(shape, 0.3, device=device)
        self.leak = torch.zeros(shape, device=device)
        """Memory per second."""
        self.number = torch.zeros(shape, device=device)
        """Calls in work or waiting."""

        self.there = (torch.arange(nodes, device=device) < cluster.initial_nodes).repeat(environments, 1)
        self.coming = torch.full((environments, nodes), math.inf, device=device)
        """Time until an added node is there [s]."""
        self.slow = torch.zeros(environments, nodes, device=device)
        """Time for which a node is still slow [s]."""
        self.empty = torch.zeros(environments, nodes, device=device)
        """For how long nothing was on it [s]."""
        self.changes = torch.zeros(environments, device=device)
        self.restarts = torch.zeros(environments, device=device)
        self._added = torch.arange(nodes, device=device) >= cluster.initial_nodes

        while self._place():
            pass
        self.phase[self.phase == STARTING] = READY
        self.timer.zero_()
        self.timer[self.phase == READY] = _HOUR  # long warm

    # -- what they are ---------------------------------------------------------------------------------------

    @property
    def ready(self) -> Tensor:
        return self.phase == READY

    @property
    def on_node(self) -> Tensor:
        return self.phase >= STARTING

    @property
    def node_class(self) -> Tensor:
        """[E, S, R]."""
        return self._node_class[self.node]

    def speed(self) -> Tensor:
        """[E, S, R]. Of a core, as the node is, warm or not, and with the memory there is left."""
        life, faults = self.cluster.life, self.cluster.faults
        of_nodes = torch.where(self.slow > 0, self._node_speed * faults.slow_speed, self._node_speed)
        speed = of_nodes.gather(1, self.node.flatten(1)).view_as(self.timer)
        cold = (self.phase == READY) & (self.timer < life.warm_up)
        tight = (self.memory - faults.leak_slows).clamp(min=0) / (1 - faults.leak_slows)
        return speed * torch.where(cold, life.warm_speed, 1.0) * (1 - tight / 2)

    # -- what is decided -------------------------------------------------------------------------------------

    def scale(self, replicas: Tensor) -> None:
        """Lets replicas come or go until there are as many as wanted [E, S], draining ones not counted."""
        wanted = replicas.round().maximum(self._low).minimum(self._high)
        self.changes += (wanted - self.wanted).abs().sum(1)
        self.wanted = wanted
        self._come_and_go()

    def _come_and_go(self) -> None:
        counted = (self.phase >= PENDING) & (self.phase <= READY)
        more = (self.wanted - counted.sum(2)).unsqueeze(2)
        absent = self.phase == ABSENT
        come = absent & (absent.cumsum(2) <= more)
        self.phase[come] = PENDING
        self.timer[come] = 0
        # First those that do not work yet; of the ready the youngest.
        age = torch.where(self.phase == READY, self.timer, self.phase.float() - _HOUR)
        rank = torch.where(counted, age, math.inf).argsort(2).argsort(2)
        go = counted & (rank < -more)
        ready = go & self.ready
        self._end(go & ~ready)
        self._drain(ready)

    def restart(self, chosen: Tensor) -> None:
        """Drains the ready replica with the fullest memory of the chosen services [E, S], where there is
        another one; a new one takes its place."""
        memory = torch.where(self.ready, self.memory, -1)
        fullest = torch.zeros_like(self.ready).scatter_(2, memory.argmax(2, keepdim=True), True)
        go = fullest & (chosen & (self.ready.sum(2) > 1)).unsqueeze(2)
        self.restarts += go.sum((1, 2))
        self._drain(go)
        self._come_and_go()

    # -- what happens ----------------------------------------------------------------------------------------

    def fail(self, seconds: float) -> Tensor:
        """Draws the faults of some time. Returns the calls that are lost with a replica [E, S]."""
        faults = self.cluster.faults
        if faults.crash_rate or faults.leak_rate:
            chance = torch.rand(self.timer.shape, generator=self._generator, device=self._device)
            crash = faults.crash_rate * seconds / _HOUR
            lost = self._crash(self.ready & (chance < crash))
            leaks = self.ready & (self.leak == 0) & (chance > 1 - faults.leak_rate * seconds / _HOUR)
            times = self._lognormal(leaks, faults.leak_time, 0.5)
            self.leak[leaks] = (1 - self.memory[leaks]) / times
        else:
            lost = torch.zeros_like(self.wanted)
        if faults.slow_rate:
            chance = torch.rand(self.slow.shape, generator=self._generator, device=self._device)
            self.slow[self.there & (chance < faults.slow_rate * seconds / _HOUR)] = faults.slow_time
        return lost

    def pass_time(self, seconds: float) -> Tensor:
        """Lets replicas start, age, leak, drain and find nodes. Returns the calls that are lost [E, S]."""
        faults, life = self.cluster.faults, self.cluster.life
        starting, draining = self.phase == STARTING, self.phase == DRAINING
        self.timer += torch.where(starting | draining, -seconds, seconds)
        started = starting & (self.timer <= 0)
        self.phase[started] = READY
        self.timer[started] = 0
        over = draining & ((self.timer <= 0) | (self.number < _EMPTY))
        lost = (self.number * over).sum(2)
        lost = torch.where(lost < _EMPTY, 0.0, lost)
        self._end(over)
        if faults.leak_rate:
            self.memory += self.leak * seconds
            lost = lost + self._crash(self.ready & (self.memory >= 1))
        if faults.slow_rate:
            self.slow = (self.slow - seconds).clamp(min=0)
        self._add_nodes(seconds, life.node_idle)
        self._place()
        return lost

    # -- steps of these --------------------------------------------------------------------------------------

    def _lognormal(self, which: Tensor, median: float, sigma: float) -> Tensor:
        count = int(which.sum())
        return median * (sigma * torch.randn(count, generator=self._generator, device=self._device)).exp()

    def _start(self, which: Tensor) -> None:
        life = self.cluster.life
        self.timer[which] = self._lognormal(which, life.start, life.start_sigma).clamp(*life.start_bounds)
        self.phase[which] = STARTING
        self.memory[which] = 0.3
        self.leak[which] = 0
        self.number[which] = 0

    def _crash(self, which: Tensor) -> Tensor:
        """The calls that are lost [E, S]; the replicas start anew on their nodes."""
        if not which.any():
            return torch.zeros_like(self.wanted)
        lost = (self.number * which).sum(2)
        self.restarts += which.sum((1, 2))
        self._start(which)
        return lost

    def _drain(self, which: Tensor) -> None:
        self.phase[which] = DRAINING
        self.timer[which] = self.cluster.life.grace

    def _end(self, which: Tensor) -> None:
        self.phase[which] = ABSENT
        self.number[which] = 0
        self.leak[which] = 0
        self.memory[which] = 0.3

    def used(self) -> Tensor:
        """[E, M]. Cores that are requested on each node."""
        cores = (self.on_node * self._cores.unsqueeze(1)).flatten(1)
        return torch.zeros_like(self.slow).scatter_add_(1, self.node.flatten(1), cores)

    def _add_nodes(self, seconds: float, idle: float) -> None:
        if not self._added.any():
            return
        self.coming -= seconds
        arrived = self.coming <= 0
        self.there |= arrived
        self.coming[arrived] = math.inf
        self.empty[arrived] = 0
        self.empty += seconds
        if bool((self.there & self._added & (self.empty > idle)).any()):
            self.empty[self.used() > 0] = 0
            self.there &= ~(self._added & (self.empty > idle))

    def _place(self) -> bool:
        """Puts pending replicas on nodes, those that wait longest first, each on the node with the largest
        share of free cores; asks for a node where those that come have not room enough. Returns whether any
        found a place."""
        pending = self.phase == PENDING
        if not pending.any():
            return False
        envs = pending.flatten(1).any(1).nonzero().squeeze(1)
        phase = self.phase[envs].flatten(1)
        waited = self.timer[envs].flatten(1)
        free = torch.where(self.there[envs], self._node_cores - self.used()[envs], -1)
        most = phase.shape[1] // len(self._cores)
        placed = torch.zeros_like(pending)
        rows = torch.arange(len(envs), device=self._device)
        left = torch.where(phase == PENDING, waited, -1)
        cores = self._cores.repeat_interleave(most)
        lacking = torch.zeros_like(left, dtype=torch.bool)
        for _ in range(_PLACED):
            one = left.argmax(1)
            waits = left[rows, one] >= 0
            if not waits.any():
                break
            need = self._cores[one // most]
            share = torch.where(free >= need.unsqueeze(1), free / self._node_cores, -1)
            node = share.argmax(1)
            fits = waits & (share[rows, node] >= 0)
            free[rows[fits], node[fits]] -= need[fits]
            left[rows, one] = -1
            # Where one does not fit, none of its size will.
            large = (cores >= need.unsqueeze(1)) & (waits & ~fits).unsqueeze(1) & (left >= 0)
            lacking |= large
            lacking[rows, one] |= waits & ~fits
            left[large] = -1
            at = (envs[fits], one[fits] // most, one[fits] % most)
            placed[at] = True
            self.node[at] = node[fits]
        coming = torch.where(self.coming[envs] < math.inf, self._node_cores, 0).sum(1)
        self._ask_for_node(envs[(lacking * cores).sum(1) > coming])
        self._start(placed)
        return bool(placed.any())

    def _ask_for_node(self, envs: Tensor) -> None:
        """One more node in these environments, where there is one to be had."""
        absent = ~self.there[envs] & (self.coming[envs] == math.inf)
        can = absent.any(1)
        low, high = self.cluster.life.node_start
        first = absent[can].int().argmax(1)
        times = torch.rand(len(first), generator=self._generator, device=self._device)
        self.coming[envs[can], first] = low + (high - low) * times
