"""Readers that are no language models, behind the same interface: what tests, estimates and unpaid runs ask.

The *literal* reader takes every explanation for a set of quoted tokens: it explains with the tokens that are marked,
finds a passage fitting where it holds one of them, marks right where only they are marked, and predicts 10 at them.
With probability `error` each single answer is turned round, drawn from a seed and the question, so that the order of
questions changes nothing. The *coin* answers every question in its form and at random: it is chance, and asking it
costs an estimate of what a model would. Both give log-probabilities.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

from sonde.features import questions
from sonde.features.marking import LINE_BREAK, one_line, spans
from sonde.lm.asking.completion import (
    CHARACTERS_PER_TOKEN,
    Completion,
    Message,
    Offers,
    Params,
    Token,
    Usage,
    rough_count,
)  # fmt: skip

Tokenize = Callable[[str], Sequence[str]]
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_EXPLANATION_WORDS = 25
_REASONING_WORDS = 90
_SURE = 0.9
_RISEN = 5


def sentence(tokens: Sequence[str]) -> str:
    """The explanation of a set of tokens, in the form that the literal reader reads."""
    return "fires on " + ", ".join(f'"{_escaped(token)}"' for token in tokens)


def quoted(explanation: str) -> list[str]:
    """The tokens that an explanation names in double quotes."""
    found = [re.sub(r"\\(.)", r"\1", token) for token in _QUOTED.findall(explanation)]
    return [token.replace(LINE_BREAK, "\n") for token in found if token]


class LiteralReader:
    """Answers by the tokens that an explanation quotes.

    error: share of single answers that are turned round. tokenize: text to tokens, so that "the" is not found in
    "then"; without it, a passage holds a token where it holds its letters. seed: of what is turned round.
    """

    def __init__(self, *, error: float = 0.0, seed: int = 0, tokenize: Tokenize | None = None) -> None:
        if not 0 <= error <= 1:
            raise ValueError(f"error is a share of the answers, not {error}")
        self._error, self._seed, self._tokenize = error, seed, tokenize
        self.name = f"literal-reader-{error:g}-{seed}"

    @property
    def offers(self) -> Offers:
        """Log-probabilities of answers."""
        return Offers(logprobs=True)

    def count(self, messages: Sequence[Message]) -> int:
        """A rough count."""
        return rough_count(messages)

    async def close(self) -> None:
        """There is nothing to let go of."""

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """Answer one question."""
        system, asked = messages[0]["content"], _question(messages)
        rng = random.Random(f"{self._seed}\n{system}\n{asked}")
        return _completion(self._answer(system, asked, rng), messages, params, [_SURE])

    def _answer(self, system: str, asked: str, rng: random.Random) -> str:
        if system.startswith((questions.EXPLAIN, questions.EXPLAIN_TOKENS)):
            return f"{questions.EXPLANATION} {sentence(_named(asked))}"
        if system == questions.EXPLAIN_EFFECT:
            risen = Counter(re.findall(r'\("((?:[^"\\]|\\.)*)", ', asked))
            return f"{questions.EXPLANATION} {sentence([token for token, _ in risen.most_common(_RISEN)])}"
        if system == questions.INTRUDE:
            passages = questions.read_numbered(asked)
            right = _odd(passages)
            wrong = rng.randrange(len(passages) - 1)
            return str((right if not self._turned(rng) else wrong + (wrong >= right)) + 1)
        explanation, body = read_description(asked)
        tokens = quoted(explanation)
        if system == questions.GENERATE:
            count = int(re.findall(r"\d+", body)[-1])
            return questions.numbered([f"see{tokens[i % len(tokens)]} here" if tokens else "" for i in range(count)])
        lines = questions.read_numbered(body)
        if system == questions.SIMULATE:
            # Both are decoded from JSON or quotes, so they compare as they are.
            here = [json.loads(line) in tokens for line in lines]
            return json.dumps([10 * (fits != self._turned(rng)) for fits in here])
        judge = self._fits if system == questions.DETECT else _marked_right
        return json.dumps([int(judge(line, tokens) != self._turned(rng)) for line in lines])

    def _turned(self, rng: random.Random) -> bool:
        return rng.random() < self._error

    def _fits(self, passage: str, tokens: Sequence[str]) -> bool:
        text = passage.replace(LINE_BREAK, "\n")
        held = text if self._tokenize is None else set(self._tokenize(text))
        return any(token in held for token in tokens)


class CoinReader:
    """Answers at random, in the form that was asked for. `name` and its count of tokens stand for another model's."""

    def __init__(self, seed: int = 0, *, name: str | None = None, context: int | None = None) -> None:
        self._seed, self._context = seed, context
        self.name = f"coin-{seed}" if name is None else name

    @property
    def offers(self) -> Offers:
        """Log-probabilities of answers."""
        return Offers(logprobs=True, schema=True, context=self._context)

    def count(self, messages: Sequence[Message]) -> int:
        """A rough count."""
        return rough_count(messages)

    async def close(self) -> None:
        """There is nothing to let go of."""

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """Answer one question."""
        system, asked = messages[0]["content"], _question(messages)
        rng = random.Random(f"{self._seed}\n{system}\n{asked}")
        if system.startswith((questions.EXPLAIN, questions.EXPLAIN_TOKENS)):
            words = _EXPLANATION_WORDS + _REASONING_WORDS * system.endswith(questions.CHAIN)
            # No two alike, or questions about different latents would be one question, asked once.
            text = f"{questions.EXPLANATION} {' '.join(['word'] * words)} {rng.randrange(10**6)}"
            return _completion(text, messages, params, [])
        if system == questions.EXPLAIN_EFFECT:
            return _completion(f"{questions.EXPLANATION} word word", messages, params, [])
        if system == questions.INTRUDE:
            return _completion(str(1 + rng.randrange(len(questions.read_numbered(asked)))), messages, params, [])
        _, body = read_description(asked)
        if system == questions.GENERATE:
            count = int(re.findall(r"\d+", body)[-1])
            return _completion(questions.numbered(["word " * 15] * count), messages, params, [])
        lines = questions.read_numbered(body)
        if system == questions.SIMULATE:
            return _completion(json.dumps([rng.randrange(11) for _ in lines]), messages, params, [])
        likely = [rng.random() for _ in lines]
        return _completion(json.dumps([int(p > 0.5) for p in likely]), messages, params, likely)


def read_description(asked: str) -> tuple[str, str]:
    """The explanation of a question and what comes after it."""
    head, _, body = asked.rpartition(questions.DESCRIPTION)[2].partition("\n\n")
    return head.strip(), body


def _question(messages: Sequence[Message]) -> str:
    """The question itself, also where it is put once more."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return next(text for text in reversed(texts) if not text.startswith(questions.AGAIN))


def _completion(text: str, messages: Sequence[Message], params: Params, likely: Sequence[float]) -> Completion:
    """The answer as tokens of one sign each, where asked for; `likely` are P(1) of its digits, or how sure all are."""
    usage = Usage(rough_count(messages), 0, math.ceil(len(text) / CHARACTERS_PER_TOKEN))
    if not params.top_logprobs:
        return Completion(text, usage)
    tokens, digits = [], 0
    for sign in text:
        top: tuple[tuple[str, float], ...] = ((sign, 0.0),)
        if sign in "01" and likely:
            p = likely[digits] if len(likely) > 1 else likely[0] if sign == "1" else 1 - likely[0]
            digits += 1
            p = min(max(p, 1e-6), 1 - 1e-6)
            top = (("1", math.log(p)), ("0", math.log1p(-p)))
        tokens.append(Token(sign, dict(top).get(sign, 0.0), top))
    return Completion(text, usage, tuple(tokens))


def _named(asked: str) -> list[str]:
    """The tokens that are marked in a question, without those that are others written together."""
    found: dict[str, None] = {}
    for passage in questions.read_numbered(asked):
        found |= dict.fromkeys(span.replace(LINE_BREAK, "\n") for span in spans(passage))
    if not found:  # tokens and strengths alone
        found |= dict.fromkeys(token for token in re.findall(r"\('((?:[^'\\]|\\.)*)', \d+\)", asked))
    names = sorted(found, key=len)
    return [name for i, name in enumerate(names) if name.strip() and not composed(name, names[:i])]


def composed(text: str, parts: Sequence[str]) -> bool:
    """Whether a text is some of the parts, one after another."""
    reach = [True] + [False] * len(text)
    for end in range(1, len(text) + 1):
        reach[end] = any(
            end >= len(part) and reach[end - len(part)] and text[end - len(part) : end] == part
            for part in parts
            if part
        )
    return reach[-1]


def _marked_right(passage: str, tokens: Sequence[str]) -> bool:
    found = [span.replace(LINE_BREAK, "\n") for span in spans(passage)]
    return bool(found) and all(composed(span, tokens) for span in found)


def _odd(passages: Sequence[str]) -> int:
    """The passage whose marks occur least in the others."""
    marks = [set(spans(passage)) for passage in passages]
    shared = [sum(bool(own & other) for j, other in enumerate(marks) if j != i) for i, own in enumerate(marks)]
    return shared.index(min(shared))


def _escaped(token: str) -> str:
    return one_line(token).replace("\\", "\\\\").replace('"', '\\"')
