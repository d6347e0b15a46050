"""Training as a map from initial to final weights, θ₀ ↦ θ_T: everything else about it is fixed here, once.

Fixed are the data, which rows make the batch of each step, the update rule and its schedule, and the draws of dropout.
Early stopping and learning rates that look at the data have no place in it: they make the map jump. Kinks (ReLU, max
pooling) are named in a warning, since a Jacobian does not see a unit change sides.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from sonde.dynamics.update_rules import SGD, Rule
from sonde.errors import SondeError
from sonde.nets.loop import Schedule

_KINKS = ("relu", "maxpool", "max_pool", "threshold", "hardtanh", "abs", "prelu", "leakyrelu", "adaptivemax", "maxback")
_MEMBERS = 64  # networks evaluated at once
COSINE = Schedule(warmup=0, decay=1, shape="cosine")
CONSTANT = Schedule(warmup=0, decay=0)

Loss = Callable[[Tensor, Tensor], Tensor]


def batch_order(
    rows: int,
    *,
    batch: int,
    epochs: int,
    shuffle: int | None = None,
    rest: Literal["refuse", "drop", "ragged"] = "refuse",
) -> list[Int[Tensor, " batch"]]:
    """The rows of every step's batch: in their own order, the same every epoch, or shuffled anew by seed `shuffle`.

    `rest` says what becomes of rows that fill no batch: they are dropped, or are a smaller (ragged) batch of their own.
    Raises `SondeError` where there are some and nobody has said.
    """
    if not 1 <= batch <= rows or epochs < 1:
        raise SondeError(
            f"batches of {batch} out of {rows:,} rows for {epochs} epochs: give 1 to {rows:,}, and 1 epoch"
        )
    if rows % batch and rest == "refuse":
        raise SondeError(
            f"batches of {batch} leave {rows % batch} of {rows:,} rows over: choose rest='drop' or rest='ragged'"
        )
    generator = torch.Generator().manual_seed(shuffle or 0)
    batches: list[Tensor] = []
    for _ in range(epochs):
        order = torch.arange(rows) if shuffle is None else torch.randperm(rows, generator=generator)
        batches += list(order[: rows - rows % batch if rest == "drop" else rows].split(batch))
    return batches


@dataclass(frozen=True)
class TrainingMap:
    """A deterministic training of `module`, whose parameters now are θ₀, on `inputs` and `targets` [rows …].

    order: rows of the batch of each step; their number is the number of steps, T.
    rule, schedule: the optimiser and the factor on its learning rate at each step.
    loss: outputs and targets of a batch ↦ its loss, a mean over rows; by default the cross entropy.
    clip: norm to which gradients are clipped; it is differentiated too.
    seed: of what the module draws while it trains (dropout); step t draws from seed + t.

    Raises `SondeError` for half-precision parameters, batch norm with running statistics, an order that is not
    recorded, rows that do not exist, and losses that differ when they are computed twice.
    """

    module: nn.Module
    inputs: Tensor
    targets: Tensor
    order: Sequence[Int[Tensor, " batch"]] = field(repr=False)
    rule: Rule = field(default_factory=SGD)
    schedule: Schedule = COSINE
    loss: Loss = nn.functional.cross_entropy
    clip: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_module(self.module)
        if not isinstance(self.order, list | tuple) or not all(isinstance(rows, Tensor) for rows in self.order):
            raise SondeError(
                f"the training map is not deterministic: pass order=…, a list with the rows of every step's batch, not "
                f"{type(self.order).__name__}"
            )
        if not self.order:
            raise SondeError("order is empty: give the rows of at least one batch")
        n = len(self.inputs)
        if len(self.targets) != n or max(int(rows.max()) for rows in self.order) >= n:
            raise SondeError(f"{n:,} inputs, {len(self.targets):,} targets: order names rows that do not exist")
        if self.clip is not None and self.clip <= 0:
            raise SondeError(f"clip is {self.clip}; give a norm above 0, or None")
        with self.draws(0):
            first = self.loss_at(self.start, 0)
        with self.draws(0):
            again = self.loss_at(self.start, 0)
        if first.isfinite() and not first.equal(again):
            raise SondeError(
                f"the training map is not deterministic: the same weights gave the losses {first:.6g} and {again:.6g}; "
                "pass seed=…, which fixes the masks of dropout"
            )
        self._warn_of_kinks()

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.order)

    @cached_property
    def start(self) -> Float[Tensor, " N"]:
        """θ₀: the module's parameters in their order, flattened."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    @property
    def n(self) -> int:
        """N, the number of parameters."""
        return self.start.numel()

    @property
    def clean(self) -> bool:
        """Whether many trainings may run as one batch: a common clip or common draws would tie them together."""
        return self.clip is None and self.seed is None

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return self.rule.lr * self.schedule.factor(step, self.steps)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step."""
        rows = self.order[step]
        return self.inputs[rows], self.targets[rows]

    def values(self, theta: Float[Tensor, " N"]) -> dict[str, Tensor]:
        """A flat vector as the module's named parameters."""
        named = dict(self.module.named_parameters())
        pieces = theta.split([p.numel() for p in named.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}

    def outputs(self, theta: Float[Tensor, " N"], x: Tensor) -> Tensor:
        """What the module with weights `theta` says of `x`."""
        return functional_call(self.module, self.values(theta), (x,))

    def loss_at(self, theta: Float[Tensor, " N"], step: int) -> Float[Tensor, ""]:
        """The loss of a step's batch, to be called within `draws(step)`."""
        x, y = self.batch(step)
        return self.loss(self.outputs(theta, x), y)

    @contextlib.contextmanager
    def draws(self, step: int) -> Iterator[None]:
        """Whatever is drawn inside is what that step draws."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + step)
            yield

    @torch.no_grad()
    def logits(self, thetas: Float[Tensor, "m N"], x: Tensor) -> Iterator[Float[Tensor, "some rows outputs"]]:
        """Outputs of many weights on `x`, some members at a time, without dropout."""
        module = copy.deepcopy(self.module).eval()

        def one(theta: Tensor) -> Tensor:
            return functional_call(module, self.values(theta), (x,))

        for some in thetas.split(_MEMBERS):
            yield vmap(one)(some)

    def evaluate(
        self, thetas: Float[Tensor, "m N"], x: Tensor, y: Tensor
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Loss and accuracy of every weight vector on given rows; nan for weights that are not finite."""
        losses, right = [], []
        for logits in self.logits(thetas, x):
            losses.append(torch.stack([self.loss(each, y) for each in logits]))
            right.append((logits.argmax(-1) == y).double().mean(-1) if y.ndim == 1 else losses[-1] * torch.nan)
        return torch.cat(losses), torch.cat(right)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, as plain values, so that stored columns are never mixed with another map's."""
        import hashlib

        digest = hashlib.sha256()
        for tensor in (self.start, self.inputs, self.targets, *self.order):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return {
            "data": digest.hexdigest(),
            "rule": repr(self.rule),
            "schedule": repr(self.schedule),
            "steps": self.steps,
            "clip": self.clip,
            "seed": self.seed,
            "dtype": str(self.start.dtype),
        }

    def _warn_of_kinks(self) -> None:
        with self.draws(0), torch.enable_grad():
            loss = self.loss_at(self.start.clone().requires_grad_(), 0)
        found, waiting = set(), [loss.grad_fn]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name().lower().startswith(_KINKS):
                found.add(node.name().rstrip("0123456789").removesuffix("Backward"))
            waiting += [parent for parent, _ in node.next_functions]
        if found:
            warnings.warn(
                f"the network has kinks ({', '.join(sorted(found))}): the Jacobian is that of the pieces it trains on, "
                "and says nothing of changes that move a unit across one",
                stacklevel=4,
            )


def _check_module(module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    if not parameters:
        raise SondeError("the module has no parameters: there is nothing to train")
    for name, p in parameters.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise SondeError(
                f"parameter {name} is {str(p.dtype).removeprefix('torch.')}: a product of that many steps needs "
                "float32 or float64; call module.float()"
            )
    if len({p.dtype for p in parameters.values()}) > 1:
        raise SondeError("the parameters mix float32 and float64: call module.float() or module.double()")
    for name, part in module.named_modules():
        if getattr(part, "track_running_stats", False):
            raise SondeError(
                f"{name} keeps running statistics, which the map leaves out: use track_running_stats=False"
            )
