"""Which Dirichlet distribution fits a set of predictions best?

The likelihood of n distributions p under Dirichlet(α) depends on them through the mean log-probability
g_k = mean log p_k alone: log L / n = log Γ(Σα) - Σ log Γ(α_k) + Σ (α_k - 1) g_k, concave in α. At the maximum
ψ(α_k) - ψ(Σα) = g_k. Newton's step costs O(K), because the Hessian is diagonal plus a constant (Minka 2000,
"Estimating a Dirichlet distribution"). `MeanLogProbs` gathers g in one pass.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.stats.information import log_probs

_STEPS = 200
_TOLERANCE = 1e-9  # of ψ(α_k) - ψ(Σα) - g_k, relative to g_k's size
_FIXED_POINT = 8


class MeanLogProbs:
    """Running mean log-probability over predictions; `fit` gives the Dirichlet. `n` counts predictions."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.n = 0
        self._sum = torch.zeros(vocab, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "... vocab"], mask: Bool[Tensor, "..."] | None = None) -> "MeanLogProbs":
        """Take in predictions as logits (or log-probabilities), those where `mask` is true; returns itself.

        Raises `ValueError` for another vocabulary, and for a token of probability 0, which no Dirichlet allows.
        """
        if logits.shape[-1] != self.vocab:
            raise ValueError(f"predictions over {logits.shape[-1]} tokens: expected {self.vocab}")
        rows = log_probs(logits if mask is None else logits[mask]).reshape(-1, self.vocab)
        total = rows.sum(0, dtype=torch.float64)
        if not total.isfinite().all():
            raise ValueError("a prediction gives a token probability 0, or is nan: no Dirichlet distribution has that")
        self._sum += total.cpu()
        self.n += len(rows)
        return self

    @property
    def mean(self) -> Float[Tensor, " vocab"]:
        """Mean log-probability of each token, float64. Raises `ValueError` before the first prediction."""
        if not self.n:
            raise ValueError("no prediction was taken in, so there is no mean log-probability")
        return self._sum / self.n

    def fit(self) -> Float[Tensor, " vocab"]:
        """Parameters α of the most likely Dirichlet distribution; see `fit_dirichlet`."""
        return fit_dirichlet(self.mean)

    def merge(self, other: "MeanLogProbs") -> "MeanLogProbs":
        """Take in what another pass has seen; returns itself. Raises `ValueError` for another vocabulary."""
        if other.vocab != self.vocab:
            raise ValueError(f"predictions over {other.vocab} tokens: expected {self.vocab}")
        self._sum += other._sum
        self.n += other.n
        return self

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`; `MeanLogProbs.from_state` continues from it."""
        return {"n": self.n, "sum": self._sum.clone()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "MeanLogProbs":
        """What `state` was taken from."""
        made = cls(len(state["sum"]))
        made.n, made._sum = state["n"], state["sum"].clone()
        return made


def fit_dirichlet(mean_log_p: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """Parameters α > 0 of the Dirichlet distribution that is most likely given the mean log-probability, float64.

    Raises `ValueError` for fewer than two outcomes, for values that are not finite, and where no maximum exists
    because the predictions do not vary: then Σ exp(g) = 1, and α grows without bound.
    """
    g = mean_log_p.double()
    if g.ndim != 1 or len(g) < 2:
        raise ValueError(f"mean log-probabilities of shape {tuple(g.shape)}: expected those of two outcomes or more")
    if not g.isfinite().all():
        raise ValueError("mean log-probabilities hold nan or infinity: a token had probability 0")
    if not float(g.logsumexp(0)) < -1e-12:
        raise ValueError("the mean log-probabilities are those of one fixed prediction: no Dirichlet distribution fits")
    alpha = _start(g)
    for _ in range(_STEPS):
        gradient = torch.digamma(alpha.sum()) - torch.digamma(alpha) + g
        if bool((gradient.abs() <= _TOLERANCE * (1 + g.abs())).all()):
            return alpha
        curvature = -torch.polygamma(1, alpha)
        common = torch.polygamma(1, alpha.sum())
        shift = (gradient / curvature).sum() / (1 / common + (1 / curvature).sum())
        step = (gradient - shift) / curvature
        alpha = _ascended(alpha, step, g)
    raise ValueError(f"Newton's method found no maximum in {_STEPS} steps: the predictions hardly vary")


def log_likelihood(alpha: Float[Tensor, " vocab"], mean_log_p: Float[Tensor, " vocab"]) -> float:
    """Mean log density of the predictions behind `mean_log_p` under Dirichlet(α)."""
    alpha, g = alpha.double(), mean_log_p.double()
    return float(torch.lgamma(alpha.sum()) - torch.lgamma(alpha).sum() + ((alpha - 1) * g).sum())


def _start(g: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """A few rounds of the fixed point ψ(α_k) = ψ(Σα) + g_k, from α in proportion to the geometric mean."""
    alpha = torch.softmax(g, 0) * (len(g) - 1) / (-2 * g.logsumexp(0))
    alpha = alpha.clamp(min=1e-6)
    for _ in range(_FIXED_POINT):
        alpha = _inverse_digamma(torch.digamma(alpha.sum()) + g)
    return alpha


def _ascended(
    alpha: Float[Tensor, " vocab"], step: Float[Tensor, " vocab"], g: Float[Tensor, " vocab"]
) -> Float[Tensor, " vocab"]:
    """α - step, halved until α stays positive and the likelihood does not fall."""
    now = log_likelihood(alpha, g)
    slack = 1e-13 * (1 + abs(now))
    scale = 1.0
    while scale > 1e-9:
        new = alpha - scale * step
        if bool((new > 0).all()) and log_likelihood(new, g) >= now - slack:
            return new
        scale /= 2
    return _inverse_digamma(torch.digamma(alpha.sum()) + g)


def _inverse_digamma(y: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """Solve ψ(x) = y for x by Newton from Minka's bounds; six steps reach double precision."""
    x = torch.where(y >= -2.22, y.exp() + 0.5, -1 / (y - torch.digamma(torch.ones_like(y))))
    for _ in range(6):
        x = x - (torch.digamma(x) - y) / torch.polygamma(1, x)
    return x
