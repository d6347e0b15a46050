"""KL divergence and cross entropy of lens predictions without autograd over tokens x vocabulary.

With x the normed hidden state, z = s (W_U x + b_U) the logits, p the target distribution and e = s p W_U its pull:

    KL(p || softmax z) = -H(p) - s p·b_U - e·x + logsumexp(z)        d KL / d x = s softmax(z) W_U - e

`e` and `H(p)` are computed once a batch and shared by all layers; of z only one chunk of tokens exists at a time, and
its gradient is taken while it does. A soft-cap c tanh(z / c) bends z after the head, and p enters elementwise: there
the chunk of p is made again from the final hidden state and the gradient is (q - p)(1 - tanh²) s W_U. Cross entropy is
the case where p is one token.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


class Unembeds(Protocol):
    """What an unembedding is made of: `sonde.lm.unembedding.Unembedding` is one."""

    norm: nn.Module | None
    project: nn.Module | None
    scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        """The head's matrix, (vocab, d_head)."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The head's bias, (vocab,)."""
        ...


class Readout:
    """An unembedding in the precision of the losses: norm and head in `dtype`, shared where they have it already."""

    def __init__(self, unembedding: Unembeds, dtype: torch.dtype = torch.float32) -> None:
        self._before = [_in_dtype(part, dtype) for part in (unembedding.norm, unembedding.project) if part is not None]
        self.weight = unembedding.weight.detach().to(dtype)
        self.bias = None if unembedding.bias is None else unembedding.bias.detach().to(dtype)
        self.scale, self.softcap = unembedding.scale, unembedding.softcap

    @property
    def dtype(self) -> torch.dtype:
        """Number type of hidden states and logits."""
        return self.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.weight.shape[0]

    def normed(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_head"]:
        """What the head is given."""
        for module in self._before:
            hidden = module(hidden)
        return hidden

    def logits(
        self, normed: Float[Tensor, "n d_head"], out: Float[Tensor, "n vocab"] | None = None
    ) -> Float[Tensor, "n vocab"]:
        """Logits of normed hidden states, written to `out` where it is given."""
        z = torch.mm(normed * self.scale, self.weight.T, out=out)
        if self.bias is not None:
            z.add_(self.bias, alpha=self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def chunks(self, n: int, chunk: int | None = None) -> Iterator[slice]:
        """Slices of at most `chunk` of `n` tokens; by default as many as keep tokens x vocabulary small."""
        if chunk is None:
            elements = _CHUNK_ELEMENTS.get(self.weight.device.type, _CHUNK_ELEMENTS["cpu"])
            chunk = max(16, elements // self.vocab_size)
        return (slice(start, min(start + chunk, n)) for start in range(0, n, chunk))


@dataclass(frozen=True)
class Target:
    """What lenses should predict at n tokens, and the part of the loss that no lens changes."""

    constant: Float[Tensor, " n"]
    pull: Float[Tensor, "n d_head"] | None  # None with a soft-cap
    final: Float[Tensor, "n d_head"] | None = None
    labels: Int[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.constant)

    def __getitem__(self, index: Any) -> "Target":
        """The targets of some of the tokens."""
        parts = (self.constant, self.pull, self.final, self.labels)
        return Target(*(None if part is None else part[index] for part in parts))  # type: ignore[arg-type]

    @staticmethod
    @torch.no_grad()
    def model(readout: Readout, final: Float[Tensor, "n d_model"], *, chunk: int | None = None) -> "Target":
        """The model's own prediction from its last hidden state: the loss is KL(p || q)."""
        normed = readout.normed(final.to(readout.dtype))
        constant = normed.new_empty(len(normed))
        pull = torch.empty_like(normed) if readout.softcap is None else None
        for part in readout.chunks(len(normed), chunk):
            z = readout.logits(normed[part])
            p, lse = _softmax_(z.clone())
            # -H(p) = sum p log p
            constant[part] = torch.einsum("nv,nv->n", p, z) - lse
            if pull is not None:
                pull[part] = torch.mm(p, readout.weight).mul_(readout.scale)
                if readout.bias is not None:
                    constant[part] -= readout.scale * (p @ readout.bias)
        return Target(constant, pull, final=normed if pull is None else None)

    @staticmethod
    @torch.no_grad()
    def tokens(readout: Readout, labels: Int[Tensor, " n"]) -> "Target":
        """Given tokens: the loss is the cross entropy."""
        constant = readout.weight.new_zeros(len(labels))
        if readout.softcap is not None:
            return Target(constant, None, labels=labels)
        if readout.bias is not None:
            constant = -readout.scale * readout.bias[labels]
        return Target(constant, readout.weight[labels] * readout.scale)


def divergence(
    normed: Float[Tensor, "layers n d_head"], target: Target, readout: Readout, *, chunk: int | None = None
) -> Float[Tensor, "layers n"]:
    """KL (or cross entropy) in nats of every layer and token, differentiable in `normed`.

    Args:
        normed: what the head would be given at each layer: `readout.normed` of translated hidden states.
        target: made by `Target.model` or `Target.tokens` with the same readout.
        readout: the unembedding.
        chunk: tokens in a chunk; memory is `chunk` x vocabulary.

    """
    return _Divergence.apply(normed, target, readout, chunk)  # type: ignore[return-value]


@dataclass(frozen=True)
class Reading:
    """What one layer predicts at n tokens."""

    kl: Float[Tensor, " n"]
    cross_entropy: Float[Tensor, " n"]
    top: Int[Tensor, " n"]
    total: Float[Tensor, " vocab"]
    """Sum of the predictions over tokens, float64."""


@torch.no_grad()
def read_layer(
    normed: Float[Tensor, "n d_head"], target: Target, labels: Int[Tensor, " n"], readout: Readout
) -> Reading:
    """Score one layer in chunks, without gradients.

    The cross entropy is to `labels`, and 0 where they are negative.
    """
    n = len(normed)
    kl, ce = normed.new_empty(n), normed.new_empty(n)
    top = labels.new_empty(n)
    total = torch.zeros(readout.vocab_size, dtype=torch.float64, device=normed.device)
    buffer = None
    for part in readout.chunks(n):
        x, here, label = normed[part], target[part], labels[part]
        if buffer is None or len(buffer) != len(x):
            buffer = normed.new_empty(len(x), readout.vocab_size)
        z = readout.logits(x, out=buffer)
        if here.pull is not None:
            expected = torch.einsum("nd,nd->n", x, here.pull)
        else:
            assert here.final is not None
            expected = torch.einsum("nv,nv->n", _softmax_(readout.logits(here.final))[0], z)
        own = z.gather(-1, label.clamp(min=0)[:, None]).squeeze(-1)
        highest, top[part] = z.max(-1)
        q = z.sub_(highest[:, None]).exp_()
        sums = q.sum(-1)
        lse = highest + sums.log()
        kl[part] = here.constant + lse - expected
        ce[part] = torch.where(label >= 0, lse - own, 0)
        total += (1 / sums) @ q
    return Reading(kl, ce, top, total)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normed: Tensor, target: Target, readout: Readout, chunk: int | None) -> Tensor:
        layers, n, _ = normed.shape
        wanted = ctx.needs_input_grad[0]
        loss = normed.new_empty(layers, n)
        gradient = torch.empty_like(normed) if wanted else None
        step = _plain if readout.softcap is None else _capped
        buffers: dict[int, Tensor] = {}
        for part in readout.chunks(n, chunk):
            here = target[part]
            rows = len(here)
            if rows not in buffers:
                buffers[rows] = normed.new_empty(rows, readout.vocab_size)
            p = None
            if here.final is not None:
                p, _ = _softmax_(readout.logits(here.final))
            for layer in range(layers):
                into = None if gradient is None else gradient[layer, part]
                loss[layer, part] = step(normed[layer, part], here, p, readout, buffers[rows], into)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0][..., None], None, None, None


def _plain(
    x: Tensor, target: Target, p: Tensor | None, readout: Readout, buffer: Tensor, gradient: Tensor | None
) -> Tensor:
    assert target.pull is not None
    z = readout.logits(x, out=buffer)
    highest = z.amax(-1, keepdim=True)
    total = z.sub_(highest).exp_().sum(-1, keepdim=True)
    if gradient is not None:
        torch.mm(z, readout.weight, out=gradient)
        gradient.mul_(readout.scale / total).sub_(target.pull)
    return target.constant + (highest + total.log()).squeeze(-1) - torch.einsum("nd,nd->n", x, target.pull)


def _capped(
    x: Tensor, target: Target, p: Tensor | None, readout: Readout, buffer: Tensor, gradient: Tensor | None
) -> Tensor:
    z = readout.logits(x, out=buffer)
    q, lse = _softmax_(z.clone())
    if p is None:
        assert target.labels is not None
        labels = target.labels[:, None]
        expected = z.gather(-1, labels).squeeze(-1)
        q.scatter_add_(-1, labels, -torch.ones_like(q[:, :1]))
    else:
        expected = torch.einsum("nv,nv->n", p, z)
        q.sub_(p)
    if gradient is not None:
        assert readout.softcap is not None
        bend = z.div_(readout.softcap).square_().neg_().add_(1)
        torch.mm(q.mul_(bend), readout.weight, out=gradient)
        gradient.mul_(readout.scale)
    return target.constant + lse - expected


def _softmax_(z: Float[Tensor, "n vocab"]) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """Softmax in place, and the logsumexp."""
    highest = z.amax(-1, keepdim=True)
    total = z.sub_(highest).exp_().sum(-1, keepdim=True)
    return z.div_(total), (highest + total.log()).squeeze(-1)


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if all(p.dtype == dtype for p in module.parameters()):
        return module
    return copy.deepcopy(module).to(dtype)
