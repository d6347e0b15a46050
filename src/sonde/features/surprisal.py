"""Does a text surprise a language model less once it has read the explanation?

A window's value is the mean over its tokens of l(nothing) - l(explanation): the loss after a prompt about unrelated
sentences minus the loss after one that holds the explanation. The score is the AUC of active against silent windows.
Each prompt runs once and leaves its memory; every batch continues from a copy of it, because continuing writes into
it, and a shared one would show each batch the texts of those before.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from sonde.errors import SondeError
from sonde.features.local_scores import Ranking, ranking
from sonde.features.samplers import LatentExamples
from sonde.features.windows import Window
from sonde.lm.model import LanguageModel, Past
from sonde.stats.information import cross_entropy, log_probs

EXPLAINED = "The following sentences have this in common: {explanation}.\n\n"
UNRELATED = "The following are various unrelated sentences.\n\n"
_BATCH = 32


class SurprisalScorer:
    """Scores explanations with one language model; the prompt without explanation runs once.

    Args:
        lm: the model, whose tokenizer made the windows' tokens.
        explained: the prompt, with `{explanation}` in it.
        unrelated: the prompt of the comparison.
        batch: windows at once.

    Raises:
        SondeError: for a prompt without its place, a model without tokenizer, one that cannot continue from its cache.

    """

    def __init__(
        self, lm: LanguageModel, *, explained: str = EXPLAINED, unrelated: str = UNRELATED, batch: int = _BATCH
    ) -> None:
        if "{explanation}" not in explained:
            raise SondeError("the prompt of the surprisal scorer needs {explanation} in it")
        self._lm, self._explained, self._batch = lm, explained, batch
        self._nothing = _prompt(lm, unrelated)

    def score(self, explanation: str, examples: LatentExamples) -> Ranking:
        """The value of every test window. Raises `SondeError` for an empty explanation, and one too long to fit."""
        if not explanation.strip():
            raise SondeError(
                f"latent {examples.latent} has an empty explanation: it is stored as failed and not scored"
            )
        prompt = _prompt(self._lm, self._explained.replace("{explanation}", explanation))
        groups = (examples.test, examples.negatives)
        return ranking(*(self._losses(self._nothing, group) - self._losses(prompt, group) for group in groups))

    def _losses(self, prompt: "_Prompt", windows: Sequence[Window]) -> Float[np.ndarray, " n"]:
        """Mean loss of each window's tokens after the prompt, in nats."""
        found = [
            prompt.losses(
                self._lm, torch.from_numpy(np.stack([w.tokens for w in windows[start : start + self._batch]]))
            )
            for start in range(0, len(windows), self._batch)
        ]
        return np.concatenate(found) if found else np.zeros(0)


class _Prompt:
    def __init__(self, past: Past, last: torch.Tensor) -> None:
        self._past, self._last = past, last

    @torch.no_grad()
    def losses(self, lm: LanguageModel, tokens: Int[torch.Tensor, "batch pos"]) -> Float[np.ndarray, " batch"]:
        tokens = tokens.long().to(lm.device)
        held = self._past.mask.shape[1]
        if lm.max_positions is not None and held + tokens.shape[1] > lm.max_positions:
            raise SondeError(
                f"prompt and window take {held + tokens.shape[1]} tokens, {lm.name} has {lm.max_positions} positions"
            )
        copy = self._past.select(torch.zeros(len(tokens), dtype=torch.long))
        logits = self._last.expand(len(tokens), 1, -1)
        if tokens.shape[1] > 1:
            after = lm(tokens[:, :-1], past=copy).logits
            assert after is not None
            logits = torch.cat([logits, after], 1)
        return cross_entropy(log_probs(logits), tokens).mean(-1).double().cpu().numpy()


@torch.no_grad()
def _prompt(lm: LanguageModel, text: str) -> _Prompt:
    out = lm(torch.tensor([lm.encode(text)]), use_cache=True)
    assert out.logits is not None and out.past is not None
    return _Prompt(out.past, out.logits[:, -1:])
