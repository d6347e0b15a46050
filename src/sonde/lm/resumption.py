"""Going on with a forward pass in the middle: the stream before block i is given, and the blocks below it do not run.

    full pass          blocks 0 … L-1
    resumed at i       blocks i … L-1 on a stream that was read at resid_pre.i before, or made by something else

A block is passed by in the shape in which it returns (tensor or tuple), which is recorded on a few random tokens; on
the same tokens the resumed pass is held against the whole one. Families that hand more than the stream from block to
block fail that test, and `works` says so: in them the blocks below run, for what else they hand on.
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sonde.errors import SondeError
from sonde.lm.continuation import difference, random_tokens
from sonde.lm.model import LanguageModel
from sonde.lm.rewiring import Forward, rewired, stream_in, with_stream

_LENGTH = 8


class Resumption:
    """Passes of one model from any block on, without caches; made by `resumption(lm)`.

    works: whether a resumed pass gives what the whole one gives, to 1e-4 of its scale (8 roundings in half precision).
    error: the measured difference.
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel) -> None:
        self._passing: dict[int, Forward] = {}
        self.works, self.error = True, 0.0
        last, middle = f"resid_post.{lm.n_layers - 1}", max(1, lm.n_layers // 2)
        tokens = random_tokens(lm.model, _LENGTH)
        with self._recording(lm), lm.reading("resid_pre.*", last) as whole:
            lm(tokens)
        if lm.n_layers > 1:
            with self.at(lm, middle, whole[f"resid_pre.{middle}"]), lm.reading(last) as resumed:
                lm(tokens)
            self.error = difference(resumed[last], whole[last])
        self.works = self.error <= max(1e-4, 8 * torch.finfo(lm.dtype).eps)

    @contextmanager
    def at(self, lm: LanguageModel, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
        """Surround a call `lm(tokens)`: blocks below `layer` are passed by, and block `layer` is given `stream`.

        `layer` L, after the last block, leaves the final norm and the unembedding. Only real tokens take the stream.
        """
        last = lm.n_layers
        site = f"resid_pre.{layer}" if layer < last else f"resid_post.{last - 1}"
        below = range(layer) if self.works else ()
        with rewired(lm, {place: self._passing[place] for place in below}), lm.editing({site: lambda hidden: stream}):
            yield

    @contextmanager
    def _recording(self, lm: LanguageModel) -> Iterator[None]:
        def around(place: int, forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                out = forward(*args, **kwargs)
                self._passing[place] = _passing(out)
                return out

            return call

        with rewired(lm, {place: around(place, block.forward) for place, block in enumerate(lm.structure.blocks)}):
            yield


_measured: "weakref.WeakKeyDictionary[PreTrainedModel, Resumption]" = weakref.WeakKeyDictionary()


def resumption(lm: LanguageModel) -> Resumption:
    """How passes of a model are resumed; measured on the first call."""
    if lm.model not in _measured:
        _measured[lm.model] = Resumption(lm)
    return _measured[lm.model]


def resumed(lm: LanguageModel, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> AbstractContextManager[None]:
    """Surround `lm(tokens, mask)`: the pass goes on from `stream` before block `layer` (L: after the last one)."""
    return resumption(lm).at(lm, layer, stream)


def run_from(
    lm: LanguageModel,
    layer: int,
    stream: Float[Tensor, "batch pos d_model"],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Output of the last block when block `layer` is given `stream`, with gradients where the grad mode asks for them.

    `tokens` and `mask` are those of the pass that the stream belongs to: they make its masks and positions.
    """
    last = f"resid_post.{lm.n_layers - 1}"
    if layer == lm.n_layers:
        return stream
    with resumed(lm, layer, stream), lm.reading(last) as acts:
        lm(tokens, mask)
    return acts[last]


def first_block(lm: LanguageModel, site: str) -> int:
    """The block that the stream enters after `site`. Raises `SondeError` for sites beside the stream."""
    kind, _, number = site.partition(".")
    if kind not in ("resid_pre", "resid_post") or site not in lm.sites:
        raise SondeError(f"a model is resumed from the residual stream, resid_pre.i or resid_post.i, not from {site!r}")
    return int(number) + (kind == "resid_post")


def _passing(out: Any) -> Forward:
    """A block that returns its input in the shape of `out`."""
    return lambda *args, **kwargs: with_stream(out, stream_in(args, kwargs))
