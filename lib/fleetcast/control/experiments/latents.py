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
from fleetcast.control.experiments.setting import BIDRL, DEFAULT, Setting, table

STATES = ("idle", "stable", "overloaded")
#: A service whose replicas are less busy than the first is idle; one that is busier than the second, or whose
#: calls fail, is overloaded (CPU as share of what is requested).
_IDLE, _OVERLOADED = 0.3, 0.8
#: Latent states of each state that are drawn, at most, and decisions between two of the same service.
_DRAWN, _APART = 800, 5


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
    shares: NDArray[np.float64]
    """Of the time that services are in each of STATES; as many of each are drawn as there are, or enough."""
    silhouette: float

    def markdown(self) -> str:
        """How well states lie apart."""
        rows = [[name, f"{100 * share:.1f} %"] for name, share in zip(STATES, self.shares, strict=True)]
        return (
            f"{table(['state', 'of the time'], rows)}\n\nThe 15 nearest latent states of other times tell a "
            f"service's state in {100 * self.told:.0f} % of the cases; to say the most common one always is "
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
    """The first agent's latent states on held-out traffic while H-Auto as it comes scales, which lets
    services be idle and overloaded, and what the services did at these times."""
    setting.make([BIDRL])
    policy, driver = setting.agent(BIDRL, 0), setting.policy(DEFAULT)[0]
    engine = FluidEngine(
        setting.cluster, setting.held_out, step=setting.options.step, seed=setting.options.held_out.seed
    )
    for one in (policy, driver):
        one.reset(setting.cluster, engine.environments)
    interval = setting.cluster.measure.interval
    intervals = int(setting.held_out.rates.shape[1] * setting.held_out.step / interval)
    found, states, times = [], [], []
    for number in range(intervals):
        seen = engine.observe()
        window = policy.see(seen)
        if number >= policy.agent.options.window and number % _APART == 0:
            known = ~seen.cpu.isnan()
            busy = (seen.cpu > _OVERLOADED) | (seen.errors > 0)
            of_service = torch.where(busy, 2, torch.where(seen.cpu < _IDLE, 0, 1))
            found.append(policy.encode(window)[known])
            states.append(of_service[known])
            times.append(torch.full((int(known.sum()),), number))
        engine.step(driver.act(seen))
    z, state, time = (np.asarray(torch.cat(one)) for one in (found, states, times))
    shares = np.bincount(state, minlength=len(STATES)) / len(state)
    random = np.random.default_rng(0)
    drawn = np.concatenate(
        [random.permutation(np.flatnonzero(state == one))[:_DRAWN] for one in range(len(STATES))]
    )
    z, state, time = z[drawn].astype(np.float64), state[drawn], time[drawn]
    early = time < np.median(time)
    told = KNeighborsClassifier(15).fit(z[early], state[early]).score(z[~early], state[~early])
    flat = TSNE(perplexity=min(30, len(z) // 4), init="pca", random_state=0).fit_transform(z)
    apart = float(silhouette_score(z, state)) if len(np.unique(state)) > 1 else float("nan")
    common = float(np.bincount(state[~early]).max() / (~early).sum())
    return Latents(state, flat.astype(np.float64), float(told), common, shares, apart)
