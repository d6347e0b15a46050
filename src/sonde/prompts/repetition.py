"""Say one string over and over, whatever the text is: the plainest behaviour that a prompt can be asked for.

The text stands in the context and is not what is predicted: at the t-th scored place the label is token t mod k of a
string of k tokens. A string of one token needs no position, a longer one makes the model count. After the repetition
test of Nordby, arXiv:2505.14943.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.prompts.passes import Scored


@dataclass(frozen=True)
class Repetition:
    """An objective: cross-entropy a token to the string `ids`, repeated; `exact` is 1 where all of it is likeliest."""

    ids: tuple[int, ...]

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """Nats a token."""
        logp = scored.logits.float().log_softmax(-1)
        chosen = logp.gather(-1, self._labels(scored)[..., None])[..., 0]
        return -(chosen * scored.weights).sum(-1) / scored.weights.sum(-1)

    def exact(self, scored: Scored) -> Float[Tensor, " rows"]:
        """1 where the likeliest token is the string's at every scored place, else 0."""
        right = scored.logits.argmax(-1) == self._labels(scored)
        return (right | (scored.weights == 0)).all(-1).float()

    def _labels(self, scored: Scored) -> Int[Tensor, "rows scored"]:
        ids = torch.tensor(self.ids, device=scored.logits.device)
        return ids[scored.index.to(ids.device) % len(ids)].expand(scored.logits.shape[:2])
