"""Train soft prompts against frozen weights: lengths, positions, learning rates and restarts as one batch.

    s <- s - Adam(grad_s mean_rows objective(M(x spliced with s, y)))

AdamW (Loshchilov and Hutter 2019) without weight decay, learning rates in units of the embedding's coordinate RMS r,
cosine decay. A prompt starts from rows of E, or from the best shorter prompt with rows of E before it, so that a longer
one is not worse merely because it was trained less. What a prompt is at its best validation loss is what is kept.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.lm.chunked import faster_scans
from sonde.lm.model import LanguageModel
from sonde.nets.loop import Schedule, train
from sonde.prompts.examples import Examples
from sonde.prompts.generation import sampled
from sonde.prompts.objectives import Objective, checked, cross_entropy, on_own_text, wanted_by
from sonde.prompts.passes import Passes, Rows, pieces
from sonde.prompts.soft_prompt import Position, SoftPrompt, check_position, embedding_rms, sampled_rows, width

_HELD_OUT = (0.8, 0.2)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine to 0."""

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` (0-based) of `steps`."""
        rise = (step + 1) / max(1.0, self.warmup * steps)
        return min(1.0, rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Trial:
    """One trained prompt of the grid.

    Attributes:
        prompt: the vectors at the best validation.
        length: n.
        position: where it goes.
        restart: which start, from 0.
        lr: in units of r.
        validation: the objective on the validation examples, of `prompt`.
        losses: on the batch of each step.
        best_step: steps before `prompt` was reached.
        stopped: why training ended early, or "".

    """

    prompt: SoftPrompt
    length: int
    position: Position
    restart: int
    lr: float
    validation: float
    losses: list[float] = field(repr=False)
    best_step: int = 0
    stopped: str = ""


@dataclass(frozen=True)
class _Place:
    length: int
    position: Position
    restart: int
    lr: float


def train_prompts(
    lm: LanguageModel,
    examples: Examples,
    *,
    lengths: Sequence[int] = (1, 4, 16),
    restarts: int = 3,
    positions: Sequence[Position] = ("suffix",),
    lrs: Sequence[float] = (0.3,),
    steps: int = 100,
    objective: Objective = cross_entropy,
    batch: int = 16,
    seed: int = 0,
    validation: Examples | None = None,
    validations: int = 8,
    init: Literal["rows", "grow", "zero"] | SoftPrompt = "rows",
    checkpoint: Path | None = None,
    passes: Passes | None = None,
    progress: str | None = None,
) -> list[Trial]:
    """Train a prompt for every length, position, learning rate and restart.

    Args:
        lm: the model; its weights are not changed.
        examples: what the prompts are trained on.
        lengths: numbers of vectors. 0 is no prompt: it is scored, not trained, once.
        restarts: starts of each, from different rows of E.
        positions: places that are searched over.
        lrs: peak learning rates in units of r.
        steps: updates of each prompt.
        objective: a function of `Scored`; see `sonde.prompts.objectives`.
        batch: examples a step. All prompts of the grid see the same ones.
        seed: of starts, batches and places.
        validation: what the best step is chosen on; by default a fifth of the contexts is held out from `examples`, or
            where there is only one context, the training examples themselves.
        validations: how often that is done.
        init: "rows" of E, "zero", "grow" (the best shorter prompt with rows of E before it: lengths one after another),
            or a prompt to go on from.
        checkpoint: file to go on from after an interruption; it ends with the same numbers.
        passes: those of `examples`, to share what is kept of the contexts with other calls. Nothing is then held out
            of `examples`: give `validation`.
        progress: label of a progress bar.

    Returns:
        Trials in the order of lengths, positions, learning rates, restarts.

    Raises:
        SondeError: for grids without entries, texts longer than the context, and objectives that give no number a row.

    """
    grid = [
        _Place(length, position, restart, lr)
        for length in lengths
        for position in positions
        for lr in lrs
        for restart in range(restarts)
    ]
    if not grid or steps < 1 or batch < 1 or min(lengths) < 0 or min(lrs) <= 0:
        raise SondeError(
            f"nothing to train: lengths {tuple(lengths)}, positions {tuple(positions)}, lrs {tuple(lrs)}, {restarts}"
            f" restarts, {steps} steps, batches of {batch}"
        )
    for position in positions:
        check_position(position)
    if validation is None:
        examples, validation = held_out(examples, seed, passes)
    passes = passes or Passes(lm, examples)
    held = passes if validation is examples else Passes(lm, validation)
    for each in (passes, held):  # what does not fit is said before anything is trained
        each.rows(range(len(each.examples)), [max(lengths)] * len(positions), positions)
    trials: dict[_Place, Trial] = {}
    with faster_scans(lm.model):
        plain = next((place for place in grid if place.length == 0), None)
        if plain is not None:
            nothing = SoftPrompt.empty(lm)
            loss = float(score_prompts(held, [nothing], objective, seed=seed).mean())
            trials[plain] = Trial(replace(nothing, position=plain.position), **vars(plain), validation=loss, losses=[])
        trained = [place for place in grid if place.length]
        ordered = sorted({place.length for place in trained}) if init == "grow" else [0] if trained else []
        for length in ordered:
            stage = [place for place in trained if length in (0, place.length)]
            starts = _starts(lm, stage, init, seed, trials)
            where = checkpoint
            if checkpoint is not None and length:
                where = checkpoint.with_name(f"{checkpoint.stem}-{length}{checkpoint.suffix}")
            identity = {"grid": [list(vars(place).values()) for place in stage], "steps": steps, "batch": batch}
            identity |= {"seed": seed, "model": lm.hash if where else "", "init": _described(init)}
            identity |= {"examples": _described(examples), "objective": _described(objective)}
            loop = _Loop(passes, held, stage, starts, objective, steps=steps, batch=batch, seed=seed, often=validations)
            loop.run(where, identity, progress)
            trials |= loop.trials()
    return [trials[place] for place in grid if place in trials]


def score_prompts(
    passes: Passes,
    prompts: Sequence[SoftPrompt],
    objective: Objective = cross_entropy,
    *,
    batch: int = 32,
    seed: int = 0,
) -> Float[Tensor, "prompts rows"]:
    """An objective of prompts on every example, without gradient. `seed` places prompts of position "random"."""
    for prompt in prompts:
        prompt.fits(passes.lm)
    bank = torch.cat([prompt.vectors.to(passes.lm.device) for prompt in prompts])
    found = torch.zeros(len(prompts), len(passes.examples))
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(prompt) for prompt in prompts]
    positions: list[Position] = [prompt.position for prompt in prompts]
    with torch.no_grad():
        for members in passes.batches(batch):
            for group in passes.grouped(members, lengths, positions, generator=generator):
                for rows, values in objective_values(passes, bank, group, objective, seed):
                    example = torch.tensor(members)[rows.member]
                    found.index_put_((rows.owner, example), values.cpu() / rows.samples, accumulate=True)
    return found


def objective_values(
    passes: Passes, bank: Tensor, rows: Rows, objective: Objective, seed: int
) -> Iterator[tuple[Rows, Float[Tensor, " rows"]]]:
    """The objective of rows under the current grad mode, part by part; on own text where the objective wants that."""
    own = on_own_text(objective)
    if own is not None:
        with torch.no_grad():
            rows = own.rollout(rows, partial(sampled, passes, bank.detach(), seed=seed), passes)
    for part in pieces(rows, passes.lm):
        scored = passes.score(bank, part, wanted=wanted_by(objective, part.weights.shape[1]))
        yield part, checked(objective(scored), len(part)).float()


class _AllStopped(Exception):
    """Every prompt has met a loss that is no number."""


class _Bank(nn.Module):
    """The prompts in training, the last good and the best ones, and what happened to each: all that is resumed."""

    def __init__(self, starts: Sequence[Tensor], steps: int) -> None:
        super().__init__()
        n = len(starts)
        self.vectors = nn.ParameterList([nn.Parameter(start.clone()) for start in starts])
        joined = torch.cat([start.clone() for start in starts])
        for name, value in {
            "good": joined,
            "best": joined.clone(),
            "validation": torch.full((n,), math.inf),
            "best_step": torch.zeros(n, dtype=torch.long),
            "stopped": torch.full((n,), -1, dtype=torch.long),
            "losses": torch.full((n, steps), math.nan),
        }.items():
            self.register_buffer(name, value)

    good: Tensor
    best: Tensor
    validation: Tensor
    best_step: Tensor
    stopped: Tensor
    losses: Tensor

    def joined(self) -> Float[Tensor, "m width"]:
        return torch.cat(list(self.vectors))


class _Loop:
    """One stage of the grid: all its prompts side by side."""

    def __init__(
        self,
        passes: Passes,
        held: Passes,
        stage: Sequence[_Place],
        starts: Sequence[Tensor],
        objective: Objective,
        *,
        steps: int,
        batch: int,
        seed: int,
        often: int,
    ) -> None:
        self.passes, self.held, self.stage, self.objective = passes, held, stage, objective
        self.steps, self.seed = steps, seed
        self.rms = embedding_rms(passes.lm)
        self.bank = _Bank(starts, steps)
        self.lengths = [place.length for place in stage]
        self.positions: list[Position] = [place.position for place in stage]
        self.batches = passes.batches(batch, seed=seed)
        self.validated = {round((i + 1) * steps / often) for i in range(often)} | {steps}

    def run(self, checkpoint: Path | None, identity: dict[str, Any], progress: str | None) -> None:
        groups = [
            {"params": [vectors], "lr": place.lr * self.rms}
            for vectors, place in zip(self.bank.vectors, self.stage, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._validate(0)
        with suppress(_AllStopped):
            train(
                self.bank,
                self._loss,
                [optimizer],
                steps=self.steps,
                schedule=Cosine(),
                checkpoint=checkpoint,
                identity=identity,
                report=self._report,
                progress=progress,
            )

    def trials(self) -> dict[_Place, Trial]:
        found = {}
        for i, (place, vectors) in enumerate(zip(self.stage, self.bank.best.split(self.lengths), strict=True)):
            step = int(self.bank.stopped[i])
            why = ""
            if step >= 0:
                rate = f"{place.lr} r = {place.lr * self.rms:.3g}"
                why = f"the loss was no number at step {step} with learning rate {rate}: the last good prompt is kept"
            facts = {"lr": place.lr, "restart": place.restart, "seed": self.seed, "steps": self.steps}
            facts["validation"] = float(self.bank.validation[i])
            losses = self.bank.losses[i][: step if step >= 0 else None].tolist()
            found[place] = Trial(
                SoftPrompt(vectors.clone(), place.position, facts),
                **vars(place),
                validation=float(self.bank.validation[i]),
                losses=losses,
                best_step=int(self.bank.best_step[i]),
                stopped=why,
            )
        return found

    def _loss(self, step: int) -> Tensor:
        """The sum of the prompts' losses, whose gradient was computed part by part."""
        bank = self.bank
        values, gradient = self._gradient(step)
        spans = [part.isfinite().all() for part in gradient.split(self.lengths)]
        failed = (bank.stopped < 0) & ~(values.isfinite() & torch.stack(spans).cpu())
        if failed.any():
            bank.stopped[failed] = step
            with torch.no_grad():
                goods = bank.good.split(self.lengths)
                for i in failed.nonzero()[:, 0].tolist():
                    bank.vectors[i].copy_(goods[i])
        alive = bank.stopped < 0
        if not alive.any():
            raise _AllStopped
        bank.losses[alive, step] = values[alive]
        bank.good = bank.joined().detach().clone()
        parts = zip(bank.vectors, gradient.split(self.lengths), alive.tolist(), strict=True)
        # a prompt that was stopped gets no gradient at all: the optimiser passes it by
        surrogate = sum(((v - v.detach()) * g).sum() for v, g, live in parts if live)
        return values[alive].mean().to(gradient.device) + surrogate

    def _gradient(self, step: int) -> tuple[Float[Tensor, " prompts"], Float[Tensor, "m width"]]:
        leaf = self.bank.joined().detach().requires_grad_()
        members = self._members(step)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        values, gradient = torch.zeros(len(self.stage)), torch.zeros_like(leaf)
        for group in self.passes.grouped(members, self.lengths, self.positions, generator=generator):
            for rows, losses in objective_values(
                self.passes, leaf, group, self.objective, self.seed * 1_000_003 + step
            ):
                share = losses / (len(members) * rows.samples)
                gradient += torch.autograd.grad(share.sum(), leaf)[0]
                values.index_add_(0, rows.owner, share.detach().cpu())
        return values, gradient

    def _members(self, step: int) -> list[int]:
        """The batches in a new order every epoch."""
        epoch, place = divmod(step, len(self.batches))
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.seed + epoch))
        return self.batches[int(order[place])]

    def _report(self, step: int, loss: float) -> None:
        if step + 1 in self.validated:
            self._validate(step + 1)

    def _validate(self, done: int) -> None:
        bank = self.bank
        parts = bank.joined().detach().split(self.lengths)
        prompts = [SoftPrompt(part, position) for part, position in zip(parts, self.positions, strict=True)]
        found = score_prompts(self.held, prompts, self.objective, seed=self.seed).mean(1)
        better = found < bank.validation
        bank.validation = torch.where(better, found, bank.validation)
        bank.best_step = torch.where(better, done, bank.best_step)
        spread = better.repeat_interleave(torch.tensor(self.lengths)).to(bank.best.device)
        bank.best = torch.where(spread[:, None], bank.joined().detach(), bank.best)


def held_out(examples: Examples, seed: int, passes: Passes | None = None) -> tuple[Examples, Examples]:
    """Training examples and a fifth of the contexts to choose by; both are all examples where that cannot be."""
    if passes is not None or len({tuple(context) for context in examples.contexts}) == 1:
        return examples, examples
    training, validation = examples.split(_HELD_OUT, seed=seed)
    return training, validation


def _described(thing: Any) -> str:
    """Of what a checkpoint belongs to: its name and plain values, long ones as a checksum."""
    if isinstance(thing, str):
        return thing
    values = {} if isinstance(thing, FunctionType) else getattr(thing, "__dict__", {})
    plain = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items() if name[0] != "_"}
    plain = {name: v for name, v in plain.items() if isinstance(v, list | dict | int | float | str)}
    return f"{getattr(thing, '__qualname__', type(thing).__qualname__)} {zlib.crc32(repr(plain).encode()):08x}"


def _starts(
    lm: LanguageModel, stage: Sequence[_Place], init: str | SoftPrompt, seed: int, done: Mapping[_Place, Trial]
) -> list[Tensor]:
    """Where each prompt begins. Restarts differ; positions and learning rates share their starts."""
    found = []
    for place in stage:
        generator = torch.Generator().manual_seed(seed * 7919 + place.restart * 101 + place.length)
        start = sampled_rows(lm, place.length, generator)
        if init == "zero":
            start = torch.zeros(place.length, width(lm), device=lm.device)
        elif isinstance(init, SoftPrompt):
            init.fits(lm)
            start = _padded(init.vectors.to(lm.device), start)
        elif init == "grow":
            shorter = [
                trial
                for other, trial in done.items()
                if 0 < other.length < place.length and replace(other, length=place.length) == place
            ]
            if shorter:
                start = _padded(min(shorter, key=lambda trial: trial.validation).prompt.vectors, start)
        found.append(start)
    return found


def _padded(shorter: Tensor, start: Tensor) -> Tensor:
    """The shorter prompt behind the first vectors of `start`: next to what follows it, as it was."""
    if len(shorter) > len(start):
        raise SondeError(f"a prompt of {len(shorter)} vectors is longer than {len(start)}")
    return torch.cat([start[: len(start) - len(shorter)], shorter])
