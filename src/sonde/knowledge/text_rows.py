"""Texts as a language model reads them to classify them: behind a prefix that all share, by their last token.

    prefix   text₁ label₁ ⏎⏎ text₂ label₂ ⏎⏎ …  (labelled rows, or nothing)          text   the row that is asked about

The prefix is run once and its memory forked for every row, in training too, where gradients flow back through the one
copy: B rows behind a prefix of P tokens cost P + B T tokens instead of B (P + T). Rows are padded to the right, where
no causal model looks. Nothing is ever cut: what does not fit into the context is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.states import answer_tokens
from sonde.lm.continuation import continuation
from sonde.lm.model import LanguageModel, Past
from sonde.lm.prompt_rows import like_lengths


@dataclass(frozen=True)
class Wording:
    """How a row is asked about and answered.

    template: the question, with {text} in it. words: the label of each class, one token as it follows the question, its
    space included. between: stands between labelled rows of a prompt.
    """

    words: tuple[str, ...] = (" no", " yes")
    template: str = "{text}"
    between: str = "\n\n"

    def __post_init__(self) -> None:
        if "{text}" not in self.template:
            raise SondeError(f"the template {self.template!r} has no {{text}} in it")

    def question(self, text: str) -> str:
        """The row without its label."""
        return self.template.replace("{text}", text)

    def prompt(self, texts: Sequence[str], classes: Sequence[int]) -> str:
        """Labelled rows, ready for a question to follow."""
        rows = zip(texts, classes, strict=True)
        return "".join(self.question(text) + self.words[number] + self.between for text, number in rows)


class TextRows:
    """Questions as ids behind one prefix.

    Raises `SondeError` where the longest does not fit into the context with the prefix and one more token, naming the
    row and both lengths; and for a model without a tokenizer.
    """

    def __init__(self, lm: LanguageModel, questions: Sequence[str], *, prefix: str = "") -> None:
        if lm.tokenizer is None:
            raise SondeError(f"{lm.name} was made without a tokenizer: it reads no texts")
        self.lm = lm
        self.prefix: list[int] = lm.encode(prefix) if prefix else []
        if prefix:
            # the prefix has the special tokens that open a text
            self.ids = [
                list(lm.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]
                for question in questions
            ]
        else:
            self.ids = [lm.encode(question) for question in questions]
        empty = [i for i, ids in enumerate(self.ids) if not ids]
        if empty:
            raise SondeError(f"text {empty[0]} is empty: every row needs at least one token")
        longest = max(range(len(self.ids)), key=lambda i: len(self.ids[i]), default=None)
        room = lm.max_positions
        if longest is not None and room is not None and len(self.prefix) + len(self.ids[longest]) + 1 > room:
            raise SondeError(
                f"text {longest} has {len(self.ids[longest])} tokens behind a prompt of {len(self.prefix)}, and "
                f"{lm.name} reads {room} with the label: use a shorter prompt or shorter texts, nothing is cut off"
            )
        self._whole = bool(self.prefix) and continuation(lm.model).mode == "none"

    def __len__(self) -> int:
        return len(self.ids)

    def memory(self) -> Past | None:
        """The prefix's memory under the model as it is now, with gradients where they are on; None without a prefix."""
        if not self.prefix or self._whole:
            return None
        return self.lm(torch.tensor([self.prefix]), use_cache=True).past

    def last(self, places: Sequence[int] | Int[Tensor, " b"], memory: Past | None = None) -> Float[Tensor, "b d"]:
        """What the unembedding is given after the last token of rows. Gradients flow where they are on.

        `memory` is what `memory()` returned under the same weights; by default it is made for this call.
        """
        memory = memory or self.memory()
        lead = self.prefix if self._whole else []
        rows = [[*lead, *self.ids[int(i)]] for i in places]
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        site = f"resid_post.{self.lm.n_layers - 1}"
        with self.lm.reading(site) as acts:
            if memory is None:
                self.lm(tokens, torch.arange(width) < lengths[:, None])
            else:
                # pads are left unmasked: they stand after all that is read, and the memory is thrown away
                self.lm(tokens, past=memory.select(torch.zeros(len(rows), dtype=torch.long)))
        hidden = acts[site]
        chosen = hidden[torch.arange(len(rows), device=hidden.device), (lengths - 1).to(hidden.device)]
        return self.lm.unembedding.normed(chosen)

    @torch.no_grad()
    def all_last(self, places: Sequence[int] | None = None, *, batch: int = 64) -> Float[Tensor, "n d"]:
        """`last` of many rows, in batches of like length behind one run of the prefix; in float32, on the CPU."""
        wanted = list(range(len(self))) if places is None else [int(i) for i in places]
        memory = self.memory()
        found: Tensor | None = None
        for group in like_lengths([len(self.ids[i]) for i in wanted], batch):
            part = self.last([wanted[i] for i in group], memory).float().cpu()
            found = torch.empty(len(wanted), part.shape[1]) if found is None else found
            found[group] = part
        return torch.empty(0, 0) if found is None else found


def label_tokens(lm: LanguageModel, questions: Sequence[str], words: Sequence[str]) -> Int[Tensor, "n C"]:
    """Ids of the label words as they follow each question.

    Raises `SondeError` for words that are not one token each or share it, and for fewer than two.
    """
    if len(words) < 2 or len(set(words)) < len(words):
        raise SondeError(
            f"the label words are {', '.join(map(repr, words))}: expected one for each class, all different"
        )
    rows = [lm.encode(question) for question in questions]
    pairs = [
        answer_tokens(lm, questions, rows, (first, second))
        for i, first in enumerate(words)
        for second in words[i + 1 :]
    ]
    return torch.cat([pairs[0][:, :1], *(pair[:, 1:] for pair in pairs[: len(words) - 1])], 1)
