"""Which labelled concepts can be read from a model linearly, and at which site? Closed-form probes of many at once.

One pass collects, at every site, the covariance of the activations and the mean of every class of every concept. The
probe of a concept is Fisher's linear discriminant with a shared within-class covariance S,

    score_c(x) = mu_cᵀ S⁻¹ x - mu_cᵀ S⁻¹ mu_c / 2 + log p_c,

the Bayes classifier where classes are Gaussian with one covariance; nothing is descended and nothing is tuned. A second
pass, over other text, scores it. Controls: the same probe fitted to labels dealt anew among the labelled tokens of a
batch, and the class that was most frequent in the first pass. Tokens without a label count as a class of their own in
S, and are never named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.concepts.scrubbing import Labels
from sonde.lm.batches import TokenBatches
from sonde.stats.intervals import Interval, bootstrap_ratio
from sonde.stats.moments import Moments
from sonde.stats.solve import solve_spd

_RIDGE = 1e-4  # of the mean variance, added to S


@dataclass(frozen=True)
class LayerProbes:
    """Probes of several concepts at several sites.

    weights, bias: by site, of all classes of all concepts side by side, first of the true labels, then of the dealt
    ones. sizes: number of classes of each concept. majority: the most frequent class of each.
    """

    weights: Mapping[str, Float[Tensor, "d classes"]]
    bias: Mapping[str, Float[Tensor, " classes"]]
    sizes: tuple[int, ...]
    majority: tuple[int, ...]

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        return {
            "weights": dict(self.weights),
            "bias": dict(self.bias),
            "sizes": list(self.sizes),
            "majority": list(self.majority),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LayerProbes":
        """The probes that `state` was taken from."""
        return cls(state["weights"], state["bias"], tuple(state["sizes"]), tuple(state["majority"]))


class ProbeFitting:
    """Consumer of a stream over `batches` that fits probes of several concepts at `sites`."""

    def __init__(
        self, sites: Sequence[str], batches: TokenBatches, concepts: Sequence[Labels], *, seed: int = 0
    ) -> None:
        self.sites = tuple(sites)
        self._batches, self._concepts = batches, concepts
        self._sizes = tuple(len(labels.names) for labels in concepts)
        self._moments: dict[str, Moments] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, batch: Any) -> None:
        """Take in a batch with activations at the sites."""
        hot = []
        for dealt in (False, True):
            for labels, size in zip(self._concepts, self._sizes, strict=True):
                z = labels.at(self._batches, batch.index)
                if dealt:
                    z = _dealt(z, self._generator)
                hot.append(torch.nn.functional.one_hot(z[batch.mask.cpu()] + 1, size + 1))
        columns = torch.cat(hot, 1).double()
        for site in self.sites:
            x = batch.acts[site][batch.mask]
            moments = self._moments.setdefault(site, Moments(x.shape[-1], columns.shape[1]))
            moments.update(x, columns.to(x.device))

    def finish(self) -> LayerProbes:
        """Solve for the probes. Raises `ValueError` before the first batch."""
        weights, bias = {}, {}
        shares = next(iter(self._moments.values())).other_mean.cpu() if self._moments else torch.zeros(0)
        for site, moments in self._moments.items():
            weights[site], bias[site] = self._solved(moments)
        if not weights:
            raise ValueError("no batch was seen: feed a text first")
        majority, start = [], 0
        for size in self._sizes:
            majority.append(int(shares[start + 1 : start + size + 1].argmax()))
            start += size + 1
        return LayerProbes(weights, bias, self._sizes, tuple(majority))

    def _solved(self, moments: Moments) -> tuple[Float[Tensor, "d classes"], Float[Tensor, " classes"]]:
        counts = moments.other_mean * moments.n
        weights, bias, start = [], [], 0
        for size in self._sizes * 2:
            n = counts[start : start + size + 1]
            # Scatter with the indicator of a class is n_c (mu_c - mu).
            apart = moments.cross_scatter[:, start : start + size + 1] / n.clamp(min=1)
            within = (moments.scatter - (apart * n) @ apart.T) / moments.n
            ridge = _RIDGE * within.diagonal().mean() * torch.eye(len(within)).to(within)
            means = moments.mean[:, None] + apart[:, 1:]
            solved = solve_spd(within + ridge, means)
            known = n[1:]
            weights.append(solved)
            bias.append((known / known.sum().clamp(min=1)).log() - 0.5 * (means * solved).sum(0))
            start += size + 1
        return torch.cat(weights, 1).float(), torch.cat(bias).float()


class ProbeScoring:
    """Consumer of a stream over `batches` that scores probes on it, row by row."""

    def __init__(self, probes: LayerProbes, batches: TokenBatches, concepts: Sequence[Labels]) -> None:
        self.sites = tuple(probes.weights)
        self._probes, self._batches, self._concepts = probes, batches, concepts
        self._parts: list[Int[Tensor, "batch columns"]] = []

    def update(self, batch: Any) -> None:
        """Count right answers in each row: of the probe, of that of dealt labels, of the most frequent class."""
        found = []
        edges = np.cumsum([0, *self._probes.sizes * 2])
        labels = [labels.at(self._batches, batch.index) for labels in self._concepts]
        for site in self.sites:
            scores = batch.acts[site].float() @ self._probes.weights[site].to(batch.acts[site].device)
            scores = (scores + self._probes.bias[site].to(scores.device)).cpu()
            for part, (low, high) in enumerate(pairwise(edges)):
                told = scores[..., low:high].argmax(-1)
                found.append((told == labels[part % len(labels)]).sum(-1))
        for z, majority in zip(labels, self._probes.majority, strict=True):
            found += [(z == majority).sum(-1), (z >= 0).sum(-1)]
        self._parts.append(torch.stack(found, 1))

    def state(self) -> Any:
        """What was counted so far."""
        return torch.cat(self._parts) if self._parts else None

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        self._parts = [] if state is None else [state]

    def merge_state(self, state: Any) -> None:
        """Add what another process has counted."""
        if state is not None:
            self._parts.append(state)

    def accuracy(self, concept: int, site: str, *, dealt: bool = False, seed: int = 0) -> Interval:
        """Share of the labelled tokens whose class the probe told right; bootstrap over rows."""
        k = len(self._concepts)
        return self._share(self.sites.index(site) * 2 * k + dealt * k + concept, concept, seed)

    def majority(self, concept: int, *, seed: int = 0) -> Interval:
        """Share of the labelled tokens that are of the class that was most frequent in the fitting text."""
        return self._share(len(self.sites) * 2 * len(self._concepts) + 2 * concept, concept, seed)

    def _share(self, column: int, concept: int, seed: int) -> Interval:
        counts = torch.cat(self._parts).double().numpy()
        known = counts[:, len(self.sites) * 2 * len(self._concepts) + 2 * concept + 1]
        return bootstrap_ratio(counts[:, column], known, seed=seed)


def _dealt(z: Int[Tensor, "batch pos"], generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    """The labels of a batch dealt anew among its labelled tokens."""
    new = z.clone()
    known = z >= 0
    values = z[known]
    new[known] = values[torch.randperm(len(values), generator=generator)]
    return new
