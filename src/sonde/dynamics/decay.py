"""What becomes of a skill when its training stops: stages of training, each on a mixture, that branch from one another.

A stage says what is trained on and for how long: all tasks (joint), all but some (drop), all again (revive). It starts
from a point, the weights, the optimiser's state and the steps behind it, and ends in another; any number of stages
start from the same point, so that one joint phase serves all drops, controls and revivals. The batch of a step is that
of the step counted from the very beginning: a stage cut in two with the state kept is the uncut one, bit for bit.

What is done with the optimiser's state at a switch is a factor of the experiment. Moments of Adam that are kept make
the first steps of a revival overshoot, so the default is to reset them and to warm up over 20 steps; the learning rate
is constant otherwise. Every stage is `sonde.nets.loop.train` with the tasks' scores watched on a logarithmic grid.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.data.task_mixture import Mixture
from sonde.dynamics.decay_scores import Scorer, Scores, next_token_loss
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.nets.loop import Schedule, Watch, log_steps, train

Switch = Literal["keep", "reset", "decay"]
Rule = Literal["adamw", "sgd"]
Penalty = Callable[[nn.Module], Tensor]
Criterion = Callable[[Mapping[str, float]], bool]

_DECAYED = 0.1  # of the moments, where a switch decays them
_EVERY = 200


@dataclass(frozen=True)
class Learner:
    """How a network learns: the same through all stages unless a stage says otherwise.

    `ends` is the share of a stage's end over which the learning rate falls to 0; anything but 0 draws a warning, for
    what follows a rate of 0 is not decay of the skill alone.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    optimizer: Rule = "adamw"
    batch: int = 64
    ends: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0 or self.batch < 1 or not 0 <= self.ends <= 1:
            raise SondeError(
                f"a learning rate of {self.lr}, weight decay {self.weight_decay}, batch {self.batch}, ends {self.ends}"
                ": give a rate above 0, a decay of 0 or more, a batch of 1 or more, ends from 0 to 1"
            )
        if self.optimizer not in ("adamw", "sgd"):
            raise SondeError(f"optimizer {self.optimizer!r} is unknown: use adamw or sgd")
        if self.ends:
            warnings.warn(
                "the learning rate reaches 0 before the switch: a skill dropped there does not decay, and the next "
                "stage starts with a jump of the rate",
                stacklevel=3,
            )

    def over(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser, AdamW or SGD with momentum 0.9."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Stage:
    """What is trained on for how many steps, and how it begins.

    Attributes:
        name: of the stage.
        steps: M.
        drop: tasks that are taken out of the mixture; empty for the joint mixture.
        only: tasks that alone are trained on; not with `drop`.
        replay: share of the batch that the dropped tasks keep.
        switch: what is done with the optimiser's state of the point it starts from: keep, reset, or decay to a tenth.
        warmup: steps of linear warm-up.
        per_octave: how often the tasks are scored in each doubling of the steps.

    """

    name: str
    steps: int
    drop: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    replay: float = 0.0
    switch: Switch = "reset"
    warmup: int = 20
    per_octave: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or self.per_octave < 1:
            raise SondeError(
                f"stage {self.name!r}: {self.steps} steps, warm-up of {self.warmup}, {self.per_octave} scores in each "
                "doubling; give 1, 0 and 1 or more"
            )
        if self.drop and self.only:
            raise SondeError(f"stage {self.name!r} has both `drop` and `only`: give one")
        if self.switch not in get_args(Switch):
            raise SondeError(f"switch {self.switch!r} is unknown: use {', '.join(get_args(Switch))}")

    def mixture(self, joint: Mixture) -> Mixture:
        """What this stage trains on. Raises `SondeError` for tasks that the mixture does not have, or none left."""
        if self.only:
            return joint.only(*self.only)
        if not self.drop:
            return joint
        left = joint.without(*self.drop)
        return left.with_share(self.replay, *self.drop) if self.replay else left


@dataclass(frozen=True)
class Point:
    """Where a stage starts or ends: weights, the optimiser's state (None: fresh), and the steps behind it."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    steps: int = 0

    @classmethod
    def of(cls, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 0) -> "Point":
        """A copy of how a network is now."""
        state = None if optimizer is None else _copied(optimizer.state_dict())
        return cls({name: tensor.detach().clone() for name, tensor in module.state_dict().items()}, state, steps)

    def into(self, module: nn.Module) -> nn.Module:
        """Give the weights to a network, which is returned."""
        module.load_state_dict(self.weights)
        return module

    def tree(self) -> dict[str, Any]:
        """The point as `sonde.files.save_bundle` takes it."""
        return {"weights": self.weights, "optimizer": self.optimizer, "steps": self.steps}

    def save(self, path: str | Path) -> None:
        """Write the point as one safetensors file."""
        save_bundle(path, self.tree())

    @classmethod
    def load(cls, path: str | Path) -> "Point":
        """Read what `save` wrote. Raises `SondeError` as `load_bundle` does."""
        return cls(**load_bundle(path))


@dataclass(frozen=True)
class Curve:
    """Scores of every task at the steps of one stage.

    times: steps since the stage began. tokens: of a step, by which curves are comparable.
    """

    stage: str
    times: tuple[int, ...]
    scores: tuple[Scores, ...]
    tokens: int

    def of(self, task: str, measure: str = "exact") -> Float[np.ndarray, " times"]:
        """One measure of one task over time."""
        return np.array([scores[task][measure] for scores in self.scores])

    def mean(self, tasks: Sequence[str], measure: str = "exact") -> Float[np.ndarray, " times"]:
        """One measure over time, mean over tasks."""
        return np.mean([self.of(task, measure) for task in tasks], axis=0)

    def first(self, tasks: Sequence[str], criterion: Criterion) -> int | None:
        """The first step at which all of `tasks` meet the criterion; None where they never do."""
        return next(
            (t for t, s in zip(self.times, self.scores, strict=True) if all(criterion(s[k]) for k in tasks)), None
        )

    def then(self, other: "Curve") -> "Curve":
        """The curve of this stage and of one that went on from its end, as one."""
        last = self.times[-1]
        later = [(last + t, s) for t, s in zip(other.times, other.scores, strict=True) if t > 0]
        times, scores = zip(*later, strict=True) if later else ((), ())
        return replace(self, times=(*self.times, *times), scores=(*self.scores, *scores))

    def rows(self, **labels: Any) -> list[dict[str, Any]]:
        """A row for every step and task, with `labels` in front."""
        return [
            {**labels, "stage": self.stage, "step": step, "task": task, **values}
            for step, scores in zip(self.times, self.scores, strict=True)
            for task, values in scores.items()
        ]

    def tree(self) -> dict[str, Any]:
        """The curve as `sonde.files.save_bundle` takes it."""
        return {"stage": self.stage, "times": self.times, "scores": self.scores, "tokens": self.tokens}

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> "Curve":
        """What `tree` made."""
        return cls(tree["stage"], tuple(tree["times"]), tuple(tree["scores"]), tree["tokens"])


@dataclass(frozen=True, kw_only=True)
class Branching:
    """A network, a mixture and a learner, on which stages are run from any point.

    `scored` are the tasks that are scored, all by default. The network is changed in place by every stage; what counts
    is the point that it returns.
    """

    module: nn.Module
    joint: Mixture
    learner: Learner = field(default_factory=Learner)
    seed: int = 0
    scored: tuple[str, ...] = ()

    def start(self) -> Point:
        """The network as it is, as a point without steps behind it."""
        return Point.of(self.module)

    def run(
        self,
        stage: Stage,
        start: Point,
        *,
        joint: Mixture | None = None,
        learner: Learner | None = None,
        trainable: Callable[[str], bool] | None = None,
        penalty: Penalty | None = None,
        until: tuple[Sequence[str], Criterion] | None = None,
        keep: Mapping[int, Point] | dict[int, Point] | None = None,
        checkpoint: Path | None = None,
        progress: str | None = None,
    ) -> tuple[Point, Curve]:
        """Run a stage from `start`; returns the point where it ends and the scores on the way.

        Args:
            stage: what is trained on.
            start: where it begins.
            joint: the mixture that the stage's names are of, where it is not the common one.
            learner: other settings for this stage.
            trainable: which parameters are trained, by name; all by default.
            penalty: added to the loss of every step.
            until: tasks and a criterion; the stage ends as soon as all of them meet it.
            keep: a dict whose keys are steps of the grid; each is given the point that was reached there.
            checkpoint: file by which an interrupted stage goes on.
            progress: label of a progress bar.

        Raises `SondeError` for names that the mixture does not have, and for a loss that is not finite.

        """
        learner = learner or self.learner
        mixture = stage.mixture(joint or self.joint)
        module = start.into(self.module)
        named = dict(module.named_parameters())
        chosen = [p for name, p in named.items() if trainable is None or trainable(name)]
        if not chosen:
            raise SondeError(f"stage {stage.name!r} trains no parameter: there are {', '.join(named)}")
        grad = {name: p.requires_grad for name, p in named.items()}
        ours = {id(p) for p in chosen}
        for p in named.values():
            p.requires_grad_(id(p) in ours)
        optimizer = learner.over(chosen)
        _switch(optimizer, start.optimizer, stage.switch)
        scorer = Scorer([mixture.task(name) for name in self.scored or mixture.names])
        kept: dict[int, Point] = keep if isinstance(keep, dict) else {}
        grid = {*log_steps(stage.steps, per_octave=stage.per_octave), *kept}

        def look(done: int) -> dict[str, Any]:
            if done in kept:
                kept[done] = Point.of(module, optimizer, start.steps + done)
            tree: dict[str, Any] = {"scores": scorer(module)}
            return tree | ({"point": kept[done].tree()} if done in kept else {})

        def stop(tree: dict[str, Any]) -> bool:
            return until is not None and all(until[1](tree["scores"][task]) for task in until[0])

        pad, seed = mixture.tasks[0].pad, self.seed

        def loss_of_step(step: int) -> Tensor:
            at = start.steps + step
            tokens = mixture.batch(at, learner.batch, seed=seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed + 1) * 1_000_003 + at)  # of dropout
                loss = next_token_loss(module, tokens, pad)
            return loss if penalty is None else loss + penalty(module)

        watch = Watch(grid, look, stop if until is not None else None)
        module.train()
        losses = train(
            module,
            loss_of_step,
            [optimizer],
            steps=stage.steps,
            schedule=Schedule(warmup=stage.warmup / stage.steps, decay=learner.ends),
            checkpoint=checkpoint,
            every=_EVERY,
            identity={"stage": _plain(asdict(stage)), "learner": _plain(asdict(learner)), "seed": seed},
            watch=watch,
            progress=progress,
        )
        module.eval()
        for name, p in named.items():
            p.requires_grad_(grad[name])
        seen = dict(sorted(watch.seen.items()))
        for done, tree in seen.items():
            if done in kept:
                kept[done] = Point(**tree["point"])
        curve = Curve(
            stage.name,
            tuple(seen),
            tuple(tree["scores"] for tree in seen.values()),
            learner.batch * mixture.tasks[0].rows.shape[1],
        )
        return Point.of(module, optimizer, start.steps + len(losses)), curve

    def learn(
        self,
        steps: int,
        *,
        criterion: float = 0.95,
        limit: int = 3,
        per_octave: int = 4,
        checkpoint: Path | None = None,
    ) -> tuple[Point, Curve, bool]:
        """The joint phase: `steps` steps on all tasks, then blocks of half as many until all are learned.

        It takes at most `limit` times `steps`. Returns the point, the learning curve, and whether all trained tasks
        reached `criterion` of whole rows right.
        """
        names = [name for name in self.joint.trained if not self.scored or name in self.scored]
        block = Stage("joint", steps, per_octave=per_octave)
        point, curve = self.run(block, self.start(), checkpoint=_numbered(checkpoint, 0), progress="joint")
        part = 1
        while not _learned(curve, names, criterion) and curve.times[-1] + max(1, steps // 2) <= limit * steps:
            further = replace(block, steps=max(1, steps // 2), switch="keep", warmup=0, per_octave=1)
            point, more = self.run(further, point, checkpoint=_numbered(checkpoint, part), progress="joint, longer")
            curve, part = curve.then(more), part + 1
        return point, curve, _learned(curve, names, criterion)


def _learned(curve: Curve, names: Sequence[str], criterion: float) -> bool:
    return all(curve.scores[-1][name]["exact"] >= criterion for name in names)


def _numbered(path: Path | None, part: int) -> Path | None:
    return None if path is None else path.with_name(f"{path.stem}-{part}{path.suffix}")


def _switch(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, how: Switch) -> None:
    if state is None or how == "reset":
        return
    state = _copied(state)
    if [len(group["params"]) for group in state["param_groups"]] != [
        len(group["params"]) for group in optimizer.param_groups
    ]:
        raise SondeError("the optimiser's state is of other parameters: switch with reset")
    if how == "decay":
        for moments in state["state"].values():
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if moments.get(name) is not None:
                    moments[name].mul_(_DECAYED)
    given = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, given, strict=True):
        group.update(own)  # rates are this stage's; only the moments come from before


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state without shared tensors."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]  # type: ignore[return-value]
    return state.detach().clone() if isinstance(state, Tensor) else state


def _plain(tree: Any) -> Any:
    """Tuples as lists, as a bundle gives them back."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree
