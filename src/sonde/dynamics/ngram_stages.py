"""Which order of its text's statistics does a network rely on, and when in training? Its distance to n-gram models.

At each checkpoint two things are measured for each order n. (1) D_KL(n-gram || network) and the Jensen-Shannon
divergence, at held-out contexts: a network that uses no more than n tokens comes close to the n-gram model and leaves
it again when it learns to use more. (2) The network's loss on sequences sampled from the n-gram model, in which nothing
beyond n tokens can be learned, also by position. The entropy of the n-gram model on its own samples is the least that
this loss can be. (Belrose et al. 2024, arXiv:2402.04362; logits at t are compared with the context t - n + 2 … t.)
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.stats.ngram import NgramModel
from sonde.stats.ngram_rows import NgramRows

Network = Callable[[Tensor], Tensor]  # tokens "batch pos" to logits "batch pos vocab"

_LOGITS = 1 << 25  # in a batch


@dataclass(frozen=True)
class Yardsticks:
    """What every checkpoint is held against: made once, from n-gram models and text that they were not counted on.

    Of `held` the logits from position `first` on are compared with `predictions`, a row for each position, sequence
    after sequence. `samples` are sequences drawn from a model of each order, `entropies` the model's own mean entropy
    in nats at their positions.
    """

    held: Int[Tensor, "sequences pos"]
    first: int
    predictions: dict[str, NgramRows]
    samples: dict[str, Int[Tensor, "sequences pos"]]
    entropies: dict[str, float]

    @classmethod
    def build(
        cls,
        models: "dict[str, tuple[NgramModel, int]]",
        held: Int[Tensor, "sequences pos"],
        *,
        sampled: Sequence[str] = (),
        sequences: int = 64,
        seed: int = 0,
    ) -> "Yardsticks":
        """Yardsticks of named (model, order); sequences as long as the held ones are drawn from those in `sampled`.

        Raises `SondeError` for held sequences that are shorter than the longest n-gram.
        """
        first = max(order for _, order in models.values()) - 1
        if held.ndim != 2 or held.shape[1] <= first + 1:
            raise SondeError(f"held text of shape {tuple(held.shape)}: expected rows of more than {first + 1} tokens")
        predictions, samples, entropies = {}, {}, {}
        for name, (model, order) in models.items():
            predictions[name] = model.predictions(held[:, :-1], order=order, first=first)
            if name in sampled:
                drawn = model.sample(sequences, held.shape[1], seed=seed, order=order)
                samples[name] = torch.from_numpy(drawn)
                entropies[name] = float(model.predictions(drawn[:, :-1], order=order, first=first).entropy().mean())
        return cls(held, first, predictions, samples, entropies)


def measure(
    network: Network, yardsticks: Yardsticks, *, vocab: int | None = None, jensen_shannon: bool = True
) -> dict[str, Any]:
    """Distances and losses of one checkpoint, in nats, by sequence: a tree that a bundle keeps.

    `kl` and `js` hold by name Float[Tensor, " sequences"], the mean over positions; `loss` the loss on the held
    sequences; `sampled` by name the losses on sampled sequences, Float[Tensor, " sequences"], and `by_position` their
    mean at each position, Float[Tensor, " pos-1"]. `vocab` cuts the logits of a padded model to its first tokens; `js`
    stays empty without `jensen_shannon`, which costs more than the rest where the vocabulary is large. Raises
    `SondeError` where model and counts are over different numbers of tokens.
    """
    held, first = yardsticks.held, yardsticks.first
    kl: dict[str, list[Tensor]] = {name: [] for name in yardsticks.predictions}
    js: dict[str, list[Tensor]] = {name: [] for name in yardsticks.predictions}
    losses = []
    places = held.shape[1] - 1 - first
    for start, tokens, logits in _logits(network, held, vocab):
        losses.append(_loss(logits, tokens).mean(1))
        flat = logits[:, first:].flatten(0, 1)
        for name, rows in yardsticks.predictions.items():
            part = rows.part(start * places, (start + len(tokens)) * places)
            kl[name].append(part.kl(flat).view(-1, places).mean(1))
            if jensen_shannon:
                js[name].append(part.jensen_shannon(flat).view(-1, places).mean(1))
    sampled, by_position = {}, {}
    for name, drawn in yardsticks.samples.items():
        each = torch.cat([_loss(logits, tokens) for _, tokens, logits in _logits(network, drawn, vocab)])
        sampled[name], by_position[name] = each.mean(1), each.mean(0)
    return {
        "kl": {name: torch.cat(parts) for name, parts in kl.items()},
        "js": {name: torch.cat(parts) for name, parts in js.items() if parts},
        "loss": torch.cat(losses),
        "sampled": sampled,
        "by_position": by_position,
    }


def trace(
    series: Iterable[tuple[int, Network]], yardsticks: Yardsticks, *, vocab: int | None = None
) -> dict[int, dict[str, Any]]:
    """`measure` of each checkpoint by its step. The series may load its networks one by one."""
    return {step: measure(network, yardsticks, vocab=vocab) for step, network in series}


def logits_of(lm: LanguageModel) -> Network:
    """A language model as a function from tokens to logits."""

    def network(tokens: Tensor) -> Tensor:
        logits = lm(tokens).logits
        assert logits is not None
        return logits

    return network


def lowest(values: "dict[int, float]") -> int:
    """The step at which a curve is lowest."""
    return min(values, key=lambda step: values[step])


def step_of(name: str) -> int | None:
    """The step that a checkpoint's name ends in, such as step1000, checkpoint-500 or global_step20-hf; None without."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def checkpoints_in(folder: str | Path) -> list[tuple[int, Path]]:
    """Folders in `folder` that hold a model and have a step in their name (step1000, checkpoint-500), by step."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [
        (step, path)
        for path in folder.iterdir()
        if re.fullmatch(r"(global_?)?(step|checkpoint)[-_]?\d+", path.name)
        and (path / "config.json").is_file()
        and (step := step_of(path.name)) is not None
    ]
    return sorted(found)


def shuffled(tokens: Int[np.ndarray, "..."], *, seed: int = 0) -> Int[np.ndarray, "..."]:
    """The same tokens in an order drawn at random over the whole text: what only unigrams survive."""
    return np.random.default_rng(seed).permutation(tokens.ravel()).reshape(tokens.shape)


def _logits(network: Network, tokens: Int[Tensor, "n pos"], vocab: int | None):
    """Start, tokens and logits of all positions but the last, batch by batch."""
    rows = 1
    start = 0
    while start < len(tokens):
        part = tokens[start : start + rows]
        with torch.no_grad():
            logits = network(part[:, :-1])
        if vocab is not None:
            logits = logits[..., :vocab]
        yield start, part, logits.float()
        start += len(part)
        rows = max(1, _LOGITS // max(1, logits[0].numel()))


def _loss(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos+1"]) -> Float[Tensor, "batch pos"]:
    targets = tokens[:, 1:].to(logits.device)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).double().cpu()
