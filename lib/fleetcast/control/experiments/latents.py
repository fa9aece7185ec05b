"""What the latent states tell apart: the paper's fourth figure, t-SNE of z by what a service does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier

from fleetcast import plots
from fleetcast.control.engine import FluidEngine
from fleetcast.control.experiments.setting import BIDRL, Setting, table

STATES = ("idle", "stable", "overloaded")
#: A service whose replicas are less busy than the first is idle; one that is busier than the second, or whose
#: calls fail, is overloaded (CPU as share of what is requested).
_IDLE, _OVERLOADED = 0.35, 0.8
#: Latent states that are drawn, and decisions between two of the same service.
_DRAWN, _APART = 3000, 5


@dataclass(frozen=True)
class Latents:
    """Latent states of services at some times."""

    state: NDArray[np.int64]
    """[P] places in STATES."""
    flat: NDArray[np.float64]
    """[P, 2] t-SNE."""
    told: float
    """How often the state is that of the nearest latent states of other times."""
    by_chance: float
    """How often the most common state is right."""
    silhouette: float

    def markdown(self) -> str:
        """How well states lie apart."""
        counts = np.bincount(self.state, minlength=len(STATES))
        rows = [[name, f"{100 * n / len(self.state):.0f} %"] for name, n in zip(STATES, counts, strict=True)]
        return (
            f"{table(['state', 'of the time'], rows)}\n\nThe 15 nearest latent states of other times tell a "
            f"service's state in {100 * self.told:.0f} % of the cases; always to say the most common one is "
            f"right in {100 * self.by_chance:.0f} %. Silhouette of the states in z: {self.silhouette:.2f}.\n"
        )

    def pictures(self) -> dict[str, bytes]:
        """The plane."""
        figure, (axes,) = plots.subplots("t-SNE of the latent states", width=5.4, height=4.4)
        for place, name in enumerate(STATES):
            at = self.state == place
            color = (plots.PALETTE[5], plots.PALETTE[0], plots.PALETTE[1])[place]
            x, y = self.flat[at].T
            axes.scatter(x, y, s=5, color=color, marker="os^"[place], label=name, linewidths=0)
        axes.set_xticks([])
        axes.set_yticks([])
        plots.legend(figure, axes, 3)
        return {"latents": plots.png(figure)}


def latents(setting: Setting) -> Latents:
    """The first agent's latent states on held-out traffic, and what the services did at these times."""
    setting.make([BIDRL])
    policy = setting.agent(BIDRL, 0)
    engine = FluidEngine(
        setting.cluster, setting.held_out, step=setting.options.step, seed=setting.options.held_out.seed
    )
    policy.reset(setting.cluster, engine.environments)
    interval = setting.cluster.measure.interval
    intervals = int(setting.held_out.rates.shape[1] * setting.held_out.step / interval)
    found, states, times = [], [], []
    for number in range(intervals):
        seen = engine.observe()
        now = policy.encode(policy.see(seen))
        if number >= policy.agent.options.window and number % _APART == 0:
            known = ~seen.cpu.isnan()
            busy = (seen.cpu > _OVERLOADED) | (seen.errors > 0)
            of_service = torch.where(busy, 2, torch.where(seen.cpu < _IDLE, 0, 1))
            found.append(now[known])
            states.append(of_service[known])
            times.append(torch.full((int(known.sum()),), number))
        engine.step(policy.decide(now))
    drawn = np.random.default_rng(0).permutation(sum(map(len, found)))[:_DRAWN]
    z = torch.cat(found).double().numpy()[drawn]
    state, time = (np.asarray(torch.cat(one))[drawn] for one in (states, times))
    early = time < np.median(time)
    told = KNeighborsClassifier(15).fit(z[early], state[early]).score(z[~early], state[~early])
    flat = TSNE(perplexity=min(30, len(z) // 4), init="pca", random_state=0).fit_transform(z)
    apart = float(silhouette_score(z, state)) if len(np.unique(state)) > 1 else float("nan")
    common = float(np.bincount(state[~early]).max() / (~early).sum())
    return Latents(state, flat.astype(np.float64), float(told), common, apart)
