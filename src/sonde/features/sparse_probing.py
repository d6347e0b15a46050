"""Is a concept in few latents? Logistic probes that see the k latents which tell its classes apart best.

k-sparse probing (Gurnee et al. 2305.01610; Karvonen et al. 2503.09532): latents are ranked on training rows by the
absolute difference of their means between the classes, a logistic regression on the k best is fitted there and scored
on test rows. The baselines are the same with k coordinates of the activations, a probe on all coordinates, and the
larger class. Labels must be in the rows, such as tags of tokens (`sonde.data.rule_tags`) or classes of prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary, Sparse
from sonde.stats.intervals import Interval, wilson
from sonde.stats.logistic import L2, logistic

KS = (1, 2, 5, 10, 20)
_LEAST = 20


@dataclass(frozen=True)
class SparseProbes:
    """Accuracy on test rows by k, of latents and of coordinates; of a probe on all coordinates; of the larger class.

    latents: the latents of the largest k, best first.
    """

    by_latents: dict[int, Interval]
    by_coordinates: dict[int, Interval]
    dense: Interval
    majority: Interval
    latents: tuple[int, ...]


def sparse_probing(
    dictionary: Dictionary,
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, " n"] | Int[Tensor, " n"],
    *,
    ks: Sequence[int] = KS,
    test: float = 0.3,
    seed: int = 0,
) -> SparseProbes:
    """Probe a concept with two classes, `y` 0 and 1, in the latents and in the activations `x`.

    Args:
        dictionary: whose latents are probed.
        x: activations.
        y: the class of each row.
        ks: numbers of latents.
        test: share of the rows that are tested on.
        seed: of the split, in which both parts have both classes.

    Raises:
        SondeError: for labels of one class or other than 0 and 1, fewer than 20 rows of a class, and k out of range.

    """
    y = _classes(y, len(x))
    if not 0 < test < 1:
        raise SondeError(f"test is {test}: give a share between 0 and 1")
    most = max(ks, default=0)
    if min(ks, default=0) < 1 or most > dictionary.design.latents:
        raise SondeError(f"ks are {tuple(ks)}: give numbers from 1 to the {dictionary.design.latents} latents")
    train, held = _split(y, test, seed)
    x = x.float()
    sparse = encoded(dictionary, x)
    best = by_mean_difference(sparse, y, train, dictionary.design.latents, most)
    found = columns(sparse, best)
    coordinates = (x[train][y[train]].mean(0) - x[train][~y[train]].mean(0)).abs().argsort(descending=True)
    larger = bool(y[train].double().mean() >= 0.5)
    return SparseProbes(
        by_latents={k: accuracy(found[:, :k], y, train, held) for k in ks},
        by_coordinates={k: accuracy(x[:, coordinates[:k]], y, train, held) for k in ks},
        dense=accuracy(x, y, train, held),
        majority=wilson(int((y[held] == larger).sum()), len(held)),
        latents=tuple(best.tolist()),
    )


@torch.no_grad()
def encoded(dictionary: Dictionary, x: Float[Tensor, "n d"], *, rows: int = 4096) -> Sparse:
    """Latents of rows, a few thousand rows at a time, each row as it is alone."""
    parts = [dictionary.encode(x[start : start + rows].to(dictionary.device)) for start in range(0, len(x), rows)]
    width = max(part.values.shape[1] for part in parts)
    wide = [[torch.nn.functional.pad(t.cpu(), (0, width - t.shape[1])) for t in part] for part in parts]
    return Sparse(torch.cat([values for values, _ in wide]), torch.cat([indices for _, indices in wide]))


def column_means(sparse: Sparse, latents: int) -> Float[Tensor, " latents"]:
    """Mean of each latent over rows."""
    total = torch.zeros(latents, dtype=torch.float64)
    return total.index_add_(0, sparse.indices.flatten(), sparse.values.flatten().double()) / max(1, len(sparse.values))


def columns(sparse: Sparse, latents: Int[Tensor, " k"]) -> Float[Tensor, "n k"]:
    """Values of some latents, dense."""
    size = int(max(sparse.indices.max(), latents.max())) + 1
    place = torch.full((size,), len(latents))
    place[latents] = torch.arange(len(latents))
    out = torch.zeros(len(sparse.values), len(latents) + 1)
    return out.scatter_add_(1, place[sparse.indices], sparse.values.float())[:, :-1]


def by_mean_difference(
    sparse: Sparse, y: Bool[Tensor, " n"], rows: Int[Tensor, " m"], latents: int, k: int, *, larger: bool = False
) -> Int[Tensor, " k"]:
    """The k latents whose means differ most between the classes of `rows`, the best first.

    With `larger`, those come first whose mean is larger where y is true.
    """
    means = [column_means(Sparse(*(part[rows[y[rows] == c]] for part in sparse)), latents) for c in (True, False)]
    difference = means[0] - means[1]
    return (difference if larger else difference.abs()).argsort(descending=True)[:k]


def accuracy(
    x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], train: Int[Tensor, " m"], test: Int[Tensor, " t"]
) -> Interval:
    """Share of the test rows that a logistic probe of the training rows gets right."""
    right = (probe_margins(x, y, train)[test] > 0) == y[test]
    return wilson(int(right.sum()), len(test))


def probe_margins(x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], train: Int[Tensor, " m"]) -> Float[Tensor, " n"]:
    """Margins of all rows under a logistic probe of the training rows."""
    found = logistic(x[train][None], y[train].double(), l2=L2)
    return x.double() @ found.weight[0] + found.bias[0]


def _classes(y: Tensor, rows: int) -> Bool[Tensor, " n"]:
    if y.shape != (rows,):
        raise SondeError(f"labels of shape {tuple(y.shape)} for {rows} rows: give one a row")
    if y.dtype != torch.bool:
        other = sorted(set(y.unique().tolist()) - {0, 1})
        if other:
            raise SondeError(f"a label is {other[0]}: expected 0 and 1; probe several classes one against the rest")
        y = y == 1
    for name, count in (("1", int(y.sum())), ("0", int((~y).sum()))):
        if count < _LEAST:
            raise SondeError(f"{count} rows have the label {name}: at least {_LEAST} are needed")
    return y


def _split(y: Bool[Tensor, " n"], test: float, seed: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " t"]]:
    """Rows to fit and to test on, each class split alike."""
    generator = torch.Generator().manual_seed(seed)
    train, held = [], []
    for value in (True, False):
        rows = (y == value).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = max(1, round(test * len(rows)))
        held.append(rows[:cut])
        train.append(rows[cut:])
    return torch.cat(train), torch.cat(held)
