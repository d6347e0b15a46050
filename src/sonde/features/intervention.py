"""What does a latent do? Add to it, see which text comes, and ask whether the explanation fits that text better.

A dictionary reads x = decode(f) + error. Adding a to latent i and keeping the error gives x + a W_dec[i], at the last
token of a prompt and at every token after it, also while decoding from the cache (the original steers only the prompt's
last token there). Strengths are comparable by what they do: a is chosen so that the mean KL(clean || steered) of the
next token hits a target. Setting the latent to zero, x - f_i W_dec[i], has no strength to choose. The score of an
explanation is E[log p(explanation | prompt, steered text) - log p(explanation | prompt, clean text)] in nats over
prompts (Paulo et al. 2410.13928).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.latent_cache import LatentCache
from sonde.lm.continuation import continuation
from sonde.lm.generation import left_padded
from sonde.lm.model import LanguageModel, Past
from sonde.lm.prompt_rows import like_lengths
from sonde.lm.taps import Edit
from sonde.stats.information import kl, log_probs

_BATCH = 64
_RANGE = (-3.0, 4.0)  # of log10 of the strength
_EVALUATIONS = 10
_WITHIN = 0.1
_FLOOR = 1e-12  # a KL below this is rounding
_FEWEST = 2

Prompts = Sequence[Sequence[int]]
Likelihood = Callable[[Sequence[str], str], Float[np.ndarray, " n"]]
"""log p(explanation | text) in nats of every text."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change at one site that acts on the last token of a prompt and on all that follow.

    Attributes:
        site: where.
        edit: from a strength to the change of activations there.

    """

    site: str
    edit: Callable[[float], Edit]

    def on(self, lm: LanguageModel, strength: float) -> Any:
        """The context in which the model is changed."""
        return lm.editing({self.site: self.edit(strength)}, positions=slice(-1, None))


@dataclass(frozen=True)
class Strength:
    """A strength and what it does.

    Attributes:
        value: of the intervention.
        kl: mean KL(clean || steered) of the next token, in nats.
        evaluations: passes that the search took.
        met: whether `kl` is within a tenth of the target.

    """

    value: float
    kl: float
    evaluations: int
    met: bool


def adding(site: str, direction: Float[Tensor, " d"]) -> Intervention:
    """Add a multiple of a direction: a latent's decoder row, or a random one of its length as the control."""
    return Intervention(site, lambda strength: lambda x: x + strength * direction.to(x.dtype))


def latent_addition(dictionary: Any, latent: int, *, site: str | None = None) -> Intervention:
    """Add to a latent of a `Dictionary`, where it writes. Raises `SondeError` where it does not say where that is."""
    where = site or (dictionary.target if dictionary.design.transcodes else dictionary.site)
    if where is None:
        raise SondeError("this dictionary does not say which site it writes to: give one")
    return adding(where, dictionary.w_dec[latent].detach().float())


def latent_ablation(dictionary: Any, latent: int, *, site: str | None = None) -> Intervention:
    """Take away what a latent of an autoencoder adds: x - f_i W_dec[i]. The strength is not used."""
    where = site or dictionary.site
    if where is None or dictionary.design.transcodes:
        raise SondeError(
            "a latent is set to zero at the site that it reads and writes: give an autoencoder and its site"
        )
    row = dictionary.w_dec[latent].detach().float()

    def ablated(x: Tensor) -> Tensor:
        return x - dictionary.latents_of(x.float(), [latent]).to(x.dtype) * row.to(x.dtype)

    return Intervention(where, lambda strength: ablated)


def firing_prompts(
    cache: LatentCache, hookpoint: str, latent: int, *, count: int, most: int = 64, least: int = 2, seed: int = 0
) -> list[list[int]]:
    """Prompts that end at the first token of a sequence at which the latent fires, of `least` to `most` tokens."""
    found = cache.latent(hookpoint, latent)
    sequence, first = np.unique(found.sequence, return_index=True)
    ends = found.position[first]
    usable = np.flatnonzero(ends + 1 >= least)
    chosen = np.random.default_rng([seed, latent]).permutation(usable)[:count]
    return [cache.tokens[sequence[i], max(0, ends[i] + 1 - most) : ends[i] + 1].tolist() for i in chosen.tolist()]


class NextTokens:
    """The next token after each of some prompts, under any intervention. What comes before the last token runs once."""

    def __init__(self, lm: LanguageModel, prompts: Prompts, *, batch: int = _BATCH) -> None:
        if not prompts or min(map(len, prompts)) < _FEWEST:
            raise SondeError(f"an intervention needs prompts of at least {_FEWEST} tokens")
        self._lm, self.prompts = lm, [list(prompt) for prompt in prompts]
        how = continuation(lm.model)
        self._groups: list[tuple[list[int], Tensor, Tensor, Past | None]] = []
        for numbers in like_lengths([len(prompt) for prompt in prompts], batch, equal=how.ignores_mask):
            tokens, mask = left_padded([self.prompts[i] for i in numbers], lm.device)
            past = None
            if how.mode != "none":
                with torch.no_grad():
                    past = lm(tokens[:, :-1], mask[:, :-1], use_cache=True).past
            self._groups.append((numbers, tokens, mask, past))
        self.clean = self.log_probs(None)

    @torch.no_grad()
    def log_probs(self, intervention: Intervention | None, strength: float = 1.0) -> Float[Tensor, "prompts vocab"]:
        """Log-probabilities of the next token."""
        out: list[Tensor | None] = [None] * len(self.prompts)
        for numbers, tokens, mask, past in self._groups:
            with nullcontext() if intervention is None else intervention.on(self._lm, strength):
                if past is None:
                    logits = self._lm(tokens, mask).logits
                else:
                    copy = past.select(torch.arange(len(tokens)))
                    logits = self._lm(tokens[:, -1:], mask[:, -1:], past=copy).logits
            assert logits is not None
            for number, row in zip(numbers, log_probs(logits[:, -1]).cpu(), strict=True):
                out[number] = row
        return torch.stack([row for row in out if row is not None])

    def divergence(self, intervention: Intervention, strength: float) -> float:
        """Mean KL(clean || steered) of the next token in nats."""
        return max(_FLOOR, float(kl(self.clean.double(), self.log_probs(intervention, strength).double()).mean()))


def find_strength(target: float, divergence: Callable[[float], float], *, evaluations: int = _EVALUATIONS) -> Strength:
    """The strength in [1e-3, 1e4] at which `divergence` is within a tenth of `target`.

    For small strengths KL grows as their square, so a step goes along that line in log-log coordinates, and is at least
    twice the last one while the target is still on the same side. Once it lies between two strengths, a step goes along
    the line through them, and every third one to their middle. Where the KL levels off below the target, or has not
    met it after `evaluations`, the nearest found is returned as not met.
    """
    if not target > 0:
        raise SondeError(f"the target KL is {target}: give a number of nats above 0, such as 0.1")
    low, high = _RANGE
    points: dict[float, float] = {}  # log10 of the strength: log10 of KL over target
    below: float | None = None
    above: float | None = None
    x, step = 0.5, 0.0
    for done in range(1, evaluations + 1):
        y = math.log10(divergence(10**x) / target)
        points[x] = y
        if 1 - _WITHIN <= 10**y <= 1 + _WITHIN:
            return Strength(10**x, target * 10**y, done, True)
        if y < 0:
            below = x if below is None else max(below, x)
        else:
            above = x if above is None else min(above, x)
        left, right = low if below is None else below, high if above is None else above
        if below is None or above is None:
            step = math.copysign(max(abs(y) / 2, 2 * abs(step)), -y)
            x = min(max(x + step, low), high)
            if x in points:
                break
        else:
            share = -points[below] / (points[above] - points[below])
            # every third step halves, in case the line keeps one end
            x = left + (right - left) * (0.5 if done % 3 == 0 else min(max(share, 0.05), 0.95))
    best = min(points, key=lambda place: abs(points[place]))
    return Strength(10**best, target * 10 ** points[best], len(points), False)


def increases(
    next_tokens: NextTokens, intervention: Intervention, strength: float, *, most: int = 5
) -> list[list[tuple[int, float]]]:
    """For each prompt the tokens whose probability rises most, and by how much: what an explainer is shown."""
    rise = next_tokens.log_probs(intervention, strength).exp() - next_tokens.clean.exp()
    values, ids = rise.topk(most, dim=-1)
    return [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(ids, values, strict=True)]


def continued(
    lm: LanguageModel,
    prompts: Prompts,
    intervention: Intervention | None,
    strength: float = 1.0,
    *,
    tokens: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """A sampled continuation of every prompt, as text without the prompt."""
    with nullcontext() if intervention is None else intervention.on(lm, strength):
        new = lm.generate(
            [list(prompt) for prompt in prompts], max_new_tokens=tokens, temperature=temperature, seed=seed
        )
    return [lm.decode(ids) for ids in new]


@dataclass(frozen=True, eq=False)
class EffectScore:
    """How much likelier the effect makes an explanation, chosen on one half of the prompts and reported on the other.

    Attributes:
        explanation: the one of the largest mean gain on the first half.
        gains: Float[np.ndarray, "prompts"] in nats on the second half.
        best_of_all: largest mean gain of any explanation over all prompts, which is optimistic.

    """

    explanation: str
    gains: Float[np.ndarray, " prompts"]
    best_of_all: float

    @property
    def mean(self) -> float:
        """The score, in nats."""
        return float(self.gains.mean())


def effect_score(
    explanations: Sequence[str], likelihood: Likelihood, steered: Sequence[str], clean: Sequence[str]
) -> EffectScore:
    """Score explanations of one intervention; `steered` and `clean` are texts of the same prompts, in random order.

    Raises `SondeError` for no explanation and for fewer than two prompts.
    """
    given = [text for text in explanations if text.strip()]
    if not given:
        raise SondeError("there is no explanation to score: all are empty")
    if len(steered) != len(clean) or len(steered) < _FEWEST:
        raise SondeError(f"{len(steered)} steered and {len(clean)} clean texts: give two or more pairs")
    gains = np.stack([likelihood(steered, text) - likelihood(clean, text) for text in given])
    half = len(steered) // 2
    best = int(gains[:, :half].mean(1).argmax())
    return EffectScore(given[best], gains[best, half:], float(gains.mean(1).max()))


class FewShotLikelihood:
    """log p(explanation | text) under a language model that has seen worked examples.

    Args:
        lm: the model.
        shots: pairs of a text and what is said of it.
        batch: texts at once.

    """

    def __init__(self, lm: LanguageModel, shots: Sequence[tuple[str, str]], *, batch: int = 16) -> None:
        self._lm, self._batch = lm, batch
        self._head = "".join(_case(text, f" {said}\n\n") for text, said in shots)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], explanation: str) -> Float[np.ndarray, " n"]:
        """Nats of the explanation's tokens after each text."""
        said = self._lm.encode(f" {explanation}")
        rows = [self._lm.encode(self._head + _case(text, "")) + said for text in texts]
        out = np.zeros(len(rows))
        equal = continuation(self._lm.model).ignores_mask
        for numbers in like_lengths([len(row) for row in rows], self._batch, equal=equal):
            tokens, mask = left_padded([rows[i] for i in numbers], self._lm.device)
            logits = self._lm(tokens, mask).logits
            assert logits is not None
            logp = log_probs(logits[:, -len(said) - 1 : -1])
            out[numbers] = logp.gather(-1, tokens[:, -len(said) :, None])[..., 0].sum(-1).double().cpu().numpy()
        return out


def _case(text: str, said: str) -> str:
    return f"Text: {text}\nThe text is about:{said}"
