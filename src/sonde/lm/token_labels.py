"""The class of every token of a text, batch by batch: labels of words or passages, or the token's place in its window.

Both halves of a text share one `TokenLabels`, since `TokenBatches.split` keeps the numbers of the tokens. Classes are
renumbered to those that occur, so that none is fitted without rows.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sonde.data.labels import UNKNOWN, LabelledText
from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches

_FIRST_PLACES = 4


class TokenLabels:
    """Classes of tokens. Made by `TokenLabels.of` or `TokenLabels.by_place`.

    concept: what the classes are classes of. names: the classes.
    """

    def __init__(self, concept: str, names: Sequence[str], by_token: Int[np.ndarray, " tokens"] | None) -> None:
        self.concept, self.names = concept, tuple(names)
        self._by_token = by_token
        self._edges: list[int] = []

    @classmethod
    def of(cls, batches: TokenBatches, labelled: LabelledText) -> "TokenLabels":
        """Labels of the tokens of `batches`, which read `labelled.texts` (all halves of it share the result).

        Raises `SondeError` where the tokens are of another text, and where fewer than two classes occur: then there is
        nothing to erase.
        """
        found = labelled.at(*batches.extents())
        used = np.concatenate([batches.places(i).numpy().ravel() for i in range(batches.n_batches)])
        present = np.unique(found[used[used >= 0]])
        present = present[present >= 0]
        if len(present) < 2:
            only = f"only {labelled.names[present[0]]!r}" if len(present) else "no class at all"
            raise SondeError(
                f"nothing to erase: {only} of {labelled.concept} occurs in the {int((used >= 0).sum()):,} tokens read"
            )
        number = np.full(len(labelled.names) + 1, UNKNOWN, dtype=np.int64)  # the last stands for -1
        number[present] = np.arange(len(present))
        return cls(labelled.concept, [labelled.names[c] for c in present], number[found])

    @classmethod
    def by_place(cls, context: int) -> "TokenLabels":
        """Classes of places in a window of `context` tokens: 1-4, 5-16, 17-64, … (each bin four times as long)."""
        edges = [0, _FIRST_PLACES]
        while edges[-1] < context:
            edges.append(4 * edges[-1])
        edges[-1] = context
        names = [f"{low + 1} to {high}" for low, high in pairwise(edges)]
        if len(names) < 2:
            raise SondeError(f"nothing to erase: windows of {context} tokens have one bin of places")
        made = cls("place in the window", names, None)
        made._edges = edges
        return made

    def at(self, batches: TokenBatches, index: int) -> Int[Tensor, "batch pos"]:
        """The class of each token of batch `index`, -1 where unknown and at pads."""
        places = batches.places(index)
        if self._by_token is None:
            column = torch.bucketize(torch.arange(places.shape[1]), torch.tensor(self._edges[1:-1]), right=True)
            return torch.where(places >= 0, column, UNKNOWN)
        known = torch.from_numpy(np.append(self._by_token, UNKNOWN))
        return known[places]

    def counts(self, batches: TokenBatches) -> Mapping[str, int]:
        """How many tokens of `batches` have each class."""
        total = torch.zeros(len(self.names) + 1, dtype=torch.long)
        for index in range(batches.n_batches):
            total += torch.bincount(self.at(batches, index).ravel() + 1, minlength=len(self.names) + 1)
        return dict(zip(self.names, total[1:].tolist(), strict=True))
