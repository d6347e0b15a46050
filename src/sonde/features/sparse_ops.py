"""Products with a matrix of latents of which few entries in a row are not zero, and their gradients.

n rows of M latents are a `Pattern` (which entries) and their values, flat and row by row. Reading the chosen entries of
W x + b and decoding Σ_i f_i W_dec[i] cost 2 d each entry forwards; backwards, both weight gradients are one product of
an M x n sparse matrix with the n rows, and both share the one sort that turns the pattern on its side.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_SUM = 0  # embedding_bag's number for mode="sum"

with warnings.catch_warnings():  # torch says once in a process that its sparse rows are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))

_SPARE: ContextVar[list[Tensor] | None] = ContextVar("spare", default=None)


@contextmanager
def reusing(spare: list[Tensor]) -> Iterator[None]:
    """Inside, gradients of weights are written over tensors of `spare` that fit, which leave the list.

    Fresh memory of the size of the weights costs more time than what is written to it: the system hands it out page by
    page. The numbers in `spare` must be finite.
    """
    token = _SPARE.set(spare)
    try:
        yield
    finally:
        _SPARE.reset(token)


def _blank(rows: int, columns: int, like: Tensor) -> Tensor:
    spare = _SPARE.get() or []
    for place, tensor in enumerate(spare):
        if tensor.shape == (rows, columns) and tensor.dtype == like.dtype and tensor.device == like.device:
            return spare.pop(place)
    return like.new_zeros(rows, columns)


class Pattern:
    """Which latents are kept in each of n rows.

    Attributes:
        latents: numbers of the latents, row after row; entries.
        starts: first entry of each row, and the number of entries; n + 1.
        size: number M of latents.

    """

    def __init__(self, latents: Int[Tensor, " entries"], starts: Int[Tensor, " n+1"], size: int) -> None:
        self.latents = latents
        self.starts = starts
        self.size = size

    @staticmethod
    def of_indices(indices: Int[Tensor, "n k"], size: int) -> "Pattern":
        """The pattern of `k` latents in every row."""
        n, k = indices.shape
        return Pattern(indices.reshape(-1), torch.arange(0, n * k + 1, max(k, 1), device=indices.device)[: n + 1], size)

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " entries"]:
        """The row of each entry."""
        lengths = self.starts.diff()
        numbers = torch.arange(self.n, device=self.latents.device)
        return torch.repeat_interleave(numbers, lengths, output_size=len(self.latents))

    @cached_property
    def _turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order of the entries by latent, where each latent starts in it, and the rows in that order."""
        order = torch.sort(self.latents.to(torch.int32), stable=True)[1]
        starts = torch.zeros(self.size + 1, dtype=torch.int64, device=order.device)
        torch.cumsum(self.counts, 0, out=starts[1:])
        return order, starts, self.rows[order]

    @cached_property
    def counts(self) -> Int[Tensor, " latents"]:
        """In how many rows each latent is kept."""
        return torch.bincount(self.latents, minlength=self.size)

    def turned_product(
        self, values: Float[Tensor, " entries"], dense: Float[Tensor, "n d"]
    ) -> Float[Tensor, "latents d"]:
        """Fᵀ dense, where F is the n x M matrix with `values` at the entries."""
        order, starts, rows = self._turned
        turned = torch.sparse_csr_tensor(starts, rows, values[order], (self.size, self.n), check_invariants=False)
        out = _blank(self.size, dense.shape[1], dense)
        return torch.addmm(out, turned, dense, beta=0, out=out)

    def column_sums(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " latents"]:
        """Σ over rows of the values of each latent."""
        return torch.bincount(self.latents, values, minlength=self.size).to(values.dtype)

    def product(self, values: Float[Tensor, " entries"], weight: Float[Tensor, "latents d"]) -> Float[Tensor, "n d"]:
        """F weight: the sum of the rows of `weight` that each row keeps, times the values."""
        return embedding_bag(
            self.latents, weight, self.starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )

    def inner(self, dense: Float[Tensor, "n d"], weight: Float[Tensor, "latents d"]) -> Float[Tensor, " entries"]:
        """(dense weightᵀ) at the entries, latent by latent, so that each row of `weight` is read once."""
        order, starts, rows = self._turned
        turned = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            weight, dense.contiguous(), rows, starts[:-1], self.latents[order], _SUM, -1
        )
        return torch.empty_like(turned).index_copy_(0, order, turned)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pattern = pattern
        return pattern.product(values, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (gradient,) = grad_outputs
        values, weight = ctx.saved_tensors
        to_values = ctx.pattern.inner(gradient, weight) if ctx.needs_input_grad[0] else None
        to_weight = ctx.pattern.turned_product(values, gradient) if ctx.needs_input_grad[1] else None
        return to_values, to_weight, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centre: Tensor | None, weight: Tensor, bias: Tensor, pattern: Pattern, values: Tensor
    ) -> Tensor:
        centred = x if centre is None else x - centre
        ctx.save_for_backward(centred, weight)
        ctx.pattern = pattern
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = grad_outputs
        centred, weight = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        to_x = to_centre = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = pattern.product(gradient, weight)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            to_bias = pattern.column_sums(gradient)
        if ctx.needs_input_grad[1]:
            to_centre = -(to_bias @ weight)  # the sum over rows of -to_x, without the rows
        if ctx.needs_input_grad[2]:
            to_weight = pattern.turned_product(gradient, centred)
        return to_x, to_centre, to_weight, to_bias, None, None


def decode(
    values: Float[Tensor, " entries"], weight: Float[Tensor, "latents d"], pattern: Pattern
) -> Float[Tensor, "n d"]:
    """Σ_i f_i weight[i] of every row. Gradients reach values and weight; the weight's is dense, `latents x d`."""
    return _Decode.apply(values, weight, pattern)  # type: ignore[no-any-return]


def read(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    pattern: Pattern,
    values: Float[Tensor, " entries"],
    *,
    centre: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, " entries"]:
    """The entries of weight (x - centre) + bias, whose numbers `values` are known already, with their gradients.

    What is kept is a constant: no gradient reaches an entry that is not in the pattern.
    """
    return _Read.apply(x, centre, weight, bias, pattern, values)  # type: ignore[no-any-return]
