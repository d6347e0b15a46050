"""Tokens as a lens sees them: hidden states of all its sites beside the last block's output and the label.

A `token_shift` of s pairs the lens at position t with the target at t + s: 0 for the model's own prediction, 1 for the
next token, negative for what lies behind. Pads, and positions whose target lies outside the row, are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lens.fused import Readout, Target
from sonde.lm.stream import Batch


@dataclass(frozen=True)
class LensRows:
    """n tokens: what lenses read, and what they are to predict."""

    hidden: Float[Tensor, "layers n d_model"]
    final: Float[Tensor, "n d_model"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.final)

    @staticmethod
    def of(batch: Batch, sites: Sequence[str], last: str, token_shift: int = 0, *, labels_shift: int = 0) -> "LensRows":
        """The rows of a batch: `final` from `token_shift` positions on, `labels` the tokens from `labels_shift` on."""
        here, there = paired(batch.mask, token_shift or labels_shift)
        hidden = torch.stack([batch.acts[site][here] for site in sites])
        rows = LensRows(hidden, batch.acts[last][there if token_shift else here], batch.tokens[there])
        if not (rows.final.isfinite().all() and rows.hidden.isfinite().all()):
            raise SondeError(
                "hidden states hold nan or infinity, so no lens fits them: load the model in float32 or bfloat16"
            )
        return rows

    @staticmethod
    def cat(parts: Sequence["LensRows"]) -> "LensRows":
        """Several sets of rows one after the other."""
        return LensRows(
            torch.cat([part.hidden for part in parts], 1),
            torch.cat([part.final for part in parts]),
            torch.cat([part.labels for part in parts]),
        )

    def __getitem__(self, index: slice | Tensor) -> "LensRows":
        """Some of the rows."""
        return LensRows(self.hidden[:, index], self.final[index], self.labels[index])

    def target(self, readout: Readout, loss: str) -> Target:
        """What the loss "kl" or "ce" compares with."""
        if loss == "ce":
            return Target.tokens(readout, self.labels)
        return Target.model(readout, self.final)


def paired(mask: Bool[Tensor, "batch pos"], shift: int) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Positions that have a target `shift` tokens later, and those targets; as many in each row, in the same order.

    Raises `SondeError` when the shift is as long as the rows.
    """
    length = mask.shape[1]
    if abs(shift) >= length:
        raise SondeError(f"a token_shift of {shift} leaves nothing of rows of {length} tokens")
    here, there = torch.zeros_like(mask), torch.zeros_like(mask)
    first, second = slice(0, length - abs(shift)), slice(abs(shift), length)
    if shift < 0:
        first, second = second, first
    both = mask[:, first] & mask[:, second]
    here[:, first] = both
    there[:, second] = both
    return here, there
