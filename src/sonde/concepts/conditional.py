"""An edit that acts only where a probe says so: h -> e(h) where w·h + b > threshold, else h.

The probe reads the same vector that would be edited, so a token is edited or not by itself (conditional steering, Lee
et al. 2024, arXiv:2409.05907, reads the prompt instead: enter the edit with `rows` for that).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Conditional(nn.Module):
    """`edit` where the probe's score is above `threshold`, nothing elsewhere. At -inf it is the edit itself.

    Args:
        edit: any edit of vectors, `[... d] -> [... d]`.
        weight: w of the probe, Float[Tensor, "d"].
        bias: b of the probe.
        threshold: the score above which the edit acts.

    """

    def __init__(
        self, edit: nn.Module, weight: Float[Tensor, " d"], *, bias: float = 0.0, threshold: float = 0.0
    ) -> None:
        super().__init__()
        if weight.ndim != 1 or not weight.isfinite().all():
            raise ValueError(f"a probe's weight is a finite vector, not of shape {tuple(weight.shape)}")
        self.edit = edit
        self.register_buffer("weight", weight.detach().float())
        self.bias, self.threshold = bias, threshold

    def acts(self, h: Float[Tensor, "*batch d"]) -> Bool[Tensor, "*batch"]:
        """Where the edit acts."""
        return h.float() @ self.weight + self.bias > self.threshold  # type: ignore[operator]

    def forward(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The vectors, edited where the probe fires."""
        return torch.where(self.acts(h)[..., None], self.edit(h), h)

    def at(self, strength: float | Float[Tensor, " batch"]) -> "Conditional":
        """The same condition on the edit at another strength."""
        return Conditional(self.edit.at(strength), self.weight, bias=self.bias, threshold=self.threshold)  # type: ignore
