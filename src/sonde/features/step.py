"""One optimisation step of a dictionary: loss, gradients, projection, update, and the books that the next one needs.

`Step(dictionary, config)` is called on a batch of activations (and targets). Steps are optimiser steps, whatever the
number of micro-batches; a latent is dead after so many *tokens* without firing. A step that was saved with `state` and
loaded goes on with the same numbers to the bit. Under data parallelism `accumulate` and `update` are called one by
one, with gradients, `fired` and `tokens` summed over the processes in between.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.features.cross_layer import CrossLayerTranscoder
from sonde.features.dictionary import Dictionary
from sonde.features.objective import Part, Scale, losses, variance
from sonde.features.optimisers import AveragedSignSGD, optimisers
from sonde.features.sparse_ops import reusing
from sonde.features.step_config import StepConfig


class Step:
    """The training of one dictionary (or cross-layer transcoder), a step a call.

    Attributes:
        module: what is trained; its dictionaries are `dictionaries`.
        config: with nothing left open.
        done: optimiser steps.
        tokens_seen: rows of all steps.
        since_fired: rows since each latent of each dictionary fired; int64.
        fired, tokens: what `accumulate` has noted for the next `update`: rows, and whether a latent fired in them.

    Raises:
        ValueError: for a configuration that does not fit the design.

    """

    def __init__(self, module: Dictionary | CrossLayerTranscoder, config: StepConfig | None = None) -> None:
        self.module = module
        self.dictionaries: list[Dictionary] = [module] if isinstance(module, Dictionary) else list(module.layers)
        self.config = (config or StepConfig()).for_design(self.dictionaries[0].design)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        for p in self.parameters:
            if p.dtype not in (torch.float32, torch.float64):
                raise SondeError(f"weights are {p.dtype}: a dictionary trains in float32, whatever the model's type")
        self.optimisers = optimisers(self.parameters, self.config)
        self.done = self.tokens_seen = 0
        self._spare: list[Tensor] = []
        self.since_fired = [
            torch.zeros(each.design.latents, dtype=torch.int64, device=each.device) for each in self.dictionaries
        ]
        self._clear()

    def __call__(
        self, x: Float[Tensor, "... inputs"], y: Float[Tensor, "... outputs"] | None = None
    ) -> dict[str, float]:
        """One step on a batch; `y` are the targets of a transcoder. A cross-layer transcoder takes "n layers d" twice.

        Returns the terms of the loss before the step: "loss", "fvu", "l0" and, where they exist, "aux", "multi" and
        "penalty" (without λ), the share of latents that are "dead", the norm of the "gradient" and the rate "lr".

        Raises:
            SondeError: for NaN or infinite activations, with the step and the row; for widths that do not fit; for a
                batch without rows, or whose rows are all equal; if the loss is no longer finite.

        """
        rows, targets, scale = self.prepared(x, y)
        size = self.config.micro_rows or len(rows)
        terms: dict[str, float] = {}
        for start in range(0, len(rows), size):
            found = self.accumulate(rows[start : start + size], targets[start : start + size], scale)
            terms = {name: terms.get(name, 0.0) + value for name, value in found.items()}
        return terms | self.update()

    def prepared(
        self, x: Float[Tensor, "... inputs"], y: Float[Tensor, "... outputs"] | None = None
    ) -> tuple[Tensor, Tensor, Scale]:
        """Rows and targets in the weights' type, checked, and what the sums over them are divided by."""
        first = self.dictionaries[0]
        if isinstance(self.module, CrossLayerTranscoder):
            rows, targets = self.module.checked(x, y)
        else:
            rows = first.rows(x)[0]
            targets = self._targets(first, rows, y)
        if not len(rows):
            raise SondeError(f"step {self.done} of {self._place()} has no rows: every token was masked out")
        spread = variance(targets)
        finite = spread if targets is rows else spread + rows.sum()
        if not math.isfinite(float(finite)):
            self._stop(rows, targets)
        if not float(spread) > 0:
            raise SondeError(
                f"the {len(rows)} rows of step {self.done} of {self._place()} are all equal: FVU is undefined"
            )
        return rows, targets, Scale(spread, len(rows))

    def accumulate(
        self, rows: Float[Tensor, "n inputs"], targets: Float[Tensor, "n outputs"], scale: Scale
    ) -> dict[str, float]:
        """Add the gradients of some rows of a batch, whose `scale` is that of all its rows."""
        config, first = self.config, self.dictionaries[0]
        rise = (self.done + 1) / config.sparsity_warmup if config.sparsity_warmup else 1.0
        was = [each.training for each in self.dictionaries]
        for each in self.dictionaries:
            each.train()
        try:
            parts = [
                Part(each, part_rows, since >= config.dead_after, column)
                for (each, part_rows, column), since in zip(self._parts(rows), self.since_fired, strict=True)
            ]
            loss = losses(
                parts,
                targets,
                config,
                scale,
                k=config.k_at(self.done, first.design.k) if config.k_start else None,
                sparsity=(config.sparsity or 0.0) * min(1.0, rise),
            )
            with reusing(self._spare):
                loss.total.backward()
        finally:
            for each, training in zip(self.dictionaries, was, strict=True):
                each.train(training)
        self.tokens += len(rows)
        for place, (fired, smallest) in enumerate(zip(loss.fired, loss.smallest, strict=True)):
            self.fired[place] |= fired
            if smallest is not None:
                self.smallest[place] = torch.minimum(self.smallest[place], smallest.double())
        names = list(loss.terms)
        return dict(zip(names, torch.stack([loss.terms[name].double() for name in names]).tolist(), strict=True))

    def update(self) -> dict[str, float]:
        """Project, clip, move the weights, count who fired. Raises `SondeError` for gradients that are not finite."""
        config = self.config
        if config.norm == "project":
            for each in self.dictionaries:
                _project(each.w_dec)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise SondeError(f"gradients of {self._place()} became {norm} at step {self.done}: lower the learning rate")
        if config.clip is not None and norm > config.clip:
            torch._foreach_mul_(gradients, config.clip / norm)
        lr = (config.lr or 0.0) * config.factor(self.done)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
        for p in self.parameters:
            if p.ndim == 2 and p.grad is not None:
                self._spare.append(p.grad)
            p.grad = None
        del self._spare[: -len(self.parameters)]
        self._constrain()
        self._follow_threshold()
        dead = 0
        for since, fired in zip(self.since_fired, self.fired, strict=True):
            since += self.tokens
            since[fired] = 0
            dead += int((since >= config.dead_after).sum())
        self.done += 1
        self.tokens_seen += self.tokens
        self._clear()
        return {"dead": dead / sum(len(since) for since in self.since_fired), "gradient": norm, "lr": lr}

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, the weights are those to be kept: the averages, where the optimiser has them."""
        moving = [(o, p) for o in self.optimisers if isinstance(o, AveragedSignSGD) for p in self.parameters]
        kept = [p.detach().clone() for _, p in moving]
        with torch.no_grad():
            for optimiser, p in moving:
                p.copy_(optimiser.copies(p)[-1])
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, p), old in zip(moving, kept, strict=True):
                    p.copy_(old)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave in the weights what is to be kept. Training does not go on after it."""
        for optimiser in self.optimisers:
            if isinstance(optimiser, AveragedSignSGD):
                for p in self.parameters:
                    p.copy_(optimiser.copies(p)[-1])

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`, between two steps; `load` continues from it to the bit."""
        return {
            "done": self.done,
            "tokens_seen": self.tokens_seen,
            "since_fired": self.since_fired,
            "module": dict(self.module.state_dict()),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises `SondeError` for the state of another design or optimiser."""
        try:
            self.module.load_state_dict(state["module"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise SondeError(f"the saved step does not fit {self._place()}: {str(error).splitlines()[0]}") from error
        self.done, self.tokens_seen = state["done"], state["tokens_seen"]
        for since, saved in zip(self.since_fired, state["since_fired"], strict=True):
            since.copy_(saved)
        self._clear()

    def _clear(self) -> None:
        self.tokens = 0
        self.fired = [torch.zeros_like(since, dtype=torch.bool) for since in self.since_fired]
        self.smallest = [torch.tensor(math.inf, dtype=torch.float64, device=each.device) for each in self.dictionaries]

    def _place(self) -> str:
        return self.dictionaries[0].site or "the dictionary"

    def _parts(self, rows: Tensor) -> list[tuple[Dictionary, Tensor, int]]:
        if isinstance(self.module, CrossLayerTranscoder):
            return self.module.parts(rows)
        return [(self.dictionaries[0], rows, 0)]

    @staticmethod
    def _targets(dictionary: Dictionary, rows: Tensor, y: Tensor | None) -> Tensor:
        design = dictionary.design
        if not design.transcodes:
            if y is not None:
                raise SondeError(f"{dictionary!r} is an autoencoder: its target is its input, so it takes no y")
            return rows
        if y is None:
            raise SondeError(f"{dictionary!r} is a transcoder: it needs the targets y of width {design.outputs}")
        if y.shape[-1] != design.outputs:
            raise SondeError(f"targets have width {y.shape[-1]}, but {dictionary!r} writes width {design.outputs}")
        targets = y.reshape(-1, design.outputs).to(rows.dtype)
        if len(targets) != len(rows):
            raise SondeError(f"there are {len(rows)} rows of activations and {len(targets)} of targets")
        return targets

    def _stop(self, rows: Tensor, targets: Tensor) -> None:
        for name, matrix in (("activations", rows), ("targets", targets)):
            bad = (~matrix.isfinite()).any(1).nonzero()[:, 0]
            if len(bad):
                row = int(bad[0])
                value = float(matrix[row][~matrix[row].isfinite()][0])
                raise SondeError(
                    f"{name} of {self._place()} hold {value} in batch {self.done}, row {row} ({len(bad)} rows in all)"
                )
        raise SondeError(
            f"activations of {self._place()} in batch {self.done} are too large for {rows.dtype}: scale them"
        )

    @torch.no_grad()
    def _constrain(self) -> None:
        """Decoder rows back to length 1 and thresholds back to 0 or more."""
        averaged = [optimiser for optimiser in self.optimisers if isinstance(optimiser, AveragedSignSGD)]
        for each in self.dictionaries:
            if self.config.norm == "project":
                for copy in averaged[0].copies(each.w_dec) if averaged else [each.w_dec]:
                    copy /= torch.linalg.vector_norm(copy, dim=1, keepdim=True).clamp_(min=1e-12)
            if each.design.kind == "jumprelu":
                threshold = each.get_parameter("threshold")
                for copy in averaged[0].copies(threshold) if averaged else [threshold]:
                    copy.clamp_(min=0)

    @torch.no_grad()
    def _follow_threshold(self) -> None:
        if self.done < self.config.threshold_start:
            return
        for each, smallest in zip(self.dictionaries, self.smallest, strict=True):
            if each.design.chooses_across_rows and each.threshold is not None and bool(smallest.isfinite()):
                weight = 1 - self.config.threshold_decay if float(each.threshold) > 0 else 1.0
                each.threshold.lerp_(smallest.to(each.threshold), weight)


def _project(w_dec: nn.Parameter) -> None:
    """Take the part along each row out of the row's gradient."""
    if w_dec.grad is not None:
        for gradient, rows in zip(w_dec.grad.split(1024), w_dec.detach().split(1024), strict=True):
            gradient.addcmul_(torch.linalg.vecdot(gradient, rows)[:, None], rows, value=-1)
