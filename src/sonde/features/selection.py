"""Which latents does a row keep? One product with the encoder, a chunk of rows at a time, and a choice.

No more of the n x M matrix exists at once than one chunk, whose buffer is used again for the next, except where the
choice is among all rows (`batch_top_k`). The k largest of a row lie in the k groups with the largest maxima, so that a
pass of group maxima and two short selections find them: exact, and about three times as fast as one long selection.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.features.sparse_ops import Pattern

_CHUNK = 1 << 22  # entries of a chunk: 16 MB in float32, and no more than an eighth of all of them
_GROUP = 8


class Kept(NamedTuple):
    """A pattern and the numbers of W x + b at its entries, without gradients and before any relu."""

    pattern: Pattern
    pre: Float[Tensor, " entries"]


def chunks(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "latents d"], bias: Float[Tensor, " latents"]
) -> Iterator[tuple[int, Float[Tensor, "rows latents"]]]:
    """First row and preactivations of each chunk of rows; a chunk is overwritten by the next."""
    size = max(1, min(-(-len(x) // 8), _CHUNK // len(weight)))
    buffer = torch.empty(size, len(weight), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        yield start, torch.addmm(bias, rows, weight.T, out=buffer[: len(rows)])


def largest(pre: Float[Tensor, "rows latents"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of every row and where they are, in no order."""
    rows, latents = pre.shape
    groups = latents // _GROUP
    if pre.is_cuda or latents % _GROUP or groups < 2 * k:
        return torch.topk(pre, k, sorted=False)
    spread = pre.view(rows, _GROUP, groups)  # group g holds the latents g, g + groups, …: maxima run along memory
    chosen = torch.topk(spread.amax(1), k, sorted=False)[1]
    candidates = spread.gather(2, chosen[:, None].expand(-1, _GROUP, -1)).reshape(rows, _GROUP * k)
    values, places = torch.topk(candidates, k, sorted=False)
    return values, chosen.gather(1, places % k) + torch.div(places, k, rounding_mode="floor") * groups


@torch.no_grad()
def top_k(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    k: int,
    *,
    worth: Float[Tensor, " latents"] | None = None,
) -> Kept:
    """The k largest of every row, by pre times `worth` if that is given."""
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for start, pre in chunks(x, weight, bias):
        end = start + len(pre)
        if worth is None:
            values[start:end], indices[start:end] = largest(pre, k)
        else:
            indices[start:end] = largest(pre * worth, k)[1]
            values[start:end] = pre.gather(1, indices[start:end])
    return Kept(Pattern.of_indices(indices, len(weight)), values.view(-1))


@torch.no_grad()
def group_max(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "latents d"], bias: Float[Tensor, " latents"], k: int
) -> Kept:
    """The largest of each of k groups of neighbouring latents."""
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    firsts = torch.arange(0, len(weight), len(weight) // k, device=x.device)
    for start, pre in chunks(x, weight, bias):
        best, place = pre.unflatten(-1, (k, -1)).max(-1)
        values[start : start + len(pre)] = best
        indices[start : start + len(pre)] = place + firsts
    return Kept(Pattern.of_indices(indices, len(weight)), values.view(-1))


@torch.no_grad()
def above(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    threshold: Float[Tensor, " latents"] | Float[Tensor, ""] | float,
    *,
    worth: Float[Tensor, " latents"] | None = None,
) -> Kept:
    """Every positive entry that is above its threshold, after it is multiplied by `worth` if that is given."""
    latents, lengths, values = [], [], []
    for _, pre in chunks(x, weight, bias):
        kept = ((pre if worth is None else pre * worth) > threshold) & (pre > 0)
        latents.append(kept.nonzero()[:, 1])
        lengths.append(kept.sum(1))
        values.append(pre[kept])
    return _joined(latents, lengths, values, len(weight), x)


@torch.no_grad()
def batch_top_k(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    k: int,
    *,
    worth: Float[Tensor, " latents"] | None = None,
) -> Kept:
    """The k n largest positive entries of all rows together; fewer where fewer are positive."""
    floor = _floor(x, weight, bias, k, worth)
    kept = above(x, weight, bias, floor, worth=worth)
    wanted = k * len(x)
    if len(kept.pre) < wanted and floor > 0:
        kept = above(x, weight, bias, 0.0, worth=worth)
    if len(kept.pre) <= wanted:
        return kept
    pattern = kept.pattern
    ranks = kept.pre if worth is None else kept.pre * worth[pattern.latents]
    chosen = torch.topk(ranks, wanted, sorted=False)[1].sort()[0]
    lengths = torch.bincount(pattern.rows[chosen], minlength=pattern.n)
    return Kept(Pattern(pattern.latents[chosen], _starts(lengths), pattern.size), kept.pre[chosen])


def _floor(x: Tensor, weight: Tensor, bias: Tensor, k: int, worth: Tensor | None) -> float:
    """A value that somewhat more than k n entries are likely to exceed, from some of the rows."""
    sample = x[:: max(1, len(x) // 64)]
    pre = torch.addmm(bias, sample, weight.T)
    if worth is not None:
        pre = pre * worth
    wanted = min(pre.numel(), int(1.5 * k * len(sample)) + 1)
    return max(0.0, float(torch.topk(pre.reshape(-1), wanted, sorted=True)[0][-1]))


def _joined(latents: list[Tensor], lengths: list[Tensor], values: list[Tensor], size: int, x: Tensor) -> Kept:
    if not latents:
        empty = torch.empty(0, dtype=torch.int64, device=x.device)
        return Kept(Pattern(empty, torch.zeros(1, dtype=torch.int64, device=x.device), size), x.new_empty(0))
    return Kept(Pattern(torch.cat(latents), _starts(torch.cat(lengths)), size), torch.cat(values))


def _starts(lengths: Int[Tensor, " n"]) -> Int[Tensor, " n+1"]:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
