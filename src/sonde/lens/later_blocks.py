"""Run a model from the middle on: its blocks from l to the last, on a state that something else has made.

A block is called as the model itself called it, with the masks and positions of an ordinary pass over the same tokens.
That this repeats the ordinary pass is measured, not assumed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

_TOLERANCE = 1e-3  # of repeated blocks, relative to the size of the last block's output


class Blocks:
    """How a model called its blocks in the last pass, made by `recording`.

    Memory: the masks and positions of that pass; no activations.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._calls: list[tuple[tuple, dict[str, Any]]] = []

    def run(self, hidden: Float[Tensor, "batch pos d_model"], first: int) -> Float[Tensor, "batch pos d_model"]:
        """Output of the last block when block `first` is given `hidden`; batch and pos are those of the pass."""
        for block, (args, kwargs) in list(zip(self.lm.structure.blocks, self._calls, strict=True))[first:]:
            out = block(hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple | list) else out
        return hidden

    @torch.no_grad()
    def check(self, acts: Mapping[str, Tensor], first: int) -> None:
        """Raise `SondeError` unless blocks called by hand repeat the pass that `acts` were read in.

        `acts` holds the input of block `first` and the output of the last block.
        """
        last = acts[f"resid_post.{self.lm.n_layers - 1}"]
        again = self.run(acts[f"resid_pre.{first}"], first)
        error = float((again - last).abs().max() / last.abs().max())
        if not error < _TOLERANCE:
            raise SondeError(
                f"the last {self.lm.n_layers - first} blocks of {self.lm.name} cannot be run by themselves: their "
                f"output is off by {error:.2g} of its size"
            )


@contextmanager
def recording(lm: LanguageModel) -> Iterator[Blocks]:
    """Record how the model calls its blocks.

    `with recording(lm) as blocks: lm(tokens)`, then `blocks.run(h, 3)` as often as is wanted. The pass must not stop
    early: read the last block's output, or nothing.
    """
    blocks = Blocks(lm)

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # a cache that the family makes unasked would grow with every run
        rest = {
            name: None if isinstance(value, Cache) else value
            for name, value in kwargs.items()
            if name != "hidden_states"
        }
        blocks._calls.append((args[1:], rest))

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in lm.structure.blocks]
    try:
        yield blocks
    finally:
        for hook in hooks:
            hook.remove()


def first_block(lm: LanguageModel, site: str) -> int:
    """The block that the stream enters after `site`. Raises `SondeError` for sites beside the stream."""
    kind, _, number = site.partition(".")
    if kind not in ("resid_pre", "resid_post") or site not in lm.sites:
        raise SondeError(f"a model is resumed from the residual stream, resid_pre.i or resid_post.i, not from {site!r}")
    return int(number) + (kind == "resid_post")
