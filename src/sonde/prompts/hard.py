"""The best prompt of real tokens, and what it costs: n log2 V bits.

One token: every token of the vocabulary is tried. More: greedy coordinate search. The gradient of the loss by the
prompt's vectors says, to first order, what each token at each place would change; of the best by that guess some are
tried, and the best that was tried is kept (the idea of Zou et al. 2023, arXiv:2307.15043; the search is our own). It
finds a good prompt, not the best: its bits are an upper bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import Position, SoftPrompt, embedded

_FIRST = 2  # examples on which all tokens are tried; the best go on to all examples
_KEPT = 64
_BATCH = 16
_ROWS = 1024  # in a pass


@dataclass(frozen=True)
class HardPrompt:
    """Token ids, the mean nats of the whole target under them, and the runners-up as (ids, nats), best first."""

    ids: tuple[int, ...]
    nats: float
    others: tuple[tuple[tuple[int, ...], float], ...]
    position: Position
    vocabulary: int

    @property
    def bits(self) -> float:
        """The number of tokens times log2 V."""
        return len(self.ids) * math.log2(self.vocabulary)

    def soft(self, lm: LanguageModel) -> SoftPrompt:
        """The same prompt as vectors."""
        return SoftPrompt.from_tokens(lm, self.ids, self.position)


@torch.no_grad()
def best_token(
    lm: LanguageModel,
    examples: Examples,
    *,
    position: Position = "suffix",
    kept: int = _KEPT,
    progress: str | None = None,
) -> HardPrompt:
    """The best prompt of one token: all are tried on the first two examples, the best `kept` of them on all.

    Special tokens are left out. `others` has the `kept` best but one.
    """
    passes = Passes(lm, examples)
    ids = torch.tensor(_allowed(lm))
    few = [[i] for i in range(min(_FIRST, len(examples)))]
    parts = tqdm(ids.split(_ROWS), desc=progress, disable=progress is None)
    nats = torch.cat([_losses(passes, part[:, None], position, few) for part in parts])
    first = ids[nats.argsort()[: max(kept, 1)]]
    return _ranked(passes, first[:, None], position)


def greedy_search(
    lm: LanguageModel,
    examples: Examples,
    n: int,
    *,
    position: Position = "suffix",
    steps: int = 32,
    tried: int = 64,
    best: int = 16,
    batch: int = 8,
    start: Sequence[int] | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> HardPrompt:
    """A good prompt of `n` tokens by greedy coordinate search.

    In each step the `best` tokens of each place by the gradient are candidates, `tried` single exchanges of them are
    scored on `batch` examples, and the best is kept if it is an improvement there. `start` is a prompt to begin with;
    by default random tokens. Raises `SondeError` for n < 1 and for a start of another length.
    """
    if n < 1 or (start is not None and len(start) != n):
        raise SondeError(f"a hard prompt of {n} tokens from a start of {0 if start is None else len(start)}")
    passes, generator = Passes(lm, examples), torch.Generator().manual_seed(seed)
    allowed = torch.tensor(_allowed(lm))
    table = embedded(lm, allowed)
    now = torch.tensor(start) if start is not None else allowed[torch.randint(len(allowed), (n,), generator=generator)]
    seen = {tuple(now.tolist())}
    batches = passes.batches(batch, seed=seed)
    for step in tqdm(range(steps), desc=progress, disable=progress is None):
        members = batches[step % len(batches)]
        bank = embedded(lm, now).requires_grad_()
        loss = passes.score(bank, passes.rows(members, [n], [position])).nats
        (gradient,) = torch.autograd.grad(loss.sum(), bank)
        candidates = allowed[(-(gradient @ table.T)).topk(min(best, len(allowed)), dim=1).indices.cpu()]
        places = torch.randint(n, (tried,), generator=generator)
        picks = torch.randint(candidates.shape[1], (tried,), generator=generator)
        changed = now.repeat(tried + 1, 1)
        changed[torch.arange(tried), places] = candidates[places, picks]
        with torch.no_grad():
            nats = _losses(passes, changed, position, [members])
        now = changed[int(nats.argmin())]
        seen.add(tuple(now.tolist()))
    return _ranked(passes, torch.tensor(sorted(seen)), position)


def _ranked(passes: Passes, prompts: Int[Tensor, "prompts n"], position: Position) -> HardPrompt:
    with torch.no_grad():
        nats = _losses(passes, prompts, position, passes.batches(_BATCH))
    order = nats.argsort().tolist()
    ranked = [(tuple(prompts[i].tolist()), float(nats[i])) for i in order]
    size = len(_allowed(passes.lm))
    return HardPrompt(ranked[0][0], ranked[0][1], tuple(ranked[1:]), position, size)


def _losses(
    passes: Passes, prompts: Int[Tensor, "prompts n"], position: Position, batches: Sequence[Sequence[int]]
) -> Float[Tensor, " prompts"]:
    """Mean nats of the whole target of each prompt over batches of examples."""
    n = prompts.shape[1]
    total, size = torch.zeros(len(prompts)), max(1, _ROWS // max(len(batch) for batch in batches))
    for batch in batches:
        for begin in range(0, len(prompts), size):
            part = prompts[begin : begin + size]
            places: list[Position] = [position] * len(part)
            rows = passes.rows(batch, [n] * len(part), places)
            scored = passes.score(embedded(passes.lm, part.flatten()), rows)
            nats = (scored.nats * (scored.weights > 0)).sum(1)
            total[begin : begin + size] += nats.view(len(part), len(batch)).sum(1).cpu()
    return total / sum(len(batch) for batch in batches)


def _allowed(lm: LanguageModel) -> list[int]:
    """Tokens that text can hold."""
    special = set() if lm.tokenizer is None else set(lm.tokenizer.all_special_ids)
    size = min(lm.vocab_size, lm.structure.embedding.weight.shape[0])  # type: ignore[arg-type, index]
    size = size if lm.tokenizer is None else min(size, len(lm.tokenizer))
    return [token for token in range(size) if token not in special]
