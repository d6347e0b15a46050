"""How well prompts work on examples that they were not trained on: nats of the whole target, and exact success.

Summed nats of the whole target, because under teacher forcing all but its first tokens may be easy; and whether the
model, left to itself, writes exactly the target. Greedy text equals the target if and only if every target token is the
likeliest after the true ones before it, so one teacher-forced pass decides it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.lm.chunked import faster_scans
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.passes import Passes, pieces
from sonde.prompts.soft_prompt import Position, SoftPrompt


@dataclass(frozen=True)
class Evaluation:
    """What prompts do on each example.

    Attributes:
        nats: -log p of the whole target.
        tokens: scored tokens of each example.
        onset: -log p of the target's first token.
        right: share of the target's tokens that are the likeliest, under teacher forcing.
        exact: whether the model on its own (greedy) writes the target.

    """

    nats: Float[Tensor, "prompts rows"]
    tokens: Float[Tensor, " rows"]
    onset: Float[Tensor, "prompts rows"]
    right: Float[Tensor, "prompts rows"]
    exact: Bool[Tensor, "prompts rows"]

    @property
    def loss(self) -> Float[Tensor, " prompts"]:
        """Nats a token over all examples."""
        return self.nats.sum(1) / self.tokens.sum()

    @property
    def success(self) -> Float[Tensor, " prompts"]:
        """Share of the examples on which the whole target is written."""
        return self.exact.float().mean(1)


@torch.no_grad()
def evaluate(
    lm: LanguageModel,
    prompts: SoftPrompt | Sequence[SoftPrompt],
    examples: Examples,
    *,
    batch: int = 32,
    seed: int = 0,
    passes: Passes | None = None,
) -> Evaluation:
    """Score prompts of any length and position on examples, all at the same target tokens.

    Weights of target tokens count in `nats` and leave tokens out of `exact` where they are 0. `seed` places prompts of
    position "random". `passes` are those of `examples`, to share what is kept of the contexts with other calls.
    """
    prompts = [prompts] if isinstance(prompts, SoftPrompt) else list(prompts)
    for prompt in prompts:
        prompt.fits(lm)
    passes = passes or Passes(lm, examples)
    bank = torch.cat([prompt.vectors.to(lm.device) for prompt in prompts])
    lengths = [len(prompt) for prompt in prompts]
    positions: list[Position] = [prompt.position for prompt in prompts]
    found = torch.zeros(4, len(prompts), len(passes.examples))
    tokens = torch.zeros(len(passes.examples))
    generator = torch.Generator().manual_seed(seed)
    with faster_scans(lm.model):
        for members in passes.batches(batch):
            for group in passes.grouped(members, lengths, positions, generator=generator):
                for rows in pieces(group, lm):
                    scored = passes.score(bank, rows)
                    weights, nats = scored.weights, scored.nats
                    counted = weights > 0
                    right = (scored.logits.argmax(-1) == scored.labels) & counted
                    first = counted.float().argmax(-1, keepdim=True)
                    columns = [
                        (nats * weights).sum(-1),
                        nats.gather(-1, first)[:, 0],
                        right.sum(-1) / counted.sum(-1),
                        (right | ~counted).all(-1),
                    ]
                    example = torch.tensor(members)[rows.member]
                    found[:, rows.owner, example] = torch.stack([column.float().cpu() for column in columns])
                    tokens[example] = weights.sum(-1).float().cpu()
    nats, onset, right, exact = found
    return Evaluation(nats, tokens, onset, right, exact > 0)
