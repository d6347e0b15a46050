"""Sequence tasks whose rule is learned suddenly: addition digit by digit, repeated phrases, skip trigrams.

Each draws any number of sequences from a seed, and says at which positions the next token can be known (Nanda et al.
2023, arXiv:2301.05217, appendix on other tasks). `mask[i, t]` is true where `tokens[i, t + 1]` follows from what stands
at and before t.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sonde.errors import SondeError


class Sequences(NamedTuple):
    """Token rows, and where the next token is to be predicted."""

    tokens: Int[Tensor, "n length"]
    mask: Bool[Tensor, "n length-1"]


class SequenceTask(Protocol):
    """A source of sequences."""

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        ...

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        ...

    def draw(self, n: int, seed: int) -> Sequences:
        """`n` sequences, the same for the same seed."""
        ...


@dataclass(frozen=True)
class Addition:
    """a + b = c, digit by digit, the most significant first: 5 digits give 18 positions of 12 tokens.

    Tokens 0 to 9 are digits, 10 is `+` and 11 is `=`; the sum has a digit more than the summands.
    """

    digits: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 17:
            raise SondeError(f"summands have 1 to 17 digits, not {self.digits}")

    vocab = 12

    @property
    def length(self) -> int:
        """Two summands, two signs, one sum."""
        return 3 * self.digits + 3

    def draw(self, n: int, seed: int) -> Sequences:
        """Summands with uniform digits; every digit of the sum is to be predicted."""
        generator = torch.Generator().manual_seed(seed)
        summands = torch.randint(10, (2, n, self.digits), generator=generator)
        places = 10 ** torch.arange(self.digits - 1, -1, -1)
        total = (summands * places).sum((0, 2))
        answer = total[:, None] // 10 ** torch.arange(self.digits, -1, -1) % 10
        plus, equals = (torch.full((n, 1), sign) for sign in (10, 11))
        tokens = torch.cat([summands[0], plus, summands[1], equals, answer], 1)
        mask = torch.zeros(n, self.length - 1, dtype=torch.bool)
        mask[:, 2 * self.digits + 1 :] = True
        return Sequences(tokens, mask)


@dataclass(frozen=True)
class RepeatedPhrase:
    """Random tokens in which one random phrase stands several times: what induction heads continue.

    To be predicted: the second and later tokens of the second and later occurrences.
    """

    vocab: int = 128
    length: int = 85
    phrase: int = 16
    times: int = 3

    def __post_init__(self) -> None:
        if self.phrase < 2 or self.times < 2 or self.phrase * self.times > self.length:
            raise SondeError(
                f"a phrase of {self.phrase} tokens, {self.times} times, in {self.length}: it must have 2 tokens or "
                "more, stand twice or more, and fit"
            )

    def draw(self, n: int, seed: int) -> Sequences:
        """The gaps before, between and after the occurrences are uniform among those that fit."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocab, (n, self.length), generator=generator)
        phrase = torch.randint(self.vocab, (n, self.phrase), generator=generator)
        free = self.length - self.phrase * self.times
        cuts = torch.randint(free + 1, (n, self.times), generator=generator).sort(1).values
        starts = cuts + self.phrase * torch.arange(self.times)
        places = starts[:, :, None] + torch.arange(self.phrase)
        tokens.scatter_(1, places.flatten(1), phrase.repeat(1, self.times))
        mask = torch.zeros(n, self.length, dtype=torch.bool)
        mask.scatter_(1, places[:, 1:, :-1].flatten(1), True)
        return Sequences(tokens, mask[:, :-1])


@dataclass(frozen=True)
class SkipTrigram:
    """A … ? → B: one of `classes` keys stands somewhere among fillers, a question mark ends the row, B answers it.

    Keys are the first `classes` tokens, their answers the next, fillers the ones after, and the last is `?`; which
    answer belongs to which key is fixed by the task's own seed. The paper's format is not published; this has its
    starting loss, that of about ten classes.
    """

    classes: int = 10
    fillers: int = 20
    length: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2 or self.fillers < 1 or self.length < 3:
            raise SondeError("a skip trigram has 2 classes, 1 filler and 3 tokens or more")

    @property
    def vocab(self) -> int:
        """Keys, answers, fillers, the question mark."""
        return 2 * self.classes + self.fillers + 1

    def draw(self, n: int, seed: int) -> Sequences:
        """The key's place is uniform; only the answer is to be predicted."""
        generator = torch.Generator().manual_seed(seed)
        answers = torch.randperm(self.classes, generator=torch.Generator().manual_seed(self.seed)) + self.classes
        tokens = torch.randint(self.fillers, (n, self.length), generator=generator) + 2 * self.classes
        keys = torch.randint(self.classes, (n,), generator=generator)
        places = torch.randint(self.length - 2, (n, 1), generator=generator)
        tokens.scatter_(1, places, keys[:, None])
        tokens[:, -2] = self.vocab - 1
        tokens[:, -1] = answers[keys]
        mask = torch.zeros(n, self.length - 1, dtype=torch.bool)
        mask[:, -1] = True
        return Sequences(tokens, mask)
