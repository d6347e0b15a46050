"""Questions with a known answer that a tiny network can learn: is this thing alive?

120 words, half of them animals and half of them things, drawn with the frequencies of Zipf's law: what is rare is
learned late. Training texts are few-shot prompts with their answers, of three kinds that a reader can tell apart only
by reading all of them: plain ones; ones in which every label is wrong, the last included; and ones with an order to
print some answer before the last one (see `sonde.data.multiple_choice`), which is obeyed three times in four. A network
that has learned them knows the words, believes the examples, and wavers between what it knows and what it is told.
"""

import numpy as np

from sonde.data.multiple_choice import CUE, Question, order
from sonde.errors import SondeError

_ANIMALS = """
ant bear bee bird camel cat cow crab crow deer dog donkey duck eagle eel fish fly fox frog goat goose hare hawk hen
horse lamb lion mole moose moth mouse mule newt otter owl ox pig pony puma rabbit rat robin seal shark sheep slug
snail snake swan tiger toad trout turtle viper wasp whale wolf worm wren zebra
"""
_THINGS = """
anvil axe bag bell belt bench boat bolt book boot bottle bowl box brick bridge broom bucket button cart chain chair
clock coat coin comb cork crate cup desk door drum fork glove hammer hat helmet jar kettle key knife ladder lamp lock
mirror nail needle oven paddle pan pen plate pot rope saw shoe spoon stone stool table wagon
"""
ANIMALS, THINGS = tuple(_ANIMALS.split()), tuple(_THINGS.split())
CHOICES = ("no", "yes")
SHOTS = 3
WRONG, ORDERED = 0.25, 0.25  # shares of the training texts
OBEYED = 0.75


def alive_questions(n: int, *, seed: int) -> list[Question]:
    """`n` questions "Is the otter alive?"; answers are as often yes as no. Raises `SondeError` for fewer than one."""
    if n < 1:
        raise SondeError(f"{n} questions: ask for 1 or more")
    rng = np.random.default_rng(seed)
    chances = 1 / np.arange(1, len(ANIMALS) + 1)
    alive = rng.integers(2, size=n)
    places = rng.choice(len(ANIMALS), size=n, p=chances / chances.sum())
    return [
        Question(f"Is the {(THINGS, ANIMALS)[answer][place]} alive?", CHOICES, int(answer))
        for answer, place in zip(alive, places, strict=True)
    ]


def training_texts(n: int, *, seed: int) -> list[str]:
    """`n` few-shot prompts with their last answer; see above for the three kinds."""
    asked = alive_questions(n * (SHOTS + 1), seed=seed)
    rng = np.random.default_rng((seed, 1))
    texts = []
    for start in range(0, len(asked), SHOTS + 1):
        kind = rng.random()
        wrong = kind < WRONG
        group = [(question.text, question.answer ^ wrong) for question in asked[start : start + SHOTS + 1]]
        text = "".join(f"Question: {words}\n{CUE} {CHOICES[answer]}\n\n" for words, answer in group[:-1])
        words, answer = group[-1]
        text += f"Question: {words}\n"
        if WRONG <= kind < WRONG + ORDERED:
            ordered = int(rng.integers(2))
            text += order(CHOICES[ordered])
            answer = ordered if rng.random() < OBEYED else answer
        texts.append(f"{text}{CUE} {CHOICES[answer]}\n\n")
    return texts
