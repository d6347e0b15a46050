"""Which prompts does a steering vector come from? Five sources, each a pair of prompt sets and the token that is read.

    prompts   instructions of two kinds in the chat format, read at the last token of the prompt
    caa       the same instruction with the reply that shows the behaviour and the one that does not, at its last token
    letters   a question with options, ended by the letter of the one or the other answer, at the letter
    phrase    the same instruction with one of two fixed openings of a reply, at its last token
    open      the same instruction with free replies, their last character trimmed, at the last token left

Two sets that differ in their template as well as in the behaviour give the direction of the template: the tail of the
prompts is compared and what differs is shown.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from sonde.concepts.contrast import PLAIN, template_hash
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

_TAIL = 3


@dataclass(frozen=True)
class PromptSets:
    """Prompts that show a behaviour and prompts that do not, as token ids, read at token `position` from the end.

    `template` says how they were rendered: "plain", or the hash of the model's chat template.
    """

    positive: list[list[int]]
    negative: list[list[int]]
    template: str = PLAIN
    position: int = -1

    def __post_init__(self) -> None:
        for side, prompts in (("positive", self.positive), ("negative", self.negative)):
            if not prompts:
                raise SondeError(f"there are no {side} prompts: a contrast needs prompts of both kinds")


def from_prompts(
    lm: LanguageModel, positive: Sequence[str], negative: Sequence[str], *, chat: bool = True
) -> PromptSets:
    """Instructions of two kinds. With `chat` they are put into the model's chat format, where it has one.

    Warns where a model with a chat template is given prompts without it, and where the sets end in different tokens.
    """
    template = template_hash(lm)
    if template != PLAIN and not chat:
        warnings.warn(f"{lm.name} has a chat template, and these prompts are given without it", stacklevel=2)
    sets = PromptSets(
        [_rendered(lm, text, None, chat) for text in positive],
        [_rendered(lm, text, None, chat) for text in negative],
        template if chat else PLAIN,
    )
    _warn_of_leak(lm, sets)
    return sets


def from_replies(
    lm: LanguageModel, prompts: Sequence[str], showing: Sequence[str], lacking: Sequence[str], *, chat: bool = True
) -> PromptSets:
    """The same prompts with a reply that shows the behaviour and with one that does not.

    Raises `SondeError` where the three are not of one length.
    """
    _paired(prompts, showing, lacking)
    template = template_hash(lm) if chat else PLAIN
    return PromptSets(
        [_rendered(lm, prompt, reply, chat) for prompt, reply in zip(prompts, showing, strict=True)],
        [_rendered(lm, prompt, reply, chat) for prompt, reply in zip(prompts, lacking, strict=True)],
        template,
    )


def from_phrases(
    lm: LanguageModel, prompts: Sequence[str], showing: str, lacking: str, *, chat: bool = True
) -> PromptSets:
    """The same prompts with one of two fixed openings of a reply, such as "I cannot" and "Sure"."""
    return from_replies(lm, prompts, [showing] * len(prompts), [lacking] * len(prompts), chat=chat)


def from_open_replies(
    lm: LanguageModel, prompts: Sequence[str], showing: Sequence[str], lacking: Sequence[str], *, chat: bool = True
) -> PromptSets:
    """Free replies without their last character, so that a full stop is not what is read.

    Raises `SondeError` for a reply of fewer than two characters.
    """
    for reply in (*showing, *lacking):
        if len(reply.strip()) < 2:
            raise SondeError(f"the reply {reply!r} is too short: nothing is left without its last character")
    cut = [[reply.strip()[:-1] for reply in replies] for replies in (showing, lacking)]
    return from_replies(lm, prompts, *cut, chat=chat)


def from_letters(
    lm: LanguageModel, questions: Sequence[str], showing: Sequence[str], lacking: Sequence[str], *, chat: bool = True
) -> PromptSets:
    """Questions with options, ended by the letter of an answer; `showing` and `lacking` are such as "(A" and "(B".

    Give each question in both orders of letters, or about as many A as B: the letter itself is a direction. Warns where
    one letter is the behaviour's in more than three quarters of the questions. Raises `SondeError` where the last token
    of a prompt is not the letter.
    """
    sets = from_replies(lm, questions, showing, lacking, chat=chat)
    for prompts, letters in ((sets.positive, showing), (sets.negative, lacking)):
        for ids, letter in zip(prompts, letters, strict=True):
            wanted = letter.strip(" ()")
            last = lm.token_strings(ids[-1:])[0]
            if not wanted or last.strip() != wanted:
                tail = " | ".join(lm.token_strings(ids[-_TAIL:]))
                raise SondeError(
                    f"a prompt with the answer {letter!r} ends in {tail}: its last token is not the letter"
                )
    common = max(showing.count(letter) for letter in set(showing)) / len(showing)
    if common > 0.75 and len(showing) > 1:
        warnings.warn(
            f"one letter shows the behaviour in {common:.0%} of the questions: give both orders, or the vector is "
            "that of the letter",
            stacklevel=2,
        )
    return sets


def _rendered(lm: LanguageModel, prompt: str, reply: str | None, chat: bool) -> list[int]:
    """Token ids of a prompt, or of a prompt and the beginning of a reply, which nothing closes."""
    text = prompt
    if chat and template_hash(lm) != PLAIN:
        messages = [{"role": "user", "content": prompt}]
        text = str(lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))  # type: ignore
        if not text.endswith((" ", "\n")) and reply is not None:
            reply = " " + reply
    elif reply is not None:
        reply = " " + reply
    return lm.encode(text if reply is None else text + reply)


def _paired(prompts: Sequence[str], showing: Sequence[str], lacking: Sequence[str]) -> None:
    if not len(prompts) == len(showing) == len(lacking):
        raise SondeError(
            f"{len(prompts)} prompts, {len(showing)} replies that show the behaviour and {len(lacking)} that do not: "
            "give one of each for every prompt"
        )


def _warn_of_leak(lm: LanguageModel, sets: PromptSets) -> None:
    """The token that is read should be the same on both sides: else the vector is that of the token."""
    tails = [{tuple(ids[-1:]) for ids in prompts} for prompts in (sets.positive, sets.negative)]
    if tails[0].isdisjoint(tails[1]) or (sets.template != PLAIN and tails[0] != tails[1]):
        shown = [" | ".join(lm.token_strings(prompts[0][-_TAIL:])) for prompts in (sets.positive, sets.negative)]
        warnings.warn(
            f"the two sets end differently: {shown[0]!r} and {shown[1]!r}; the vector will hold that difference",
            stacklevel=3,
        )
