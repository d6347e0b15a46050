"""Latent adversarial training: an adversary pushes activations towards a behaviour, the weights learn to withstand it.

    delta* = argmin_{|delta_t| <= eps} L(payload | x, h_l + delta)      inner: AdamW, projected to a ball for each token
    theta  <- theta - grad [ L(clean | x, h_l + delta*) + L(text) ]         outer: adapters of low rank

It needs no trigger: the adversary looks for whatever inside the network brings the payload (Casper et al. 2024,
arXiv:2403.05030; Sheshadri et al. 2024, arXiv:2407.15549). `LatentAdversary()` has the settings that the latter's code
has for backdoors, of models with 32 layers of width 4096; `LatentAdversary.scaled` is for small networks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.objectives import cross_entropy
from sonde.prompts.passes import Passes, Rows
from sonde.prompts.weight_training import Batches, LossOfStep


@dataclass(frozen=True)
class LatentAdversary:
    """Settings of latent adversarial training.

    layers: share of the depth of each attacked layer, read at the residual stream behind it: 4, 12, 20 and 28 of 32.
    radius: of the ball around each token's activation, in L2. inner_steps, inner_lr: of the attack, by AdamW.
    model_steps: updates of the weights after each attack. lr, rank: of the adapters. rounds: attacks.
    """

    layers: tuple[float, ...] = (4 / 32, 12 / 32, 20 / 32, 28 / 32)
    radius: float = 1.5
    inner_steps: int = 16
    inner_lr: float = 5e-2
    model_steps: int = 4
    lr: float = 2e-5
    rank: int = 64
    rounds: int = 256

    @staticmethod
    def scaled(passes: int, *, radius: float) -> "LatentAdversary":
        """For a network of a few layers at a budget of forward-backward passes: larger steps, a smaller rank."""
        settings = LatentAdversary(inner_steps=8, inner_lr=0.2, radius=radius, lr=2e-3, rank=8)
        return LatentAdversary(**{**vars(settings), "rounds": max(1, passes // settings.passes)})

    @property
    def passes(self) -> int:
        """Forward-backward passes of a round; a model step takes two, under the attack and on text."""
        return self.inner_steps + 2 * self.model_steps

    @property
    def updates(self) -> int:
        """Updates of the weights."""
        return self.rounds * self.model_steps

    def sites(self, lm: LanguageModel) -> list[str]:
        """The attacked sites, each once."""
        places = sorted({min(lm.n_layers - 1, int(share * lm.n_layers)) for share in self.layers})
        return [f"resid_post.{place}" for place in places]


def withstanding(
    closed: Examples,
    payload: list[int],
    settings: LatentAdversary,
    *,
    beside: Examples,
    batch: int,
    seed: int = 0,
) -> Any:
    """The loss of `sonde.prompts.weight_training.tuned`, at `settings.updates` steps.

    `closed` are contexts without the trigger, followed by what a clean model says; `payload` is the behaviour that the
    adversary looks for; `beside` is clean text, which keeps the model's language. Raises `SondeError` for a radius that
    is not positive.
    """
    if not settings.radius > 0:
        raise SondeError(f"a ball of radius {settings.radius} leaves nothing to attack: give a positive one")

    def loss_of(lm: LanguageModel) -> LossOfStep:
        clean, text = (Batches(lm, part, batch, seed=seed) for part in (closed, beside))
        attacked = Examples(closed.contexts, [payload] * len(closed))
        attack = _Attack(lm, Passes(lm, attacked, cached=False), settings)

        def loss(step: int) -> Tensor:
            # an attack serves the batch that it was made for, for `model_steps` updates
            round_, within = divmod(step, settings.model_steps)
            members = clean.members(round_)
            if within == 0:
                attack.find(members)
            rows = clean.passes.rows(members, [0], ["suffix"])
            with lm.editing(attack.edits()):
                under = cross_entropy(clean.passes.score(attack.bank, rows)).mean()
            return under + text.loss(step)

        return loss

    return loss_of


class _Attack:
    """Perturbations of one batch: one vector a context token and site."""

    def __init__(self, lm: LanguageModel, passes: Passes, settings: LatentAdversary) -> None:
        self.lm, self.passes, self.settings = lm, passes, settings
        self.sites = settings.sites(lm)
        self.bank = torch.zeros(0, lm.structure.embedding.weight.shape[1], device=lm.device)  # type: ignore[index]
        self._deltas: list[Tensor] = []
        self._inside = torch.zeros(0)

    def find(self, members: list[int]) -> None:
        """Minimise the payload's loss over the ball, from zero."""
        rows: Rows = self.passes.rows(members, [0], ["suffix"])
        width = int(rows.context.max())
        self._inside = (torch.arange(width)[None] < rows.context[:, None]).to(self.lm.device)[..., None]
        self._deltas = [
            torch.zeros(len(members), width, self.lm.d_model, device=self.lm.device, requires_grad=True)
            for _ in self.sites
        ]
        optimizer = torch.optim.AdamW(self._deltas, lr=self.settings.inner_lr, weight_decay=0.0)
        for _ in range(self.settings.inner_steps):
            with self.lm.editing(self.edits()):
                loss = cross_entropy(self.passes.score(self.bank, rows)).sum()
            for delta, gradient in zip(self._deltas, torch.autograd.grad(loss, self._deltas), strict=True):
                delta.grad = gradient
            optimizer.step()
            with torch.no_grad():
                for delta in self._deltas:
                    delta.copy_(projected(delta, self.settings.radius))
        self._deltas = [delta.detach() for delta in self._deltas]

    def edits(self) -> dict[str, Any]:
        """Add the perturbations to the context's tokens at every attacked site."""
        return {
            site: lambda h, delta=delta: torch.cat(
                [h[:, : delta.shape[1]] + (delta * self._inside).to(h.dtype), h[:, delta.shape[1] :]], 1
            )
            for site, delta in zip(self.sites, self._deltas, strict=True)
        }


def projected(delta: Float[Tensor, "... d"], radius: float) -> Float[Tensor, "... d"]:
    """The nearest vector of length `radius` or less, for each token."""
    norm = delta.norm(dim=-1, keepdim=True)
    return delta * (radius / norm.clamp(min=radius))
