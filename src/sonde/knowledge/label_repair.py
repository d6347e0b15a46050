"""Which of a supervisor's labels are wrong? What the student's own activations say, to relabel or leave out rows.

    kNN          the mean label of the 50 nearest rows
    logistic     the prediction of a logistic regression on the labels themselves, L2 1e-3 a row
    topological  in the directed graph of nearest neighbours with the same hard label, the largest strongly connected
                 component of each class is kept; then those rows leave whose label is farthest from the mean label of
                 their neighbours, until a tenth of all is gone (Wu et al. 2020, arXiv:2012.04835)

The first two can relabel (their value is the new label) or filter (a tenth with the largest |label - value| leaves);
the third filters. Features alone decide: no truth is used.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.label_choice import probabilities
from sonde.knowledge.label_fit import fit_path

Kind = Literal["knn", "logistic", "topological"]
Use = Literal["relabel", "filter"]
_GONE = 0.1


@dataclass(frozen=True, eq=False)
class Repaired:
    """The labels as they should be used, and which rows."""

    labels: Float[Tensor, "n C"]
    kept: Bool[np.ndarray, " n"]


def repair(
    x: Float[Tensor, "n d"],
    labels: Float[Tensor, "n C"],
    *,
    kind: Kind = "knn",
    use: Use = "relabel",
    neighbours: int = 50,
    l2: float = 1e-3,
    gone: float = _GONE,
) -> Repaired:
    """Relabel or filter. `gone` is the share that a filter leaves out.

    Raises `SondeError` for no more rows than neighbours, for "topological" with "relabel", and for other names.
    """
    if kind not in ("knn", "logistic", "topological") or use not in ("relabel", "filter"):
        raise SondeError(f"there is no label repair {kind!r} by {use!r}: knn, logistic, topological; relabel, filter")
    if kind == "topological" and use == "relabel":
        raise SondeError("the topological filter leaves rows out and has no new labels: use filter")
    if kind != "logistic" and len(x) <= neighbours:
        raise SondeError(f"{len(x)} rows do not have {neighbours} neighbours each: give fewer neighbours")
    near = nearest(x, neighbours) if kind != "logistic" else None
    value = _logistic(x, labels, l2) if near is None else labels[torch.from_numpy(near)].mean(1)
    if use == "relabel":
        return Repaired(value.to(labels), np.ones(len(x), dtype=bool))
    off = (labels - value.to(labels)).abs().sum(1).numpy()
    kept = np.ones(len(x), dtype=bool)
    if kind == "topological" and near is not None:
        kept = _components(near, labels.argmax(1).numpy())
    leave = round(gone * len(x)) - int((~kept).sum())
    if leave > 0:
        inside = np.flatnonzero(kept)
        kept[inside[np.argsort(-off[inside], kind="stable")[:leave]]] = False
    return Repaired(labels, kept)


def nearest(x: Float[Tensor, "n d"], count: int, *, block: int = 1024) -> Int[np.ndarray, "n count"]:
    """The nearest other rows of each row, nearest first, by Euclidean distance."""
    rows = x.float()
    square = rows.square().sum(1)
    found = []
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        distance = square[None] - 2 * part @ rows.T
        distance[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        found.append(distance.topk(count, 1, largest=False).indices)
    return torch.cat(found).numpy()


def _logistic(x: Float[Tensor, "n d"], labels: Float[Tensor, "n C"], l2: float) -> Float[Tensor, "n C"]:
    rows = torch.cat([x.float(), x.new_ones(len(x), 1, dtype=torch.float32)], 1)
    columns = 1 if labels.shape[1] == 2 else labels.shape[1]
    # l2 is per row in the loss's mean; fit_path takes a sum over rows and units of the mean square of a row.
    penalty = l2 * len(x) / float(rows.square().sum() / len(x))
    weights = fit_path(rows, labels, prior=rows.new_zeros(columns, rows.shape[1]), penalties=[penalty])[0]
    return probabilities(rows @ weights.T)


def _components(near: Int[np.ndarray, "n k"], hard: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Rows in the largest strongly connected component of their class."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, k = near.shape
    start, end = np.repeat(np.arange(n), k), near.ravel()
    same = hard[start] == hard[end]
    graph = coo_array((np.ones(int(same.sum())), (start[same], end[same])), shape=(n, n)).tocsr()
    _, component = connected_components(graph, directed=True, connection="strong")
    kept = np.zeros(n, dtype=bool)
    for value in np.unique(hard):
        own = hard == value
        kept |= own & (component == np.bincount(component[own]).argmax())
    return kept
