"""Going on with a forward pass in the middle: the stream before block i is given, and the blocks below it do not run.

    full pass          blocks 0 … L-1
    resumed at i       blocks i … L-1 on a stream that was read at resid_pre.i before

A block is passed by in the shape in which it returns (tensor or tuple), which is recorded on a few random tokens; on
the same tokens the resumed pass is held against the whole one. Families that hand more than the stream from block to
block fail that test, and `works` says so.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.lm.continuation import difference, random_tokens
from sonde.lm.model import LanguageModel

Forward = Callable[..., Any]
_LENGTH = 8


class Resumption:
    """Passes of one model from any block on; without caches.

    works: whether a resumed pass gives what the whole one gives, to 1e-4 of its scale (8 roundings in half precision).
    error: the measured difference.
    """

    @torch.no_grad()
    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._passed_by: dict[int, Forward] = {}
        tokens = random_tokens(lm.model, _LENGTH)
        last, middle = f"resid_post.{lm.n_layers - 1}", max(1, lm.n_layers // 2)
        self.error = 0.0
        if lm.n_layers > 1:
            with self._recording(), lm.reading("resid_pre.*", last) as whole:
                lm(tokens)
            with self.at(middle, whole[f"resid_pre.{middle}"]), lm.reading(last) as resumed:
                lm(tokens)
            self.error = difference(resumed[last], whole[last])
        self.works = self.error <= max(1e-4, 8 * torch.finfo(lm.dtype).eps)

    @contextmanager
    def at(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
        """Surround a call `lm(tokens)`: blocks below `layer` are passed by, and block `layer` is given `stream`."""
        with ExitStack() as stack:
            for place in range(layer):
                stack.enter_context(self._running(place, self._passed_by[place]))
            if layer:
                stack.enter_context(self._lm.editing({f"resid_pre.{layer}": lambda hidden: stream}))
            yield

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def around(place: int) -> Forward:
            forward = self._lm.structure.blocks[place].forward

            def call(*args: Any, **kwargs: Any) -> Any:
                out = forward(*args, **kwargs)
                self._passed_by[place] = _passing(out)
                return out

            return call

        with ExitStack() as stack:
            for place in range(self._lm.n_layers):
                stack.enter_context(self._running(place, around(place)))
            yield

    @contextmanager
    def _running(self, place: int, forward: Forward) -> Iterator[None]:
        """Have a block run another function than its own."""
        block = self._lm.structure.blocks[place]
        before = block.__dict__.get("forward")
        block.forward = forward
        try:
            yield
        finally:
            if before is None:
                del block.forward
            else:
                block.forward = before


def _passing(out: Any) -> Forward:
    """A block that returns its input in the shape of `out`."""
    rest = out[1:] if isinstance(out, tuple | list) else None

    def call(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if rest is None else type(out)((hidden, *rest))

    return call
