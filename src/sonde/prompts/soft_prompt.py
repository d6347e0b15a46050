"""A soft prompt: n vectors of embedding width that stand in a text where tokens could stand (Lester et al. 2021).

Vectors are spliced in at the embedding's output, before whatever a family does to it (a scale, a norm, positions), so
that rows of E = embedding(ids) are exactly the hard prompt of those tokens. Sizes are in units of the coordinate RMS
r = sqrt(mean(E^2)).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

Position = Literal["prefix", "suffix", "random", "slot"] | int
"""Before the context; right before the target; anywhere, anew for each row; at each row's own slot; at an index."""

_BLOCK = 8192


@dataclass(frozen=True)
class SoftPrompt:
    """Vectors and where they go.

    Attributes:
        vectors: in float32, whatever the model's weights are.
        position: see `Position`.
        facts: what is known about the training: learning rate, losses, seed. Plain numbers and words.

    """

    vectors: Float[Tensor, "n width"]
    position: Position = "suffix"
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2:
            raise SondeError(f"a prompt is a matrix (n, width), not of shape {tuple(self.vectors.shape)}")
        check_position(self.position)

    def __len__(self) -> int:
        return len(self.vectors)

    @staticmethod
    def from_tokens(lm: LanguageModel, ids: Sequence[int] | str, position: Position = "suffix") -> "SoftPrompt":
        """The hard prompt of these tokens as vectors."""
        if isinstance(ids, str):
            ids = lm.tokenizer(ids, add_special_tokens=False)["input_ids"] if lm.tokenizer else lm.encode(ids)
        return SoftPrompt(embedded(lm, torch.tensor(list(ids), dtype=torch.long)), position)

    @staticmethod
    def empty(lm: LanguageModel) -> "SoftPrompt":
        """No prompt at all: n = 0."""
        return SoftPrompt(torch.zeros(0, width(lm), device=lm.device))

    def fits(self, lm: LanguageModel) -> None:
        """Raise `SondeError` when the vectors are not of the model's embedding width."""
        if self.vectors.shape[1] != width(lm):
            raise SondeError(f"the prompt has width {self.vectors.shape[1]}, {lm.name} wants {width(lm)}")

    @torch.no_grad()
    def nearest_tokens(
        self, lm: LanguageModel, k: int = 5, *, metric: Literal["cosine", "euclidean"] = "cosine"
    ) -> list[list[tuple[int, float]]]:
        """The k token ids whose embeddings are nearest to each vector, with the cosine or the distance in units of r.

        Nearest is not equal: a vector may act like a token that it is far from. Try the tokens as a hard prompt.
        """
        self.fits(lm)
        vectors = self.vectors.to(lm.device).float()
        pieces = []
        for block in torch.arange(_vocabulary(lm)).split(_BLOCK):
            rows = embedded(lm, block)
            if metric == "cosine":
                pieces.append(torch.nn.functional.normalize(vectors, dim=-1) @ torch.nn.functional.normalize(rows).T)
            else:
                pieces.append(-torch.cdist(vectors, rows) / embedding_rms(lm))
        scores, ids = torch.cat(pieces, -1).topk(k, dim=-1)
        values = scores if metric == "cosine" else -scores
        return [
            list(zip(row, numbers, strict=True)) for row, numbers in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def save(self, folder: str | Path, lm: LanguageModel) -> None:
        """Write the prompt to `folder`, with the hash of the model that it belongs to."""
        from sonde.prompts.formats import save

        save(self, folder, lm)

    @staticmethod
    def load(folder: str | Path, lm: LanguageModel, *, force: bool = False) -> "SoftPrompt":
        """Read a prompt of Sonde's or PEFT's format for `lm`.

        A prompt of another model is refused with `SondeError`, unless `force` and of the same width.
        """
        from sonde.prompts.formats import load

        return load(folder, lm, force=force)


def check_position(position: Position) -> None:
    """Raise `SondeError` for what is not a position."""
    if position not in ("prefix", "suffix", "random", "slot") and not (isinstance(position, int) and position >= 0):
        raise SondeError(f"{position!r} is no position: prefix, suffix, random, slot or an index from 0")


def width(lm: LanguageModel) -> int:
    """Width of the embedding, which in some families is not `d_model`."""
    return lm.structure.embedding.weight.shape[1]  # type: ignore[index, return-value]


@torch.no_grad()
def embedded(lm: LanguageModel, ids: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
    """Rows of E in float32: what the embedding gives out for ids, its own scale included."""
    return lm.structure.embedding(ids.to(lm.device)).detach().float()


@torch.no_grad()
def embedding_rms(lm: LanguageModel) -> float:
    """Root mean square r of the coordinates of E: the unit of sizes and learning rates."""
    total = sum(
        embedded(lm, block).square().double().sum().item() for block in torch.arange(_vocabulary(lm)).split(_BLOCK)
    )
    return (total / (_vocabulary(lm) * width(lm))) ** 0.5


def sampled_rows(lm: LanguageModel, n: int, generator: torch.Generator) -> Float[Tensor, "n width"]:
    """Rows of E of n random tokens: the usual start of a prompt."""
    return embedded(lm, torch.randint(_vocabulary(lm), (n,), generator=generator))


def _vocabulary(lm: LanguageModel) -> int:
    return lm.structure.embedding.weight.shape[0]  # type: ignore[index, return-value]
