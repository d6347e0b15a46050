"""Training of tuned lenses, given hidden states: minimise the sum over layers of E KL(p || q_l).

*ridge* is the closed form that regresses the last block's output f on h_l: with r = f - h_l,

    A = Cov(r, h) (Cov(h) + λI)⁻¹,    b = E r - A E h,

λ a fraction of the mean variance; a strong λ leads back to the logit lens. *muon* (orthogonalised momentum on A, AdamW
on b) and *adam* descend from zero or, as `ridge+muon` and `ridge+adam`, from there. *sgd* is the recipe of Belrose et
al. (2303.08112): Nesterov momentum 0.9, linear decay, weight decay 1e-3, clipping at 1, from zero. Layers are problems
of their own: each keeps the parameters with its least held-out loss, the logit lens among them, so that no layer ends
worse than it began.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.lens.fused import Readout, Target, divergence
from sonde.lens.tuned import TunedLens
from sonde.nets.muon import Muon
from sonde.stats.moments import Moments
from sonde.stats.solve import ridge

Decode = Callable[[Float[Tensor, "layers n d_model"]], Float[Tensor, "layers m d_head"]]
Trainer = Literal["ridge+muon", "ridge+adam", "ridge", "muon", "adam", "sgd"]
_RATES = {"muon": 0.4, "adam": 1e-2, "sgd": 0.1, "ridge": 0.0}
_DECAYS = {"muon": 2.5e-4, "adam": 0.0, "sgd": 1e-3, "ridge": 0.0}
_STEPS = {"muon": 250, "adam": 250, "sgd": 250, "ridge": 0}
_BIAS_RATE = 1e-2  # AdamW beside Muon
_SAME = 1e-3  # relative gain in held-out loss that counts as progress


@dataclass(frozen=True)
class LensTraining:
    """How a lens is trained. Raises `SondeError` for settings that contradict each other."""

    trainer: Trainer = "ridge+muon"
    kind: Literal["tuned", "bias"] = "tuned"
    loss: Literal["kl", "ce"] = "kl"
    token_shift: int | None = None
    """Target position minus lens position; None is 0 for "kl" and 1 for "ce"."""
    steps: int | None = None
    """Gradient steps; None is 120 after ridge and 250 without."""
    tokens_per_step: int = 1024
    """Of cached states. A lens that trains as a consumer takes a batch as it comes."""
    tokens: int = 65536
    """Most tokens to cache."""
    cache_bytes: int = 1 << 29
    """States that would take more are not cached: every batch is a step and is forgotten."""
    lr: float | None = None
    weight_decay: float | None = None
    ridge: float = 1e-4
    """λ as a fraction of the mean variance of a hidden dimension."""
    ridge_tokens: int | None = None
    """Tokens to regress on before the first step, where states are not cached; None is 32 d_model."""
    held_out: int = 4096
    """Tokens that are not trained on, but decide when to stop and what to keep."""
    evaluate_every: int = 20
    patience: int = 4
    """Evaluations without progress in any layer before training stops."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trainer not in ("ridge+muon", "ridge+adam", "ridge", "muon", "adam", "sgd"):
            raise SondeError(
                f"trainer {self.trainer!r} is unknown: use ridge+muon, ridge+adam, ridge, muon, adam or sgd"
            )
        if self.loss not in ("kl", "ce"):
            raise SondeError(f"loss {self.loss!r} is unknown: use kl (the model's prediction) or ce (the next token)")
        if self.kind not in ("tuned", "bias"):
            raise SondeError(f"a lens of kind {self.kind!r} cannot be trained: use tuned or bias")
        for name in ("tokens_per_step", "tokens", "held_out", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise SondeError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def shift(self) -> int:
        """`token_shift`, or the loss's own."""
        if self.token_shift is not None:
            return self.token_shift
        return 1 if self.loss == "ce" else 0

    @property
    def descent(self) -> str:
        """The gradient part: muon, adam, sgd, or ridge where there is none."""
        return self.trainer.removeprefix("ridge+")

    @property
    def n_steps(self) -> int:
        """`steps`, or the trainer's own."""
        if self.steps is not None:
            return self.steps if self.descent != "ridge" else 0
        return 120 if self.trainer.startswith("ridge+") else _STEPS[self.descent]


class Descent:
    """Gradient steps on the translators of a lens, with held-out evaluation; tensors in, no model."""

    def __init__(self, lens: TunedLens, readout: Readout, settings: LensTraining, *, slow_down: float = 1.0) -> None:
        self.lens, self.readout, self.settings = lens, readout, settings
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.held: tuple[Tensor, Target] | None = None
        self._stale = 0
        self._best = {name: p.detach().clone() for name, p in lens.named_parameters()}
        self.best: Float[Tensor, " layers"] = torch.full((len(lens),), float("inf"), dtype=torch.float64)
        self._optimizers = _optimizers(lens, settings)
        self._rates = [[group["lr"] * slow_down for group in o.param_groups] for o in self._optimizers]

    @property
    def evaluations(self) -> int:
        """How often the held-out loss was measured."""
        return len(self.history)

    @property
    def done(self) -> bool:
        """All steps done, or no layer made progress in `patience` evaluations."""
        return self.step >= self.settings.n_steps or self._stale >= self.settings.patience

    def hold_out(self, hidden: Float[Tensor, "layers n d_model"], target: Target) -> None:
        """The tokens on which parameters are compared."""
        self.held = (hidden, target)

    def start(self, weight: Float[Tensor, "layers d d"], bias: Float[Tensor, "layers d"]) -> None:
        """Begin the descent from given translators; a bias-only lens takes the bias alone."""
        with torch.no_grad():
            if self.lens.weight is not None:
                self.lens.weight.copy_(weight)
            assert self.lens.bias is not None
            self.lens.bias.copy_(bias)

    def loss(
        self,
        hidden: Float[Tensor, "layers n d_model"],
        target: Target,
        decode: Decode | None = None,
    ) -> Float[Tensor, " layers"]:
        """Mean over tokens of the divergence, by layer. `decode` leads from translated states to the head."""
        normed = (decode or self.readout.normed)(self.lens.translate_all(hidden))
        return divergence(normed, target, self.readout).mean(-1)

    def descend(
        self,
        hidden: Float[Tensor, "layers n d_model"],
        target: Target,
        decode: Decode | None = None,
        *,
        evaluate: Callable[[], Float[Tensor, " layers"]] | None = None,
    ) -> None:
        """One step. Raises `SondeError` when the loss is not finite.

        `evaluate` gives the held-out loss where it is not that of the tokens of `hold_out`.
        """
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - self.step / self.settings.n_steps)
            optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self.loss(hidden, target, decode)
            loss.sum().backward()
        if not bool(loss.isfinite().all()):
            raise SondeError(f"the lens loss became {loss.sum().item()} at step {self.step}: lower the learning rate")
        if self.settings.descent == "sgd":
            nn.utils.clip_grad_norm_(self.lens.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self.step += 1
        if self.step % self.settings.evaluate_every == 0 or self.step == self.settings.n_steps:
            self.evaluate(None if evaluate is None else evaluate())

    @torch.no_grad()
    def evaluate(self, held_out_loss: Float[Tensor, " layers"] | None = None) -> None:
        """Measure the held-out loss of every layer, and keep parameters that are better than all before."""
        if held_out_loss is None:
            assert self.held is not None
            held_out_loss = self.loss(*self.held)
        loss = held_out_loss.double().cpu()
        better = loss < self.best
        progress = bool((loss < self.best * (1 - _SAME)).any())
        self._stale = 0 if progress else self._stale + 1
        self.best = torch.where(better, loss, self.best)
        for name, parameter in self.lens.named_parameters():
            kept = self._best[name]
            where = better.to(kept.device).view(-1, *[1] * (kept.ndim - 1))
            self._best[name] = torch.where(where, parameter.detach(), kept)
        self.history.append({"step": self.step if self.history else -1, "loss": loss.tolist()})

    def settle(self) -> None:
        """Give the lens the best parameters of every layer."""
        with torch.no_grad():
            for name, parameter in self.lens.named_parameters():
                parameter.copy_(self._best[name])
                parameter.grad = None

    def state(self) -> dict[str, Any]:
        """All numbers of the descent; `load` goes on from them."""
        return {
            "lens": dict(self.lens.state_dict()),
            "best": self._best,
            "best_loss": self.best,
            "step": self.step,
            "stale": self._stale,
            "history": self.history,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.lens.load_state_dict(state["lens"])
        device = next(self.lens.parameters()).device
        self._best = {name: tensor.to(device) for name, tensor in state["best"].items()}
        self.best, self.step, self._stale = state["best_loss"], state["step"], state["stale"]
        self.history = state["history"]
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def ridge_translators(
    moments: list[Moments], strength: float, *, kind: str = "tuned"
) -> tuple[Float[Tensor, "layers d d"], Float[Tensor, "layers d"]]:
    """A and b of each layer that minimise |r - A h - b|² + λ n |A|², from moments of h and of r = final - h beside it.

    λ is `strength` times the mean variance of h's dimensions. For the kind "bias", A is 0 and b the mean of r.
    """
    mean = torch.stack([moment.mean for moment in moments])
    shift = torch.stack([moment.other_mean for moment in moments])
    scatter = torch.stack([moment.scatter for moment in moments])
    if kind == "bias":
        return torch.zeros_like(scatter), shift
    weight = ridge(scatter, torch.stack([moment.cross_scatter for moment in moments]), lam=strength).mT
    return weight, shift - (weight @ mean[..., None]).squeeze(-1)


def shuffled(n: int, size: int, step: int, seed: int) -> Tensor:
    """The rows of a step: every epoch visits n // size batches in a new order. A function of the step alone."""
    epoch, place = divmod(step, n // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)[place * size : (place + 1) * size]


def _optimizers(lens: TunedLens, settings: LensTraining) -> list[torch.optim.Optimizer]:
    kind = settings.descent
    lr = _RATES[kind] if settings.lr is None else settings.lr
    decay = _DECAYS[kind] if settings.weight_decay is None else settings.weight_decay
    if kind == "ridge":
        return []
    if kind == "sgd":
        return [torch.optim.SGD(lens.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay)]
    if kind == "adam" or lens.weight is None:
        rate = lr if kind == "adam" else _BIAS_RATE
        return [torch.optim.AdamW(lens.parameters(), rate, betas=(0.9, 0.95), weight_decay=decay)]
    assert lens.bias is not None
    return [
        Muon([lens.weight], lr, momentum=0.9, weight_decay=decay),
        torch.optim.AdamW([lens.bias], _BIAS_RATE, betas=(0.9, 0.95), weight_decay=decay),
    ]
