"""A latent with its windows as somebody reads them: the text of every token beside its activation."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sonde.features.marking import marked, plain
from sonde.features.samplers import LatentExamples
from sonde.features.windows import Window

Words = Callable[[Sequence[int]], list[str]]
"""The text of each token, such as `LanguageModel.token_strings`."""


@dataclass(frozen=True, eq=False)
class Case:
    """A window and the text of its tokens."""

    window: Window
    tokens: tuple[str, ...]

    @property
    def name(self) -> str:
        """Where it is: sequence and first token."""
        return f"{self.window.sequence}:{self.window.start}"

    @property
    def text(self) -> str:
        """On one line."""
        return plain(self.tokens)

    def marked(self, marks: Sequence[bool] | None = None) -> str:
        """On one line with marks; by default where the latent fires."""
        return marked(self.tokens, self.window.marked.tolist() if marks is None else marks)


@dataclass(frozen=True, eq=False)
class Subject:
    """A latent to explain and to test explanations on. `promoted` are the tokens that it makes likelier, quoted."""

    examples: LatentExamples
    train: tuple[Case, ...]
    train_negatives: tuple[Case, ...]
    test: tuple[Case, ...]
    negatives: tuple[Case, ...]
    promoted: tuple[str, ...] = ()

    @staticmethod
    def of(examples: LatentExamples, words: Words, promoted: Sequence[str] = ()) -> "Subject":
        """The windows of a latent with the text of their tokens."""
        parts = (examples.train, examples.train_negatives, examples.test, examples.negatives)
        cases = (tuple(Case(window, tuple(words(window.tokens.tolist()))) for window in part) for part in parts)
        return Subject(examples, *cases, promoted=tuple(promoted))

    @property
    def hookpoint(self) -> str:
        """Where the latent is."""
        return self.examples.hookpoint

    @property
    def latent(self) -> int:
        """Its number."""
        return self.examples.latent

    def random(self, seed: int, what: str) -> np.random.Generator:
        """A generator of its own for every latent and purpose, whatever the order in which they are done."""
        return np.random.default_rng([seed, self.latent, zlib.crc32(f"{self.hookpoint}/{what}".encode())])

    def held_out(self, seed: int) -> list[Case]:
        """Test windows and negatives in an order that tells nothing."""
        cases = [*self.test, *self.negatives]
        return [cases[i] for i in self.random(seed, "order").permutation(len(cases))]

    @cached_property
    def marks(self) -> int:
        """How many tokens are marked in a test window on average, at least one."""
        counts = [int(case.window.marked.sum()) for case in self.test]
        return max(1, round(sum(counts) / len(counts))) if counts else 1
