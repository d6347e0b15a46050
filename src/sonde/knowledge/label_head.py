"""Learning from features by gradient: a linear head, stage by stage, with any of the losses.

Slower than `sonde.knowledge.label_logistic` and needed where the loss is not convex: log-confidence and its relatives.
The head starts at 0.01 times the usual random weights, in float32; each stage has a fresh optimiser (or keeps its
state), and the best validation AUROC says when to stop (`sonde.knowledge.label_training`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.knowledge.label_losses import CrossEntropy, Loss
from sonde.knowledge.label_problem import Problem
from sonde.knowledge.label_training import StageSettings, train_stage

_SMALL = 0.01  # of the usual initial weights


@dataclass(frozen=True)
class Head:
    """The backend; see the module.

    keep_optimiser: its moments go on from stage to stage.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    stage: StageSettings = field(default_factory=StageSettings)
    keep_optimiser: bool = False
    name: str = "head"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The loss and how a stage is trained."""
        return {"loss": asdict(self.loss), **asdict(self.stage), "keep_optimiser": self.keep_optimiser}  # type: ignore[call-overload]

    def learner(self, problem: Problem, *, seed: int) -> "HeadLearner":
        """An untrained head on standardised features. Raises `SondeError` for a problem without features."""
        return HeadLearner(self, problem, seed)


class HeadLearner:
    """The classifier; `head` is a linear map from standardised features, without an offset of its own."""

    def __init__(self, backend: Head, problem: Problem, seed: int) -> None:
        self._backend, self._seed = backend, seed
        pool, test = problem.standardised
        self._pool, self._test = pool.float(), test.float()
        columns = 1 if len(problem.classes) == 2 else len(problem.classes)
        self.head = nn.Linear(self._pool.shape[1], columns, bias=False)
        bound = _SMALL / self._pool.shape[1] ** 0.5
        with torch.no_grad():
            self.head.weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self._optimiser: torch.optim.Optimizer | None = None

    def fit(self, rows: Int[np.ndarray, " n"], labels: Float[Tensor, "n C"]) -> Sequence[str]:
        """One stage."""
        x = self._pool[torch.from_numpy(rows)]
        stage = self._backend.stage
        if self._optimiser is None or not self._backend.keep_optimiser:
            self._optimiser = torch.optim.AdamW(
                self.head.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=stage.weight_decay
            )
        return train_stage(
            self.head,
            lambda places: self.head(x[torch.from_numpy(places)]),
            labels,
            loss=self._backend.loss,
            settings=stage,
            optimizer=self._optimiser,
            seed=self._seed,
        )

    def pool_scores(self, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n K"]:
        """Log-odds or logits of rows of the pool."""
        with torch.no_grad():
            return self.head(self._pool[torch.from_numpy(rows)]).double()

    def test_scores(self) -> Float[np.ndarray, "test *C"]:
        """Log-odds `[test]`, or logits `[test C]`."""
        with torch.no_grad():
            scores = self.head(self._test).double().numpy()
        return scores[:, 0] if scores.shape[1] == 1 else scores
