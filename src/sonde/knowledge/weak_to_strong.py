"""How much of the gap between a weak supervisor and the truth does a student close that the supervisor alone taught?

    PGR = (student - supervisor) / (ceiling - supervisor)                on test AUROC

The student learns from weak labels only; the ceiling is the same model taught the truth on as many rows. It is 0 for a
copy of the supervisor and 1 for the ceiling. A `Recipe` says with which loss the student learns (any of
`sonde.knowledge.label_losses`), whether labels are repaired first from the student's features
(`sonde.knowledge.label_repair`), and how often it learns again from its own soft labels (strong to strong).
Burns et al. 2023 (arXiv:2312.09390); EleutherAI, "Experiments in Weak-to-Strong Generalization".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.knowledge.label_choice import probabilities
from sonde.knowledge.label_head import Head
from sonde.knowledge.label_losses import ConfidenceEntropy, ConfidenceWindow, Divergence, LogConfidence
from sonde.knowledge.label_methods import Backend
from sonde.knowledge.label_problem import Outcome, Problem, Purchase, log_odds
from sonde.knowledge.label_repair import Kind, Use, repair
from sonde.knowledge.label_score import rates
from sonde.knowledge.recovered_gap import ScoredRows, recovered_gap, recovered_gap_interval
from sonde.stats.intervals import Interval


@dataclass(frozen=True)
class Recipe:
    """How a student learns from weak labels; a `Method`.

    backend: the student, such as `Head(loss=LogConfidence())`. repair: None, or the kind of label repair; use: to
    relabel or to filter. iterations: of learning again from the student's own soft labels on the same rows.
    """

    name: str
    backend: Backend = field(default_factory=Head)
    repair: Kind | None = None
    use: Use = "relabel"
    neighbours: int = 50
    iterations: int = 0

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Buy the first source's labels, repair, train, and train again. Needs features where labels are repaired."""
        source = next(iter(purchase.counts))
        rows, labels = purchase.take(source)
        if self.repair is not None:
            x = problem.standardised[0][torch.from_numpy(rows)][:, :-1]
            repaired = repair(x, labels, kind=self.repair, use=self.use, neighbours=self.neighbours)
            rows, labels = rows[repaired.kept], repaired.labels[torch.from_numpy(repaired.kept)]
        learner = self.backend.learner(problem, seed=seed)
        notes = list(learner.fit(rows, labels))
        for again in range(self.iterations):
            own = probabilities(learner.pool_scores(rows)).to(labels)
            learner = self.backend.learner(problem, seed=seed + again + 1)
            notes += learner.fit(rows, own)
        settings = {
            "backend": self.backend.name,
            **self.backend.settings,
            "repair": self.repair,
            "use": self.use,
            "neighbours": self.neighbours,
            "iterations": self.iterations,
        }
        return Outcome.of(learner.test_scores(), purchase, notes=notes, settings=settings)


RECIPES: tuple[Recipe, ...] = (
    Recipe("xent"),
    Recipe("log-confidence", Head(loss=LogConfidence())),
    Recipe("confidence window", Head(loss=ConfidenceWindow())),
    Recipe("window at the median", Head(loss=ConfidenceWindow("median"))),
    Recipe("entropy", Head(loss=ConfidenceEntropy())),
    Recipe("kl", Head(loss=Divergence())),
    Recipe("kNN relabel", repair="knn"),
    Recipe("kNN filter", repair="knn", use="filter"),
    Recipe("logistic relabel", repair="logistic"),
    Recipe("logistic filter", repair="logistic", use="filter"),
    Recipe("topological filter", repair="topological", use="filter"),
    Recipe("strong to strong", iterations=2),
)
"""Those of the sources, for a linear student on features."""


@dataclass(frozen=True)
class Generalisation:
    """One student against its supervisor and its ceiling, by test AUROC, and the share of the gap that it closes.

    recovered: None where the ceiling is less than 0.05 above the supervisor. seeds: how many problems.
    """

    recipe: str
    supervisor: float
    student: float
    ceiling: float
    student_accuracy: float
    recovered: Interval | None
    seeds: int


def generalise(
    problems: Sequence[Problem],
    recipe: Recipe,
    *,
    rows: int,
    weak: str = "weak",
    seed: int = 0,
) -> Generalisation:
    """Train the student on `rows` weak labels and its ceiling on as many true ones, once for each problem (seed).

    Every problem's weak source needs `test_labels`, which say how good the supervisor is. Two classes. The ceiling is
    trained with the recipe's backend and plain cross-entropy where that is a `Head`.

    Raises `SondeError` for a problem of more classes or without the supervisor's test labels.
    """
    if not problems:
        raise SondeError("no problems: a student needs at least one")
    ceilings, students, supervisors, accuracies = [], [], [], []
    for number, problem in enumerate(problems):
        given = problem.source(weak).test_labels
        if given is None or len(problem.classes) != 2:
            raise SondeError(f"{problem.name}: a recovered gap needs two classes and test labels of source {weak!r}")
        supervisor = log_odds(given).numpy()
        student = recipe(problem, Purchase(problem, {weak: rows}, seed=seed + number), seed=seed + number).scores
        ceiling = _ceiling(problem, recipe, rows, seed + number)
        accuracies.append(rates(student, problem.test_truth)[0])
        for kept, scores in ((students, student), (supervisors, supervisor), (ceilings, ceiling)):
            kept.append(_scored(problem, scores))
    areas = [[_area(one) for one in kept] for kept in (students, supervisors, ceilings)]
    student_area, floor, top = (float(np.mean(one)) for one in areas)
    try:
        recovered = recovered_gap_interval(list(zip(students, supervisors, ceilings, strict=True)), seed=seed)
    except SondeError:
        recovered = None
    return Generalisation(recipe.name, floor, student_area, top, float(np.mean(accuracies)), recovered, len(problems))


def gap_recovered(student: float, supervisor: float, ceiling: float) -> float:
    """PGR of three AUROCs: 0 for a copy of the supervisor, 1 for the ceiling.

    Raises `SondeError` where the ceiling is less than 0.05 above the supervisor: there is no gap.
    """
    return recovered_gap([student], [supervisor], [ceiling])


def _ceiling(problem: Problem, recipe: Recipe, rows: int, seed: int) -> Float[np.ndarray, " test"]:
    backend = Head(stage=recipe.backend.stage) if isinstance(recipe.backend, Head) else recipe.backend
    purchase = Purchase(problem, {problem.oracle: rows}, seed=seed)
    learner = backend.learner(problem, seed=seed)
    learner.fit(*purchase.take(problem.oracle))
    return learner.test_scores()


def _scored(problem: Problem, scores: Float[np.ndarray, " test"]) -> ScoredRows:
    return ScoredRows(scores, problem.test_truth.astype(bool), np.arange(len(scores)))


def _area(rows: ScoredRows) -> float:
    return rates(rows.scores, rows.truth.astype(np.int64))[1]
