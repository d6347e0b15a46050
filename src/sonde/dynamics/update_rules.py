"""Update rules of optimisers with their derivatives: how a small change of weights passes through one step, both ways.

A step takes weights θ, moments s and a gradient g (already clipped) at learning rate η, with h = g + λθ (λ: L2 penalty,
δ: decoupled decay):

    SGD     m' = μm + h        d = m'   (Nesterov: d = h + μm')                       θ' = (1 - ηδ)θ - ηd
    Adam    m' = β₁m + (1-β₁)h        v' = β₂v + (1-β₂)h²
            d = m̂ / (√(v̂ + ε_r) + ε)  with m̂ = m'/(1-β₁ᵗ), v̂ = v'/(1-β₂ᵗ)              θ' = (1 - ηδ)θ - ηd

Their derivatives need the Hessian H of the step's loss only as a product: forward G = HΘ + λΘ takes the place of h, and
for Adam, with r = √(v̂ + ε_r),  dd = dm̂ / (r + ε) - m̂ dv̂ / (2r (r + ε)²). Backward the same lines are transposed.
ε_r inside the root keeps that finite where a gradient is always 0 (as in optax). Source: Belrose & Scherlis 2024,
arXiv:2412.07003. Names of settings are those of `torch.optim`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sonde.errors import SondeError

Parts = list[Tensor]
"""A vector, or a block of columns, in pieces: one flat tensor, or one for each layer of a fused network."""

Product = Callable[[Parts, Parts, float], None]
"""`product(x, out, beta)` sets out to beta · out + H x, in place."""


@dataclass(frozen=True)
class StepTaken:
    """What the derivative of a step needs of the step itself; pieces broadcast against those of tangents.

    `gradient` is h, `moments` are those after the step, `count` the number of the step from 1, `lr` its η.
    """

    count: int
    lr: float
    gradient: Parts
    moments: Sequence[Parts]


class Rule(Protocol):
    """What the training Jacobian asks of an optimiser."""

    @property
    def lr(self) -> float:
        """The learning rate before any schedule."""
        ...

    @property
    def l2(self) -> float:
        """The weight of the L2 penalty."""
        ...

    @property
    def n_moments(self) -> int:
        """How many vectors of the size of the weights it remembers."""
        ...

    @property
    def uses_gradient(self) -> bool:
        """Whether its derivative needs the gradient and moments themselves."""
        ...

    def step(
        self, theta: Tensor, moments: Sequence[Tensor], gradient: Tensor, *, lr: float, count: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Weights and moments after the step, of tensors of any one shape."""
        ...

    def forward(self, theta: Parts, moments: Sequence[Parts], product: Product, taken: StepTaken) -> None:
        """Replace tangents of weights and moments before the step by those after it."""
        ...

    def backward(self, theta: Parts, moments: Sequence[Parts], product: Product, taken: StepTaken) -> None:
        """Replace cotangents of weights and moments after the step by those before it."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with momentum (undamped), Nesterov's variant, L2 penalty and decoupled decay."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    l2: float = 0.0
    decoupled: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.l2, self.decoupled)
        if not 0 <= self.momentum < 1:
            raise SondeError(f"momentum is {self.momentum}; give a number from 0 to below 1")
        if self.nesterov and not self.momentum:
            raise SondeError("Nesterov's variant needs a momentum above 0")

    @property
    def n_moments(self) -> int:
        """One, the momentum."""
        return 1

    @property
    def uses_gradient(self) -> bool:
        """The derivative of a step of SGD is the same at every gradient."""
        return False

    def step(
        self, theta: Tensor, moments: Sequence[Tensor], gradient: Tensor, *, lr: float, count: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Weights and momentum after the step."""
        h = gradient + self.l2 * theta if self.l2 else gradient
        m = self.momentum * moments[0] + h
        d = h + self.momentum * m if self.nesterov else m
        return (1 - lr * self.decoupled) * theta - lr * d, [m]

    def forward(self, theta: Parts, moments: Sequence[Parts], product: Product, taken: StepTaken) -> None:
        """M' = μM + HΘ + λΘ, Θ' = (1 - ηδ)Θ - ηM', in place."""
        m, keep = moments[0], 1 - taken.lr * self.decoupled
        if not self.nesterov:
            product(theta, m, self.momentum)
            for x, y in zip(theta, m, strict=True):
                _add(y, x, self.l2)
                _scale(x, keep).add_(y, alpha=-taken.lr)
            return
        g = [torch.empty_like(x) for x in theta]
        product(theta, g, 0.0)
        for x, y, h in zip(theta, m, g, strict=True):
            _add(h, x, self.l2)
            y.mul_(self.momentum).add_(h)
            _scale(x, keep).add_(h, alpha=-taken.lr).add_(y, alpha=-taken.lr * self.momentum)

    def backward(self, theta: Parts, moments: Sequence[Parts], product: Product, taken: StepTaken) -> None:
        """λ_m ← λ_m - ηλ_θ, λ_θ ← (1 - ηδ)λ_θ + (H + λ)λ_m, λ_m ← μλ_m, in place."""
        m = moments[0]
        h = m
        if self.nesterov:
            h = []
            for x, y in zip(theta, m, strict=True):
                y.add_(x, alpha=-taken.lr * self.momentum)
                h.append(y.add(x, alpha=-taken.lr))
        else:
            for x, y in zip(theta, m, strict=True):
                y.add_(x, alpha=-taken.lr)
        product(h, theta, 1 - taken.lr * self.decoupled)
        for x, y, z in zip(theta, m, h, strict=True):
            _add(x, z, self.l2)
            y.mul_(self.momentum)


@dataclass(frozen=True)
class Adam:
    """Adam, with `eps_root` inside the square root; `decoupled` decay makes it AdamW, `l2` is the older penalty."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 1e-8
    l2: float = 0.0
    decoupled: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.l2, self.decoupled)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SondeError(f"betas are {self.betas}; give two numbers from 0 to below 1")
        if self.eps < 0 or self.eps_root < 0 or not self.eps + self.eps_root:
            raise SondeError(f"eps is {self.eps} and eps_root {self.eps_root}; give 0 or more, and one above 0")

    @property
    def n_moments(self) -> int:
        """Two, of the gradient and of its square."""
        return 2

    @property
    def uses_gradient(self) -> bool:
        """The second moment makes every step depend on its gradient."""
        return True

    def step(
        self, theta: Tensor, moments: Sequence[Tensor], gradient: Tensor, *, lr: float, count: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Weights and both moments after the step."""
        h = gradient + self.l2 * theta if self.l2 else gradient
        (a, b), (c, e) = self.betas, self._corrections(count)
        m = a * moments[0] + (1 - a) * h
        v = b * moments[1] + (1 - b) * h**2
        d = (m / c) / ((v / e + self.eps_root).sqrt() + self.eps)
        return (1 - lr * self.decoupled) * theta - lr * d, [m, v]

    def forward(self, theta: Parts, moments: Sequence[Parts], product: Product, taken: StepTaken) -> None:
        """Tangents of both moments and of the weights, in place."""
        g = [torch.empty_like(x) for x in theta]
        product(theta, g, 0.0)
        (a, b), keep = self.betas, 1 - taken.lr * self.decoupled
        slopes = self._slopes(taken)
        for x, dm, dv, h, own, (by_m, by_v) in zip(theta, *moments, g, taken.gradient, slopes, strict=True):
            _add(h, x, self.l2)
            dm.mul_(a).add_(h, alpha=1 - a)
            dv.mul_(b).addcmul_(h, own, value=2 * (1 - b))
            _scale(x, keep).addcmul_(dm, by_m, value=-taken.lr).addcmul_(dv, by_v, value=-taken.lr)

    def backward(self, theta: Parts, moments: Sequence[Parts], product: Product, taken: StepTaken) -> None:
        """Cotangents of the weights and of both moments, in place."""
        (a, b), slopes = self.betas, self._slopes(taken)
        g = []
        for x, dm, dv, own, (by_m, by_v) in zip(theta, *moments, taken.gradient, slopes, strict=True):
            dm.addcmul_(x, by_m, value=-taken.lr)
            dv.addcmul_(x, by_v, value=-taken.lr)
            g.append(dm.mul(1 - a).addcmul_(dv, own, value=2 * (1 - b)))
            dm.mul_(a)
            dv.mul_(b)
        product(g, theta, 1 - taken.lr * self.decoupled)
        for x, h in zip(theta, g, strict=True):
            _add(x, h, self.l2)

    def _corrections(self, count: int) -> tuple[float, float]:
        return 1 - self.betas[0] ** count, 1 - self.betas[1] ** count

    def _slopes(self, taken: StepTaken) -> list[tuple[Tensor, Tensor]]:
        """∂d/∂m' and ∂d/∂v'; the second is 0 where both moments are 0 and ε_r is too, where it does not exist."""
        c, e = self._corrections(taken.count)
        found = []
        for m, v in zip(*taken.moments, strict=True):
            root = (v / e + self.eps_root).sqrt()
            below = root + self.eps
            curved = -(m / c) / (2 * e * root * below**2)
            found.append((1 / (c * below), curved.where(root > 0, torch.zeros_like(curved))))
        return found


class RuleOptimizer(torch.optim.Optimizer):
    """A rule as a torch optimiser, so that the training loop takes exactly the steps that are differentiated."""

    def __init__(self, params: Any, rule: Rule) -> None:
        super().__init__(params, {"lr": rule.lr})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter; one without a gradient has a gradient of 0, as it has for the Jacobian."""
        if closure is not None:
            raise SondeError("this optimiser takes no closure: compute the loss and its gradient first")
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(count=0, moments=[torch.zeros_like(p) for _ in range(self.rule.n_moments)])
                state["count"] += 1
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                new, moments = self.rule.step(p, state["moments"], grad, lr=group["lr"], count=state["count"])
                p.copy_(new)
                state["moments"] = moments


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies a gradient of this norm by."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def _check(lr: float, l2: float, decoupled: float) -> None:
    if not 0 < lr < math.inf or l2 < 0 or decoupled < 0:
        raise SondeError(f"lr is {lr}, l2 {l2} and decoupled {decoupled}; give lr above 0, the others 0 or more")


def _add(into: Tensor, x: Tensor, factor: float) -> Tensor:
    return into.add_(x, alpha=factor) if factor else into


def _scale(x: Tensor, factor: float) -> Tensor:
    return x.mul_(factor) if factor != 1 else x
