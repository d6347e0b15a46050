"""How well does a small language model predict text it has not read, and how much better than counting?

A document is cut into windows of the model's context that overlap by half; each token is scored once, in the window
where it has at least half a context before it (all that there is, at the start of a document). Bits per byte: the sum
of -log2 p(token) over the number of bytes, which does not depend on the tokenizer. The baseline is an n-gram model
of the same training tokens, scored on the same tokens. Intervals: a bootstrap over blocks of half a context, because
neighbouring tokens are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.stats.information import cross_entropy, log_probs
from sonde.stats.intervals import Interval, bootstrap_mean, bootstrap_ratio
from sonde.stats.ngram import NgramModel

COST = "help() of Python: rise of bits per token over the base"


@dataclass(frozen=True)
class Score:
    """Bits per byte of one text, by the model and by the n-gram baseline, and the baseline minus the model."""

    text: str
    bytes: int
    tokens: int
    model: Interval
    ngram: Interval
    gain: Interval


def score(
    name: str,
    documents: Sequence[str],
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    ngram: NgramModel,
    context: int | None = None,
    seed: int = 0,
) -> Score:
    """Score `documents`, together called `name`, by `model` (in a precision that it computes in) and by `ngram`.

    `context` is the length of the windows, by default the most that the model takes.
    """
    context = context or int(model.config.max_position_embeddings)  # type: ignore[arg-type]
    block = context // 2
    rows: list[np.ndarray] = []
    tokens = 0
    for document in documents:
        ids = np.array([tokenizer.eos_token_id, *tokenizer(document)["input_ids"]])
        widths = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(ids[1:].tolist())])
        tokens += len(widths)
        columns = np.stack([token_nats(model, ids, context=context), -ngram.log_prob(ids)[1:], widths])
        rows += [part.sum(1) for part in np.split(columns, range(block, columns.shape[1], block), axis=1)]
    sums = np.stack(rows)
    nats, counted, width = sums.T / [[math.log(2)], [math.log(2)], [1]]
    size = sum(len(document.encode()) for document in documents)
    return Score(
        name,
        size,
        tokens,
        bootstrap_ratio(nats, width, seed=seed),
        bootstrap_ratio(counted, width, seed=seed),
        bootstrap_ratio(counted - nats, width, seed=seed),
    )


@torch.inference_mode()
def token_nats(
    model: PreTrainedModel, ids: Int[np.ndarray, " n"], *, context: int | None = None, batch: int = 8
) -> Float[np.ndarray, " n-1"]:
    """-log p of every token but the first, in nats, given at least half a context of what stands before it."""
    context = context or int(model.config.max_position_embeddings)  # type: ignore[arg-type]
    half = context // 2
    starts = range(0, max(1, len(ids) - half), half)
    windows = np.zeros((len(starts), context), dtype=np.int64)
    for row, start in zip(windows, starts, strict=True):
        part = ids[start : start + context]
        row[: len(part)] = part
    out = np.zeros(len(ids) - 1)
    for first in range(0, len(windows), batch):
        tokens = torch.from_numpy(windows[first : first + batch]).to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
        for row, start in zip(nats.double().cpu().numpy(), starts[first : first + batch], strict=True):
            begin = 0 if start == 0 else half - 1
            end = min(context - 1, len(ids) - 1 - start)
            out[start + begin : start + end] = row[begin:end]
    return out


@torch.no_grad()
def rise_over(base: LanguageModel, lm: LanguageModel) -> Interval:
    """What fine-tuning cost on text that neither has read: bits per token of Python's help topics more than `base`."""
    from sonde.data.python_docs import topics

    text = TokenBatches(topics(), lm.tokenizer, context=256, limit_tokens=16384)  # type: ignore[arg-type]
    rows: list[Tensor] = []
    for batch in text:
        nats = []
        for one in (lm, base):
            logits = one(batch.tokens).logits
            assert logits is not None
            nats.append(cross_entropy(log_probs(logits[:, :-1]), batch.tokens[:, 1:]).mean(1))
        rows.append((nats[0] - nats[1]) / math.log(2))
    return bootstrap_mean(torch.cat(rows).double().numpy())
