"""Do the directions that a lens finds influential matter to the model? Ablate each in the model and compare.

For every direction v of a causal basis at layer l, the model runs on from r(h_l, v) = h_l - v vᵀ(h_l - m), with the
component replaced at all positions, and its prediction p' is held against its own p:

    effect(v) = E KL(p || p')        fidelity = Spearman's correlation over directions of effect(v) and σ(v)

σ is measured on the same tokens, which the directions were not fitted on. Random orthonormal directions are the control
(Belrose et al. 2303.08112, section 4.1). Directions are rows of one batch, and blocks before l are not run again.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.lens.causal_basis import CausalBasis, random_basis
from sonde.lens.direction_loss import direction_loss
from sonde.lens.fused import Readout, Target, divergence
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatch
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import first_block, run_from
from sonde.stats.intervals import Interval, bootstrap, bootstrap_ratio
from sonde.stats.ranks import spearman

_TOKENS = 4096  # in a batch of directions x rows


@dataclass(frozen=True)
class DirectionEffects:
    """Energies and effects of directions in nats, summed over the tokens of each row of text."""

    energies: Float[np.ndarray, "k rows"]
    effects: Float[np.ndarray, "k rows"]
    tokens: Float[np.ndarray, " rows"]

    @property
    def energy(self) -> Float[np.ndarray, " k"]:
        """σ of each direction: what its ablation does to the lens, in nats a token."""
        return self.energies.sum(-1) / self.tokens.sum()

    @property
    def effect(self) -> Float[np.ndarray, " k"]:
        """KL(p || p'): what it does to the model, in nats a token."""
        return self.effects.sum(-1) / self.tokens.sum()

    def effect_intervals(self) -> list[Interval]:
        """The effect of each direction with its interval over rows of text."""
        return [bootstrap_ratio(direction, self.tokens) for direction in self.effects]

    def energy_intervals(self) -> list[Interval]:
        """The energy of each direction with its interval over rows of text."""
        return [bootstrap_ratio(direction, self.tokens) for direction in self.energies]

    def spearman(self) -> Interval:
        """Rank correlation of energy and effect with a bootstrap interval over directions.

        Raises `ValueError` for fewer than two directions.
        """
        return bootstrap(lambda x, y: float(spearman(x, y)), self.energy, self.effect)


@dataclass(frozen=True)
class Fidelity:
    """A causal basis in the model, and as many random directions."""

    site: str
    basis: DirectionEffects
    control: DirectionEffects

    def strength(self, top: int = 4) -> Interval:
        """Mean effect of the `top` most influential directions over that of a random one, interval over rows."""
        if not 1 <= top <= len(self.basis.effects):
            raise SondeError(f"the basis has {len(self.basis.effects)} directions, so there is no top {top}")
        order = self.basis.energy.argsort()[::-1][:top]
        return bootstrap_ratio(self.basis.effects[order].mean(0), self.control.effects.mean(0))

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        parts = {"basis": self.basis, "control": self.control}
        numbers = {
            name: {field.name: torch.from_numpy(getattr(part, field.name)) for field in dataclasses.fields(part)}
            for name, part in parts.items()
        }
        return {"site": self.site, **numbers}

    @staticmethod
    def from_state(state: dict[str, Any]) -> "Fidelity":
        """What `state` was taken from."""
        own, control = (
            DirectionEffects(**{name: values.numpy() for name, values in state[part].items()})
            for part in ("basis", "control")
        )
        return Fidelity(state["site"], own, control)


@torch.no_grad()
def fidelity(
    lm: LanguageModel,
    lens: TunedLens,
    bases: CausalBasis | Sequence[CausalBasis],
    batches: Iterable[TokenBatch],
    *,
    seed: int = 0,
    progress: str | None = None,
) -> list[Fidelity]:
    """Ablate every direction of every basis in the model, and as many random ones of each layer.

    Args:
        lm: the model.
        lens: whose energies are compared.
        bases: of layers of the residual stream, `resid_pre.i` or `resid_post.i`.
        batches: text that the bases were not fitted on. Each batch runs through the rest of the model once for every
            few directions: a few thousand tokens are enough.
        seed: of the random directions.
        progress: label of a progress bar; None for no bar.

    Raises:
        SondeError: for sites beside the residual stream, and no text.

    """
    chosen = [bases] if isinstance(bases, CausalBasis) else list(bases)
    readout = Readout(lm.unembedding)
    firsts = [first_block(lm, basis.site) for basis in chosen]
    last = f"resid_post.{lm.n_layers - 1}"
    directions = [
        torch.cat([basis.directions, random_basis(len(basis), lm.d_model, seed=seed + place)]).to(lm.device)
        for place, basis in enumerate(chosen)
    ]
    sums: list[list[tuple[Tensor, Tensor]]] = [[] for _ in chosen]
    counts: list[Tensor] = []
    for batch in batches:
        mask = batch.mask.to(lm.device)
        rows, length = mask.shape
        together = min(max(1, _TOKENS // (rows * length)), max(map(len, directions), default=1))
        with lm.reading(*{basis.site for basis in chosen}, last) as acts:
            lm(batch.tokens, batch.mask)
        counts.append(mask.sum(-1).double())
        target = Target.model(readout, acts[last][mask])
        places = tqdm(chosen, desc=progress, unit="layer", disable=progress is None, leave=False)
        for place, basis in enumerate(places):
            hidden, vectors = acts[basis.site].float(), directions[place]
            mean = basis.mean.to(hidden)
            energies = direction_loss(lens, basis.site, hidden[mask], mean).by_token(vectors)
            effects = []
            for start in range(0, len(vectors), together):
                group = vectors[start : start + together]
                away = torch.einsum("btd,kd->kbt", hidden - mean, group)
                ablated = (hidden - away[..., None] * group[:, None, None]).flatten(0, 1).to(lm.dtype)
                tokens, copies = batch.tokens.repeat(len(group), 1), batch.mask.repeat(len(group), 1)
                ends = run_from(lm, firsts[place], ablated, tokens, copies).unflatten(0, (len(group), rows))
                effects.append(divergence(readout.normed(ends[:, mask].to(readout.dtype)), target, readout))
            sums[place].append((_by_row(energies, mask), _by_row(torch.cat(effects), mask)))
    if not counts:
        raise SondeError("no text was given, so no direction could be ablated in the model")
    tokens_by_row = torch.cat(counts).cpu().numpy()
    found = []
    for basis, parts in zip(chosen, sums, strict=True):
        energy, effect = (torch.cat(values, -1).cpu().numpy() for values in zip(*parts, strict=True))
        k = len(basis)
        own, control = (
            DirectionEffects(energy[part], effect[part], tokens_by_row) for part in (slice(0, k), slice(k, None))
        )
        found.append(Fidelity(basis.site, own, control))
    return found


def _by_row(values: Float[Tensor, "k n"], mask: Bool[Tensor, "rows pos"]) -> Float[Tensor, "k rows"]:
    """Sums over the real tokens of each row."""
    row = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
    sums = values.new_zeros(len(values), len(mask), dtype=torch.float64)
    return sums.index_add_(-1, row, values.double())
