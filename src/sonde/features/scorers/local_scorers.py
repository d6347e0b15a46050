"""The scorers that need a model of this process in place of one that is asked, put into the form of the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sonde.features.embedding_scores import embedding_score, example_embedding_score
from sonde.features.latent_cache import LEAST
from sonde.features.samplers import Embed
from sonde.features.scorers.generation import Fires
from sonde.features.scorers.ranked import Ranked
from sonde.features.surprisal import SurprisalScorer
from sonde.lm.model import LanguageModel


def embedding(decode: Callable[[Sequence[int]], str], embed: Embed | None = None) -> Ranked:
    """Cosine of explanation and window; without `embed`, of the words that both have."""
    return Ranked("embedding", lambda text, examples: embedding_score(text, examples, decode, embed))


def example_embedding(decode: Callable[[Sequence[int]], str], embed: Embed | None = None) -> Ranked:
    """Cosine of windows with those of the explainer; it needs no explanation."""
    return Ranked(
        "example-embedding", lambda _, examples: example_embedding_score(examples, decode, embed), explained=False
    )


def surprisal(lm: LanguageModel) -> Ranked:
    """How much less a window surprises `lm` after the explanation."""
    scorer = SurprisalScorer(lm)
    return Ranked("surprisal", scorer.score)


def fires(lm: LanguageModel, encoders: Mapping[str, Any]) -> Fires:
    """Run texts through `lm` and give a latent's largest activation in each, and its number of tokens."""

    @torch.no_grad()
    def largest(hookpoint: str, latent: int, texts: Sequence[str]) -> list[tuple[float, int]]:
        encoder = encoders[hookpoint]
        site = getattr(encoder, "site", None) or hookpoint
        found = []
        for text in texts:
            ids = lm.encode(text)[: lm.context]
            with lm.reading(site) as acts:
                lm(torch.tensor([ids]))
            values, indices = encoder.encode(acts[site][0].float())
            own = values[indices == latent]
            top = float(own.max()) if len(own) else 0.0
            found.append((top if top > LEAST else 0.0, len(ids)))
        return found

    return largest
