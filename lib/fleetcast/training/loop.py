"""The training loop of one process among several, in plain torch.

The loss is the mean squared error of the mean (stgnn, eq. 4; fusion, eq. 7) plus the pinball loss of the
quantiles, over observed targets only. Sums and counts are added over all ranks before they are divided, so
two ranks with a batch each take the step that one rank takes with both.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fleetcast.models.base import Fitted, Model, Output
from fleetcast.training.options import FitOptions
from fleetcast.windows import order
from fleetcast.windows.batch import Batch
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Part
from fleetcast.windows.order import Item

log = logging.getLogger("fleetcast")


#: Scaled targets have variance 1, so a loss beyond this has exploded.
_EXPLODED = 1e4


class DivergedError(RuntimeError):
    """The loss is not a finite number, or has exploded."""


@dataclass
class Progress:
    """What a resumed run must know beside the tensors."""

    epoch: int = 0
    """Epochs that are complete."""
    best_loss: float = math.inf
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    """Of each epoch: `train_loss`, `val_loss`, `seconds`, `windows_per_s` (training, all ranks), and
    `wait_share`, the mean share of these seconds that a rank waited for batches."""

    @property
    def wait_share(self) -> float | None:
        """`wait_share` of all epochs together; None where it was not measured."""
        measured = [epoch for epoch in self.history if "wait_share" in epoch]
        seconds = sum(epoch["seconds"] for epoch in measured)
        return (
            sum(epoch["wait_share"] * epoch["seconds"] for epoch in measured) / seconds if seconds else None
        )

    def finished(self, options: FitOptions) -> bool:
        """Whether the last epoch is over or the validation loss has stopped falling."""
        return self.epoch >= options.epochs or self.epoch - 1 - self.best_epoch >= options.patience

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; JSON has no infinity."""
        return asdict(self) | {"best_loss": self.best_loss if math.isfinite(self.best_loss) else None}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Progress:
        """What `to_json` gave."""
        return cls(**(saved | {"best_loss": math.inf if saved["best_loss"] is None else saved["best_loss"]}))


@dataclass
class Run:
    """Everything of a training run on one rank."""

    net: nn.Module
    """The model, wrapped for DDP where there are several ranks."""
    optimizer: torch.optim.AdamW
    shards: Shards
    options: FitOptions
    levels: tuple[float, ...]
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best epoch so far."""
    rank: int = 0
    world: int = 1
    waited: float = 0.0
    """Seconds of this epoch that this rank has waited for batches."""

    @classmethod
    def start(cls, model: Model, shards: Shards, options: FitOptions, rank: int = 0, world: int = 1) -> Run:
        """A run before its first epoch, on the device where the model is."""
        # The parameters are on their device already: the optimizer's moments are restored to where they are.
        parameters = {"params": list(model.parameters())}  # none of a model that is fitted at once
        optimizer = torch.optim.AdamW(
            [parameters], lr=options.learning_rate, weight_decay=options.weight_decay
        )
        levels = model.geometry.quantiles
        return cls(model, optimizer, shards, options, levels, model.device, rank=rank, world=world)

    @property
    def model(self) -> Model:
        """The model itself."""
        return cast(Model, getattr(self.net, "module", self.net))

    def batches(self, plan: Sequence[Item]) -> Generator[Batch, None, None]:
        """The batches of a plan; how long each is waited for adds to `waited`."""
        with closing(self.shards.batches(plan, self.device)) as batches:
            while True:
                asked = time.monotonic()
                batch = next(batches, None)
                self.waited += time.monotonic() - asked
                if batch is None:
                    return
                yield batch


def train(run: Run, save: Callable[[Run, dict[str, float]], None]) -> None:
    """Runs all epochs that are left; `save` is called after each, on every rank, with its figures.

    Raises DivergedError with epoch and step if the loss is not finite or has exploded, or with the epoch if
    the validation's has.
    """
    if isinstance(run.model, Fitted):
        if run.progress.epoch == 0:
            _fit(run, run.model, save)
        return
    while not run.progress.finished(run.options):
        epoch = run.progress.epoch
        # An epoch's randomness comes from seed, epoch and rank alone, so a resumed run draws what an
        # uninterrupted one draws.
        torch.manual_seed(hash((run.options.seed, epoch, run.rank)) % 2**31)
        started, run.waited = time.monotonic(), 0.0
        train_loss, windows_per_s = _train_epoch(run)
        val_loss = validate(run)
        _check(val_loss, f"epoch {epoch + 1}: the validation loss")
        times = _times(run, started)
        if val_loss < run.progress.best_loss:
            run.progress.best_loss, run.progress.best_epoch = val_loss, epoch
            run.best = {name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()}
        figures = {"train_loss": train_loss, "val_loss": val_loss, **times, "windows_per_s": windows_per_s}
        run.progress.history.append(figures)
        run.progress.epoch += 1
        if run.rank == 0:
            log.info(
                "epoch %d/%d: train loss %.4f, validation loss %.4f (best %.4f in epoch %d), %s windows/s, "
                "%.1f %% of the time waiting for batches",
                epoch + 1,
                run.options.epochs,
                train_loss,
                val_loss,
                run.progress.best_loss,
                run.progress.best_epoch + 1,
                f"{windows_per_s:,.0f}",
                100 * times["wait_share"],
            )
        save(run, figures)


def _times(run: Run, started: float) -> dict[str, float]:
    """How long the epoch took, and which share of it the ranks waited for batches."""
    seconds = time.monotonic() - started
    waited, passed = _sum_over_ranks(run, torch.tensor([run.waited, seconds], dtype=torch.float64)).tolist()
    return {"seconds": seconds, "wait_share": waited / passed}


def _fit(run: Run, model: Fitted, save: Callable[[Run, dict[str, float]], None]) -> None:
    """The one epoch of a model that is fitted at once, by every rank alike."""
    started, run.waited = time.monotonic(), 0.0

    def batches(part: Part) -> Iterator[Batch]:
        plan = order.evaluation(run.shards.manifest, part, run.options.batch_size)
        for batch in run.batches(plan):
            yield batch.alone()  # of a border there is nothing to learn twice

    model.fit(partial(batches, "train"), partial(batches, "val"))
    val_loss = validate(run)
    _check(val_loss, "the validation loss")
    run.best = dict(model.state_dict())
    figures = {"val_loss": val_loss, **_times(run, started)}
    run.progress = Progress(1, val_loss, 0, [figures])
    if run.rank == 0:
        log.info("fitted in %.1f s: validation loss %.4f", figures["seconds"], val_loss)
    save(run, figures)


def _train_epoch(run: Run) -> tuple[float, float]:
    """Mean loss over the epoch's observed targets, and windows per second of all ranks."""
    o = run.options
    epoch = run.progress.epoch
    for group in run.optimizer.param_groups:
        group["lr"] = o.learning_rate * (1 + math.cos(math.pi * epoch / o.epochs)) / 2
    plan = order.training(
        run.shards.manifest, o.batch_size, o.seed, epoch, run.rank, run.world, o.steps_per_epoch
    )
    run.net.train()
    total = torch.zeros(2, dtype=torch.float64)
    windows, started = 0, time.monotonic()
    last = started
    with closing(run.batches(plan)) as batches:
        for step, batch in enumerate(batches):
            loss, count = _losses(run, batch)
            mean = _step(run, loss, count, f"epoch {epoch + 1}, step {step + 1}")
            total += torch.stack([loss.detach().double().cpu(), count.double().cpu()])
            windows += len(batch.origins) * run.world
            now = time.monotonic()
            if run.rank == 0 and now - last > 5:
                last = now
                log.info(
                    "epoch %d/%d, step %d/%d: loss %.4f, %s windows/s",
                    epoch + 1,
                    o.epochs,
                    step + 1,
                    len(plan),
                    mean,
                    f"{windows / (now - started):,.0f}",
                )
    rate = windows / (time.monotonic() - started)
    loss_sum, seen = _sum_over_ranks(run, total.to(run.device)).tolist()
    return loss_sum / max(seen, 1), rate


def _step(run: Run, loss: Tensor, count: Tensor, when: str) -> float:
    """One step of the optimizer on this rank's sum of losses; returns their mean over all ranks' targets.

    Raises DivergedError that says when.
    """
    # How many targets there are on all ranks is summed while gradients are computed: nobody waits for it.
    counts = count.double()[None]
    summed = dist.all_reduce(counts, async_op=True) if run.world > 1 else None
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if summed is not None:
        summed.wait()
    # DDP averages gradients over ranks; this makes the average the gradient of the mean over all targets.
    scale = (run.world / counts[0].clamp(min=1)).to(loss.dtype)
    _check(value := (loss.detach() * scale).item(), f"{when}: the loss")
    for parameter in run.net.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    nn.utils.clip_grad_norm_(run.net.parameters(), run.options.clip_norm)
    run.optimizer.step()
    return value


def _check(loss: float, what: str) -> None:
    if not loss < _EXPLODED:  # nor for nan
        raise DivergedError(f"{what} is {loss:.6g}, expected less than {_EXPLODED:.0e} on scaled targets")


@torch.no_grad()
def validate(run: Run) -> float:
    """Mean loss over every observed target of the validation part, the same on all ranks."""
    run.net.eval()
    total = torch.zeros(2, dtype=torch.float64)
    plan = order.evaluation(run.shards.manifest, "val", run.options.batch_size, run.rank, run.world)
    with closing(run.batches(plan)) as batches:
        for batch in batches:
            # Not through DDP: ranks may have different numbers of batches here.
            loss, count = _losses(run, batch, run.model)
            total += torch.stack([loss.double().cpu(), count.double().cpu()])
    loss_sum, seen = _sum_over_ranks(run, total.to(run.device)).tolist()
    return loss_sum / max(seen, 1)


def _losses(run: Run, batch: Batch, net: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    batch = batch.to(run.device)
    # bfloat16 needs no loss scaling; on a CPU it would be slower than float32.
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
        output = (net or run.net)(batch)
    return loss_sum(output, batch, run.levels)


def loss_sum(output: Output, batch: Batch, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Summed loss over observed targets, and how many there are."""
    mask = batch.y_mask
    loss = (output.mean - batch.y) ** 2
    if output.quantiles is not None:
        q = torch.tensor(levels, device=batch.y.device)
        under = batch.y[..., None] - output.quantiles
        loss = loss + torch.maximum(q * under, (q - 1) * under).mean(-1)
    return torch.where(mask, loss, 0.0).sum(), mask.sum()


def _sum_over_ranks(run: Run, value: Tensor) -> Tensor:
    if run.world > 1:
        value = value.to(run.device)
        dist.all_reduce(value)
    return value
