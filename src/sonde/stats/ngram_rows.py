"""How far is a network's prediction from that of an n-gram model, at many contexts at once? No table is made dense.

Row i is p_i = s_i + r_i b: a sparse part s_i (what stands in the tables after its context), and the weight r_i of one
distribution b over the vocabulary that all rows share (that of a token after nothing; r = 0 without smoothing). With
logits y, log q = y - logsumexp(y), and with S the non-zeros of s:

    KL(p || q) = sum_S (p log p - r b log r b) + r (log r + sum b log b) - sum_S s y - r (b . y) + logsumexp(y)

so it takes the non-zeros, one product b . y and one logsumexp a row. Jensen-Shannon likewise where r = 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError

_DENSE_ROWS = 256


@dataclass(frozen=True)
class NgramRows:
    """Next-token distributions as a CSR matrix (`begins`, `tokens`, `values`) and `rest` times a shared `base`."""

    begins: Int[Tensor, " n+1"]
    tokens: Int[Tensor, " nonzero"]
    values: Float[Tensor, " nonzero"]
    rest: Float[Tensor, " n"]
    base: Float[Tensor, " vocab"]

    @classmethod
    def of(
        cls,
        begins: Int[np.ndarray, " n+1"],
        tokens: Int[np.ndarray, " nonzero"],
        values: Float[np.ndarray, " nonzero"],
        rest: Float[np.ndarray, " n"],
        base: Float[np.ndarray, " vocab"],
    ) -> "NgramRows":
        """Rows from arrays; what a discount left nothing of is dropped."""
        if not values.all():
            kept = values > 0
            begins = np.concatenate([[0], np.cumsum(kept)])[begins]
            tokens, values = tokens[kept], values[kept]
        return cls(*(torch.from_numpy(one) for one in (begins, tokens.astype(np.int64), values, rest, base)))

    def __len__(self) -> int:
        return len(self.rest)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that a row is over."""
        return len(self.base)

    @property
    def seen(self) -> Bool[Tensor, " n"]:
        """Rows that have mass: all but those of contexts that an unsmoothed model never saw."""
        return (self.rest > 0) | (self.begins.diff() > 0)

    def part(self, start: int, stop: int) -> "NgramRows":
        """Rows `start` to `stop`."""
        begins = self.begins[start : stop + 1]
        inside = slice(int(begins[0]), int(begins[-1]))
        return NgramRows(begins - begins[0], self.tokens[inside], self.values[inside], self.rest[start:stop], self.base)

    def dense(self) -> Float[Tensor, "n vocab"]:
        """All probabilities. For a few rows: it holds rows times vocabulary numbers."""
        full = self.rest[:, None] * self.base
        return full.index_put_((self._row, self.tokens), self.values, accumulate=True)

    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy of each row in nats; 0 for one without mass."""
        b = self.base[self.base > 0]
        own = self.values + self.rest[self._row] * self.base[self.tokens]
        shared = self.rest[self._row] * self.base[self.tokens]
        inside = torch.xlogy(own, own) - torch.xlogy(shared, shared)
        return -(self._sum(inside) + torch.xlogy(self.rest, self.rest) + self.rest * (b * b.log()).sum())

    def kl(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """KL(row || softmax of logits) in nats, float64 on the CPU; 0 for a row without mass.

        Raises `SondeError` for logits over another vocabulary or of another number of rows.
        """
        self._check(logits)
        rows = self._to(logits.device)
        norm = logits.logsumexp(-1).double()
        picked = logits.reshape(-1)[rows._row * logits.shape[-1] + rows.tokens].double()
        cross = rows._sum(rows.values * picked)
        mass = rows._sum(rows.values)
        if bool((rows.rest > 0).any()):
            shared = (logits @ rows.base.to(logits.dtype)).double()
            cross = cross + torch.where(rows.rest > 0, rows.rest * shared, 0.0)
            mass = mass + rows.rest
        return -self.entropy() - (cross - norm * mass).cpu()

    def jensen_shannon(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """Jensen-Shannon divergence between row and softmax of logits in nats, at most ln 2; 0 without mass.

        Rows of a smoothed model are made dense, a few at a time. Raises as `kl` does.
        """
        self._check(logits)
        if bool((self.rest > 0).any()):
            steps = range(0, len(self), _DENSE_ROWS)
            return torch.cat([self.part(i, min(i + _DENSE_ROWS, len(self)))._dense_js(logits[i:]) for i in steps])
        rows = self._to(logits.device)
        norm = logits.logsumexp(-1)
        log_q = logits - norm[:, None]
        entropy_q = -torch.xlogy(log_q.exp(), log_q.exp()).sum(-1).double()
        q = log_q.reshape(-1)[rows._row * logits.shape[-1] + rows.tokens].double().exp()
        half, mixed = q / 2, (rows.values + q) / 2
        inside = rows._sum(torch.xlogy(half, half) - torch.xlogy(mixed, mixed))
        entropy_mixed = (inside + entropy_q / 2 + np.log(2) / 2).cpu()
        return torch.where(self.seen, entropy_mixed - (self.entropy() + entropy_q.cpu()) / 2, 0.0).clamp(min=0)

    def csr(self) -> Tensor:
        """The sparse part as a torch CSR tensor, for use elsewhere."""
        import warnings

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                self.begins, self.tokens, self.values, (len(self), self.vocab_size), check_invariants=True
            )

    @property
    def _row(self) -> Int[Tensor, " nonzero"]:
        return torch.repeat_interleave(self.begins.diff())

    def _sum(self, values: Float[Tensor, " nonzero"]) -> Float[Tensor, " n"]:
        """Sums over the non-zeros of each row."""
        return torch.zeros_like(self.rest).index_add_(0, self._row, values)

    def _to(self, device: torch.device) -> "NgramRows":
        parts = (self.begins, self.tokens, self.values, self.rest, self.base)
        return NgramRows(*(part.to(device) for part in parts))

    def _dense_js(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        p = self.dense()
        q = logits[: len(self)].double().softmax(-1).cpu()
        mixed = (p + q) / 2
        terms = torch.xlogy(p, p) + torch.xlogy(q, q)
        return (terms.sum(-1) / 2 - torch.xlogy(mixed, mixed).sum(-1)).clamp(min=0)

    def _check(self, logits: Tensor) -> None:
        if logits.ndim != 2 or len(logits) != len(self):
            raise SondeError(f"logits of shape {tuple(logits.shape)} for {len(self)} rows: expected (rows, vocabulary)")
        if logits.shape[1] != self.vocab_size:
            raise SondeError(
                f"the model predicts over {logits.shape[1]} tokens and the counts are over {self.vocab_size}: where "
                f"one is padded, slice it, such as logits[..., :{min(logits.shape[1], self.vocab_size)}]"
            )
