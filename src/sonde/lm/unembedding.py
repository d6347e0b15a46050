"""The whole unembedding of a language model: final norm, projection, head, and what the family does to the logits.

U(h) = post(W_U · project(norm(h)) + b_U), where post multiplies by a scale (Cohere, Granite, FalconH1) or bends by a
soft-cap c·tanh(z/c) (Gemma 2, RecurrentGemma, xLSTM). The configuration's keys are the only trace of `post`.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sonde.lm.structure import Structure

SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIER_KEYS = ("logit_scale", "lm_head_multiplier")
DIVISOR_KEYS = ("logits_scaling",)


class Unembedding:
    """Callable `hidden -> logits` with its parts: `norm`, `project`, `weight`, `bias`, `scale`, `softcap`.

    `weight` has shape (vocab, d_head), `bias` (vocab,) or None. `scale` multiplies the logits; `softcap` is the bound c
    of c·tanh(z/c) or None. The parts are the model's own modules and tensors, not copies.
    """

    def __init__(self, structure: Structure, config: PreTrainedConfig) -> None:
        self.norm: nn.Module | None = structure.norm
        self.project: nn.Module | None = structure.project
        self._head = structure.head
        self.scale = 1.0
        for key in MULTIPLIER_KEYS:
            self.scale *= _number(config, key) or 1.0
        for key in DIVISOR_KEYS:
            self.scale /= _number(config, key) or 1.0
        caps = [cap for cap in (_number(config, key) for key in SOFTCAP_KEYS) if cap]
        self.softcap: float | None = caps[0] if caps else None

    @property
    def weight(self) -> Float[Tensor, "vocab d_head"]:
        """The head's matrix."""
        return self._head.weight

    @property
    def bias(self) -> Float[Tensor, " vocab"] | None:
        """The head's bias, where it has one."""
        return getattr(self._head, "bias", None)

    def __call__(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Logits of a residual stream that has passed the last block."""
        return self.head(self.normed(hidden))

    def normed(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_head"]:
        """What the head is given: the final norm (and projection, where there is one) of `hidden`."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.project is None else self.project(hidden)

    def head(self, normed: Float[Tensor, "... d_head"]) -> Float[Tensor, "... vocab"]:
        """Logits of what `normed` returned: head, scale, soft-cap."""
        logits = self._head(normed)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def hash(self) -> str:
        """SHA-256 of the unembedding's numbers in float32, whatever they are stored in."""
        digest = hashlib.sha256()
        parts = [self.weight, self.bias]
        for module in (self.norm, self.project):
            parts += [] if module is None else list(module.parameters())
        for part in parts:
            if part is not None:
                digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
        digest.update(f"{self.scale!r} {self.softcap!r}".encode())
        return digest.hexdigest()


def _number(config: PreTrainedConfig, key: str) -> float | None:
    value = getattr(config, key, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
