"""How much does a prompt lose when its vectors are shaken?

    F(rho) = E L(s + delta) - L(s)        G(rho) = r E |grad L(s + delta)|        delta ~ N(0, (rho r)^2 I)

in units of the embedding's coordinate RMS r, over antithetic draws: delta and -delta together, so that the odd part of
L cancels. For small rho, F is rho^2 r^2 tr(H) / 2 with H the Hessian of L at s; its trace is estimated on its own,
after Hutchinson (1989). The worst delta in the ball that the noise fills, |delta| <= rho r sqrt(n d), is sought by
projected gradient ascent (Madry et al. 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.objectives import Objective, cross_entropy
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import Position, SoftPrompt, embedding_rms
from sonde.prompts.training import objective_values
from sonde.stats.intervals import Interval, bootstrap_mean, paired_difference

RHOS = (0.03, 0.1, 0.3, 1.0, 3.0)
_BATCH = 8
_STARTS = 2  # of the ascent, at each rho
_STRIDE = 2.5  # radii that the ascent may walk in all
_DIFFERENCE = 0.01  # of r, each coordinate: how far apart the gradients of a second derivative are taken


@dataclass(frozen=True)
class Fragility:
    """Losses of a shaken prompt, averaged over examples.

    rhos: sizes of the noise in units of r. loss: L(s). losses: L(s + delta), the second half of the draws being the
    negatives of the first. gradients: r |grad L(s + delta)|. at_rest: r |grad L(s)|.
    """

    rhos: tuple[float, ...]
    loss: float
    losses: Float[Tensor, "rhos draws"]
    gradients: Float[Tensor, "rhos draws"]
    at_rest: float

    def rise(self, rho: float) -> Interval:
        """F(rho), with an interval over antithetic pairs."""
        pairs = self.losses[self.rhos.index(rho)].view(2, -1).mean(0)
        return bootstrap_mean((pairs - self.loss).double().numpy())

    def gradient(self, rho: float) -> Interval:
        """G(rho), likewise."""
        return bootstrap_mean(self.gradients[self.rhos.index(rho)].view(2, -1).mean(0).double().numpy())


def fragility(
    lm: LanguageModel,
    prompt: SoftPrompt,
    examples: Examples,
    *,
    rhos: Sequence[float] = RHOS,
    draws: int = 32,
    objective: Objective = cross_entropy,
    seed: int = 0,
) -> Fragility:
    """F and G of a prompt at every rho; the same directions at all of them, and all draws as one batch.

    Raises `SondeError` for a prompt of no vectors, and unless draws are even and at least 4.
    """
    if draws < 4 or draws % 2:
        raise SondeError(f"{draws} draws of a prompt of {len(prompt)} vectors: give an even number from 4")
    around = _Around(lm, prompt, examples, objective, seed)
    half = around.normal(draws // 2, seed)
    noise = torch.cat([half, -half])
    shaken = torch.stack([rho * noise for rho in rhos]).flatten(0, 1)
    losses, gradients = around(torch.cat([torch.zeros_like(noise[:1]), shaken]))
    loss, sizes = losses.mean(1), gradients.flatten(1).norm(dim=1) * around.rms
    return Fragility(
        tuple(rhos),
        float(loss[0]),
        loss[1:].view(len(rhos), draws),
        sizes[1:].view(len(rhos), draws),
        float(sizes[0]),
    )


def worst_case(
    lm: LanguageModel,
    prompt: SoftPrompt,
    examples: Examples,
    *,
    rhos: Sequence[float] = RHOS,
    steps: int = 10,
    objective: Objective = cross_entropy,
    seed: int = 0,
) -> list[Interval]:
    """The largest rise of L that `steps` steps of ascent find in the ball of each rho, with intervals over examples.

    All rhos and two random starts in each ball are one batch; the largest mean loss on the way counts, and the centre
    is in the ball, so that no rise is below 0. Raises `SondeError` for a prompt of no vectors and fewer than 2
    examples.
    """
    if steps < 1 or len(examples) < 2:
        raise SondeError(f"{steps} steps on {len(examples)} examples: give 1 and 2 at least")
    around = _Around(lm, prompt, examples, objective, seed)
    radius = torch.tensor(rhos).repeat_interleave(_STARTS)[:, None, None] * prompt.vectors.numel() ** 0.5
    radius = radius.to(lm.device)
    delta = _unit(around.normal(len(radius), seed)) * radius
    rest = around(torch.zeros_like(delta[:1]))[0]
    worst = rest.repeat(len(radius), 1)
    for step in range(steps + 1):
        losses, gradients = around(delta)
        better = losses.mean(1) > worst.mean(1)
        worst = torch.where(better[:, None], losses, worst)
        if step < steps:
            delta = delta + _STRIDE / steps * radius * _unit(gradients)
            size = delta.flatten(1).norm(dim=1)[:, None, None]
            delta = delta * (radius / size.clamp_min(1e-30)).clamp(max=1)
    found = worst.view(len(rhos), _STARTS, -1)
    chosen = found[torch.arange(len(rhos)), found.mean(-1).argmax(1)]
    return [paired_difference(rows.numpy(), rest[0].numpy()) for rows in chosen]


def hessian_trace(
    lm: LanguageModel,
    prompt: SoftPrompt,
    examples: Examples,
    *,
    draws: int = 32,
    objective: Objective = cross_entropy,
    seed: int = 0,
) -> Interval:
    """r^2 tr(H), in units of the loss: the mean of r^2 v'Hv over vectors v of random signs, with its interval.

    Hv is a central difference of gradients over 0.01 r, because fused kernels have no second derivative. F(rho) is
    rho^2 / 2 times this for small rho. Raises `SondeError` for a prompt of no vectors and fewer than 2 draws.
    """
    if draws < 2:
        raise SondeError(f"{draws} draws of a trace: give 2 or more")
    around = _Around(lm, prompt, examples, objective, seed)
    signs = around.normal(draws, seed).sign()
    _, gradients = around(_DIFFERENCE * torch.cat([signs, -signs]))
    ahead, behind = gradients.flatten(1).split(draws)
    curved = ((ahead - behind) * signs.flatten(1)).sum(1) * around.rms / (2 * _DIFFERENCE)
    return bootstrap_mean(curved.double().cpu().numpy())


class _Around:
    """L on every example, and the gradient of its mean, at prompts that differ from one by deltas in units of r."""

    def __init__(
        self, lm: LanguageModel, prompt: SoftPrompt, examples: Examples, objective: Objective, seed: int
    ) -> None:
        if not len(prompt):
            raise SondeError("a prompt of 0 vectors cannot be shaken: give one with vectors")
        prompt.fits(lm)
        self.passes, self.prompt, self.objective, self.seed = Passes(lm, examples), prompt, objective, seed
        self.rms, self.centre = embedding_rms(lm), prompt.vectors.to(lm.device).float()

    def normal(self, k: int, seed: int) -> Float[Tensor, "k n d"]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((k, *self.centre.shape), generator=generator).to(self.centre.device)

    def __call__(self, deltas: Float[Tensor, "k n d"]) -> tuple[Float[Tensor, "k rows"], Float[Tensor, "k n d"]]:
        k, n = deltas.shape[:2]
        leaf = (self.centre + self.rms * deltas).detach().flatten(0, 1).requires_grad_()
        count, positions = len(self.passes.examples), cast("list[Position]", [self.prompt.position] * k)
        losses, gradient = torch.zeros(k, count, dtype=torch.float64), torch.zeros_like(leaf)
        generator = torch.Generator().manual_seed(self.seed)
        for members in self.passes.batches(_BATCH):
            rows = self.passes.rows(members, [n] * k, positions, generator=generator)
            # places that are drawn are the same for all deltas
            rows = replace(rows, place=rows.place[: len(members)].repeat(k))
            for part, values in objective_values(self.passes, leaf, rows, self.objective, self.seed):
                share = values / part.samples
                gradient += torch.autograd.grad(share.sum(), leaf)[0]
                example = torch.tensor(members)[part.member]
                losses.index_put_((part.owner, example), share.detach().double().cpu(), accumulate=True)
        return losses, gradient.view_as(deltas) / count


def _unit(vectors: Float[Tensor, "k n d"]) -> Float[Tensor, "k n d"]:
    return vectors / vectors.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-30)
