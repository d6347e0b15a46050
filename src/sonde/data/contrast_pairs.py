r"""Questions with two answers, one of which shows a behaviour: what steering vectors are made from and scored on.

The format is that of contrastive activation addition (Rimsky et al. 2023, arXiv:2312.06681), a JSON list of

    {"question": "…\n\nChoices:\n(A) …\n(B) …",
     "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}

An item is rendered, by the tokenizer's chat template or plainly, up to the bracket that opens the answer: the token
after it is the letter. Letters must be single tokens there, and the behaviour must not always have the same letter:
otherwise a vector says "A", not the behaviour.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sonde.errors import SondeError
from sonde.stats.intervals import Interval, wilson

KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
BUILT_IN = "built-in kindness items"
_LABEL = re.compile(r"\(([A-Z0-9])\)")
_CHOICE = re.compile(r"(?m)^[ \t]*\(([A-Z0-9])\)[ \t]*")


@dataclass(frozen=True)
class ContrastItem:
    """A question that lists its choices, the label of the answer that shows the behaviour, and the other's."""

    question: str
    matching: str
    other: str

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise SondeError("the question is empty")
        if self.matching == self.other:
            raise SondeError(f"both answers have the letter {self.matching}")
        for label in (self.matching, self.other):
            if f"({label})" not in self.question:
                raise SondeError(f"the question does not list the choice ({label}): {_short(self.question)}")


@dataclass(frozen=True)
class Rendered:
    """An item as token ids: `prompt` ends with the open bracket; `match` and `other` are the ids of the two letters."""

    prompt: list[int]
    match: int
    other: int

    @property
    def positive(self) -> list[int]:
        """The prompt and the letter that shows the behaviour."""
        return [*self.prompt, self.match]

    @property
    def negative(self) -> list[int]:
        """The prompt and the other letter."""
        return [*self.prompt, self.other]


def read_contrast(source: str | Path | Sequence[Mapping[str, Any]]) -> list[ContrastItem]:
    """Items from a JSON file of the CAA format, or from records that are in memory.

    Raises `SondeError`, naming the item, for a file that is missing or not such a list, for a question or answer that
    is missing, and for answers that are no letter of the question's choices.
    """
    where, records = "the items", source
    if isinstance(source, str | Path):
        where = str(source)
        try:
            records = json.loads(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SondeError(f"{where} does not exist: give a JSON file of contrast items") from error
        except (OSError, ValueError) as error:
            raise SondeError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(records, Sequence) or isinstance(records, str) or not records:
        raise SondeError(f"{where} is not a list of items with the keys {', '.join(KEYS)}")
    items = []
    for number, record in enumerate(records):
        try:
            items.append(_item(record))
        except SondeError as error:
            raise SondeError(f"{where}, item {number}: {error}") from error
    return items


def letter_balance(items: Sequence[ContrastItem]) -> Interval:
    """Share of items whose behaviour has the earlier letter of the two, with Wilson's interval: it should be a half.

    Raises `SondeError` where it is none or all of them: the letter then tells as much as the behaviour.
    """
    if not items:
        raise SondeError("there are no items")
    first = sum(item.matching < item.other for item in items)
    if first in (0, len(items)):
        raise SondeError(
            f"all {len(items)} answers that show the behaviour have the {'earlier' if first else 'later'} letter: a "
            "vector would mean the letter, not the behaviour; swap the letters of half of the items"
        )
    return wilson(first, len(items))


def swap_letters(item: ContrastItem) -> ContrastItem:
    """The same item with the two answers' texts exchanged, so that the behaviour has the other letter.

    Raises `SondeError` where the choices do not stand on lines of their own.
    """
    head, choices = _choices(item)
    choices[item.matching], choices[item.other] = choices[item.other], choices[item.matching]
    return replace(item, question=_question(head, choices), matching=item.other, other=item.matching)


def relabel(item: ContrastItem, labels: Sequence[str] = ("1", "2")) -> ContrastItem:
    """The same item with other labels, such as 1 and 2 for A and B. Labels are given to the choices in order.

    Raises `SondeError` where there are fewer labels than choices.
    """
    head, choices = _choices(item)
    if len(labels) < len(choices):
        raise SondeError(f"{len(choices)} choices need as many labels, not {', '.join(labels)}")
    new = dict(zip(choices, labels, strict=False))
    question = _question(head, {new[label]: text for label, text in choices.items()})
    return ContrastItem(question, new[item.matching], new[item.other])


def balanced(items: Sequence[ContrastItem], *, seed: int = 0) -> list[ContrastItem]:
    """The items with the letters of as many swapped as are needed for each letter to match half of the time."""
    early = [i for i, item in enumerate(items) if item.matching < item.other]
    late = [i for i, item in enumerate(items) if item.matching > item.other]
    larger = max(early, late, key=len)
    swap = set(random.Random(seed).sample(larger, abs(len(early) - len(late)) // 2))
    return [swap_letters(item) if i in swap else item for i, item in enumerate(items)]


def render(item: ContrastItem, tokenizer: Any, *, chat: bool | None = None, system: str | None = None) -> Rendered:
    """The item as token ids up to the open bracket, and the ids of its two letters.

    Args:
        item: the item.
        tokenizer: a Hugging Face tokenizer.
        chat: through the tokenizer's chat template (by default where it has one), or as "Input: … Response: (".
        system: a system message; for chat only.

    Raises:
        SondeError: for chat without a template, and letters that are more than one token, with the split.

    """
    text = rendered_text(item, tokenizer, chat=chat, system=system)
    uses_chat = _uses_chat(tokenizer, chat)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=not uses_chat, verbose=False)["input_ids"])

    opened = _without_end(encode(text), tokenizer)
    ids = [_letter_id(letter, text, opened, encode, tokenizer) for letter in (item.matching, item.other)]
    return Rendered(opened, *ids)


def rendered_text(item: ContrastItem, tokenizer: Any, *, chat: bool | None = None, system: str | None = None) -> str:
    """The text of an item up to the open bracket of its answer; see `render`."""
    if not _uses_chat(tokenizer, chat):
        if system is not None:
            raise SondeError("a system message needs a chat template, and this rendering has none")
        return f"Input: {item.question.strip()}\nResponse: ("
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": item.question.strip()})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)) + "("


def built_in(n: int = 128, *, seed: int = 0) -> tuple[list[ContrastItem], list[ContrastItem]]:
    """Generated items of one behaviour, to answer kindly: `n` to make vectors from and 50 of other situations to score.

    Letters are balanced. For a first try on any model without a file.
    """
    rng = random.Random(seed)
    situations = rng.sample(_SITUATIONS, len(_SITUATIONS))
    half = len(situations) * 2 // 3
    made = []
    for count, those in ((n, situations[:half]), (50, situations[half:])):
        items = []
        for i in range(count):
            person, situation = rng.choice(_PEOPLE), rng.choice(those)
            texts = [rng.choice(_KIND), rng.choice(_UNKIND)]
            kind_first = i % 2 == 0
            first, second = texts if kind_first else texts[::-1]
            question = f"{person} {situation}. What do you say?\n\nChoices:\n(A) {first}\n(B) {second}"
            items.append(ContrastItem(question, *("AB" if kind_first else "BA")))
        rng.shuffle(items)
        made.append(items)
    return made[0], made[1]


def _item(record: Any) -> ContrastItem:
    if not isinstance(record, Mapping):
        raise SondeError(f"expected an object with the keys {', '.join(KEYS)}, not {type(record).__name__}")
    missing = [key for key in KEYS if not isinstance(record.get(key), str)]
    if missing:
        raise SondeError(f"it has no {missing[0]!r}; expected the keys {', '.join(KEYS)}")
    letters = []
    for key in KEYS[1:]:
        found = _LABEL.fullmatch(record[key].strip())
        if found is None:
            raise SondeError(f"{key} is {_short(record[key])!r}: expected a letter in brackets, such as '(A)'")
        letters.append(found[1])
    return ContrastItem(record["question"], *letters)


def _choices(item: ContrastItem) -> tuple[str, dict[str, str]]:
    """What stands before the choices, and their texts by label."""
    places = list(_CHOICE.finditer(item.question))
    labels = [place[1] for place in places]
    if len(set(labels)) != len(labels) or not {item.matching, item.other} <= set(labels):
        raise SondeError(f"the choices are not lines that begin with their labels: {_short(item.question)}")
    ends = [*(place.start() for place in places[1:]), len(item.question)]
    texts = [item.question[place.end() : end].strip() for place, end in zip(places, ends, strict=True)]
    return item.question[: places[0].start()], dict(zip(labels, texts, strict=True))


def _question(head: str, choices: Mapping[str, str]) -> str:
    return head + "\n".join(f"({label}) {text}" for label, text in choices.items())


def _letter_id(letter: str, text: str, opened: list[int], encode: Callable[[str], list[int]], tokenizer: Any) -> int:
    """The id of a letter behind the open bracket. A tokenizer that would join the two is given the letter alone."""
    whole = _without_end(encode(text + letter), tokenizer)
    if whole[:-1] == opened and tokenizer.decode(whole[-1:]).strip() == letter:
        return whole[-1]
    alone = list(tokenizer(letter, add_special_tokens=False, verbose=False)["input_ids"])
    if len(alone) == 1 and tokenizer.decode(alone) == letter:
        return alone[0]
    split = [tokenizer.decode([i]) for i in whole[-4:]]
    raise SondeError(
        f"the letter {letter} is not a single token of this tokenizer: the end of {_short(text[-20:] + letter)!r} is "
        f"split as {split}"
    )


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Without the end token that some tokenizers put behind a text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _uses_chat(tokenizer: Any, chat: bool | None) -> bool:
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has:
        raise SondeError("the tokenizer has no chat template: render plainly (chat=False)")
    return has if chat is None else chat


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "…"


_PEOPLE = (
    "Your sister",
    "A neighbour",
    "An old friend",
    "A child",
    "A stranger",
    "Your teacher",
    "The new boy",
    "Anne",
)
_SITUATIONS = (
    "has lost a glove in the snow",
    "forgot your birthday",
    "is late for supper",
    "has broken your cup",
    "cannot find the way home",
    "is afraid of the dark",
    "has burnt the bread",
    "asks you for help with a letter",
    "has failed an examination",
    "is sitting alone at the window",
    "has spilt milk on the table",
    "does not know the answer",
    "wants to borrow your book",
    "has fallen off a pony",
    "is crying in the garden",
)
_KIND = (
    "Do not worry, it will be all right.",
    "Come in, and let me help you.",
    "I am so glad that you told me.",
    "That might have happened to anyone.",
    "We shall do it together.",
    "Take my hand, my dear.",
)
_UNKIND = (
    "It is your own fault, and I do not care.",
    "Go away, and leave me alone.",
    "How stupid you are!",
    "I shall never forgive you.",
    "That is no business of mine.",
    "You deserve nothing better.",
)
