"""Prompts that keep their effect when they are shaken: what training can be given besides the loss.

    noise   min E_delta L(s + delta),  delta ~ N(0, (rho r)^2 I), drawn anew for each row and step
    sam     min L(s + rho r sqrt(n d) g / |g|),  g = grad L(s), held fixed (Foret et al. 2021)
    norm    min L(s) + w mean(s^2) / r^2
    hull    min L(s) + w dist(s, conv E)^2 / (d r^2),  mean over vectors, E the model's embedding

The first two change where the loss is taken and are passes; the last two are terms of the objective. Both kinds go into
`sonde.prompts.training.train_prompts`, and leave validation as it is: noise and ascent are for gradients alone.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.objectives import Objective, Selective, cross_entropy, on_own_text
from sonde.prompts.passes import Passes, Rows, Scored
from sonde.prompts.soft_prompt import embedded, embedding_rms
from sonde.prompts.training import Trial, train_prompts

Penalty = Callable[[Float[Tensor, "n d"]], Float[Tensor, ""]]
Kind = Literal["noise", "sam", "norm", "hull"]
KINDS: tuple[Kind, ...] = ("noise", "sam", "norm", "hull")


def train_robust(
    lm: LanguageModel,
    examples: Examples,
    kind: Kind,
    strength: float,
    *,
    validation: Examples,
    objective: Objective = cross_entropy,
    **options: Any,
) -> list[Trial]:
    """Train prompts by one of the four ways. Other options are those of `train_prompts`.

    `strength` is rho of noise and sam, the weight of norm and hull. The prompt of the last step is kept: choosing a
    step by its loss at rest would choose against what is asked for. Raises `SondeError` for another kind, for a
    strength that is not above 0, and as `train_prompts` does.
    """
    if kind not in KINDS or not strength > 0:
        raise SondeError(f"{kind!r} of strength {strength}: give one of {', '.join(KINDS)} and a number above 0")
    passes = None
    if kind == "noise":
        passes = NoisyPasses(lm, examples, rho=strength, seed=options.get("seed", 0))
    elif kind == "sam":
        passes = SharpPasses(lm, examples, rho=strength, objective=objective)
    else:
        objective = Penalised(objective, {"norm": norm_penalty, "hull": hull_penalty}[kind](lm), strength)
    options = {"validations": 1} | options
    return train_prompts(lm, examples, objective=objective, validation=validation, passes=passes, **options)


class NoisyPasses(Passes):
    """Passes that shake every row's prompt by its own noise of rho r, where a gradient is taken."""

    def __init__(self, lm: LanguageModel, examples: Examples, *, rho: float, seed: int = 0) -> None:
        super().__init__(lm, examples)
        self.size, self.seed = rho * embedding_rms(lm), seed

    def score(
        self, bank: Float[Tensor, "m width"], rows: Rows, *, wanted: Bool[Tensor, " scored"] | None = None
    ) -> Scored:
        """As `Passes.score`; under a gradient each row has vectors of its own."""
        if not torch.is_grad_enabled():
            return super().score(bank, rows, wanted=wanted)
        inside = torch.arange(int(rows.n.max()))[None]
        own = bank[(rows.offset[:, None] + inside)[inside < rows.n[:, None]].to(bank.device)]
        # the draw follows from the vectors, so that a run that was interrupted goes on with the same ones
        state = zlib.crc32(bank.detach().cpu().numpy().tobytes(), self.seed % (1 << 32))
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(state)).to(own.device)
        return super().score(own + self.size * noise, replace(rows, offset=rows.n.cumsum(0) - rows.n), wanted=wanted)


class SharpPasses(Passes):
    """Passes at the end of one step of ascent, of length rho r sqrt(n d), where a gradient is taken.

    The step is that of the batch's own loss, so that a training step costs two.
    """

    def __init__(
        self, lm: LanguageModel, examples: Examples, *, rho: float, objective: Objective = cross_entropy
    ) -> None:
        super().__init__(lm, examples)
        self.size, self.objective = rho * embedding_rms(lm), objective

    def score(
        self, bank: Float[Tensor, "m width"], rows: Rows, *, wanted: Bool[Tensor, " scored"] | None = None
    ) -> Scored:
        """As `Passes.score`; under a gradient the vectors are moved to where the loss is higher."""
        if not torch.is_grad_enabled():
            return super().score(bank, rows, wanted=wanted)
        leaf = bank.detach().requires_grad_()
        here = self.objective(super().score(leaf, rows, wanted=wanted))
        (gradient,) = torch.autograd.grad(here.sum(), leaf)
        shift = torch.zeros_like(leaf)
        for offset, n in _prompts(rows):
            own = gradient[offset : offset + n]
            shift[offset : offset + n] = self.size * own.numel() ** 0.5 * own / own.norm().clamp_min(1e-30)
        return super().score(bank + shift, rows, wanted=wanted)


class Penalised:
    """An objective and a weight times a penalty of the prompt's vectors.

    Args:
        objective: any.
        penalty: from vectors [n, d] to one number; `norm_penalty` and `hull_penalty` make two.
        weight: in units of the loss.

    """

    def __init__(self, objective: Objective, penalty: Penalty, weight: float) -> None:
        self.objective, self.penalty, self.weight = objective, penalty, weight
        own = on_own_text(objective)
        if own is not None:
            self.rollout = own.rollout
        if isinstance(objective, Selective):
            self.wanted = objective.wanted

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """Loss and penalty of each row."""
        values = self.objective(scored)
        prompts = torch.stack([scored.rows.offset, scored.rows.n], 1)
        penalties = torch.zeros(len(values), device=values.device)
        for offset, n in _prompts(scored.rows):
            of = (prompts == torch.tensor([offset, n])).all(1).to(values.device)
            penalties = penalties + of * self.penalty(scored.bank[offset : offset + n])
        return values + self.weight * penalties


def norm_penalty(lm: LanguageModel) -> Penalty:
    """Mean square of the coordinates in units of r^2: 1 for a typical row of the embedding."""
    square = embedding_rms(lm) ** 2
    return lambda vectors: vectors.square().mean() / square


def hull_penalty(lm: LanguageModel) -> Penalty:
    """Mean square distance of the vectors to the convex hull of the embedding's rows, in units of d r^2."""
    table = embedded(lm, torch.arange(lm.structure.embedding.weight.shape[0]))  # type: ignore[arg-type, index]
    square = embedding_rms(lm) ** 2
    # the gradient of a squared distance is that to the nearest point held fixed
    return lambda vectors: (vectors - nearest_in_hull(vectors.detach(), table)).square().mean() / square


@torch.no_grad()
def nearest_in_hull(
    vectors: Float[Tensor, "n d"], table: Float[Tensor, "V d"], steps: int = 64
) -> Float[Tensor, "n d"]:
    """The point of the convex hull of `table` nearest to each vector, by Frank and Wolfe's steps with line search."""
    point = table[torch.cdist(vectors, table).argmin(1)]
    for _ in range(steps):
        away = point - vectors
        move = table[(away @ table.T).argmin(1)] - point
        length = -(away * move).sum(1) / move.square().sum(1).clamp_min(1e-30)
        point = point + length.clamp(0, 1)[:, None] * move
    return point


def _prompts(rows: Rows) -> list[tuple[int, int]]:
    """First row of the bank and length of each prompt that has vectors."""
    pairs = torch.stack([rows.offset, rows.n], 1).unique(dim=0).tolist()
    return [(offset, n) for offset, n in pairs if n]
