"""Variance, invariance, negative covariance: a direction on which phrasings agree and answers differ, in closed form.

For n questions in v templates, let a± be a question's states averaged over its templates. With

    V = Cov(a-) + Cov(a+)                 variance between questions
    I = mean over questions of the covariance over templates, of both answers
    X = Cov(a-, a+) + Cov(a+, a-)         what the two answers share
    P                                     LEACE map of answer x template

the probe is the top eigenvector of P (w_var V - (1 - w_neg) I - w_neg X) Pᵀ (EleutherAI/elk). All of it is made of
covariances that stream: `VincStatistics` takes one batch of questions after the other. In sums s = a+ + a- and
differences t = a+ - a-, 2 V = Cov(s) + Cov(t) and 2 X = Cov(s) - Cov(t). With one template I is 0.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.contrast_probes import answer_eraser, project, pulled_back, top_eigenvector
from sonde.knowledge.fitting import Solution, Task
from sonde.knowledge.states import States
from sonde.stats.leace_map import class_cross_covariance, class_means, leace_maps
from sonde.stats.moments import Moments


class VincStatistics:
    """Moments of contrast pairs by question, from any number of batches of whole questions."""

    def __init__(self) -> None:
        self.n = 0
        self._moments: list[dict[str, Moments]] = []
        self._means = torch.zeros(0, 0, 0, dtype=torch.float64)
        self._counts = torch.zeros(0, dtype=torch.float64)

    def update(
        self, states: States, groups: Int[Tensor, " n"], templates: Int[Tensor, " n"] | None = None
    ) -> "VincStatistics":
        """Take in a batch; all rows of a question (`groups`) are in one batch. Returns itself.

        Raises `SondeError` for states of another width or number of layers than those before.
        """
        layers, d = len(states.sites), states.d
        if not self._moments:
            kinds = ("sum", "difference", "within", "pooled")
            self._moments = [{kind: Moments(d, precision=torch.float32) for kind in kinds} for _ in range(layers)]
        if len(self._moments) != layers or self._moments[0]["sum"].dim != d:
            raise SondeError(
                f"states of {layers} layers of width {d}: those before had {len(self._moments)} of width "
                f"{self._moments[0]['sum'].dim}"
            )
        questions, which, sizes = groups.unique(return_inverse=True, return_counts=True)
        cells = torch.zeros_like(groups) if templates is None else templates
        rows = states.by_layer("pair").unflatten(2, (2, d))
        for own, x in zip(self._moments, rows, strict=True):
            average = torch.zeros(len(questions), 2, d).index_add_(0, which, x.float()) / sizes[:, None, None]
            own["sum"].update(average[:, 1] + average[:, 0])
            own["difference"].update(average[:, 1] - average[:, 0])
            own["within"].update((x - average[which]) / sizes[which].sqrt()[:, None, None])
            own["pooled"].update(x)
        self._add_means(rows, cells)
        self.n += len(questions)
        return self

    def objective(self, layer: int, *, w_var: float, w_neg: float) -> Float[Tensor, "d d"]:
        """w_var V - (1 - w_neg) I - w_neg X of one layer, float64."""
        own = self._moments[layer]
        total, apart = own["sum"].covariance, own["difference"].covariance
        within = own["within"].scatter / self.n
        return w_var * (total + apart) / 2 - (1 - w_neg) * within - w_neg * (total - apart) / 2

    def eraser(self, layer: int) -> tuple[Float[Tensor, "d q"], Float[Tensor, "q d"]]:
        """L and R that take out answer and template."""
        cross = class_cross_covariance(self._means[layer : layer + 1], self._counts)
        pooled = self._moments[layer]["pooled"]
        left, right = leace_maps(pooled.covariance[None], cross, n=pooled.n)
        return left[0], right[0]

    def _add_means(self, rows: Float[Tensor, "layers n 2 d"], cells: Int[Tensor, " n"]) -> None:
        both = torch.stack([2 * cells, 2 * cells + 1], 1).flatten()
        k = max(int(both.max()) + 1, len(self._counts))
        means, counts = class_means(rows.flatten(1, 2), both, k)
        old = torch.zeros_like(counts)
        old[: len(self._counts)] = self._counts
        before = torch.zeros_like(means)
        if self._counts.numel():
            before[:, : len(self._counts)] = self._means
        total = (old + counts).clamp(min=1)
        self._means = (before * old[:, None] + means * counts[:, None]) / total[:, None]
        self._counts = old + counts


def fit_vinc(task: Task, *, w_var: float = 0.0, w_neg: float = 0.5) -> Solution:
    """Top eigenvector; `w_var` weighs the variance, `w_neg` the negative covariance against the invariance."""
    if not 0 <= w_neg <= 1 or w_var < 0:
        raise SondeError(f"w_var is {w_var} and w_neg {w_neg}: expected 0 or more, and a share from 0 to 1")
    layers, n = len(task.rows), len(task.states)
    streamed = None
    if task.groups is not None or task.templates is not None:
        groups = torch.arange(n) if task.groups is None else task.groups
        streamed = VincStatistics().update(task.states, groups, task.templates)
        if streamed.n < 2:
            raise SondeError(f"all {n} rows ask one question: VINC compares questions")
    weights, values = [], []
    for layer in range(layers):
        if streamed is not None:
            left, right = streamed.eraser(layer)
            matrix = streamed.objective(layer, w_var=w_var, w_neg=w_neg)
        else:
            left, right = answer_eraser(task.moments, layer, n)
            same, crossed = task.moments.pair_sums(layer)
            matrix = w_var * same - w_neg * crossed
        matrix = project(matrix, left, right)
        # Directions that only read what was erased have the eigenvalue 0, which may be the largest: take them down.
        gone = torch.linalg.qr(right.T).Q
        u, value = top_eigenvector(matrix - 2 * torch.linalg.matrix_norm(matrix) * gone @ gone.T)
        weights.append(pulled_back(u, left, right))
        values.append(float(value))
    weight = torch.stack(weights)
    return Solution(torch.cat([-weight, weight], 1), weight.new_zeros(layers), {"eigenvalue": values})
