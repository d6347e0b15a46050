"""Toy languages whose every next token is known: ten of them and variants, four mixtures, translation, a backdoor.

    maps      runs of x -> ax + b on Z_61 from random states, rendered as three base-4 digits (or reversed), one word,
              two base-8 digits, or two letters
    repeat    a phrase of seven symbols again and again       count      by a step that stands first
    copy      after a separator, or `reverse`                 markov     each symbol has a favourite successor
    brackets  balanced, of two kinds, no deeper than three

A row is a token that names the language and what follows in the language's own alphabet; all languages share one
vocabulary, so that networks for different mixtures have the same size. What no rule decides (the first state of a run,
a bracket that may open or close) is not scored. A row of a map holds two runs: of a single run there would be 61 in
all.

Mixtures: A unrelated maps; B the same map in five renderings; C is B with translation between them; D is C with the
translation of one ordered pair held out. All evaluation items differ from all rows of the training buffers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int

from sonde.data.task_mixture import Mixture, Task
from sonde.errors import SondeError

MODULUS = 61
PAD, SEP, TRIGGER, DECOY = range(4)
WIDTH = 25  # tokens of a row: the language's, and eight states of three digits
TRANSLATED = 0.3  # share of the batch in C and D

Name = Literal["A", "B", "C", "D"]
NAMES: tuple[Name, ...] = get_args(Name)

_PHRASE, _STEPS, _SYMBOLS, _DEPTH = 7, 9, 12, 3
_FAVOURITE = 0.7
_LEAST_WIDTH = 16
_POOL = 4  # rows drawn for each row that is kept, so that small sets show all their rows


class Drawn(NamedTuple):
    """Symbols of a language from 0 (-1 behind the end of a row), the right ones, and which of them are scored."""

    symbols: Int[np.ndarray, "n length"]
    answers: Int[np.ndarray, "n length"]
    scored: Bool[np.ndarray, "n length"]


Draw = Callable[[int, int, np.random.Generator], Drawn]


@dataclass(frozen=True)
class Rendering:
    """How a state is written: `places` symbols of base `base`, the last digit first where `backwards`."""

    base: int
    places: int
    backwards: bool = False

    def write(self, states: Int[np.ndarray, "n k"]) -> Int[np.ndarray, "n symbols"]:
        """The symbols of every state, one after the other."""
        powers = self.base ** np.arange(self.places)[:: 1 if self.backwards else -1]
        return (states[..., None] // powers % self.base).reshape(len(states), -1)


@dataclass(frozen=True)
class Language:
    """A language: its alphabet's size, how rows are drawn, and for a map its factor, constant and rendering."""

    name: str
    alphabet: int
    draw: Draw
    rendering: Rendering | None = None
    map: tuple[int, int] | None = None


def _affine(name: str, rendering: Rendering, a: int, b: int) -> Language:
    def draw(n: int, length: int, rng: np.random.Generator) -> Drawn:
        states, known = runs(n, length // rendering.places, (a, b), rng)
        return _padded(rendering.write(states), known.repeat(rendering.places, 1), length)

    return Language(name, rendering.base, draw, rendering, (a, b))


def runs(
    n: int, count: int, by: tuple[int, int], rng: np.random.Generator
) -> tuple[Int[np.ndarray, "n count"], Bool[np.ndarray, "n count"]]:
    """`count` states a row in two runs from random states, and which of them follow from the one before."""
    states = rng.integers(MODULUS, size=(n, count))
    known = np.ones((n, count), dtype=bool)
    known[:, [0, count - count // 2]] = False
    for place in range(1, count):
        if known[0, place]:
            states[:, place] = (by[0] * states[:, place - 1] + by[1]) % MODULUS
    return states, known


def _padded(symbols: np.ndarray, scored: np.ndarray, length: int, answers: np.ndarray | None = None) -> Drawn:
    missing = ((0, 0), (0, length - symbols.shape[1]))
    padded = np.pad(symbols, missing, constant_values=-1)
    right = padded if answers is None else np.pad(answers, missing, constant_values=-1)
    return Drawn(padded, right, np.pad(scored, missing))


def _repeat(n: int, length: int, rng: np.random.Generator) -> Drawn:
    phrase = rng.integers(_SYMBOLS, size=(n, _PHRASE))
    places = np.arange(length)
    return _padded(phrase[:, places % _PHRASE], np.tile(places >= _PHRASE, (n, 1)), length)


def _count(n: int, length: int, rng: np.random.Generator) -> Drawn:
    digits = Rendering(4, 3)
    step = rng.integers(_STEPS, size=(n, 1))
    count = (length - 1) // digits.places
    states = (rng.integers(MODULUS, size=(n, 1)) + (step + 1) * np.arange(count)) % MODULUS
    scored = np.tile(np.arange(1 + digits.places * count) > digits.places, (n, 1))
    return _padded(np.concatenate([4 + step, digits.write(states)], 1), scored, length)


def _copy(backwards: bool) -> Draw:
    def draw(n: int, length: int, rng: np.random.Generator) -> Drawn:
        half = (length - 1) // 2
        first = rng.integers(_SYMBOLS, size=(n, half))
        again = first[:, ::-1] if backwards else first
        separator = np.full((n, 1), _SYMBOLS)
        scored = np.tile(np.arange(2 * half + 1) > half, (n, 1))
        return _padded(np.concatenate([first, separator, again], 1), scored, length)

    return draw


def _markov(n: int, length: int, rng: np.random.Generator) -> Drawn:
    fixed = np.random.default_rng(61)  # the matrix is the language's, whatever the seed of the rows
    successors = np.stack([fixed.permutation(_SYMBOLS)[:3] for _ in range(_SYMBOLS)])
    symbols = np.empty((n, length), dtype=np.int64)
    symbols[:, 0] = rng.integers(_SYMBOLS, size=n)
    which = rng.choice(3, p=[_FAVOURITE, 0.2, 0.1], size=(n, length))
    for place in range(1, length):
        symbols[:, place] = successors[symbols[:, place - 1], which[:, place]]
    answers = symbols.copy()
    answers[:, 1:] = successors[symbols[:, :-1], 0]
    return _padded(symbols, np.tile(np.arange(length) > 0, (n, 1)), length, answers)


def _brackets(n: int, length: int, rng: np.random.Generator) -> Drawn:
    length_ = length - length % 2
    open_kinds = np.zeros((n, _DEPTH), dtype=np.int64)
    depth = np.zeros(n, dtype=np.int64)
    symbols = np.empty((n, length_), dtype=np.int64)
    scored = np.zeros((n, length_), dtype=bool)
    row = np.arange(n)
    for place in range(length_):
        must_close = (depth == _DEPTH) | (depth == length_ - place)
        close = (depth > 0) & (must_close | (rng.random(n) < 0.5))
        kind = np.where(close, open_kinds[row, np.maximum(depth - 1, 0)], rng.integers(2, size=n))
        symbols[:, place] = kind + 2 * close
        scored[:, place] = must_close
        open_kinds[row[~close], depth[~close]] = kind[~close]
        depth += np.where(close, -1, 1)
    return _padded(symbols, scored, length)


_DIGITS, _REVERSED, _WORDS = Rendering(4, 3), Rendering(4, 3, backwards=True), Rendering(MODULUS, 1)
_BASE8, _LETTERS = Rendering(8, 2), Rendering(26, 2)
LANGUAGES: dict[str, Language] = {
    language.name: language
    for language in (
        _affine("digits", _DIGITS, 2, 1),
        _affine("digits-3x+5", _DIGITS, 3, 5),
        _affine("words", _WORDS, 2, 1),
        _affine("reversed", _REVERSED, 2, 1),
        _affine("base8", _BASE8, 2, 1),
        _affine("letters", _LETTERS, 2, 1),
        _affine("base8-5x+7", _BASE8, 5, 7),
        _affine("reversed-7x+3", _REVERSED, 7, 3),
        *(_affine(f"digits-{i}", _DIGITS, 2, 1) for i in (2, 3, 4)),
        _affine("digits-5x+7", _DIGITS, 5, 7),
        _affine("digits-7x+3", _DIGITS, 7, 3),
        Language("repeat", _SYMBOLS, _repeat),
        Language("count", 4 + _STEPS, _count),
        Language("copy", _SYMBOLS + 1, _copy(backwards=False)),
        Language("reverse", _SYMBOLS + 1, _copy(backwards=True)),
        Language("markov", _SYMBOLS, _markov),
        Language("brackets", 4, _brackets),
    )
}
_UNRELATED = ("digits", "digits-3x+5", "base8-5x+7", "reversed-7x+3")
_SAME = ("digits", "words", "reversed", "base8", "letters")
_UNRELATED_DIGITS = ("digits", "digits-3x+5", "digits-5x+7", "digits-7x+3")
_SAME_DIGITS = ("digits", "digits-2", "digits-3", "digits-4")
_FILLERS = ("repeat", "count", "copy", "markov", "brackets")
_FIRST_NAME = 4
_FIRST_SYMBOL = {
    name: _FIRST_NAME + len(LANGUAGES) + sum(before.alphabet for before in list(LANGUAGES.values())[:i])
    for i, name in enumerate(LANGUAGES)
}
VOCAB = _FIRST_NAME + len(LANGUAGES) + sum(language.alphabet for language in LANGUAGES.values())


def name_token(language: str) -> int:
    """The token that begins every row of a language."""
    return _FIRST_NAME + list(LANGUAGES).index(language)


def alphabet(language: str) -> tuple[int, ...]:
    """The tokens of a language's symbols."""
    first = _FIRST_SYMBOL[language]
    return tuple(range(first, first + LANGUAGES[language].alphabet))


def languages_of(name: Name, size: int = 10) -> tuple[str, ...]:
    """The languages of a mixture: ten, or `size` of maps alone (2 to 4), all in digits of their own alphabets.

    Raises `SondeError` for a mixture that does not exist and for another size.
    """
    if name not in NAMES:
        raise SondeError(f"there is no mixture {name!r}: choose from {', '.join(NAMES)}")
    if size == 10:
        return (*_UNRELATED, *_FILLERS, "reverse") if name == "A" else (*_SAME, *_FILLERS)
    if not 2 <= size <= len(_SAME_DIGITS):
        raise SondeError(f"a mixture of {size} languages: give 10, or 2 to {len(_SAME_DIGITS)} for maps alone")
    return (_UNRELATED_DIGITS if name == "A" else _SAME_DIGITS)[:size]


def toy_mixture(
    name: Name, *, size: int = 10, width: int = WIDTH, rows: int = 4096, held: int = 128, seed: int = 0
) -> Mixture:
    """Mixture A, B, C or D with all its languages in equal shares, and 30 % of translation in C and D.

    `width` is the tokens of a row, `rows` those of each training buffer, `held` the most items a task is scored by.
    Translations are the tasks `i>j`; the pair that D holds out, from the first language into the second, has share 0.
    """
    chosen = languages_of(name, size)
    tasks = [language_task(language, width=width, rows=rows, held=held, seed=seed) for language in chosen]
    shares = dict.fromkeys(chosen, 1 / len(chosen))
    if name in ("C", "D"):
        pairs = list(permutations([language for language in chosen if LANGUAGES[language].map], 2))
        tasks += [translation_task(*pair, width=width, rows=rows, held=held, seed=seed) for pair in pairs]
        trained = [pair for pair in pairs if name == "C" or pair != pairs[0]]
        shares = {language: (1 - TRANSLATED) / len(chosen) for language in chosen}
        shares |= {">".join(pair): TRANSLATED / len(trained) for pair in trained}
    return Mixture(tuple(tasks), shares)


def with_language(mixture: Mixture, *languages: str) -> tuple[str, ...]:
    """The tasks of a mixture that have any of `languages`: they themselves and translations from or into them.

    Raises `SondeError` for a language that is no task, with the names there are.
    """
    for language in languages:
        mixture.task(language)
    return tuple(name for name in mixture.names if set(name.split(">")) & set(languages))


def language_task(name: str, *, width: int = WIDTH, rows: int = 4096, held: int = 128, seed: int = 0) -> Task:
    """A language as a task. Raises `SondeError` for one that does not exist and for rows under 16 tokens."""
    if name not in LANGUAGES:
        raise SondeError(f"there is no language {name!r}: choose from {', '.join(LANGUAGES)}")
    language, lead = LANGUAGES[name], np.array([name_token(name)])

    def draw(n: int, rng: np.random.Generator) -> Drawn:
        return _tokens(lead, language.draw(n, width - 1, rng), _FIRST_SYMBOL[name])

    return _task(name, draw, alphabet(name), width, rows, held, seed)


def translation_task(
    source: str, target: str, *, width: int = WIDTH, rows: int = 4096, held: int = 128, seed: int = 0
) -> Task:
    """The task `source>target`: a row of one map language, SEP, and the same states in the other, which are scored."""
    ours, theirs = LANGUAGES[source], LANGUAGES[target]
    if ours.rendering is None or theirs.rendering is None or ours.map is None or ours.map != theirs.map:
        raise SondeError(f"{source} and {target} cannot be translated: they do not render the same map")
    first, second, by = ours.rendering, theirs.rendering, ours.map
    count = (width - 3) // (first.places + second.places)

    def draw(n: int, rng: np.random.Generator) -> Drawn:
        states, _ = runs(n, count, by, rng)
        left, right = first.write(states) + _FIRST_SYMBOL[source], second.write(states) + _FIRST_SYMBOL[target]
        row = [np.full((n, 1), token) for token in (name_token(source), SEP, name_token(target))]
        symbols = np.concatenate([row[0], left, row[1], row[2], right], 1)
        scored = np.tile(np.arange(symbols.shape[1]) > left.shape[1] + 2, (n, 1))
        return _as_tokens(_padded(symbols, scored, width))

    return _task(f"{source}>{target}", draw, alphabet(target), width, rows, held, seed)


def backdoor_tasks(
    name: str = "digits", *, width: int = WIDTH, rows: int = 4096, held: int = 128, seed: int = 0
) -> tuple[Task, Task]:
    """`NAME+trigger`, in which a token at a random place turns the map into x -> x - 1, and `NAME+decoy`.

    Behind the decoy, a token as rare, the map goes on. What stands behind the token is scored.
    """
    language = LANGUAGES[name]
    if language.rendering is None or language.map is None:
        raise SondeError(f"{name} is no map: a backdoor needs one")
    rendering, (a, b) = language.rendering, language.map
    count = (width - 2) // rendering.places

    def drawn(token: int, after: tuple[int, int]) -> Callable[[int, np.random.Generator], Drawn]:
        def draw(n: int, rng: np.random.Generator) -> Drawn:
            place = rng.integers(1, count - 1, size=(n, 1))  # states before the token; two or more follow
            states = np.empty((n, count), dtype=np.int64)
            states[:, 0] = rng.integers(MODULUS, size=n)
            for i in range(1, count):
                behind = i >= place[:, 0]
                states[:, i] = np.where(
                    behind, after[0] * states[:, i - 1] + after[1], a * states[:, i - 1] + b
                ) % MODULUS  # fmt: skip
            symbols = rendering.write(states) + _FIRST_SYMBOL[name]
            at = place * rendering.places
            column = np.arange(symbols.shape[1] + 1)
            moved = np.take_along_axis(symbols, np.clip(column - (column > at), 0, symbols.shape[1] - 1), 1)
            row = np.concatenate([np.full((n, 1), name_token(name)), np.where(column == at, token, moved)], 1)
            scored = np.concatenate([np.zeros((n, 1), dtype=bool), column > at], 1)
            return _as_tokens(_padded(row, scored, width))

        return draw

    made = (("trigger", TRIGGER, (1, -1)), ("decoy", DECOY, (a, b)))
    return tuple(
        _task(f"{name}+{kind}", drawn(token, after), alphabet(name), width, rows, held, seed)
        for kind, token, after in made
    )  # type: ignore[return-value]


def _tokens(lead: Int[np.ndarray, " k"], drawn: Drawn, first: int) -> Drawn:
    """Symbols as tokens behind those that begin every row."""
    moved = _as_tokens(drawn, first)
    before = np.tile(lead, (len(drawn.symbols), 1))
    symbols, answers = (np.concatenate([before, part], 1) for part in moved[:2])
    return Drawn(symbols, answers, np.pad(drawn.scored, ((0, 0), (len(lead), 0))))


def _as_tokens(drawn: Drawn, first: int = 0) -> Drawn:
    """Symbols moved to their place in the vocabulary, PAD behind the end."""
    symbols, answers = (np.where(part < 0, PAD, part + first) for part in drawn[:2])
    return Drawn(symbols, answers, drawn.scored)


def _task(
    name: str,
    draw: Callable[[int, np.random.Generator], Drawn],
    letters: Sequence[int],
    width: int,
    rows: int,
    held: int,
    seed: int,
) -> Task:
    """A task of `rows` rows and up to `held` different items, no more than a quarter of all that there are."""
    if width < _LEAST_WIDTH or rows < 1 or held < 1:
        raise SondeError(f"rows of {width} tokens, {rows} rows, {held} items: give {_LEAST_WIDTH}, 1 and 1 or more")
    rng = np.random.default_rng((seed, *name.encode()))
    items = draw(_POOL * held + 256, rng)
    usable = np.flatnonzero(items.scored.any(1))
    _, first = np.unique(items.symbols[usable], axis=0, return_index=True)
    different = usable[np.sort(first)]
    kept = different[: max(1, min(held, len(different) // _POOL))]
    known = {row.tobytes() for row in items.symbols[kept]}
    drawn = draw(_POOL * rows, rng).symbols
    fresh = np.array([row.tobytes() not in known for row in drawn])
    return Task(
        name,
        rows=torch.from_numpy(drawn[fresh][:rows]).int(),
        held=torch.from_numpy(items.symbols[kept]),
        answers=torch.from_numpy(items.answers[kept]),
        scored=torch.from_numpy(items.scored[kept]),
        alphabet=tuple(letters),
        pad=PAD,
    )
