"""Prompts that depend on a condition: a small network writes the vectors from a few numbers, such as a wanted score.

    g(c): Linear(k -> n h), Mish; for each of the n tokens L times Linear(h -> h), Mish; for each Linear(h -> width)

Shapes and defaults (L = 0, h = 128) of Nordby, arXiv:2505.14943. It starts as rows of E that hardly depend on c.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mish

from sonde.errors import SondeError
from sonde.lm.chunked import faster_scans
from sonde.lm.model import LanguageModel
from sonde.nets.loop import train
from sonde.prompts.examples import Examples
from sonde.prompts.formats import load_generator, save_generator
from sonde.prompts.objectives import Objective, cross_entropy
from sonde.prompts.passes import Passes, Rows
from sonde.prompts.soft_prompt import Position, SoftPrompt, embedding_rms, sampled_rows, width
from sonde.prompts.training import Cosine, held_out, objective_values


class PromptGenerator(nn.Module):
    """Vectors (batch, n, width) from conditions (batch, k).

    Args:
        lm: the model whose embedding the vectors are for.
        k: numbers in a condition.
        n: vectors.
        hidden: width h of the stacks.
        layers: L of them for each vector.
        position: where the vectors go.
        seed: of the start.

    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        k: int,
        n: int,
        hidden: int = 128,
        layers: int = 0,
        position: Position = "suffix",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(k, n, hidden) < 1 or layers < 0:
            raise SondeError(f"a generator of {n} vectors from {k} numbers with {layers} layers of {hidden} is none")
        self.k, self.n, self.hidden, self.layers = k, n, hidden, layers
        self.position: Position = position
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(k, n * hidden)
            self.stack = nn.Parameter(torch.randn(layers, n, hidden, hidden) / math.sqrt(hidden))
            self.stack_bias = nn.Parameter(torch.zeros(layers, n, hidden))
            self.last = nn.Parameter(0.1 * embedding_rms(lm) * torch.randn(n, hidden, width(lm)) / math.sqrt(hidden))
            self.last_bias = nn.Parameter(sampled_rows(lm, n, torch.Generator().manual_seed(seed)).cpu())
        self.to(lm.device)

    def forward(self, conditions: Float[Tensor, "batch k"]) -> Float[Tensor, "batch n width"]:
        """The vectors of each condition."""
        hidden = mish(self.first(conditions)).unflatten(-1, (self.n, self.hidden))
        for weight, bias in zip(self.stack, self.stack_bias, strict=True):
            hidden = mish(_per_token(hidden, weight) + bias)
        return _per_token(hidden, self.last) + self.last_bias

    @torch.no_grad()
    def prompt(self, condition: Sequence[float]) -> SoftPrompt:
        """The prompt of one condition."""
        given = torch.tensor([list(condition)], dtype=torch.float32, device=self.last.device)
        if given.shape[1] != self.k:
            raise SondeError(f"a condition of {given.shape[1]} numbers; this generator takes {self.k}")
        return SoftPrompt(self(given)[0], self.position, {"condition": [float(c) for c in condition]})

    def save(self, folder: str | Path, lm: LanguageModel) -> None:
        """Write the generator to `folder`, with the hash of the model that it belongs to."""
        layout = {name: getattr(self, name) for name in ("k", "n", "hidden", "layers", "position")}
        save_generator(dict(self.state_dict()), layout, folder, lm)

    @staticmethod
    def load(folder: str | Path, lm: LanguageModel, *, force: bool = False) -> "PromptGenerator":
        """Read a generator for `lm`. That of another model is refused with `SondeError`, unless `force`."""
        layout, tensors = load_generator(folder, lm, force=force)
        generator = PromptGenerator(lm, **layout)
        if {name: t.shape for name, t in tensors.items()} != {
            name: t.shape for name, t in generator.state_dict().items()
        }:
            raise SondeError(f"the weights in {folder} are not those that its prompt.json describes")
        generator.load_state_dict(tensors)
        return generator


def train_generator(
    lm: LanguageModel,
    examples: Examples,
    generator: PromptGenerator,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    objective: Objective = cross_entropy,
    batch: int = 16,
    seed: int = 0,
    validation: Examples | None = None,
    validations: int = 8,
    checkpoint: Path | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Train a generator in place on examples with `conditions`; the best step on `validation` is what it ends as.

    Arguments are those of `train_prompts`; `lr` is AdamW's own. Returns `losses`, `validation` and `best_step`.
    Raises `SondeError` for examples without conditions of the generator's size, and where the loss is no number: the
    generator is then as it was at its best validation.
    """
    if validation is None:
        examples, validation = held_out(examples, seed)
    for each in (examples, validation):
        got = None if each.conditions is None else each.conditions.shape[1]
        if got != generator.k:
            raise SondeError(
                f"the generator takes conditions of {generator.k} numbers; the examples have {got or 'none'}"
            )
    passes, held = Passes(lm, examples), Passes(lm, validation)
    batches = passes.batches(batch, seed=seed)
    best: dict[str, Any] = {"validation": math.inf, "best_step": 0, "weights": copy.deepcopy(generator.state_dict())}

    def loss_of_step(step: int) -> Tensor:
        epoch, place = divmod(step, len(batches))
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed + epoch))
        vectors, rows = _rows(passes, generator, batches[int(order[place])], seed * 1_000_003 + step)
        leaf = vectors.detach().requires_grad_()
        gradient, total = torch.zeros_like(leaf), torch.zeros((), device=leaf.device)
        count = len(rows)
        for part, values in objective_values(passes, leaf, rows, objective, seed * 1_000_003 + step):
            share = values.sum() / (count * part.samples)
            gradient += torch.autograd.grad(share, leaf)[0]
            total += share.detach()
        # the gradient was computed part by part: this has it, and the loss's value
        return total + ((vectors - vectors.detach()) * gradient).sum()

    def validate(done: int) -> None:
        found, count = 0.0, 0
        with torch.no_grad():
            for members in held.batches(32):
                vectors, rows = _rows(held, generator, members, seed)
                for part, values in objective_values(held, vectors, rows, objective, seed):
                    found, count = found + float(values.sum()), count + len(part)
        if found / count < best["validation"]:
            best.update(validation=found / count, best_step=done, weights=copy.deepcopy(generator.state_dict()))

    validated = {round((i + 1) * steps / validations) for i in range(validations)} | {steps}
    identity = {"steps": steps, "lr": lr, "batch": batch, "seed": seed, "model": lm.hash if checkpoint else ""}
    try:
        with faster_scans(lm.model):
            validate(0)
            losses = train(
                generator,
                loss_of_step,
                [torch.optim.AdamW(generator.parameters(), lr=lr, weight_decay=0.0)],
                steps=steps,
                schedule=Cosine(),
                checkpoint=checkpoint,
                identity=identity,
                report=lambda step, loss: validate(step + 1) if step + 1 in validated else None,
                progress=progress,
            )
            validate(steps)
    finally:
        generator.load_state_dict(best.pop("weights"))
    return {"losses": losses, **best}


def _rows(passes: Passes, generator: PromptGenerator, members: Sequence[int], seed: int) -> tuple[Tensor, Rows]:
    """The vectors of a batch one after another, and its rows, each with its own."""
    conditions = passes.examples.conditions
    assert conditions is not None
    vectors = generator(conditions[list(members)].to(passes.lm.device, torch.float32)).flatten(0, 1)
    places = torch.Generator().manual_seed(seed)
    rows = passes.rows(members, [generator.n], [generator.position], generator=places)
    rows.offset.copy_(rows.member * generator.n)
    return vectors, rows


def _per_token(hidden: Float[Tensor, "batch n i"], weight: Float[Tensor, "n i o"]) -> Float[Tensor, "batch n o"]:
    """Each token's own linear map. On a CPU a loop was measured to be faster than one batched product."""
    if hidden.device.type == "cpu":
        return torch.stack([row @ w for row, w in zip(hidden.unbind(1), weight, strict=True)], 1)
    return torch.einsum("bni,nio->bno", hidden, weight)
