"""How organisms are fine-tuned: adapters of low rank on every matrix of the blocks, merged at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.lm.model import LanguageModel


def fine_tune(
    lm: "LanguageModel",
    loss_of_step: "Callable[[int, Any], Tensor]",
    *,
    steps: int,
    rank: int,
    checkpoint: Path,
    identity: dict[str, Any],
    lr: float = 2e-3,
    progress: str | None = "fine-tuning",
) -> list[float]:
    """Minimise `loss_of_step(step, model)` and change `lm` in place. Returns the loss of each step.

    Resumes from `checkpoint`, which belongs to `identity`. Raises `MissingExtra` without peft.
    """
    import torch

    from sonde.lm.lora import attach, fast_training
    from sonde.nets.loop import Schedule, train

    adapters = attach(lm, rank=rank, seed=identity.get("seed", 0))
    lm.model.train()
    with fast_training(lm):
        losses = train(
            adapters,
            lambda step: loss_of_step(step, lm.model),
            [torch.optim.AdamW(adapters.parameters(), lr=lr, weight_decay=0.0)],
            steps=steps,
            schedule=Schedule(warmup=0.05, decay=0.5),
            clip=1.0,
            checkpoint=checkpoint,
            identity=identity,
            progress=progress,
        )
    adapters.merge()
    return losses
