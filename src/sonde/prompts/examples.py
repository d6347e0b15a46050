"""What a prompt is trained and tested on: contexts, the targets that should follow them, and splits by context.

A prompt goes between or into the tokens of a context, and always before the target; only target tokens are scored, so
that prompts of every length, none included, are scored at the same tokens. Text is tokenised as one piece and cut at
the boundary, because a word may split differently where a sentence was cut before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

MARK = "{prompt}"


@dataclass(frozen=True)
class Examples:
    """Token ids of contexts and of the targets after them, one entry a row.

    Attributes:
        contexts: at least one token each; the token before the target is scored too when there is no prompt.
        targets: at least one token each.
        slots: where in each context a prompt of position "slot" goes, such as inside a chat template.
        weights: of each target token in the loss; by default 1.
        conditions: numbers that a conditional prompt is made from.

    Raises:
        SondeError: for empty contexts, for rows that do not match, and where no token is scored.

    """

    contexts: list[list[int]]
    targets: list[list[int]]
    slots: list[int] | None = None
    weights: list[list[float]] | None = None
    conditions: Float[Tensor, "rows k"] | None = None

    def __post_init__(self) -> None:
        n = len(self.contexts)
        parts = {"targets": self.targets, "slots": self.slots, "weights": self.weights, "conditions": self.conditions}
        for name, part in parts.items():
            if part is not None and len(part) != n:
                raise SondeError(f"{n} contexts, but {len(part)} {name}: give one for each")
        if not n:
            raise SondeError("no scored tokens: there are no examples")
        for i, (context, target) in enumerate(zip(self.contexts, self.targets, strict=True)):
            if not len(target) or (self.weights is not None and not any(self.weights[i])):
                raise SondeError(f"no scored tokens in example {i}: its target is empty or has no weight")
            if not len(context):
                raise SondeError(f"context {i} is empty: give one token at least, such as the end-of-text token")
            if self.weights is not None and len(self.weights[i]) != len(target):
                raise SondeError(f"example {i} has {len(target)} target tokens, but {len(self.weights[i])} weights")
            if self.slots is not None and not 0 <= self.slots[i] <= len(context):
                raise SondeError(f"slot {self.slots[i]} is outside context {i} of {len(context)} tokens")

    def __len__(self) -> int:
        return len(self.contexts)

    @staticmethod
    def from_text(lm: LanguageModel, contexts: Sequence[str], targets: str | Sequence[str]) -> "Examples":
        """Tokenise contexts and targets, one target for all or one for each.

        Raises `SondeError` with both tokenisations where the target splits differently after the context: a prompt
        between them would change the target's tokens. Usually a space belongs to the other side of the cut.
        """
        after = [targets] * len(contexts) if isinstance(targets, str) else list(targets)
        if len(after) != len(contexts):
            raise SondeError(f"{len(contexts)} contexts, but {len(after)} targets: give one for each")
        pairs = [_cut(lm, context, target) for context, target in zip(contexts, after, strict=True)]
        return Examples([context for context, _ in pairs], [target for _, target in pairs])

    @staticmethod
    def from_chat(
        lm: LanguageModel, conversations: Sequence[Sequence[Mapping[str, str]]], targets: str | Sequence[str]
    ) -> "Examples":
        """Conversations of messages (role, content) in the model's chat template; the answer is the target.

        One message of each conversation says with `{prompt}` where the prompt goes: position "slot".
        Raises `SondeError` without a chat template and where the mark does not occur exactly once.
        """
        tokenizer = lm.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise SondeError(f"{lm.name} has no chat template: write the turns out and use from_text")
        after = [targets] * len(conversations) if isinstance(targets, str) else list(targets)
        contexts, slots = [], []
        for i, messages in enumerate(conversations):
            text = str(
                tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
            )
            if text.count(MARK) != 1:
                raise SondeError(f"conversation {i} has {text.count(MARK)} marks {MARK}: write exactly one")
            before, behind = (_plain(lm, part) for part in text.split(MARK))
            contexts.append(before + behind)
            slots.append(len(before))
        return Examples(contexts, [_plain(lm, target) for target in after], slots)

    @staticmethod
    def from_rows(rows: Sequence[Sequence[int]], *, context: int = 1) -> "Examples":
        """Rows of text to predict themselves: the first `context` tokens are given, the rest is scored."""
        short = next((i for i, row in enumerate(rows) if len(row) <= context), None)
        if short is not None:
            raise SondeError(
                f"no scored tokens in row {short}: it has {len(rows[short])} tokens, {context} of them given"
            )
        return Examples([list(row[:context]) for row in rows], [list(row[context:]) for row in rows])

    def select(self, rows: Sequence[int]) -> "Examples":
        """Some of the rows, in the order given."""

        def chosen(part):
            return None if part is None else [part[i] for i in rows]

        conditions = None if self.conditions is None else self.conditions[list(rows)]
        return Examples(
            [self.contexts[i] for i in rows],
            [self.targets[i] for i in rows],
            chosen(self.slots),
            chosen(self.weights),
            conditions,
        )

    def split(self, fractions: Sequence[float] = (0.6, 0.2, 0.2), *, seed: int = 0) -> "tuple[Examples, ...]":
        """Parts such as (train, validation, test) that share no context: rows of one context stay together.

        Raises `SondeError` where there are fewer contexts than parts.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, context in enumerate(self.contexts):
            groups.setdefault(tuple(context), []).append(i)
        if len(groups) < len(fractions):
            raise SondeError(f"{len(groups)} different contexts cannot be split into {len(fractions)} parts")
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
        members = list(groups.values())
        total, cuts, done = sum(fractions), [0], 0.0
        for k, fraction in enumerate(fractions):
            done += fraction / total
            left = len(fractions) - k - 1
            cuts.append(min(max(round(done * len(groups)), cuts[-1] + 1), len(groups) - left))
        parts = (order[a:b] for a, b in pairwise(cuts))
        return tuple(self.select(sorted(i for group in part for i in members[group])) for part in parts)

    def random_targets(self, lm: LanguageModel, *, seed: int = 0) -> "Examples":
        """The control of equal length: every different target becomes a string of random tokens, no special ones."""
        generator = torch.Generator().manual_seed(seed)
        special = set() if lm.tokenizer is None else set(lm.tokenizer.all_special_ids)
        size = min(lm.vocab_size, lm.structure.embedding.weight.shape[0])  # type: ignore[arg-type, index]
        if lm.tokenizer is not None:
            size = min(size, len(lm.tokenizer))
        allowed = torch.tensor([i for i in range(size) if i not in special])
        new: dict[tuple[int, ...], list[int]] = {}
        for target in self.targets:
            if tuple(target) not in new:
                drawn = torch.randint(len(allowed), (len(target),), generator=generator)
                new[tuple(target)] = allowed[drawn].tolist()
        return replace(self, targets=[new[tuple(target)] for target in self.targets])


def _cut(lm: LanguageModel, context: str, target: str) -> tuple[list[int], list[int]]:
    whole, given, alone = lm.encode(context + target), lm.encode(context), _plain(lm, target)
    if given and whole[: len(given)] != given and whole[: len(given) - 1] == given[:-1]:
        # some tokenizers end every text with a special token
        tail = given[-1] if lm.tokenizer is not None and given[-1] in lm.tokenizer.all_special_ids else None
        if tail is not None and whole[-1] == tail:
            whole, given = whole[:-1], given[:-1]
    if whole[: len(given)] != given or (target and len(whole) == len(given)):
        raise SondeError(
            f"{target!r} splits differently after {context[-20:]!r}: together {_shown(lm, whole, len(alone) + 2)},"
            f" apart {_shown(lm, given, 2)} + {_shown(lm, alone, len(alone))}; cut the text where a token ends, most"
            " often before a space"
        )
    return given, whole[len(given) :]


def _plain(lm: LanguageModel, text: str) -> list[int]:
    assert lm.tokenizer is not None
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _shown(lm: LanguageModel, ids: Sequence[int], last: int) -> str:
    return "|".join(lm.token_strings(ids[-last:] if last else []))
