"""Which hidden state makes a model predict a given distribution?

h* = argmin_h KL(p || softmax U(h)) - w log N(norm(h); μ, Σ), by L-BFGS with a strong Wolfe line search in float64; U is
the whole unembedding (Belrose et al. 2023, `Unembed.invert` of their code). The prior is on the state after the
final norm, because before it the length of h is free and a prior would pull it to 0. Predictions that U can make are
recovered; of others h* gives the nearest.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lens.fused import Readout, Unembeds
from sonde.stats import information
from sonde.stats.moments import Moments
from sonde.stats.solve import symmetric_power

_NORMALISED = 1e-3  # how far log sum p may be from 0
_REACHED = 1e-7  # nats of KL below which a distribution counts as recovered
_PROGRESS = 1e-8  # nats a row, below which a fresh history is not worth it
_GRADIENT, _CHANGE, _HISTORY = 1e-9, 1e-12, 30


@dataclass(frozen=True)
class GaussianPrior:
    """Gaussian density of states after the final norm, up to its constant: -½ (x - mean)ᵀ precision (x - mean).

    The density counts `weight` times against KL in nats.
    """

    mean: Float[Tensor, " d_head"]
    precision: Float[Tensor, "d_head d_head"]
    weight: float = 1e-3

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise SondeError(f"the prior's weight is {self.weight}; it must not be negative")

    @staticmethod
    def of(moments: Moments, *, weight: float = 1e-3) -> "GaussianPrior":
        """The Gaussian with mean and covariance of states that were seen; directions without variance are free."""
        return GaussianPrior(moments.mean, symmetric_power(moments.covariance, -1), weight)

    def energy(self, normed: Float[Tensor, "n d_head"]) -> Float[Tensor, " n"]:
        """Half the squared Mahalanobis distance from the mean."""
        away = normed - self.mean
        return ((away @ self.precision) * away).sum(-1) / 2


@dataclass(frozen=True)
class Inversion:
    """Hidden states, and how near to the given distributions their predictions are."""

    hidden: Float[Tensor, "n d_model"]
    """In float64, before the final norm."""
    kl: Float[Tensor, " n"]
    """KL(p || softmax U(hidden)) in nats."""
    evaluations: int
    """Evaluations of the objective, in all descents."""


def invert(
    unembedding: Unembeds,
    log_p: Float[Tensor, "n vocab"],
    *,
    start: Float[Tensor, "n d_model"] | None = None,
    prior: GaussianPrior | None = None,
    descents: int = 3,
    evaluations: int = 2000,
    seed: int = 0,
) -> Inversion:
    """Hidden states whose predictions are nearest to the distributions exp(log_p).

    A norm makes the problem not convex: rows that did not reach their distribution are descended again from random
    states, and the best is kept.

    Args:
        unembedding: that of the model, such as `lm.unembedding`.
        log_p: log-probabilities; -inf for tokens that are excluded.
        start: where to begin; by default a state whose logits point as `log_p` does.
        prior: a Gaussian after the norm, or None.
        descents: how often a row is descended at most.
        evaluations: most evaluations of the objective in a descent.
        seed: of the random states.

    Raises:
        SondeError: for distributions over another vocabulary or that do not sum to 1.

    """
    readout = Readout(unembedding, torch.float64)
    log_p = _checked(log_p, readout)
    d_model = _width(unembedding, readout)
    if start is None:
        start = _start(readout, log_p, d_model)
    elif start.shape != (len(log_p), d_model):
        raise SondeError(f"starts of shape {tuple(start.shape)}: expected {(len(log_p), d_model)}")
    hidden = start.detach().to(log_p.device, torch.float64, copy=True)
    generator = torch.Generator().manual_seed(seed)
    kl, objective, done = _descended(readout, log_p, hidden, prior, evaluations)
    for _ in range(descents - 1):
        again = kl > _REACHED
        if not bool(again.any()):
            break
        other = torch.randn(int(again.sum()), d_model, generator=generator, dtype=torch.float64).to(hidden.device)
        other_kl, other_objective, more = _descended(readout, log_p[again], other, prior, evaluations)
        done += more
        better = other_objective < objective[again]
        rows = again.nonzero()[better, 0]
        hidden[rows], kl[rows], objective[rows] = other[better], other_kl[better], other_objective[better]
    return Inversion(hidden, kl, done)


def _descended(
    readout: Readout,
    log_p: Float[Tensor, "n vocab"],
    hidden: Float[Tensor, "n d_model"],
    prior: GaussianPrior | None,
    evaluations: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], int]:
    """Descend in place. Returns KL and objective of each row, and the number of evaluations."""
    p, done = log_p.exp(), 0
    hidden.requires_grad_()

    def measure() -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        normed = readout.normed(hidden)
        logq = _logits(readout, normed).log_softmax(-1)
        kl = (p * (log_p - logq)).masked_fill(p == 0, 0).sum(-1)
        return kl, kl if prior is None else kl + prior.weight * prior.energy(normed)

    def closure() -> Tensor:
        nonlocal done
        done += 1
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            total = measure()[1].sum()
            total.backward()
        return total

    before = float("inf")
    while done < evaluations:  # with a fresh history where the line search gave up
        optimizer = torch.optim.LBFGS(
            [hidden],
            max_iter=evaluations,
            max_eval=evaluations - done,
            tolerance_grad=_GRADIENT,
            tolerance_change=_CHANGE,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            after = float(measure()[1].sum())
        if before - after <= _PROGRESS * len(log_p):
            break
        before = after
    hidden.requires_grad_(False)
    kl, objective = measure()
    return kl, objective, done


def _logits(readout: Readout, normed: Float[Tensor, "n d_head"]) -> Float[Tensor, "n vocab"]:
    """Logits in new memory, differentiable; `Readout.logits` bends them in place."""
    z = normed @ readout.weight.T
    z = readout.scale * (z if readout.bias is None else z + readout.bias)
    return z if readout.softcap is None else readout.softcap * torch.tanh(z / readout.softcap)


def _checked(log_p: Tensor, readout: Readout) -> Float[Tensor, "n vocab"]:
    if log_p.ndim != 2 or log_p.shape[1] != readout.vocab_size:
        raise SondeError(
            f"distributions of shape {tuple(log_p.shape)}: expected log-probabilities (n, {readout.vocab_size})"
        )
    log_p = log_p.detach().to(readout.weight.device, torch.float64)
    off = log_p.logsumexp(-1).abs().max()
    if not float(off) < _NORMALISED:
        raise SondeError(
            f"log-probabilities must sum to 1 in each row; here log Σp is off by {float(off):.3g}: "
            "give logits.log_softmax(-1)"
        )
    return information.log_probs(log_p)


def _start(readout: Readout, log_p: Float[Tensor, "n vocab"], d_model: int) -> Float[Tensor, "n d_model"]:
    """The state, of root mean square 1, whose logits to first order are nearest to log p in least squares.

    Tokens far below the others are all taken as equally unlikely.
    """
    aim = log_p.clamp(min=float(log_p.max()) - 30)
    unit = torch.eye(d_model, dtype=torch.float64, device=log_p.device)
    with torch.no_grad():  # a norm has no slope at 0: half the difference of opposite states is what each one adds
        slopes = (_logits(readout, readout.normed(unit)) - _logits(readout, readout.normed(-unit))) / 2
    slopes = slopes - slopes.mean(-1, keepdim=True)
    centred = aim - aim.mean(-1, keepdim=True)
    solved = torch.linalg.lstsq(slopes.T, centred.T, driver="gelsd" if log_p.device.type == "cpu" else None).solution.T
    scale = solved.square().mean(-1, keepdim=True).sqrt()
    return torch.where(scale > 0, solved / scale.clamp(min=1e-300), torch.ones_like(solved))


def _width(unembedding: Unembeds, readout: Readout) -> int:
    """Width of the residual stream: what the norm, or without one the head, takes."""
    for module in (unembedding.norm, unembedding.project):
        if module is not None:
            return next(p.shape[-1] for p in module.parameters())
    return readout.weight.shape[1]
