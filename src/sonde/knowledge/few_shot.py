"""Bought labels in a prompt: few-shot classification without training, and fine-tuning behind a few-shot prompt.

    few-shot     log p(word₁ | rows with labels, text) - log p(word₀ | …)        labels hardened, order reshuffled
    prompted     k labelled rows before every text that is trained on or scored: the prompt makes the task salient

The rows of a prompt are paid for like any others, and no stage trains on them. A prompt is run once and its memory
forked for every text (`sonde.knowledge.text_rows`). Mallen & Belrose 2024 (arXiv:2410.13215), section 3.2, whose best
method is the second.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.label_lm import FineTuned
from sonde.knowledge.label_methods import Backend, Sequential
from sonde.knowledge.label_problem import Method, Outcome, Problem, Purchase
from sonde.knowledge.text_rows import TextRows, Wording, label_tokens
from sonde.lm.model import LanguageModel


@dataclass(frozen=True, eq=False)
class FewShot:
    """Labelled rows before the question, and no training; a `Method`.

    shots: rows in the prompt, by default all that were ordered of `source`, which is the oracle by default; 0 is
    zero-shot and buys nothing. orders: shuffles of the rows whose scores are averaged.
    """

    lm: LanguageModel
    wording: Wording = field(default_factory=Wording)
    shots: int | None = None
    source: str | None = None
    orders: int = 1
    batch: int = 64

    @property
    def name(self) -> str:
        """Such as "8-shot"."""
        return "few-shot" if self.shots is None else "zero-shot" if self.shots == 0 else f"{self.shots}-shot"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Buy the rows of the prompt and score the test rows behind it.

        Raises `SondeError` for a problem without texts, label words that share a token, and what does not fit the
        context.
        """
        if problem.texts is None or problem.test_texts is None:
            raise SondeError(f"{problem.name} has features but no texts: a prompt is made of texts")
        if len(self.wording.words) != len(problem.classes):
            raise SondeError(f"{len(self.wording.words)} label words for {len(problem.classes)} classes")
        if self.orders < 1:
            raise SondeError(f"orders is {self.orders}: the rows of a prompt stand in at least one order")
        questions = [self.wording.question(text) for text in problem.test_texts]
        words = label_tokens(self.lm, questions, self.wording.words)
        rows, classes, notes = _shots(problem, purchase, self.source or problem.oracle, self.shots)
        total = torch.zeros(len(questions), len(problem.classes), dtype=torch.float64)
        for order in range(self.orders):
            places = np.random.default_rng([seed, order]).permutation(len(rows))
            prefix = self.wording.prompt([problem.texts[int(i)] for i in rows[places]], classes[places].tolist())
            total += _word_logits(TextRows(self.lm, questions, prefix=prefix), words, self.batch) / self.orders
        scores = (total[:, 1] - total[:, 0]) if total.shape[1] == 2 else total
        settings = {
            "model": self.lm.name,
            "shots": len(rows),
            "orders": self.orders,
            "words": list(self.wording.words),
            "template": self.wording.template,
            "between": self.wording.between,
        }
        return Outcome.of(scores.numpy(), purchase, notes=notes, settings=settings)


@dataclass(frozen=True, eq=False)
class Prompted:
    """A method on a language model with `shots` labelled rows before every text; a `Method`.

    source: who labels the rows of the prompt, by default the oracle; the method has what is left of the order. method:
    what is done with the prompted backend, by default `Sequential`.
    """

    backend: FineTuned
    shots: int = 2
    source: str | None = None
    wording: Wording = field(default_factory=Wording)
    method: Callable[[Backend], Method] = Sequential

    @property
    def name(self) -> str:
        """Such as "2-shot prompt, sequential"."""
        return f"{self.shots}-shot prompt, {self.method(self.backend).name}"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Buy the rows of the prompt, then what the method buys. Raises `SondeError` where the order is too small."""
        if problem.texts is None:
            raise SondeError(f"{problem.name} has features but no texts: a prompt is made of texts")
        source = self.source or problem.oracle
        rows, classes, notes = _shots(problem, purchase, source, self.shots)
        places = np.random.default_rng(seed).permutation(len(rows))
        prefix = self.wording.prompt([problem.texts[int(i)] for i in rows[places]], classes[places].tolist())
        method = self.method(self.backend.prompted(prefix))
        outcome = method(problem, _Rest(purchase, source, rows), seed=seed)
        settings: dict[str, Any] = {**outcome.settings, "shots": self.shots, "prompt rows from": source}
        return Outcome.of(outcome.scores, purchase, notes=[*notes, *outcome.notes], settings=settings)


class _Rest(Purchase):
    """What is left of a purchase when rows of a source stand in a prompt: one ledger, fewer candidates."""

    def __init__(self, whole: Purchase, source: str, used: Int[np.ndarray, " k"]) -> None:
        self.problem, self.seed, self.ledger = whole.problem, whole.seed, whole.ledger
        self.counts = {name: count - (len(used) if name == source else 0) for name, count in whole.counts.items()}
        self._whole = whole
        self._candidates = {}
        for name in whole.counts:
            there = whole.candidates(name)
            self._candidates[name] = there[~np.isin(there, used)] if name == source else there

    def buy(self, source: str, rows: ArrayLike) -> Float[Tensor, "n C"]:
        """As `Purchase.buy`, of the whole; the rows of the prompt are taken, and never for sale again."""
        asked = np.asarray(rows, dtype=np.int64).ravel()
        if len(np.setdiff1d(asked, self._candidates[source])):
            raise SondeError(f"a row asked of {source!r} stands in the prompt, or belongs to another source")
        return self._whole.buy(source, asked)


def _shots(
    problem: Problem, purchase: Purchase, source: str, shots: int | None
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], list[str]]:
    """The rows of a prompt, their hardened labels, and what a reader must know."""
    ordered = purchase.counts.get(source, 0)
    count = ordered if shots is None else shots
    if not 0 <= count <= ordered:
        raise SondeError(f"a prompt of {count} rows needs as many labels of {source!r}: {ordered} were ordered")
    if not count:
        return np.empty(0, np.int64), np.empty(0, np.int64), []
    rows, labels = purchase.take(source, count)
    classes = labels.argmax(1).numpy()
    notes = []
    if len(np.unique(classes)) == 1:
        notes.append(f"all {count} rows of the prompt are of class {problem.classes[int(classes[0])]!r}")
    return rows, classes, notes


def _word_logits(texts: TextRows, words: Int[Tensor, "n C"], batch: int) -> Float[Tensor, "n C"]:
    """Log-probabilities of the words after every text, less what all have in common."""
    hidden = texts.all_last(batch=batch)
    found = torch.empty(words.shape, dtype=torch.float64)
    head = texts.lm.unembedding
    with torch.no_grad():
        for part in torch.arange(len(hidden)).split(batch):
            values = hidden[part].to(texts.lm.device, head.weight.dtype)
            found[part] = head.head(values).double().cpu().gather(1, words[part])
    return found
