"""How well does a dictionary give its activations back? Sums over tokens that pass once, in float64.

Of tokens n with target y (= x for an autoencoder), output ŷ and active latents f, by rows of text:

    FVU = Σ|y - ŷ|² / Σ|y - ȳ|²  with ȳ the mean over all tokens,   L0 = mean |{i: f_i > 0}|,
    L2 ratio = mean |ŷ| / |y|,   cosine = mean ŷ·y / (|ŷ| |y|),   relative bias = Σ|ŷ|² / Σ y·ŷ.

The relative bias (after Rajamanoharan et al. 2404.16014) is below 1 where a dictionary shrinks. ȳ is not
known before the end, so squares are taken around the mean of the first batch and moved by N |ȳ - c|², which is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary
from sonde.features.sparse_ops import decode
from sonde.stats.intervals import Interval, bootstrap

_COLUMNS = ("tokens", "error", "spread", "active", "output", "product", "cosine", "ratio")
_TINY = 1e-12
BINS_PER_DECADE = 4
LOWEST_DECADE = -7


@dataclass(frozen=True)
class Reconstruction:
    """Numbers of one dictionary; intervals are bootstraps over documents (or rows of text).

    relative_bias: None where the output is 0 everywhere. alive: share of latents that fired on at least one of the
    `tokens`. density: numbers of latents by the base-10 logarithm of how often they fire, in bins of a quarter from -7
    to 0; those that never fire are left out, rarer ones count in the first bin.

    """

    tokens: int
    fvu: Interval
    l0: Interval
    l2_ratio: Interval
    cosine: Interval
    relative_bias: Interval | None
    alive: float
    density: tuple[int, ...]


class ReconstructionSums:
    """Sums of one dictionary over batches of rows."""

    def __init__(self, dictionary: Dictionary, site: str, target: str) -> None:
        self.dictionary, self.site, self.target = dictionary, site, target
        self.fires = torch.zeros(dictionary.design.latents, dtype=torch.long)
        """On how many tokens each latent fired."""
        self._tables: list[Float[Tensor, "units columns"]] = []
        self._centre: Tensor | None = None
        self._moved: Tensor | None = None  # Σ(y - c)

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "n inputs"], y: Float[Tensor, "n outputs"], unit: Int[Tensor, " n"], units: int
    ) -> None:
        """Take in tokens, each of the row of text `unit` of this batch, which has `units` rows.

        Raises `SondeError` where the model's widths are not the dictionary's.
        """
        dictionary, design = self.dictionary, self.dictionary.design
        for width, wanted, site in (
            (x.shape[-1], design.inputs, self.site),
            (y.shape[-1], design.outputs, self.target),
        ):
            if width != wanted:
                raise SondeError(f"{site} has width {width}, but {dictionary!r} has {wanted} there")
        x = x.to(dictionary.device)
        rows, mean, scale = dictionary.rows(x)
        pattern, values = dictionary.active(rows)
        out = dictionary.finished(decode(values, dictionary.w_dec, pattern), rows)
        if mean is not None and scale is not None:
            out = out * scale + mean
        fired = values > 0
        self.fires += torch.bincount(pattern.latents[fired], minlength=design.latents).cpu()
        active = torch.bincount(pattern.rows[fired], minlength=len(x)).double().cpu()
        self._add(y.double().cpu(), out.double().cpu(), active, unit.cpu(), units)

    def _add(self, y: Tensor, out: Tensor, active: Tensor, unit: Tensor, units: int) -> None:
        table = torch.zeros(units, len(_COLUMNS), dtype=torch.float64)
        self._tables.append(table)
        if not len(y):
            return
        if self._centre is None or self._moved is None:
            self._centre = y.mean(0)
            self._moved = torch.zeros_like(self._centre)
        centred = y - self._centre
        self._moved += centred.sum(0)
        product, size, norm = (y * out).sum(1), out.norm(dim=1), y.norm(dim=1)
        columns = (
            torch.ones_like(active),
            (y - out).square().sum(1),
            centred.square().sum(1),
            active,
            size.square(),
            product,
            product / (size * norm).clamp(min=_TINY),
            size / norm.clamp(min=_TINY),
        )
        table.index_add_(0, unit, torch.stack(columns, 1))

    def state(self) -> dict[str, Any]:
        """What was taken in so far, as a tree of tensors."""
        started = {} if self._centre is None else {"centre": self._centre, "moved": self._moved, "sums": self._table()}
        return {"fires": self.fires, **started}

    def load(self, state: Mapping[str, Any]) -> None:
        """Forget what was taken in, and hold what `state` says."""
        self.fires = state["fires"]
        self._centre, self._moved = state.get("centre"), state.get("moved")
        self._tables = [state["sums"]] if "sums" in state else []

    @property
    def mean(self) -> Float[Tensor, " outputs"]:
        """ȳ. Raises `ValueError` before the first token."""
        if self._centre is None or self._moved is None:
            raise ValueError("no token was taken in: there is no mean")
        return self._centre + self._moved / self._table()[:, 0].sum()

    def _table(self) -> Float[Tensor, "units columns"]:
        return torch.cat(self._tables)

    def result(self, cluster: Int[np.ndarray, " units"], *, draws: int = 1000, seed: int = 0) -> Reconstruction:
        """All numbers; `cluster` says which document each row of text so far belongs to.

        Raises `ValueError` for fewer than two clusters, and `SondeError` for a target that is always the same.
        """
        if self._moved is None:
            raise ValueError("no token was taken in: there is nothing to divide by")
        table = self._table()
        by = torch.from_numpy(np.unique(cluster, return_inverse=True)[1])
        sums = torch.zeros(int(by.max()) + 1, len(_COLUMNS), dtype=torch.float64).index_add_(0, by, table)
        sums = sums[sums[:, 0] > 0]
        column = dict(zip(_COLUMNS, sums.T.numpy(), strict=True))
        n = float(column["tokens"].sum())
        variance = column["spread"] - column["tokens"] * float((self._moved / n).square().sum())
        if not variance.sum() > 0:
            raise SondeError(f"{self.target} is the same at all {round(n):,} tokens: there is no variance to explain")

        def ratio(top: np.ndarray, bottom: np.ndarray) -> Interval:
            return ratio_of_sums(top, bottom, draws=draws, seed=seed)

        return Reconstruction(
            tokens=round(n),
            fvu=ratio(column["error"], variance),
            l0=ratio(column["active"], column["tokens"]),
            l2_ratio=ratio(column["ratio"], column["tokens"]),
            cosine=ratio(column["cosine"], column["tokens"]),
            relative_bias=ratio(column["output"], column["product"]) if column["output"].any() else None,
            alive=float((self.fires > 0).double().mean()),
            density=density_histogram(self.fires, round(n)),
        )


def ratio_of_sums(
    top: Float[np.ndarray, " units"], bottom: Float[np.ndarray, " units"], *, draws: int = 1000, seed: int = 0
) -> Interval:
    """Σ top / Σ bottom with its bootstrap interval over units; single units of `bottom` may be negative.

    Raises `ValueError` for fewer than two units and where Σ bottom is 0.
    """

    def statistic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return a.sum(-1) / b.sum(-1)

    return bootstrap(statistic, top, bottom, batched=True, draws=draws, seed=seed)


def density_histogram(fires: Int[Tensor, " latents"], tokens: int) -> tuple[int, ...]:
    """Numbers of latents that fire at all by log10 of the share of tokens on which they do, a quarter each from -7."""
    size = -LOWEST_DECADE * BINS_PER_DECADE
    logs = (fires[fires > 0].double() / tokens).log10()
    place = ((logs - LOWEST_DECADE) * BINS_PER_DECADE).floor().long().clamp(0, size - 1)
    return tuple(torch.bincount(place, minlength=size).tolist())


def density_edges() -> list[float]:
    """Edges of the bins of `density_histogram`, as logarithms to the base 10."""
    return [LOWEST_DECADE + i / BINS_PER_DECADE for i in range(-LOWEST_DECADE * BINS_PER_DECADE + 1)]
