"""Fine-tuning by changes of low rank: W + (alpha / r) B A, with B and A alone trained (Hu et al., arXiv:2106.09685).

All matrices of the blocks take part, except those that a family's fused code reads without calling their module, where
an adapter would not be seen (the output projection of Mamba). The adapters are merged into the weights at the end.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import MissingExtra

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.lm.model import LanguageModel

_SCANNED = ("mamba", "mamba2", "rwkv")
_UNSEEN = {"mamba": ("out_proj",), "mamba2": ("out_proj",), "falcon_mamba": ("out_proj",), "falcon_h1": ("out_proj",)}


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
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("fine-tuning an organism", "tune") from error
    import torch
    from torch import nn

    from sonde.nets.loop import Schedule, train

    unseen = _UNSEEN.get(lm.family, ())
    targets = [
        name
        for name, module in lm.model.named_modules()
        if isinstance(module, nn.Linear) and module is not lm.structure.head and not name.endswith(unseen or ("\0",))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(identity.get("seed", 0))
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
            adapted: Any = get_peft_model(lm.model, settings)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        adapters = nn.ParameterList(trained)
        adapted.train()
        with _chunked(lm):
            losses = train(
                adapters,
                lambda step: loss_of_step(step, adapted),
                [torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)],
                steps=steps,
                schedule=Schedule(warmup=0.05, decay=0.5),
                clip=1.0,
                checkpoint=checkpoint,
                identity=identity,
                progress=progress,
            )
    lm.model = adapted.merge_and_unload().eval().requires_grad_(False)
    return losses


def _chunked(lm: "LanguageModel") -> "AbstractContextManager[Any]":
    """Recurrent families train on chunked scans: the library's go token by token."""
    from sonde.lm.chunked import chunked_scans

    return chunked_scans(lm.model) if lm.family in _SCANNED else nullcontext()
