"""The fluid law of a replica: how many calls are in it, and how fast they go.

In equilibrium a replica of k cores, ρ busy, holds

    n(ρ) = kρ + κ ρ^a / (1 − ρ)

calls: with κ = 1 and a = √(2(k + 1)) that is Sakasegawa's M/M/k, which processor sharing has for any
distribution of demands. κ and a also say what a balancer and few slots do to it. Away from equilibrium the
same law gives the pace at which n calls are worked on (a pointwise stationary fluid flow approximation):

    dn/dt = λ − C ρ(n),

so that a steady load has the closed form's queue, and an overload grows by λ − C. A step is implicit: ρ is
the one at its end, which keeps a step of seconds stable at service times of milliseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fleetcast.control.cluster import Balancer

#: By the less busy of two among c replicas, κ falls from that of random choice to this share of it, as
#: c^−_FALL. Fitted to the event-driven engine (`python -m benchmarks.control --parts balancers`).
_LEAST, _FALL = 0.17, 0.94
#: Rounds in which ρ^a is brought up to date within a step.
_ROUNDS = 2


def shape(
    balancer: Balancer, cores: Tensor, replicas: Tensor, slots: Tensor, scv: Tensor, busy: Tensor
) -> tuple[Tensor, Tensor]:
    """κ and a of a replica among `replicas`, by the squared coefficient of variation of its demands.

    With many slots calls share the cores; with few, they wait in line, which makes variation count: the more,
    the likelier all slots are taken.
    """
    in_line = busy.clamp(1e-6, 1) ** (slots / cores - 1).clamp(min=0)
    spread = 1 + in_line * (scv - 1)
    among = replicas.clamp(min=1)
    match balancer:
        case "random":
            factor = (1 + spread) / 2
        case "round_robin":  # every c-th call of a Poisson stream; Krämer and Langenbach-Belz's correction
            apart = 1 / among
            idle = (1 - busy) / busy.clamp(min=1e-3)
            calm = (-2 / 3 * idle * (1 - apart) ** 2 / (apart + spread)).exp()
            factor = (apart + spread) / 2 * calm
        case "p2c":
            factor = (1 + spread) / 2 * (_LEAST + (1 - _LEAST) * among**-_FALL)
    return factor, (2 * (cores + 1)).sqrt()


def advance(
    number: Tensor,
    arrivals: Tensor,
    capacity: Tensor,
    cores: Tensor,
    factor: Tensor,
    exponent: Tensor,
    busy: Tensor,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Calls in a replica and its utilisation ρ after `step` seconds.

    `arrivals` and `capacity` (C) are in calls per second; `factor` (κ) and `exponent` (a) are of `shape`;
    `busy` is ρ before. All of one shape, or such that they broadcast.
    """
    inflow = number + step * arrivals
    linear = cores + step * capacity
    apart = linear - inflow
    for _ in range(_ROUNDS):  # inflow − linear ρ = κ ρ^a / (1 − ρ), with ρ^a of the last ρ
        waits = factor * busy**exponent
        root = (apart * apart + 4 * linear * waits).sqrt()
        # Of what waits, the form that does not subtract like from like.
        waiting = torch.where(apart > 0, 2 * linear * waits / (apart + root), (root - apart) / 2)
        busy = ((inflow - waiting) / linear).clamp(0, 1)
    return cores * busy + waiting, busy
