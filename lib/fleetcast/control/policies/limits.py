"""The limits that every scaling policy goes through: stabilisation windows, scaling policies, least and most.

They are those of a HorizontalPodAutoscaler's `behavior` (autoscaling/v2), so that policies differ in what
they recommend and in nothing else. Tensors are float64 and [E, S]; times are seconds.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fleetcast.config import Options

#: Below this, a difference is rounding: ceil(1.1 · 10) is 11, whatever binary fractions say.
ROUNDING = 1e-9


class ScalingPolicy(Options):
    """How far the replicas may change within a period."""

    kind: Literal["pods", "percent"]
    value: float = Field(gt=0)
    """Replicas, or percent of those that there were when the period began."""
    period: float = Field(gt=0, le=1800)
    """[s]."""


class ScalingRules(Options):
    """One direction of `behavior`."""

    window: float = Field(ge=0, le=3600)
    """Stabilisation window [s]: up, the least recommendation of it counts; down, the largest."""
    select: Literal["max", "min", "disabled"] = "max"
    """Which scaling policy counts: the one that allows most, or least; or no scaling in this direction."""
    policies: tuple[ScalingPolicy, ...]


class Behaviour(Options):
    """`behavior` of a HorizontalPodAutoscaler, with its defaults."""

    up: ScalingRules = ScalingRules(
        window=0,
        policies=(
            ScalingPolicy(kind="pods", value=4, period=15),
            ScalingPolicy(kind="percent", value=100, period=15),
        ),
    )
    down: ScalingRules = ScalingRules(
        window=300, policies=(ScalingPolicy(kind="percent", value=100, period=15),)
    )

    @property
    def memory(self) -> float:
        """Time for which recommendations and changes matter [s]."""
        rules = (self.up, self.down)
        return max(*(one.window for one in rules), *(p.period for one in rules for p in one.policies))


class Limits:
    """Recommendations in, replicas out; it remembers what was recommended and done."""

    def __init__(self, behaviour: Behaviour, least: Tensor, most: Tensor) -> None:
        """`least` and `most` replicas, [S] or [E, S]."""
        self.behaviour, self._least, self._most = behaviour, least.double(), most.double()
        self._recommended: list[tuple[float, Tensor]] = []
        self._changed: list[tuple[float, Tensor]] = []
        self._memory = behaviour.memory

    def apply(self, time: float, current: Tensor, recommended: Tensor) -> Tensor:
        """Replicas to have from now on, given those wanted so far and those recommended, both [E, S]."""
        current, recommended = current.double(), recommended.double()
        stable = self._stabilised(time, current, recommended)
        up, down = self._limit(time, current, up=True), self._limit(time, current, up=False)
        limited = torch.where(stable > current, stable.minimum(up), stable.maximum(down))
        replicas = torch.where(stable == current, current, limited).maximum(self._least).minimum(self._most)
        self._recommended.append((time, recommended))
        self._changed.append((time, replicas - current))
        for memory in (self._recommended, self._changed):
            while memory and memory[0][0] <= time - self._memory:
                memory.pop(0)
        return replicas

    def _stabilised(self, time: float, current: Tensor, recommended: Tensor) -> Tensor:
        """As close to `current` as the recommendations of the windows ask for."""
        at_least, at_most = recommended, recommended
        for at, value in self._recommended:
            if at > time - self.behaviour.up.window:
                at_least = at_least.minimum(value)
            if at > time - self.behaviour.down.window:
                at_most = at_most.maximum(value)
        return current.maximum(at_least).minimum(at_most)

    def _limit(self, time: float, current: Tensor, *, up: bool) -> Tensor:
        """The most replicas that may be had now, or the least."""
        rules = self.behaviour.up if up else self.behaviour.down
        if rules.select == "disabled" or not rules.policies:
            return current
        limits = []
        for one in rules.policies:
            start = current.clone()
            for at, change in self._changed:
                if at > time - one.period:
                    start -= change
            sign = 1 if up else -1
            if one.kind == "pods":
                limits.append(start + sign * one.value)
            elif up:
                limits.append((start * (1 + one.value / 100) - ROUNDING).ceil())
            else:
                limits.append((start * (1 - one.value / 100) + ROUNDING).trunc())
        stacked = torch.stack(limits)
        widest = (rules.select == "max") == up
        limit = stacked.amax(0) if widest else stacked.amin(0)
        return limit.maximum(current) if up else limit.minimum(current)
