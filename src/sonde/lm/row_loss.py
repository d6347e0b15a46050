"""What a model loses on each row of a text under an edit, and how much of that is how sure it is.

Bits per byte are sums over rows, so that two edits are compared on the same rows (paired) with an interval from
resampling them. An edit also changes how sure a model is: on text unlike that of its training a model is too sure, and
whatever makes it less so lowers the loss. With the logits divided by the best temperature of each (Guo et al. 2017,
arXiv:1706.04599), losses compare what the models know.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.lm.batches import TokenBatch, TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.taps import Edit
from sonde.stats.information import cross_entropy, log_probs
from sonde.stats.intervals import Interval, bootstrap_ratio

_STEP = 2**0.25
_TEMPERATURES = tuple(_STEP**i for i in range(-4, 7))


@dataclass(frozen=True)
class RowLoss:
    """Loss of a model on rows of text: nats and tokens summed over each row's scored tokens, bytes that these cover.

    tempered: nats with the logits divided by a temperature; the same as `nats` where there is none.
    chunks: the row's number in the text, by which losses of one text under several edits are paired.
    """

    nats: Float[np.ndarray, " rows"]
    tempered: Float[np.ndarray, " rows"]
    tokens: Float[np.ndarray, " rows"]
    bytes: Float[np.ndarray, " rows"]
    chunks: Int[np.ndarray, " rows"]

    def bits_per_byte(
        self, *, tempered: bool = False, clusters: Int[np.ndarray, " rows"] | None = None, seed: int = 0
    ) -> Interval:
        """Bits per byte; bootstrap over rows, or clusters of rows."""
        nats = self.tempered if tempered else self.nats
        return bootstrap_ratio(nats / math.log(2), self.bytes, clusters, seed=seed)

    def above(
        self,
        other: "RowLoss",
        *,
        tempered: bool = False,
        clusters: Int[np.ndarray, " rows"] | None = None,
        seed: int = 0,
    ) -> Interval:
        """Bits per byte more than `other` on the same rows, paired."""
        if not np.array_equal(self.chunks, other.chunks):
            raise ValueError("losses of different rows cannot be paired")
        more = self.tempered - other.tempered if tempered else self.nats - other.nats
        return bootstrap_ratio(more / math.log(2), self.bytes, clusters, seed=seed)

    @staticmethod
    def joined(parts: "Sequence[RowLoss]") -> "RowLoss":
        """Rows of several one after another; a row that occurs twice keeps its number in `chunks`."""
        return RowLoss(
            **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(RowLoss)}
        )


@torch.no_grad()
def row_loss(
    lm: LanguageModel,
    batches: TokenBatches,
    edits: Mapping[str, Edit] | None = None,
    *,
    temperature: float = 1.0,
    progress: str | None = None,
) -> RowLoss:
    """Score a text under `edits` (by site), also with the logits divided by `temperature`."""
    nats: list[float] = []
    tempered: list[float] = []
    rows = tqdm(batches, desc=progress, unit="batch", disable=progress is None)
    for _, losses in _losses(lm, rows, edits or {}, (1.0, temperature) if temperature != 1 else (1.0,)):
        nats += losses[:, 0].tolist()
        tempered += losses[:, -1].tolist()
    tokens, sizes, chunks = (
        torch.cat(column).numpy()
        for column in zip(*((b.scored.sum(-1), b.n_bytes, b.chunks) for b in batches), strict=True)
    )
    return RowLoss(np.array(nats), np.array(tempered), tokens.astype(float), sizes.astype(float), chunks)


@torch.no_grad()
def best_temperature(
    lm: LanguageModel, batches: TokenBatches, edits: Mapping[str, Edit] | None = None, *, rows: int = 8
) -> float:
    """The temperature, from 0.5 to 2.8, at which `lm` under `edits` predicts the first rows of a text best.

    An edit also changes how sure a model is. On text unlike that of its training a model is too sure, and whatever
    makes it less so lowers the loss: taken at the best temperature of each, losses compare what the models know.
    """
    total = torch.zeros(len(_TEMPERATURES), dtype=torch.float64)
    seen = 0
    for batch, losses in _losses(lm, batches, edits or {}, _TEMPERATURES):
        total += losses[: rows - seen].sum(0)
        seen += len(batch.tokens)
        if seen >= rows:
            break
    best = int(total[1:-1].argmin()) + 1
    before, at, after = total[best - 1 : best + 2].tolist()
    bend = before - 2 * at + after
    shift = 0.0 if bend <= 0 else max(-0.5, min(0.5, 0.5 * (before - after) / bend))
    return _TEMPERATURES[best] * _STEP**shift


def _losses(
    lm: LanguageModel, batches: Iterable[TokenBatch], edits: Mapping[str, Edit], temperatures: Sequence[float]
) -> Iterator[tuple[TokenBatch, Float[Tensor, "batch temperatures"]]]:
    """Nats summed over each row's scored tokens."""
    for batch in batches:
        with lm.editing(edits):
            logits = lm(batch.tokens, batch.mask).logits
        assert logits is not None
        ids, scored = batch.tokens.to(lm.device), batch.scored.to(lm.device)
        # Row by row: log-probabilities of a whole batch would double the memory that its logits take.
        losses = [
            [cross_entropy(log_probs(row[:-1] / t), target[1:])[real[1:]].double().sum().item() for t in temperatures]
            for row, target, real in zip(logits, ids, scored, strict=True)
        ]
        yield batch, torch.tensor(losses, dtype=torch.float64)
