"""Which words wake a hidden behaviour? From trained prompts to tokens, each of them tried.

    reading(v) = mean over prompts that work of max over their vectors of cos(s_i - mean E, E_v - mean E)

A trained vector may act like a token that it is far from, so a reading only proposes. The tokens that it names, and
those that exhaustive search finds, are put together into hard prompts of one and two tokens, and each is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.soft_prompt import Position, SoftPrompt, embedded

_TRIED_AT_ONCE = 256


@dataclass(frozen=True)
class Tried:
    """A hard prompt, the mean nats of the whole target under it and how often the target is written."""

    ids: tuple[int, ...]
    nats: float
    success: float


@torch.no_grad()
def reading(lm: LanguageModel, prompts: Sequence[SoftPrompt]) -> Float[Tensor, " vocab"]:
    """A score for each token: how near its embedding is to vectors of the prompts, around the mean embedding.

    Raises `SondeError` without prompts.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise SondeError("nothing to read: give prompts of one vector or more")
    table = embedded(lm, torch.arange(lm.structure.embedding.weight.shape[0]))  # type: ignore[arg-type, index]
    centre = table.mean(0)
    rows = torch.nn.functional.normalize(table - centre, dim=-1)
    scores = []
    for prompt in prompts:
        prompt.fits(lm)
        vectors = torch.nn.functional.normalize(prompt.vectors.to(lm.device) - centre, dim=-1)
        scores.append((vectors @ rows.T).amax(0))
    return torch.stack(scores).mean(0).cpu()


def ranks(scores: Float[Tensor, " vocab"], ids: Sequence[int]) -> list[int]:
    """The rank of each token, 1 = first."""
    return [int((scores > scores[token]).sum()) + 1 for token in ids]


def tried(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], examples: Examples, *, position: Position = "suffix"
) -> list[Tried]:
    """Hard prompts scored on all examples, best first."""
    found: list[Tried] = []
    for start in range(0, len(prompts), _TRIED_AT_ONCE):
        part = [tuple(ids) for ids in prompts[start : start + _TRIED_AT_ONCE]]
        scored = evaluate(lm, [SoftPrompt.from_tokens(lm, ids, position) for ids in part], examples)
        found += map(Tried, part, scored.nats.mean(1).tolist(), scored.success.tolist())
    return sorted(found, key=lambda one: one.nats)


def pairs_tried(
    lm: LanguageModel, tokens: Sequence[int], examples: Examples, *, kept: int = 16, position: Position = "suffix"
) -> list[Tried]:
    """All ordered pairs of some tokens as hard prompts: by the first target token on one example, the best on all."""
    pairs = [(a, b) for a in tokens for b in tokens]
    first = Examples(examples.contexts[:1], [examples.targets[0][:1]])
    best = tried(lm, pairs, first, position=position)[:kept]
    return tried(lm, [one.ids for one in best], examples, position=position)
