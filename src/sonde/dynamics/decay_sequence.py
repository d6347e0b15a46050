"""Tasks one after the other, without replay, and a second time round: what is forgotten, relearned, anticipated.

T steps on each task in order; all tasks are scored after each, which gives the matrix R_ij of
`sonde.dynamics.decay_metrics`. In a second pass the tasks come again in the same order: savings are steps to the
criterion in the first pass over those in the second, and anticipation is what a task's score has already risen by just
before its turn comes, over its lowest since it was last trained (Yang, Jones, Mozer & Ren 2024).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sonde.dynamics.decay import Branching, Curve, Stage, Switch
from sonde.dynamics.decay_metrics import TaskSequence, forgetting_matrix, plasticity, reached, stability_gap
from sonde.errors import SondeError


@dataclass(frozen=True)
class Passes:
    """The curve of each stage in order, over one or more passes through the same tasks."""

    tasks: tuple[str, ...]
    before: Mapping[str, float]
    curves: tuple[Curve, ...]
    ranks: tuple[float, ...]
    dead: tuple[float, ...]

    def tree(self) -> dict[str, Any]:
        """The passes as `sonde.files.save_bundle` takes them."""
        return {
            "tasks": self.tasks,
            "before": dict(self.before),
            "curves": [curve.tree() for curve in self.curves],
            "ranks": self.ranks,
            "dead": self.dead,
        }

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> "Passes":
        """What `tree` made."""
        curves = tuple(Curve.of_tree(curve) for curve in tree["curves"])
        return cls(tuple(tree["tasks"]), tree["before"], curves, tuple(tree["ranks"]), tuple(tree["dead"]))

    def matrix(self, of_pass: int = 0, measure: str = "accuracy") -> Float[np.ndarray, "stages tasks"]:
        """R_ij of one pass: the score on task j after stage i."""
        n = len(self.tasks)
        own = self.curves[of_pass * n : (of_pass + 1) * n]
        return np.array([[curve.scores[-1][task][measure] for task in self.tasks] for curve in own])

    def summary(self, measure: str = "accuracy") -> TaskSequence:
        """ACC, BWT, FWT and forgetting of the first pass."""
        return forgetting_matrix(self.matrix(0, measure), [self.before[task] for task in self.tasks])

    def steps_to_criterion(self) -> list[list[int | None]]:
        """For each pass, the steps that each task took in its turn; None where it did not get there."""
        n = len(self.tasks)
        turns = [curve.first([self.tasks[i % n]], reached) for i, curve in enumerate(self.curves)]
        return [turns[i : i + n] for i in range(0, len(turns), n)]

    def anticipation(self, measure: str = "accuracy") -> dict[str, float]:
        """What each task has risen by just before its second turn, over its lowest after the first.

        Raises `SondeError` for a single pass.
        """
        n = len(self.tasks)
        if len(self.curves) < 2 * n:
            raise SondeError("anticipation needs a second pass through the tasks")
        found = {}
        for j, task in enumerate(self.tasks):
            between = np.array([curve.scores[-1][task][measure] for curve in self.curves[j + 1 : n + j]])
            found[task] = float(between[-1] - between.min()) if len(between) else 0.0
        return found

    def gaps(self, measure: str = "accuracy") -> list[float]:
        """The stability gap at each switch, on the task that was trained last."""
        return [
            stability_gap(curve.times, curve.of(self.tasks[(i - 1) % len(self.tasks)], measure))
            for i, curve in enumerate(self.curves)
            if i
        ]


def in_turn(
    branching: Branching,
    tasks: Sequence[str],
    *,
    steps: int,
    passes: int = 2,
    switch: Switch = "reset",
    measure: str = "accuracy",
    folder: Path | None = None,
    progress: bool = False,
) -> Passes:
    """Train the tasks one after the other, `steps` steps each, `passes` times round.

    Raises `SondeError` for fewer than two tasks and for names that the mixture does not have.
    """
    if len(tasks) < 2 or passes < 1:
        raise SondeError(f"{len(tasks)} tasks, {passes} passes: give two tasks or more and one pass or more")
    point = branching.start()
    curves, ranks, dead = [], [], []
    for turn in range(passes * len(tasks)):
        task = tasks[turn % len(tasks)]
        stage = Stage(f"turn {turn}: {task}", steps, only=(task,), switch=switch)
        checkpoint = None if folder is None else folder / f"turn-{turn}.safetensors"
        point, curve = branching.run(stage, point, checkpoint=checkpoint, progress=stage.name if progress else None)
        curves.append(curve)
        left = plasticity(branching.module, branching.joint.task(task).held)
        ranks.append(left.rank)
        dead.append(left.dead)
    first = {task: curves[0].scores[0][task][measure] for task in tasks}
    return Passes(tuple(tasks), first, tuple(curves), tuple(ranks), tuple(dead))
