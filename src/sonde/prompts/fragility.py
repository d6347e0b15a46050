"""How much does a prompt lose when its vectors are shaken?

    F(rho) = E L(s + delta) - L(s)        G(rho) = r E |grad L(s + delta)|        delta ~ N(0, (rho r)^2 I)

in units of the embedding's coordinate RMS r, over antithetic draws: delta and -delta together, so that the odd part of
L cancels. For small rho, F is rho^2 r^2 tr(H) / 2 with H the Hessian of L at s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.objectives import Objective, cross_entropy
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import SoftPrompt, embedding_rms
from sonde.stats.intervals import Interval, bootstrap_mean

RHOS = (0.03, 0.1, 0.3, 1.0, 3.0)
_BATCH = 8


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
    """F and G of a prompt at every rho; the same directions at all of them.

    Raises `SondeError` for a prompt of no vectors, and unless draws are even and at least 4.
    """
    if not len(prompt) or draws < 4 or draws % 2:
        raise SondeError(
            f"{draws} draws of a prompt of {len(prompt)} vectors: give an even number from 4, and a vector"
        )
    generator, r = torch.Generator().manual_seed(seed), embedding_rms(lm)
    half = torch.randn((draws // 2, *prompt.vectors.shape), generator=generator)
    noise = torch.cat([half, -half]).to(lm.device)
    passes, vectors = Passes(lm, examples), prompt.vectors.to(lm.device)
    (loss,), (at_rest,) = _losses(passes, prompt, vectors[None], objective, seed)
    found = [_losses(passes, prompt, vectors + rho * r * noise, objective, seed) for rho in rhos]
    return Fragility(
        tuple(rhos),
        float(loss),
        torch.stack([losses for losses, _ in found]),
        torch.stack([gradients for _, gradients in found]) * r,
        float(at_rest) * r,
    )


def _losses(
    passes: Passes, prompt: SoftPrompt, vectors: Float[Tensor, "k n d"], objective: Objective, seed: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """L and |grad L| of k prompts in the place of one, in batches of examples."""
    k, n = vectors.shape[:2]
    leaf = vectors.detach().float().requires_grad_()
    total, gradient = torch.zeros(k), torch.zeros_like(leaf)
    generator = torch.Generator().manual_seed(seed)
    for members in passes.batches(_BATCH):
        rows = passes.rows(members, [n] * k, [prompt.position] * k, generator=generator)
        values = objective(passes.score(leaf.reshape(k * n, -1), rows)).view(k, len(members)).sum(1)
        gradient += torch.autograd.grad(values.sum(), leaf)[0]
        total += values.detach().cpu()
    count = len(passes.examples)
    return total / count, gradient.flatten(1).norm(dim=1).cpu() / count
