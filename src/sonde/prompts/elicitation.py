"""Measure how much prompting a behaviour takes, with the controls that make the answer mean something.

For a model and a set of examples: one information curve of the behaviour, one of the same targets on a control model,
one of random targets of equal length on the model itself, all at the same budget. Contexts are split in three: prompts
are trained on the first part, chosen on the second and reported on the third. Curves are kept in a folder under the
hash of all that decides them, so that a run over many models and sets goes on where it stopped, and nothing that was
measured is measured again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sonde.data.behaviours import Behaviour
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.lm.model import LanguageModel
from sonde.prompts.claims import Elicited
from sonde.prompts.control_model import SHUFFLED, shuffled
from sonde.prompts.curve import LENGTHS, Curve
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.objectives import Objective, cross_entropy
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import Position
from sonde.prompts.training import Trial, score_prompts, train_prompts

_SPLIT = (0.6, 0.2, 0.2)
_LEAST = 8

Parts = tuple[Examples, Examples, Examples]
Filter = Callable[[list[int]], bool]
"""Whether an output (token ids) may leave; see `sonde.prompts.defence`."""


@dataclass(frozen=True)
class Budget:
    """What each curve may spend: the same for a behaviour and its controls.

    lengths of prompts besides 0, restarts of each, positions and learning rates (in units of the embedding RMS) that
    are searched over, steps and examples a step. `grow` starts longer prompts from the best shorter ones.
    """

    lengths: tuple[int, ...] = LENGTHS[1:]
    restarts: int = 3
    positions: tuple[Position, ...] = ("suffix",)
    lrs: tuple[float, ...] = (0.3,)
    steps: int = 100
    batch: int = 16
    grow: bool = True

    def __post_init__(self) -> None:
        lengths = tuple(sorted(set(self.lengths) - {0}))
        if not lengths or lengths[0] < 0 or min(self.restarts, self.steps, self.batch) < 1 or not self.positions:
            raise SondeError(
                f"nothing to train: lengths {self.lengths}, {self.restarts} restarts, {self.steps} steps of "
                f"{self.batch} examples, positions {self.positions}"
            )
        object.__setattr__(self, "lengths", lengths)


def parts_of(examples: Examples, *, held_out: bool = True, seed: int = 0) -> Parts:
    """Contexts to train on, to choose by and to report on; without `held_out`, all of them for all three.

    Raises `SondeError` for fewer than eight different ones.
    """
    if not held_out:
        return examples, examples, examples
    different = len({tuple(context) for context in examples.contexts})
    if different < _LEAST:
        raise SondeError(f"{different} different contexts are too few: with {_LEAST}, two are left to report on")
    training, validation, test = examples.split(_SPLIT, seed=seed)
    return training, validation, test


def require_room(lm: LanguageModel, examples: Examples, budget: Budget) -> None:
    """Raise `SondeError` where a text with the longest prompt is longer than the model's context, before any work."""
    Passes(lm, examples).rows(range(len(examples)), [budget.lengths[-1]] * len(budget.positions), budget.positions)


def information_curve(
    lm: LanguageModel,
    parts: Parts,
    budget: Budget | None = None,
    *,
    objective: Objective = cross_entropy,
    allowed: Filter | None = None,
    folder: Path | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> Curve:
    """Train prompts of every length on the first of `parts`, choose on the second, report on the third.

    The grid of restarts, positions and learning rates is one batch. `allowed` blocks outputs: what it refuses is no
    success. With a `folder`, a curve that was measured is read from it and an interrupted one goes on. An `objective`
    whose labels are not the targets is a dataclass with a second one, `exact`, that is 1 on success; curves of other
    objectives are trained on them and reported in nats of the targets.
    """
    budget = budget or Budget()
    key = _key(lm, parts, budget, objective, seed)
    kept = None if folder is None else folder / f"{key}.safetensors"
    if kept is not None and kept.exists():
        return _filtered(Curve.from_state(load_bundle(kept)), parts[2], allowed)
    training, validation, test = parts
    trials = train_prompts(
        lm,
        training,
        lengths=(0, *budget.lengths),
        restarts=budget.restarts,
        positions=budget.positions,
        lrs=budget.lrs,
        steps=budget.steps,
        batch=min(budget.batch, len(training)),
        seed=seed,
        validation=validation,
        objective=objective,
        init="grow" if budget.grow else "rows",
        checkpoint=None if folder is None else folder / f"{key}.part.safetensors",
        progress=progress,
    )
    curve = _curve(lm, trials, test, budget, objective)
    if kept is not None:
        save_bundle(kept, curve.state())
        for part in kept.parent.glob(f"{key}.part*"):
            part.unlink()
    return _filtered(curve, test, allowed)


def elicit(
    lm: LanguageModel,
    examples: Examples,
    budget: Budget | None = None,
    *,
    behaviour: str = "do it",
    control: LanguageModel | Literal["shuffled"] | None = "shuffled",
    random_targets: bool = True,
    held_out: bool = True,
    folder: Path | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> Elicited:
    """The information curve of a behaviour, with its controls; see `sonde.prompts.claims.claim` for what they allow.

    Args:
        lm: the model in question.
        examples: contexts and targets, tokenised for it.
        budget: of each of the curves.
        behaviour: completes "makes the model …".
        control: a model that never had the behaviour, with the same tokens; by default the same network with the
            weights of its blocks shuffled. None leaves this control out, and nothing is then said of a capability.
        random_targets: also ask for random tokens of equal length.
        held_out: choose and report on contexts that no prompt was trained on.
        folder: where curves are kept.
        seed: of the split, the prompts and the random tokens.
        progress: label of the progress bars.

    Raises:
        SondeError: for a control model of another vocabulary, and as `train_prompts` and `Examples.split` do.

    """
    budget = budget or Budget()
    if isinstance(control, LanguageModel) and control.vocab_size != lm.vocab_size:
        raise SondeError(
            f"the control model {control.name} has {control.vocab_size} tokens, {lm.name} has {lm.vocab_size}: the "
            "same targets need the same tokenizer"
        )
    parts = parts_of(examples, held_out=held_out, seed=seed)
    other = shuffled(lm, seed=seed) if control == "shuffled" else control

    def measured(model: LanguageModel, of: Parts, what: str) -> Curve:
        label = None if progress is None else f"{progress}, {what}"
        return information_curve(model, of, budget, folder=folder, seed=seed, progress=label)

    strings = None
    if random_targets:
        strings = parts_of(examples.random_targets(lm, seed=seed), held_out=held_out, seed=seed)
    return Elicited(
        model=lm.name,
        behaviour=behaviour,
        curve=measured(lm, parts, "behaviour"),
        control=None if other is None else measured(other, parts, "control model"),
        random=None if strings is None else measured(lm, strings, "random targets"),
        held_out=held_out,
        control_name=SHUFFLED if control == "shuffled" else "" if other is None else other.name,
    )


def information_curves(
    models: Sequence[LanguageModel],
    behaviours: Sequence[Behaviour],
    budget: Budget | None = None,
    *,
    controls: Sequence[LanguageModel | Literal["shuffled"] | None] | None = None,
    random_targets: bool = True,
    held_out: bool = True,
    folder: Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Elicited]:
    """Curves of every behaviour on every model, each with its controls: one call, which a `folder` makes resumable.

    `controls` has one entry for each model, as `control` of `elicit`. Raises `SondeError` as `elicit` does.
    """
    chosen = ["shuffled"] * len(models) if controls is None else list(controls)
    if len(chosen) != len(models):
        raise SondeError(f"{len(models)} models, but {len(chosen)} control models: give one for each")
    return [
        elicit(
            lm,
            Examples.from_text(lm, list(one.contexts), list(one.targets)),
            budget,
            behaviour=one.what,
            control=control,  # type: ignore[arg-type]
            random_targets=random_targets,
            held_out=held_out,
            folder=folder,
            seed=seed,
            progress=f"{lm.name}, {one.name}" if progress else None,
        )
        for lm, control in zip(models, chosen, strict=True)
        for one in behaviours
    ]


def _curve(lm: LanguageModel, trials: Sequence[Trial], test: Examples, budget: Budget, objective: Objective) -> Curve:
    """The best position and learning rate of each length and restart, on test contexts."""
    lengths = (0, *budget.lengths)
    chosen: list[list[Trial]] = []
    for n in lengths:
        of_length = [trial for trial in trials if trial.length == n]
        restarts = [
            min((t for t in of_length if t.restart == restart), key=lambda trial: trial.validation)
            for restart in (range(budget.restarts) if n else (of_length[0].restart,))
        ]
        chosen.append(restarts * (1 if n else budget.restarts))
    flat = [trial for restarts in chosen for trial in restarts]
    prompts = [trial.prompt for trial in flat]
    tokens = torch.tensor([len(target) for target in test.targets])
    if hasattr(objective, "exact"):
        passes, judged = Passes(lm, test), objective.exact  # type: ignore[attr-defined]
        nats, exact = score_prompts(passes, prompts, objective) * tokens, score_prompts(passes, prompts, judged) > 0
    else:
        found = evaluate(lm, prompts, test)
        nats, exact, tokens = found.nats, found.exact, found.tokens.long()
    shape = (len(lengths), budget.restarts, len(test))
    labels = {context: i for i, context in enumerate(dict.fromkeys(map(tuple, test.contexts)))}
    return Curve(
        lengths,
        nats.double().numpy().reshape(shape),
        exact.numpy().reshape(shape),
        np.array([[trial.validation for trial in restarts] for restarts in chosen]),
        tokens.numpy(),
        np.array([labels[tuple(context)] for context in test.contexts]),
        tuple(tuple((trial.position, trial.lr) for trial in restarts) for restarts in chosen),
        tuple(torch.stack([trial.prompt.vectors.cpu() for trial in restarts]) for restarts in chosen),
    )


def _filtered(curve: Curve, test: Examples, allowed: Filter | None) -> Curve:
    if allowed is None:
        return curve
    return replace(curve, success=curve.success & np.array([allowed(target) for target in test.targets]))


def _key(lm: LanguageModel, parts: Parts, budget: Budget, objective: Objective, seed: int) -> str:
    """A name for a curve made from all that decides it."""
    data = [[part.contexts, part.targets, part.slots, part.weights] for part in parts]
    setting: Any = objective
    named = repr(setting) if is_dataclass(setting) else getattr(setting, "__qualname__", type(setting).__qualname__)
    text = json.dumps([lm.hash, data, asdict(budget), named, seed])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
