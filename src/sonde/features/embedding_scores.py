"""Is an explanation nearer to the windows of its latent than to others, in an embedding of texts?

*Embedding*: the explanation is a query, the windows are documents, and the score is the AUC of their cosines.
*Example-embedding* needs no explanation: a window's value is its mean cosine with the explainer's active windows minus
that with silent ones (Paulo and Belrose 2507.08473). The embedding is any callable from texts to vectors: a sentence
encoder, or `WordOverlap`, which needs no model and tells whether the words of the explanation are in the window.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.features.local_scores import Ranking, ranking
from sonde.features.samplers import Embed, LatentExamples, unit
from sonde.features.windows import Window

Decode = Callable[[Sequence[int]], str]
RETRIEVAL = "Instruct: Retrieve texts that the given description fits.\nQuery: "
_WORD = re.compile(r"\w+")


class WordOverlap:
    """Texts as counts of words, each weighted by how rare it is among `texts`: log((1 + n) / (1 + texts with it)) + 1.

    Words that none of these texts holds are left out, so the cosine of an explanation with a window grows with the rare
    words that both have.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        held = Counter(word for text in texts for word in set(_words(text)))
        self._place = {word: i for i, word in enumerate(sorted(held))}
        rare = np.log((1 + len(texts)) / (1 + np.array([held[word] for word in self._place], dtype=np.float64)))
        self._weight = rare + 1

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n words"]:
        """One row for each text, at length 1; zeros for a text without a known word."""
        out = np.zeros((len(texts), len(self._place)))
        for row, text in enumerate(texts):
            for word, count in Counter(_words(text)).items():
                if word in self._place:
                    out[row, self._place[word]] = count
        return unit(out * self._weight)


def embedding_score(
    explanation: str, examples: LatentExamples, decode: Decode, embed: Embed | None = None, *, prompt: str = RETRIEVAL
) -> Ranking:
    """Cosine of the explanation with every test window.

    Args:
        explanation: in words. Raises `SondeError` where it is empty.
        examples: of the latent.
        decode: token ids to text.
        embed: texts to vectors; None for `WordOverlap` of the windows themselves.
        prompt: what goes before the explanation, where the embedding is one that was trained on queries.

    """
    if not explanation.strip():
        raise SondeError(f"latent {examples.latent} has an empty explanation: it is stored as failed and not scored")
    texts = [_texts(windows, decode) for windows in (examples.test, examples.negatives)]
    query = explanation if embed is None else prompt + explanation
    embed = embed or WordOverlap([*texts[0], *texts[1]])
    towards = unit(embed([query]))[0]
    return ranking(*(_cosines(embed, part, towards) for part in texts))


def example_embedding_score(examples: LatentExamples, decode: Decode, embed: Embed | None = None) -> Ranking:
    """How much nearer every test window is to the explainer's active windows than to the silent ones."""
    parts = (examples.train, examples.train_negatives, examples.test, examples.negatives)
    texts = [_texts(windows, decode) for windows in parts]
    if not texts[0] or not texts[1]:
        raise SondeError("example-embedding compares with active and silent windows of the explainer: sample both")
    embed = embed or WordOverlap([*texts[0], *texts[1]])
    towards = unit(embed(texts[0])).mean(0) - unit(embed(texts[1])).mean(0)
    return ranking(*(_cosines(embed, part, towards) for part in texts[2:]))


def _texts(windows: Sequence[Window], decode: Decode) -> list[str]:
    return [decode(window.tokens.tolist()) for window in windows]


def _cosines(embed: Embed, texts: Sequence[str], towards: Float[np.ndarray, " d"]) -> Float[np.ndarray, " n"]:
    return unit(embed(texts)) @ towards if texts else np.zeros(0)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
