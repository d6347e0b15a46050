"""How unlikely is a row under a density that need not be Gaussian? A small normalising flow.

Rows are whitened by the trusted Gaussian; the leading coordinates h then pass through coupling layers (Dinh et al.
1605.08803), which take one half of them and scale and shift the other by functions of it,

    b ← b · exp(s(a)) + t(a),        -log p(x) = |h'|² / 2 - Σ s + |rest|² / 2 + constant,

and the remaining coordinates stay Gaussian. The couplings start as the identity, so that training starts at the trusted
Gaussian itself, and each layer of features keeps the step at which trusted rows that were held out were likeliest: the
flow leaves the Gaussian only where it explains them better. All layers of features are trained as one batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.stats.gaussian_novelty import Gaussian
from sonde.stats.layered_rows import Novelty

_COUPLINGS, _HIDDEN = 4, 32
_LEADING = 32  # principal coordinates that are coupled
_HELD = 5  # one row in this many is held out
_BOUND = 2.0  # of log-scales


class CouplingFlow(Novelty):
    """Negative log-likelihood of rows under a flow fitted on trusted ones, up to a constant.

    Args:
        steps: of Adam on all trusted rows but the fifth that is held out.
        learning_rate: of Adam.
        seed: of the first weights and of which rows are held out.

    After `fit`, `gained_` is by how many nats per row the flow explains the held-out rows better than the Gaussian.

    """

    least = 10

    def __init__(self, *, steps: int = 200, learning_rate: float = 3e-3, seed: int = 0) -> None:
        self.steps, self.learning_rate, self.seed = steps, learning_rate, seed

    def _fit(self, trusted: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(trusted.shape[1], generator=generator)
        held, fitted = order[: len(order) // _HELD], order[len(order) // _HELD :]
        self.gaussian_ = Gaussian.of(trusted[:, fitted])
        self._weights = self._start(trusted.shape[0], trusted.shape[2], generator)
        best = [weight.clone() for weight in self._weights]
        z, check = (self.gaussian_.whitened(trusted[:, part]) for part in (fitted, held))
        gaussian = lowest = self._surprise(check, best).mean(1)
        free = [weight.requires_grad_() for weight in self._weights]
        optimizer = torch.optim.Adam(free, lr=self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.steps if z.shape[-1] > 1 else 0):
                optimizer.zero_grad()
                # each layer has its own weights: the sum trains them apart
                self._surprise(z, free).mean(1).sum().backward()
                optimizer.step()
                with torch.no_grad():
                    now = self._surprise(check, free).mean(1)
                    better = now < lowest
                    lowest = torch.where(better, now, lowest)
                    for kept, weight in zip(best, free, strict=True):
                        kept[better] = weight[better]
        self._weights = best
        self.gained_ = (gaussian - lowest).numpy()

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        return self._surprise(self.gaussian_.whitened(rows), self._weights)

    def _start(self, layers: int, d: int, generator: torch.Generator) -> list[Tensor]:
        width = min(d, _LEADING)
        weights = []
        for place in range(_COUPLINGS):
            given = (width + place % 2) // 2
            first = torch.randn(layers, given, _HIDDEN, generator=generator, dtype=torch.float64) / max(given, 1) ** 0.5
            weights += [
                first,
                torch.zeros(layers, 1, _HIDDEN, dtype=torch.float64),
                torch.zeros(layers, _HIDDEN, 2 * (width - given), dtype=torch.float64),
            ]
        return weights

    def _surprise(self, z: Float[Tensor, "layers n d"], weights: list[Tensor]) -> Float[Tensor, "layers n"]:
        """Negative log-likelihood of whitened rows, less that of the whitening and the constant of the Gaussian."""
        width = min(z.shape[-1], _LEADING)
        rest, h = z[..., : z.shape[-1] - width], z[..., z.shape[-1] - width :]
        lost = rest.square().sum(-1) / 2
        if width > 1:
            for place in range(_COUPLINGS):
                into, bias, out = weights[3 * place : 3 * place + 3]
                given, moved = h[..., : into.shape[1]], h[..., into.shape[1] :]
                raw, shift = (torch.tanh(given @ into + bias) @ out).chunk(2, -1)
                scale = _BOUND * torch.tanh(raw / _BOUND)
                lost = lost - scale.sum(-1)
                # reversed, so that the next coupling is given what this one moved
                h = torch.cat([given, moved * scale.exp() + shift], -1).flip(-1)
        return lost + h.square().sum(-1) / 2
