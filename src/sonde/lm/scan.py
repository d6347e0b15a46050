"""Recurrences over long sequences without a Python loop over time: chunked scans for Mamba, Mamba-2 and RWKV-4.

A linear recurrence s_t = a_t s_{t-1} + b_t is cut into chunks of C positions. Each chunk alone starts from zero, all of
them at once; the states at the borders follow in T / C steps; the state that enters a chunk is then added to what the
chunk made by itself. With a scalar decay per head (Mamba-2, Dao and Gu 2024, arXiv:2405.21060) or a fixed one per
channel (RWKV-4, Peng et al. 2023, arXiv:2305.13048) the inside of a chunk is a matrix product with the decays
exp(-sum of the steps between), never with their inverses; with a decay per channel and state (Mamba, Gu and Dao 2023,
arXiv:2312.00752) it is C steps on all chunks together. All scans compute in float32. `sonde.lm.chunked` puts them into
models of transformers.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SMALLEST = 1e-30

WkvState = tuple[Float[Tensor, "batch d"], Float[Tensor, "batch d"], Float[Tensor, "batch d"]]


def selective_scan(
    x: Float[Tensor, "batch pos d"],
    dt: Float[Tensor, "batch pos d"],
    a: Float[Tensor, "d n"],
    b: Float[Tensor, "batch pos n"],
    c: Float[Tensor, "batch pos n"],
    *,
    initial: Float[Tensor, "batch d n"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch d n"]]:
    """Mamba: s_t = exp(dt_t a) s_{t-1} + dt_t x_t b_tᵀ, y_t = s_t c_t. Returns y and the last state, in float32.

    `dt` is positive, `a` negative. `chunk` is the number of positions of a chunk, by default the root of the length.
    """
    rows, length, width = x.shape
    chunk = chunk or max(1, math.isqrt(length))
    dt = dt.float()
    # A step of length 0 leaves the state as it is, so pads at the end do nothing.
    steps, inputs, b, c = (_in_chunks(t, chunk) for t in (dt, x.float() * dt, b.float(), c.float()))
    count = steps.shape[1]
    a = a.float()
    decays = [torch.exp(steps[i][..., None] * a) for i in range(chunk)]
    gains = [inputs[i][..., None] * b[i][..., None, :] for i in range(chunk)]

    alone = gains[0]
    for i in range(1, chunk):
        alone = torch.addcmul(gains[i], decays[i], alone)
    across = torch.exp(steps.sum(0)[..., None] * a)
    state = x.new_zeros(rows, width, a.shape[1], dtype=torch.float32) if initial is None else initial.float()
    entering = []
    for k in range(count):
        entering.append(state)
        state = torch.addcmul(alone[k], across[k], state)

    inside = torch.stack(entering)
    outputs = []
    for i in range(chunk):
        inside = torch.addcmul(gains[i], decays[i], inside)
        outputs.append((inside @ c[i][..., None])[..., 0])
    y = torch.stack(outputs, 1)  # count, chunk, batch, d
    return y.flatten(0, 1).transpose(0, 1)[:, :length], state


def ssd_scan(
    x: Float[Tensor, "batch pos heads p"],
    dt: Float[Tensor, "batch pos heads"],
    a: Float[Tensor, " heads"],
    b: Float[Tensor, "batch pos groups n"],
    c: Float[Tensor, "batch pos groups n"],
    *,
    skip: Float[Tensor, " heads"] | None = None,
    initial: Float[Tensor, "batch heads p n"] | None = None,
    chunk: int = 32,
) -> tuple[Float[Tensor, "batch pos heads p"], Float[Tensor, "batch heads p n"]]:
    """Mamba-2: S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_tᵀ for every head, y_t = S_t c_t + skip x_t. Returns y, last S.

    `dt` is positive, `a` negative; heads are dealt to `groups` of b and c in turn. Everything is computed in float32,
    but the sums of the steps within a chunk in float64: their differences are what is exponentiated.
    """
    rows, length, heads, width = x.shape
    groups = b.shape[2]
    chunk = min(chunk, length)
    x, b, c = (_head_chunks(t, chunk) for t in (x, b, c))  # batch, count, heads, chunk, p
    dt = _head_chunks(dt[..., None], chunk)[..., 0]
    logs = (dt * a.float()[:, None]).double().cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (logs[..., :, None] - logs[..., None, :]).float().masked_fill(later, -torch.inf).exp()

    # Steps and decays go onto the tensors of (chunk, chunk) and (chunk, n), which are smaller than x.
    def for_heads(shared: Tensor, own: Tensor) -> Tensor:
        return (shared[:, :, :, None] * own.unflatten(2, (groups, heads // groups))).flatten(2, 3)

    weights = for_heads(c @ b.mT, decay * dt[..., None, :])
    if skip is not None:
        weights = weights + skip.float()[:, None, None] * torch.eye(chunk, device=x.device)
    into = for_heads(b, (dt * (logs[..., -1:] - logs).float().exp())[..., None])
    out_of = for_heads(c, logs.float().exp()[..., None])
    alone = x.mT @ into
    across = logs[..., -1].float().exp()[..., None, None]
    state = x.new_zeros(rows, heads, width, b.shape[-1]) if initial is None else initial.float()
    entering = []
    for k in range(alone.shape[1]):
        entering.append(state)
        state = torch.addcmul(alone[:, k], across[:, k], state)
    carried = out_of.flatten(0, 2) @ torch.stack(entering, 1).flatten(0, 2).mT
    y = torch.baddbmm(carried, weights.flatten(0, 2), x.flatten(0, 2)).unflatten(0, x.shape[:3])
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state


def wkv_scan(
    decay: Float[Tensor, " d"],
    first: Float[Tensor, " d"],
    key: Float[Tensor, "batch pos d"],
    value: Float[Tensor, "batch pos d"],
    *,
    initial: WkvState | None = None,
    chunk: int = 32,
) -> tuple[Float[Tensor, "batch pos d"], WkvState]:
    """RWKV-4: the mean of the values under weights exp(k_j - w (i - 1 - j)) before i and exp(u + k_i) at i.

    `decay` is w > 0 per position, `first` u. Returns the means and the last (num, den, max): sums of weighted values
    and weights over exp(max), as the library keeps them. Every exponent is relative to a maximum: of a chunk for its
    outputs, of the decayed keys for the state. Where a weight sum comes near the smallest numbers the chunk is halved.
    """
    rows, length, width = key.shape
    decay, first = decay.float(), first.float()
    if initial is None:
        zeros = key.new_zeros(rows, width, dtype=torch.float32)
        initial = (zeros, zeros, torch.full_like(zeros, -1e38))
    chunk = min(chunk, length)
    whole = length - length % chunk
    if whole < length:
        head, state = wkv_scan(decay, first, key[:, :whole], value[:, :whole], initial=initial, chunk=chunk)
        tail, state = wkv_scan(decay, first, key[:, whole:], value[:, whole:], initial=state, chunk=length - whole)
        return torch.cat([head, tail], 1), state

    # d, chunk, count, batch: the sums over the positions of a chunk are one batch of matrix products over channels
    k, v = (t.float().unflatten(1, (-1, chunk)).permute(3, 2, 1, 0).contiguous() for t in (key, value))
    ages = torch.arange(chunk, device=key.device, dtype=torch.float32)
    decayed = k - (decay[:, None] * ages.flip(0))[..., None, None]
    top = decayed.amax(1)
    weight = torch.exp(decayed - top[:, None])
    alone_num, alone_den = (weight * v).sum(1), weight.sum(1)
    num, den, peak = (t.T for t in initial)
    entering = []
    for i in range(k.shape[2]):
        entering.append((num, den, peak))
        faded = peak - (decay * chunk)[:, None]
        peak = torch.maximum(faded, top[:, i])
        old, new = torch.exp(faded - peak), torch.exp(top[:, i] - peak)
        num, den = old * num + new * alone_num[:, i], old * den + new * alone_den[:, i]
    num0, den0, peak0 = (torch.stack(part, 1) for part in zip(*entering, strict=True))

    with torch.no_grad():  # cancels in the quotient
        scale = torch.maximum(peak0, k.amax(1) + first[:, None, None])
        if chunk > 1:
            scale = torch.maximum(scale, k[:, :-1].amax(1))
    weight = torch.exp(k - scale[:, None])
    between = ages[:, None] - 1 - ages
    mixing = torch.exp(-decay[:, None, None] * between.clamp(min=0)).tril(-1)
    mixing = mixing + torch.diag_embed(first.exp()[:, None].expand(-1, chunk))
    faded = torch.exp(-decay[:, None] * ages)[..., None, None]
    carried = torch.exp(peak0 - scale)
    sums = mixing @ torch.stack([weight * v, weight], 2).flatten(2)
    nums, dens = sums.unflatten(2, (2, *k.shape[2:])).unbind(2)
    nums = torch.addcmul(nums, faded, (carried * num0)[:, None])
    dens = torch.addcmul(dens, faded, (carried * den0)[:, None])
    if chunk > 1 and float(dens.detach().min()) < SMALLEST:
        return wkv_scan(decay, first, key, value, initial=initial, chunk=chunk // 2)
    out = (nums / dens).permute(3, 2, 1, 0).flatten(1, 2)
    return out, (num.T, den.T, peak.T)


def causal_convolution(
    x: Float[Tensor, "batch pos d"], weight: Float[Tensor, "d k"], bias: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "batch pos d"]:
    """The short convolution of each channel that stands before these scans, as a sum of k shifted products."""
    y: Tensor = _Shifted.apply(x.float(), weight.float())  # type: ignore[assignment]
    return y if bias is None else y + bias.float()


class _Shifted(torch.autograd.Function):
    """Its own gradient: autograd would fill and add a whole tensor for every shift."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        length, size = x.shape[1], weight.shape[1]
        x = F.pad(x, (0, 0, size - 1, 0))
        ctx.save_for_backward(x, weight)
        y = x[:, size - 1 :] * weight[:, -1]
        for i in range(size - 1):
            y.addcmul_(x[:, i : i + length], weight[:, i])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        length, size = gradient.shape[1], weight.shape[1]
        by_weight = [(gradient * x[:, i : i + length]).sum((0, 1)) for i in range(size)]
        later = F.pad(gradient, (0, 0, 0, size - 1))
        by_x = gradient * weight[:, -1]
        for i in range(size - 1):
            by_x.addcmul_(later[:, size - 1 - i :][:, :length], weight[:, i])
        return by_x, torch.stack(by_weight, 1)


def _in_chunks(t: Tensor, chunk: int) -> Tensor:
    """(batch, pos, d) as (chunk, count, batch, d), zeros at the end."""
    t = F.pad(t, (0, 0, 0, -t.shape[1] % chunk))
    return t.unflatten(1, (-1, chunk)).permute(2, 1, 0, 3).contiguous()


def _head_chunks(t: Tensor, chunk: int) -> Tensor:
    """(batch, pos, heads, d) as (batch, count, heads, chunk, d) in float32, zeros at the end."""
    pad = -t.shape[1] % chunk
    t = F.pad(t, (0, 0, 0, 0, 0, pad)) if pad else t
    return t.unflatten(1, (-1, chunk)).transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
