"""Is a prompt token worth more where a token is more text? The same text in tokens of one and of four characters.

    bits per character = nats of the scored characters / (ln 2 x characters)
    characters of context replaced by n vectors = n x characters a token

A small GPT-NeoX is trained on each spelling of the same rows; then prompts stand in place of the text before a span,
and both are compared by the character: with each other, and with the text itself that they replace. The text is of four
languages of the same 35 words (`sonde.data.markov_language` and three relabellings of its chain), of which a prompt can
say which one is spoken. Its entropy is known. After Nordby, arXiv:2505.14943.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sonde.data.markov_language import LANGUAGE, transitions
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.nets.loop import Schedule, train
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.prompts.training import train_prompts
from sonde.stats.intervals import Interval, bootstrap_mean

LANGUAGES = 4
CONTEXT, SPAN = 64, 32  # characters before the span, and of it
_START = 0
_LR = 3e-3


@cache
def chains() -> Float[np.ndarray, "languages words words"]:
    """Probability of each next word after each word, in each language: one chain, its words renamed."""
    first = transitions()
    orders = [np.arange(len(LANGUAGE))]
    orders += [np.random.default_rng(seed).permutation(len(LANGUAGE)) for seed in range(1, LANGUAGES)]
    return np.stack([first[order][:, order] for order in orders])


def texts(n: int, *, seed: int, language: int | None = None, size: int = CONTEXT + SPAN) -> list[str]:
    """`n` pieces of `size` characters, cut anywhere; of one language, or of any."""
    rng = np.random.default_rng((seed, 7))
    which = np.full(n, language) if language is not None else rng.integers(LANGUAGES, size=n)
    longest = max(map(len, LANGUAGE)) + 1
    count = size // (min(map(len, LANGUAGE)) + 1) + 4
    words = np.empty((n, count), dtype=np.int64)
    words[:, 0] = rng.integers(len(LANGUAGE), size=n)
    sums = chains().cumsum(-1)
    for place in range(1, count):
        drawn = (rng.random((n, 1)) > sums[which, words[:, place - 1]]).sum(1)
        words[:, place] = drawn.clip(max=len(LANGUAGE) - 1)
    begins = rng.integers(longest, size=n)
    whole = [" ".join(LANGUAGE[i] for i in row) for row in words.tolist()]
    return [text[begin : begin + size] for text, begin in zip(whole, begins.tolist(), strict=True)]


def entropy() -> float:
    """Bits a character of a language whose words before are all known: no model of it can do better for long."""
    chain = transitions()
    shares = np.full(len(chain), 1 / len(chain))
    for _ in range(500):
        shares = shares @ (
            0.5 * chain + 0.5 * np.eye(len(chain))
        )  # lazily, so that it settles if the chain is periodic
    bits = -(chain * np.log2(np.where(chain > 0, chain, 1))).sum(1)
    sizes = np.array([len(word) + 1 for word in LANGUAGE])
    return float(shares @ bits / (shares @ sizes))


class Spelling:
    """Tokens of `k` characters each: every piece of k characters that the languages have.

    Raises `SondeError` unless k is 1, 2 or 4, so that context and span are whole tokens and a piece has two words at
    most.
    """

    def __init__(self, k: int) -> None:
        if k not in (1, 2, 4):
            raise SondeError(f"tokens of {k} characters: give 1, 2 or 4")
        pairs = [f"{a} {b}" for a in LANGUAGE for b in LANGUAGE]
        pieces = sorted({pair[i : i + k] for pair in pairs for i in range(len(pair) - k + 1)})
        self.k, self.vocab_size = k, len(pieces) + 1
        self._ids = {piece: i + 1 for i, piece in enumerate(pieces)}  # 0 begins every row

    def ids(self, text: str) -> list[int]:
        """Ids of a text of whole tokens."""
        return [self._ids[text[i : i + self.k]] for i in range(0, len(text), self.k)]

    def examples(self, rows: Sequence[str], context: int) -> Examples:
        """The last `SPAN` characters of each text after the `context` characters before them."""
        given = [[_START, *self.ids(row[CONTEXT - context : CONTEXT])] for row in rows]
        return Examples(given, [self.ids(row[CONTEXT:]) for row in rows])


def train_speller(
    spelling: Spelling, *, steps: int = 1500, rows: int = 16, seed: int = 0, checkpoint: Path | None = None
) -> LanguageModel:
    """A GPT-NeoX of width 64 and two layers, trained on rows of all languages; the same rows for every spelling."""
    torch.manual_seed(seed)
    size = (CONTEXT + SPAN) // spelling.k + 1
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=spelling.vocab_size,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=2 * size,
            bos_token_id=_START,
            eos_token_id=_START,
        )
    )

    def loss_of_step(step: int) -> torch.Tensor:
        batch = texts(rows, seed=(seed + 1) * 1_000_003 + step)
        tokens = torch.tensor([[_START, *spelling.ids(row)] for row in batch])
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    train(
        model.train(),
        loss_of_step,
        [optimizer],
        steps=steps,
        schedule=Schedule(),
        checkpoint=checkpoint,
        identity={"k": spelling.k, "steps": steps, "rows": rows, "seed": seed},
        progress=f"model of {spelling.k}-character tokens",
    )
    return LanguageModel(model, name=f"{spelling.k}-character tokens")


@dataclass(frozen=True)
class CharacterCurves:
    """Bits a character of the span in each test row.

    k: characters a token. lengths: of prompts, 0 first. prompted: under the prompt of each length, without other
    context. contexts: characters of real text. read: after so many of them.
    """

    k: int
    lengths: tuple[int, ...]
    prompted: Float[np.ndarray, "lengths rows"]
    contexts: tuple[int, ...]
    read: Float[np.ndarray, "contexts rows"]

    @property
    def replaced(self) -> tuple[int, ...]:
        """Characters of context that stand where the prompts do."""
        return tuple(n * self.k for n in self.lengths)

    def bits(self, n: int) -> Interval:
        """Mean bits a character under the prompt of n vectors."""
        return bootstrap_mean(self.prompted[self.lengths.index(n)])

    def after(self, characters: int) -> Interval:
        """Mean bits a character after so many real ones."""
        return bootstrap_mean(self.read[self.contexts.index(characters)])

    def worth(self, n: int) -> float:
        """Real characters that help as much as n vectors, between measured ones on a line; infinite beyond the last."""
        wanted, means = self.prompted[self.lengths.index(n)].mean(), self.read.mean(1)
        best = np.minimum.accumulate(means)
        if wanted < best[-1]:
            return math.inf
        return float(np.interp(-wanted, -best, self.contexts))


def character_curves(
    lm: LanguageModel,
    spelling: Spelling,
    *,
    lengths: Sequence[int] = (1, 4, 16),
    contexts: Sequence[int] = (0, 4, 8, 16, 32, 64),
    rows: int = 256,
    restarts: int = 2,
    steps: int = 150,
    lr: float = 0.3,
    seed: int = 0,
) -> CharacterCurves:
    """Train prompts on rows of the first language and score the same span of unseen rows under them and after text.

    Prompts of every length stand alone before the span; the best of `restarts` is chosen on other rows. Raises
    `SondeError` for contexts that are not whole tokens or longer than `CONTEXT`.
    """
    wrong = [m for m in contexts if not 0 <= m <= CONTEXT or m % spelling.k]
    if wrong or min(lengths) < 1 or rows < 8:
        raise SondeError(
            f"contexts {wrong or tuple(contexts)}, lengths {tuple(lengths)}, {rows} rows: give multiples of"
            f" {spelling.k} up to {CONTEXT}, lengths from 1 and 8 rows at least"
        )
    language, fresh, test = (texts(n, seed=seed * 31 + i, language=0) for i, n in enumerate((rows, rows // 4, rows), 1))
    trials = train_prompts(
        lm,
        spelling.examples(language, 0),
        lengths=tuple(lengths),
        restarts=restarts,
        lrs=(lr,),
        steps=steps,
        batch=16,
        seed=seed,
        validation=spelling.examples(fresh, 0),
        init="grow",
        progress=f"prompts of {lm.name}",
    )
    best = [min((t for t in trials if t.length == n), key=lambda trial: trial.validation) for n in lengths]
    scale = 1 / (math.log(2) * SPAN)
    prompts = [SoftPrompt.empty(lm), *(trial.prompt for trial in best)]
    prompted = evaluate(lm, prompts, spelling.examples(test, 0)).nats * scale
    read = torch.cat([evaluate(lm, prompts[0], spelling.examples(test, m)).nats for m in contexts]) * scale
    return CharacterCurves(spelling.k, (0, *lengths), _array(prompted), tuple(contexts), _array(read))


def _array(nats: torch.Tensor) -> Float[np.ndarray, "n rows"]:
    return nats.double().numpy()
