"""What happens to a language model when its layers are ablated, deleted, put in another order or replaced?

Block i adds u_i(h) to the stream h. Deleting it leaves h as it is, which is ablation by zero; ablation by the mean adds
the mean of u_i over the batch instead, resampling the u_i of another row or token. Permuting and replacing run other
blocks in its place (Belrose et al. 2303.08112, appendix; `model_surgery` and `ablation` of their code). The effect of
deleting a layer is KL(p || p without it) and the change of the loss.

Each is a context manager that undoes itself, also on an error. `resid_pre.i` and `resid_post.i` are the stream before
and after place i, whatever runs there; `mixer_out.i` and `mlp_out.i` stay with block i: what a deleted block would have
added can be read. Blocks always run, so that caches stay whole and a split run equals the whole one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.lm.batches import TokenBatch
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import resumed
from sonde.lm.rewiring import Forward, rewired, stream_in, stream_of, with_stream
from sonde.stats import information
from sonde.stats.intervals import Interval, bootstrap_ratio

Ablation = Literal["zero", "mean", "resample"]
_MEMORIES = ("past_key_values", "layer_past", "cache_params", "state")  # what models call a cache that a block gets
# Where configurations say of what kind each block is; blocks of different kinds are given different masks.
_KINDS = ("layer_types", "layers_block_type", "block_types")


@contextmanager
def deleted(lm: LanguageModel, layers: Iterable[int]) -> Iterator[None]:
    """Let the stream pass by the blocks of `layers` (negative numbers count from the last) as it is.

    Raises `SondeError` for a layer that does not exist.
    """
    with ablated(lm, layers, "zero"):
        yield


@contextmanager
def ablated(
    lm: LanguageModel,
    layers: Iterable[int],
    by: Ablation,
    *,
    over: Literal["rows", "tokens"] = "rows",
    seed: int = 0,
) -> Iterator[None]:
    """Replace what the blocks of `layers` add to the stream: by nothing, the mean, or what they add elsewhere.

    Args:
        lm: the model.
        layers: numbers of blocks; negative ones count from the last.
        by: "zero", "mean" or "resample".
        over: "rows": the mean over, or the update of another row at, the same position, for rows of one length;
            "tokens": over, or of another of, all real tokens of the batch. Not used by "zero".
        seed: of the derangement, which is the same in every call on as many rows and in every layer.

    Raises:
        SondeError: for a layer that does not exist; in the forward pass, for a batch of one row (or token) and, with
            `over="rows"`, for pads.

    """
    if by not in ("zero", "mean", "resample"):
        raise SondeError(f"ablation by {by!r} is unknown: use zero, mean or resample")
    if over not in ("rows", "tokens"):
        raise SondeError(f"ablation over {over!r} is unknown: use rows or tokens")

    def instead(hidden: Tensor, out: Any) -> Any:
        if by == "zero":
            return with_stream(out, hidden)
        update = stream_of(out) - hidden
        frame = lm._taps._frame
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if frame is None else frame.position >= 0
        return with_stream(out, hidden + _replacement(update, real.to(hidden.device), by, over, seed))

    def around(forward: Forward) -> Forward:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden = stream_in(args, kwargs).clone()
            return instead(hidden, forward(*args, **kwargs))

        return call

    blocks = lm.structure.blocks
    with rewired(lm, {layer: around(blocks[layer].forward) for layer in _numbers(lm, layers)}):
        yield


@contextmanager
def permuted(lm: LanguageModel, order: Sequence[int]) -> Iterator[None]:
    """Run block `order[i]` in place i. Each block keeps its own memory.

    Raises `SondeError` unless `order` holds every layer once, and for blocks of different kinds (attention and
    recurrence, say), which the model calls in different ways.
    """
    given = _numbers(lm, order)
    if sorted(given) != list(range(lm.n_layers)):
        raise SondeError(f"an order of {lm.name} holds each of the layers 0 to {lm.n_layers - 1} once, not {given}")
    with replaced(lm, {place: block for place, block in enumerate(given) if place != block}):
        yield


@contextmanager
def replaced(lm: LanguageModel, blocks: Mapping[int, int | nn.Module]) -> Iterator[None]:
    """Run another block in the place of some: of this model, by its number, or any module that is called like one.

    A block that runs in several places has one memory for all of them, so such a model runs without a cache only.
    Raises `SondeError` for a layer that does not exist and for blocks of different kinds.
    """
    places = _numbers(lm, blocks)
    forwards: dict[int, Forward] = {}
    for place, new in zip(places, blocks.values(), strict=True):
        if isinstance(new, nn.Module):
            forwards[place] = new.__call__  # not the module itself, which would become a part of the block
            continue
        (source,) = _numbers(lm, [new])
        _check_kind(lm, place, source)
        forward = lm.structure.blocks[source].forward
        moved = source in places and sum(other == source for other in blocks.values()) == 1
        forwards[place] = forward if moved else _without_memory(forward, lm, source)
    with rewired(lm, forwards):
        yield


@dataclass(frozen=True)
class DeletionEffects:
    """What deleting each block does to a model's predictions, by layer, with sums by rows of text.

    kl: KL(p || p without the block) in nats, summed over the tokens of each row.
    loss: cross entropy to the next token without the block less that with it, in nats, summed likewise.
    noise_kl, noise_loss: the same for a random change of the stream that is as long, at each token, as what the
        block adds: the control.
    tokens, scored, bytes: tokens of each row, those that have a next one, and the bytes of text that these cover.
    """

    kl: Float[np.ndarray, "layers rows"]
    loss: Float[np.ndarray, "layers rows"]
    noise_kl: Float[np.ndarray, "layers rows"]
    noise_loss: Float[np.ndarray, "layers rows"]
    tokens: Float[np.ndarray, " rows"]
    scored: Float[np.ndarray, " rows"]
    bytes: Float[np.ndarray, " rows"]

    def kl_by_layer(self, *, noise: bool = False, seed: int = 0) -> list[Interval]:
        """Mean KL in nats a token of deleting each block, or of the random change; bootstrap over rows."""
        return [bootstrap_ratio(row, self.tokens, seed=seed) for row in (self.noise_kl if noise else self.kl)]

    def loss_by_layer(self, *, noise: bool = False, seed: int = 0) -> list[Interval]:
        """Added loss in bits per byte of deleting each block, or of the random change; bootstrap over rows."""
        rows = self.noise_loss if noise else self.loss
        return [bootstrap_ratio(information.bits(row), self.bytes, seed=seed) for row in rows]


@torch.no_grad()
def deletion_effects(
    lm: LanguageModel, batches: Iterable[TokenBatch], *, seed: int = 0, progress: str | None = None
) -> DeletionEffects:
    """Delete every block of `lm` in turn, and measure what that does to its predictions on a text.

    A pass without block i takes the stream before it from the plain pass, so that L blocks cost (L + 1) / 2 passes.
    `batches` are a `TokenBatches` or some of its batches. Raises `SondeError` for tokens that the model does not know.
    """
    generator = torch.Generator().manual_seed(seed)
    streams = [*(f"resid_pre.{i}" for i in range(lm.n_layers)), f"resid_post.{lm.n_layers - 1}"]
    parts: list[dict[str, Tensor]] = []
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        tokens, mask = batch.tokens.to(lm.device), batch.mask.to(lm.device)
        with lm.reading(*streams, "logits") as acts:
            lm(tokens, mask)
        found: dict[str, list[Tensor]] = {name: [] for name in ("kl", "loss", "noise_kl", "noise_loss")}
        for layer in range(lm.n_layers):
            hidden, out = acts[streams[layer]], acts[streams[layer + 1]]
            change = torch.randn(hidden.shape, generator=generator).to(hidden)
            length = (out - hidden).norm(dim=-1, keepdim=True)
            noisy = out + change * (length / change.norm(dim=-1, keepdim=True))
            for stem, stream in (("", hidden), ("noise_", noisy)):
                with resumed(lm, layer + 1, stream):
                    changed = lm(tokens, mask).logits
                assert changed is not None
                kl, loss = _row_sums(acts["logits"], changed, tokens, mask)
                found[f"{stem}kl"].append(kl)
                found[f"{stem}loss"].append(loss)
        parts.append(
            {name: torch.stack(values).cpu() for name, values in found.items()}
            | {"tokens": mask.sum(-1).cpu(), "scored": batch.scored.sum(-1), "bytes": batch.n_bytes}
        )
    return DeletionEffects(
        **{name: torch.cat([part[name].double() for part in parts], -1).numpy() for name in parts[0]}
    )


def _row_sums(
    plain: Float[Tensor, "batch pos vocab"],
    changed: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Tensor,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """KL and change of cross entropy, summed over each row's real tokens; one row at a time for memory."""
    sums = []
    for p, q, ids, real in zip(plain, changed, tokens, mask, strict=True):
        logp, logq = information.log_probs(p), information.log_probs(q)
        kl = information.kl(logp, logq)[real].double().sum()
        scored = real[:-1] & real[1:]
        change = information.cross_entropy(logq[:-1], ids[1:]) - information.cross_entropy(logp[:-1], ids[1:])
        sums.append(torch.stack([kl, change[scored].double().sum()]))
    kl, loss = torch.stack(sums, 1)
    return kl, loss


def _replacement(
    update: Float[Tensor, "batch pos d"], real: Tensor, by: Ablation, over: str, seed: int
) -> Float[Tensor, "batch pos d"]:
    """What stands in for the update: the mean, or the update of another row or token."""
    if over == "rows" and not bool(real.all()):
        raise SondeError(f"{by} ablation over rows takes rows of one length, without pads: use over='tokens'")
    rows = update if over == "rows" else update[real]
    if len(rows) < 2:
        kind = over.removesuffix("s")
        raise SondeError(f"{by} ablation needs at least 2 {over}, not 1: with one {kind} it would change nothing")
    if by == "mean":
        new = rows.float().mean(0, keepdim=True).to(rows.dtype).expand_as(rows)
    else:
        new = rows[derangement(len(rows), seed=seed).to(rows.device)]
    if over == "rows":
        return new
    whole = update.clone()
    whole[real] = new
    return whole


def derangement(n: int, *, seed: int = 0) -> Int[Tensor, " n"]:
    """A random permutation of 0 … n - 1 that leaves nothing in its place, drawn uniformly by rejection.

    Raises `SondeError` for n below 2, where there is none.
    """
    if n < 2:
        raise SondeError(f"{n} item(s) cannot be exchanged: a derangement needs at least 2")
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(n)
    while True:  # a share of 1/e of all permutations are derangements
        order = torch.randperm(n, generator=generator)
        if not bool((order == own).any()):
            return order


def _without_memory(forward: Forward, lm: LanguageModel, block: int) -> Forward:
    """A block that also runs elsewhere: two runs would write into one memory."""

    def call(*args: Any, **kwargs: Any) -> Any:
        kept = [value for name, value in kwargs.items() if name in _MEMORIES]
        kept += [value for value in args[1:] if not isinstance(value, Tensor | bool)]
        if any(value is not None for value in kept):
            raise SondeError(
                f"block {block} of {lm.name} runs in several places, which have one memory: run it without a cache"
            )
        return forward(*args, **kwargs)

    return call


def _numbers(lm: LanguageModel, layers: Iterable[int]) -> list[int]:
    given = list(layers)
    for layer in given:
        if not -lm.n_layers <= layer < lm.n_layers:
            raise SondeError(f"layer {layer} does not exist: {lm.name} has layers 0 to {lm.n_layers - 1}")
    return [layer % lm.n_layers for layer in given]


def _check_kind(lm: LanguageModel, place: int, source: int) -> None:
    for key in _KINDS:
        kinds = getattr(lm.config, key, None)
        if kinds and kinds[place] != kinds[source]:
            raise SondeError(
                f"block {source} of {lm.name} cannot run in place {place}: it is of the kind {kinds[source]!r}, "
                f"that place of {kinds[place]!r}, and the model gives them different masks"
            )
    here, there = (_parts(lm.structure.blocks[block]) for block in (place, source))
    if here != there:
        other = sorted(here ^ there)[0]
        raise SondeError(
            f"block {source} of {lm.name} cannot run in place {place}: one of them has {other}, the other has not"
        )


def _parts(block: nn.Module) -> set[str]:
    return {f"{name} ({type(child).__name__})" for name, child in block.named_children()}
