"""How much information is in a trained prompt? Five rulers, because tokens are a coarse one.

    nominal       32 n d: the numbers as they are stored
    quantised     n d b, b the fewest bits of a uniform grid on which the prompt still works
    noise-coded   KL(N(s, sigma^2) || N(0, r^2)), sigma learned so large as the task bears (Hinton & van Camp 1993)
    hard          n log2 V of the best prompt of real tokens that works (`sonde.prompts.hard`)
    delivered     sum_t log2 p(y_t | s) - log2 p(y_t): what the target gained

A prompt works when it reaches a threshold of loss or of success on given examples. The first three bound the
information in the vectors from above, the fourth that of a message in the model's own tokens; the last is no bound.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.nets.loop import train
from sonde.prompts.curve import MOSTLY, Threshold
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.hard import best_token, greedy_search
from sonde.prompts.passes import Passes, Scored
from sonde.prompts.soft_prompt import Position, SoftPrompt, embedding_rms
from sonde.prompts.training import Cosine

STORED = 32
_MOST = 8  # bits a coordinate that are tried
_RANGES = (1.0, 1.6, 2.0, 2.5, 3.0, 4.0)  # half range of the grid, in RMS of the prompt
_PRICES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # nats of loss that a nat of information is worth
_DRAWS = 4  # of the noise, when a noise-coded prompt is tested


@dataclass(frozen=True)
class Bits:
    """A prompt's information in bits by the five rulers; infinite where no prompt of that kind works."""

    nominal: float
    quantised: float
    noise_coded: float
    hard: float
    delivered: float

    def rows(self) -> list[tuple[str, float]]:
        """(ruler, bits) of each."""
        return [(name.replace("_", "-"), value) for name, value in asdict(self).items()]


@dataclass(frozen=True)
class Quantised:
    """The prompt on the coarsest grid that works, its bits a coordinate, bits in all, mean nats, success."""

    prompt: SoftPrompt
    per_coordinate: int
    bits: float
    nats: float
    success: float


@dataclass(frozen=True)
class NoiseCoded:
    """Mean and deviation [n, d] of a prompt that works under its noise; KL in bits, nats and success under noise."""

    mean: Float[Tensor, "n d"]
    deviation: Float[Tensor, "n d"]
    bits: float
    nats: float
    success: float


def whole_target(scored: Scored) -> Float[Tensor, " rows"]:
    """Nats of the whole target, as an objective: tokens of weight 0 are left out, others count once."""
    return (scored.nats * (scored.weights > 0)).sum(-1)


def nominal(prompt: SoftPrompt) -> float:
    """32 bits for each coordinate."""
    return float(prompt.vectors.numel() * STORED)


def delivered(lm: LanguageModel, prompt: SoftPrompt, examples: Examples) -> float:
    """Mean bits by which the whole target is likelier with the prompt than without."""
    with_it, without = evaluate(lm, [prompt, SoftPrompt.empty(lm)], examples).nats
    return float((without - with_it).mean()) / math.log(2)


def on_grid(vectors: Float[Tensor, "n d"], bits: int, half_range: float) -> Float[Tensor, "n d"]:
    """Each coordinate in the middle of its cell: 2^bits cells of equal width on [-half_range, half_range]."""
    cell = 2 * half_range / 2**bits
    index = (vectors / cell).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (index + 0.5) * cell


def quantised(
    lm: LanguageModel, prompt: SoftPrompt, examples: Examples, *, threshold: Threshold = MOSTLY, most: int = _MOST
) -> Quantised | None:
    """The coarsest uniform grid on which the prompt still works; None if it does on none of up to `most` bits.

    For each number of bits six half ranges from 1 to 4 RMS are tried. Which one is used is not counted: it is one
    number for the whole prompt.
    """
    passes, size = Passes(lm, examples), float(prompt.vectors.square().mean().sqrt())
    for bits in range(1, most + 1):
        tried = [
            SoftPrompt(on_grid(prompt.vectors, bits, width * size), prompt.position, prompt.facts) for width in _RANGES
        ]
        found = evaluate(lm, tried, examples, passes=passes)
        losses, successes = found.nats.mean(1), found.success
        best = int((losses - 1e3 * threshold.reached(losses, successes)).argmin())
        if threshold.reached(losses[best], successes[best]):
            return Quantised(
                tried[best], bits, float(prompt.vectors.numel() * bits), float(losses[best]), float(successes[best])
            )
    return None


def information(
    mean: Float[Tensor, "*k n d"], log_deviation: Float[Tensor, "*k n d"], rms: float
) -> Float[Tensor, "*k"]:
    """KL(N(mean, deviation^2) || N(0, rms^2)) in bits, summed over n and d."""
    scaled = (log_deviation - math.log(rms)) * 2
    nats = 0.5 * (scaled.exp() + (mean / rms).square() - 1 - scaled)
    return nats.sum((-2, -1)) / math.log(2)


def noise_coded(
    lm: LanguageModel,
    prompt: SoftPrompt,
    examples: Examples,
    held: Examples,
    *,
    threshold: Threshold = MOSTLY,
    prices: Sequence[float] = _PRICES,
    steps: int = 100,
    batch: int = 8,
    lr: float = 0.1,
    seed: int = 0,
    progress: str | None = None,
) -> NoiseCoded | None:
    """Train mean and deviation of a noisy prompt from `prompt` on, one for each price of information, as one batch.

    Loss: nats of the whole target under s + sigma * noise, plus price * KL. Of those that work on `held` under noise,
    the one of the least KL is returned; None if none does. `lr` is in units of the embedding RMS r for
    the means, and plain for log sigma. Raises `SondeError` for a prompt of no vectors.
    """
    if not len(prompt):
        raise SondeError("a prompt of no vectors holds no bits: give one that was trained")
    n, count, rms = len(prompt), len(prices), embedding_rms(lm)
    passes, noise = Passes(lm, examples), torch.Generator().manual_seed(seed)
    coder = nn.ParameterDict(
        {
            "mean": prompt.vectors.detach().cpu().float().repeat(count, 1, 1),
            "log_deviation": torch.full((count, *prompt.vectors.shape), math.log(0.1 * rms)),
        }
    )
    price, places = torch.tensor(prices), cast(list[Position], [prompt.position] * count)
    batches = passes.batches(batch, seed=seed)

    def bank(generator: torch.Generator) -> Tensor:
        drawn = torch.randn(coder["mean"].shape, generator=generator)
        return (coder["mean"] + coder["log_deviation"].exp() * drawn).reshape(count * n, -1)

    def loss(step: int) -> Tensor:
        rows = passes.rows(batches[step % len(batches)], [n] * count, places, generator=noise)
        found = whole_target(passes.score(bank(noise).to(lm.device), rows)).view(count, -1).mean(1).cpu()
        cost = information(coder["mean"], coder["log_deviation"], rms) * math.log(2)
        return (found + price * cost).sum()

    groups = [{"params": [coder["mean"]], "lr": lr * rms}, {"params": [coder["log_deviation"]], "lr": lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    train(coder, loss, [optimizer], steps=steps, schedule=Cosine(), progress=progress)
    with torch.no_grad():
        noisy = [bank(noise).view(count, n, -1) for _ in range(_DRAWS)]
        tested = [SoftPrompt(vectors, prompt.position) for draw in noisy for vectors in draw]
        found = evaluate(lm, tested, held)
        losses, successes = (value.view(_DRAWS, count).mean(0) for value in (found.nats.mean(1), found.success))
        bits = information(coder["mean"], coder["log_deviation"], rms)
    working = [i for i in range(count) if threshold.reached(losses[i], successes[i])]
    if not working:
        return None
    best = min(working, key=lambda i: float(bits[i]))
    mean, deviation = coder["mean"][best].detach(), coder["log_deviation"][best].detach().exp()
    return NoiseCoded(mean, deviation, float(bits[best]), float(losses[best]), float(successes[best]))


def hard_bits(
    lm: LanguageModel,
    examples: Examples,
    held: Examples,
    *,
    lengths: Sequence[int] = (1, 2, 4),
    threshold: Threshold = MOSTLY,
    position: Position = "suffix",
    steps: int = 32,
    seed: int = 0,
) -> float:
    """The n log2 V bits of the shortest prompt of real tokens found on `examples` that works on `held`, or infinity."""
    for n in lengths:
        if n == 1:
            found = best_token(lm, examples, position=position)
        else:
            found = greedy_search(lm, examples, n, position=position, steps=steps, seed=seed)
        told = evaluate(lm, found.soft(lm), held)
        if threshold.reached(float(told.nats.mean()), float(told.success[0])):
            return found.bits
    return math.inf


def measure_bits(
    lm: LanguageModel,
    prompt: SoftPrompt,
    examples: Examples,
    held: Examples,
    *,
    threshold: Threshold = MOSTLY,
    hard_lengths: Sequence[int] = (1, 2, 4),
    steps: int = 100,
    seed: int = 0,
) -> Bits:
    """All five rulers on one trained prompt: fitted on `examples`, told on `held`."""
    coarse = quantised(lm, prompt, held, threshold=threshold)
    noisy = noise_coded(lm, prompt, examples, held, threshold=threshold, steps=steps, seed=seed)
    return Bits(
        nominal=nominal(prompt),
        quantised=math.inf if coarse is None else coarse.bits,
        noise_coded=math.inf if noisy is None else noisy.bits,
        hard=hard_bits(
            lm, examples, held, lengths=hard_lengths, threshold=threshold, position=prompt.position, seed=seed
        ),
        delivered=delivered(lm, prompt, held),
    )
