"""Training weights where prompts are trained elsewhere: a copy of a model, all weights or adapters of low rank.

    theta <- theta - AdamW(grad_theta loss)

One pass of a batch forward and backward is the unit of budget, whatever is trained: prompts, adapters or weights.
Examples are scored as prompts' are (`sonde.prompts.passes`), so that losses of all methods are of the same tokens.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.lora import attach, fast_training
from sonde.lm.model import LanguageModel
from sonde.nets.loop import Schedule, train
from sonde.prompts.examples import Examples
from sonde.prompts.objectives import cross_entropy
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import SoftPrompt

Weights = Literal["full", "lora"]
LossOfStep = Callable[[int], Tensor]


def copied(lm: LanguageModel) -> LanguageModel:
    """The same model with weights of its own."""
    return LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, name=lm.name)


def tuned(
    lm: LanguageModel,
    loss_of: Callable[[LanguageModel], LossOfStep],
    *,
    steps: int,
    weights: Weights = "full",
    lr: float,
    rank: int = 8,
    seed: int = 0,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: str | None = None,
) -> LanguageModel:
    """A copy of `lm` after `steps` updates on `loss_of(copy)(step)`; `lm` stays as it is.

    "full" trains all weights, "lora" adapters of `rank` on the linear maps of the blocks, merged at the end. Raises
    `SondeError` for fewer than one step, and `MissingExtra` for adapters without peft.
    """
    if steps < 1:
        raise SondeError(f"{steps} updates of weights: give 1 or more")
    new = copied(lm)
    adapters = attach(new, rank=rank, seed=seed) if weights == "lora" else None
    trained: Any = adapters if adapters is not None else new.model.requires_grad_(True)
    new.model.train()
    with fast_training(new):
        train(
            trained,
            loss_of(new),
            [torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=0.0)],
            steps=steps,
            schedule=Schedule(warmup=0.05, decay=0.5),
            clip=1.0,
            checkpoint=checkpoint,
            identity=identity,
            progress=progress,
        )
    if adapters is not None:
        adapters.merge()
    else:
        new.model.eval().requires_grad_(False)
    return new


def predicting(*parts: Examples, batch: int, seed: int = 0) -> Callable[[LanguageModel], LossOfStep]:
    """Cross-entropy, for `tuned`: nats a target token. Each of `parts` has the same share of a batch."""

    def loss_of(lm: LanguageModel) -> LossOfStep:
        shares = [Batches(lm, part, batch // len(parts), seed=seed) for part in parts]
        return lambda step: sum((share.loss(step) for share in shares), torch.zeros(())) / len(shares)

    return loss_of


class Batches:
    """Batches of examples for a model whose weights change, a function of the step alone."""

    def __init__(self, lm: LanguageModel, examples: Examples, size: int, *, seed: int = 0) -> None:
        if size < 1:
            raise SondeError(f"batches of {size} examples: give 1 or more for each part of the data")
        self.passes, self.size, self.seed = Passes(lm, examples, cached=False), size, seed

    def members(self, step: int) -> list[int]:
        """The examples of a step; every epoch visits all in another order."""
        n = len(self.passes.examples)
        places = range(step * self.size, (step + 1) * self.size)
        orders = {epoch: self._order(epoch, n) for epoch in {place // n for place in places}}
        return [orders[place // n][place % n] for place in places]

    def loss(self, step: int, prompt: SoftPrompt | None = None) -> Float[Tensor, ""]:
        """Nats a target token of the step's examples, under a prompt that is left alone where one is given."""
        lm = self.passes.lm
        prompt = prompt or SoftPrompt.empty(lm)
        rows = self.passes.rows(self.members(step), [len(prompt)], [prompt.position])
        return cross_entropy(self.passes.score(prompt.vectors.to(lm.device), rows)).mean()

    def _order(self, epoch: int, n: int) -> list[int]:
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)).tolist()


def joined(*parts: Examples) -> Examples:
    """Examples one part after another, with neither slots nor weights nor conditions."""
    contexts: Sequence[list[int]] = [context for part in parts for context in part.contexts]
    return Examples(list(contexts), [target for part in parts for target in part.targets])
