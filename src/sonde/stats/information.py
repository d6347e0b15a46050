"""How uncertain is a prediction, and how far apart are two? Log-probabilities in, nats out, over the last axis.

H(p) = -sum p log p; KL(p||q) = sum p log(p/q); JS = (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2, at most log 2;
TV = sum |p - q| / 2; Aitchison geometry on weighted centred log-ratios, clr_w(a) = a - sum w a (Egozcue and
Pawlowsky-Glahn 2016). An entry of probability 0 (a token removed from the vocabulary, log-probability -inf) adds
nothing. Half-precision input is computed in float32.
"""

import math
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Amount = TypeVar("Amount", float, Tensor)


def log_probs(logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Log-softmax in at least float32: in half precision the tails of a large vocabulary are lost."""
    return torch.log_softmax(_wide(logits), dim=-1)


def entropy(logp: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """Entropy H(p), between 0 and log vocab."""
    logp = _wide(logp)
    return -_expectation(logp.exp(), logp)


def cross_entropy(logp: Float[Tensor, "... vocab"], target: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Surprise -log p(target). Raises `ValueError` for targets of another shape or on another device."""
    _check_targets(logp, target)
    return -_wide(logp).gather(-1, target[..., None].long())[..., 0]


def kl(logp: Float[Tensor, "... vocab"], logq: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """Divergence KL(p||q) of q from p, never negative; infinite where q excludes what p allows."""
    logp, logq = _wide(logp), _wide(logq)
    return _expectation(logp.exp(), logp - logq).clamp(min=0)


def js(logp: Float[Tensor, "... vocab"], logq: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """Jensen-Shannon divergence: symmetric, finite, between 0 and log 2."""
    logp, logq = _wide(logp), _wide(logq)
    mixture = torch.logaddexp(logp, logq) - math.log(2)
    mean = (_expectation(logp.exp(), logp - mixture) + _expectation(logq.exp(), logq - mixture)) / 2
    return mean.clamp(0, math.log(2))


def tv(logp: Float[Tensor, "... vocab"], logq: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """Total variation: the largest difference in probability of any set of tokens, between 0 and 1."""
    return (_wide(logp).exp() - _wide(logq).exp()).abs().sum(-1) / 2


def mean_kl(logp: Float[Tensor, "... vocab"], logq: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """Mean of KL(p||q) and KL(q||p), unbounded. The `tuned-lens` package's plots call it JS."""
    return (kl(logp, logq) + kl(logq, logp)) / 2


def max_difference(logp: Float[Tensor, "... vocab"], logq: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """Largest difference in one token's probability. The `tuned-lens` package calls it total variation."""
    return (_wide(logp).exp() - _wide(logq).exp()).abs().amax(-1)


def clr(
    logp: Float[Tensor, "... vocab"], weights: Float[Tensor, "... vocab"] | None = None
) -> Float[Tensor, "... vocab"]:
    """Centred log-ratio `a - sum(w a)`, w normalised (uniform if None): blind to a constant added to all of `a`."""
    logp = _wide(logp)
    w = _weights(logp, weights)
    return logp - _expectation(w, logp)[..., None]


def aitchison(
    a: Float[Tensor, "... vocab"], b: Float[Tensor, "... vocab"], weights: Float[Tensor, "... vocab"] | None = None
) -> Float[Tensor, "..."]:
    """Aitchison similarity `<a, b>_w / (|a|_w |b|_w)` of two changes in log-probability, between -1 and 1.

    `<a, b>_w = sum w clr_w(a) clr_w(b)`. `weights` are probabilities, such as the mean of the predictions before and
    after; None weighs all tokens alike. nan where one of the changes is constant over the tokens that have weight.
    """
    w = _weights(a, weights)
    a, b = clr(a, w), clr(b, w)
    norms = _expectation(w, a * a).sqrt() * _expectation(w, b * b).sqrt()
    return (_expectation(w, a * b) / norms).clamp(-1, 1)


def bits(nats: Amount) -> Amount:
    """Nats in bits."""
    return nats / math.log(2)


def bits_per_byte(nats_per_token: float, tokens: int, bytes: int) -> float:
    """Mean loss a token in bits per byte of text, which models with different tokenizers share.

    Raises `ValueError` unless both counts are positive.
    """
    if tokens < 1 or bytes < 1:
        raise ValueError(f"{tokens} tokens and {bytes} bytes: bits per byte need some of both")
    return nats_per_token * tokens / bytes / math.log(2)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    return (p * x).masked_fill(p == 0, 0).sum(-1)


def _weights(like: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.full_like(_wide(like), 1 / like.shape[-1])
    weights = _wide(weights)
    return weights / weights.sum(-1, keepdim=True)


def _check_targets(logp: Tensor, target: Tensor) -> None:
    if logp.shape[:-1] != target.shape:
        raise ValueError(f"targets of shape {tuple(target.shape)} for predictions of shape {tuple(logp.shape)}")
    if logp.device != target.device:
        raise ValueError(f"targets on {target.device} for predictions on {logp.device}")
