"""How well does a network do each task of a mixture now? Loss, token accuracy and whole rows right, at scored places.

Each score is taken twice: over all tokens, and with the readout limited to the task's own alphabet (`masked_…`). A task
that is no longer trained loses its alphabet at the output first, so that the first falls below chance while the second
still knows the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.data.task_mixture import Task
from sonde.errors import SondeError

MEASURES = ("loss", "accuracy", "exact", "masked_loss", "masked_accuracy", "masked_exact")
_LOGITS = 1 << 25  # held at once

Scores = dict[str, dict[str, float]]


def logits_of(module: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    """Logits of a network of ours, or of a Hugging Face model."""
    made: Any = module(tokens)
    return made if isinstance(made, Tensor) else made.logits


def next_token_loss(module: nn.Module, tokens: Int[Tensor, "batch pos"], pad: int | None) -> Float[Tensor, ""]:
    """Cross entropy of the next token in nats, mean over all that are not `pad`."""
    logits = logits_of(module, tokens)[:, :-1]
    ignored = -100 if pad is None else pad
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=ignored)


@dataclass(frozen=True)
class Scorer:
    """Fixed items of several tasks, which any network is scored on: a dict of `MEASURES` for each task.

    Raises `SondeError` for no tasks. Loss is nats per scored token, the others are shares.
    """

    tasks: Sequence[Task]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise SondeError("there is no task to score")

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> Scores:
        """The scores now. The module is put into evaluation mode and back."""
        training = module.training
        module.eval()
        found = {task.name: self._task(module, task) for task in self.tasks}
        module.train(training)
        return found

    @staticmethod
    def _task(module: nn.Module, task: Task) -> dict[str, float]:
        parts: list[Tensor] = []
        where = task.scored[:, 1:]
        chunk = max(1, _LOGITS // (task.held.shape[1] * _vocabulary(module)))
        for start in range(0, len(task.held), chunk):
            own = slice(start, start + chunk)
            logits = logits_of(module, task.held[own])[:, :-1][where[own]].float()
            parts.append(_by_token(logits, task.answers[own, 1:][where[own]], task.alphabet))
        nats, right, masked_nats, masked_right = torch.cat(parts, 1).double()
        row = torch.arange(len(task.held))[:, None].expand_as(where)[where]
        return {
            "loss": float(nats.mean()),
            "accuracy": float(right.mean()),
            "exact": _whole_rows(right, row, len(task.held)),
            "masked_loss": float(masked_nats.mean()),
            "masked_accuracy": float(masked_right.mean()),
            "masked_exact": _whole_rows(masked_right, row, len(task.held)),
        }


def _vocabulary(module: nn.Module) -> int:
    """Size of the largest table or map of the network, which bounds that of its logits."""
    return max((max(p.shape) for p in module.parameters() if p.ndim == 2), default=1)


def _by_token(
    logits: Float[Tensor, "n vocab"], answers: Int[Tensor, " n"], alphabet: tuple[int, ...] | None
) -> Float[Tensor, "4 n"]:
    """Nats and hits of every scored token, over all tokens and over the alphabet."""
    made = [nn.functional.cross_entropy(logits, answers, reduction="none"), logits.argmax(1) == answers]
    if alphabet is None:
        return torch.stack([made[0], made[1].float()] * 2)
    own = torch.tensor(alphabet)
    place = torch.searchsorted(own, answers)
    limited = logits[:, own]
    made += [nn.functional.cross_entropy(limited, place, reduction="none"), limited.argmax(1) == place]
    return torch.stack([x.float() for x in made])


def _whole_rows(right: Tensor, row: Tensor, n: int) -> float:
    wrong = torch.zeros(n).index_add_(0, row, 1 - right.float())
    return float((wrong == 0).double().mean())


def chance(task: Task) -> dict[str, float]:
    """What a uniform guess within the task's alphabet scores: loss, accuracy and whole rows.

    Raises `SondeError` for a task without one.
    """
    if task.alphabet is None:
        raise SondeError(f"task {task.name!r} has no alphabet of its own, so that chance is that of all tokens")
    share = 1 / len(task.alphabet)
    lengths = task.scored.sum(1).double()
    return {
        "loss": -float(torch.tensor(share).log()),
        "accuracy": share,
        "exact": float((share**lengths).mean()),
    }


def alphabets_differ(tasks: Sequence[Task]) -> str:
    """A warning where tasks that are compared have alphabets of different sizes, else ""."""
    sizes: Mapping[str, int] = {task.name: len(task.alphabet or ()) for task in tasks}
    if len(set(sizes.values())) < 2:
        return ""
    said = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"alphabets differ in size ({said}): compare the masked readouts"
