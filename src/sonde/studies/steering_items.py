"""Contrast items for the studies of steering: some to make vectors from, others to score, as tokens of one model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError

if TYPE_CHECKING:
    from sonde.concepts.sweep import Choice
    from sonde.data.contrast_pairs import ContrastItem
    from sonde.lm.model import LanguageModel
    from sonde.studies.steering_chapters import Task


def read_items(
    contrast: str | None, held_out: str | None, *, pairs: int, held: int, seed: int
) -> "tuple[list[ContrastItem], list[ContrastItem]]":
    """Items to make vectors from, letters balanced, and other items to score.

    Raises `SondeError` where there are too few of them.
    """
    import random

    from sonde.data.contrast_pairs import balanced, built_in, letter_balance, read_contrast

    if contrast is None:
        fit, own = built_in(pairs, seed=seed)
        tested = own if held_out is None else read_contrast(held_out)
    else:
        everything = read_contrast(contrast)
        letter_balance(everything)
        random.Random(seed).shuffle(everything)
        if held_out is None:
            if len(everything) < held + 8:
                raise SondeError(
                    f"{contrast} has {len(everything)} items: {held} to score leave fewer than 8; give fewer --items"
                )
            tested, fit = everything[:held], everything[held:]
        else:
            fit, tested = everything, read_contrast(held_out)
    fit = balanced(fit[:pairs], seed=seed)
    if len(fit) < 8 or len(tested) < 2:
        raise SondeError(
            f"{len(fit)} items to make vectors from and {len(tested)} to score are too few: 8 and 2 are needed"
        )
    return fit, tested[:held]


def items_of(
    lm: "LanguageModel", fit: "Sequence[ContrastItem]", held: "Sequence[ContrastItem]", *, chat: bool | None = None
) -> "tuple[Task, int]":
    """The items as a task for `lm`, and how many do not fit into its context.

    Raises `SondeError` for a model without a tokenizer, letters that are no tokens, and where too few items fit.
    """
    from sonde.data.contrast_pairs import render
    from sonde.studies.steering_chapters import Task

    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} has no tokenizer, so it reads no items: save one beside the weights")
    made, tested = ([render(item, lm.tokenizer, chat=chat) for item in items] for items in (fit, held))
    room = (lm.max_positions or 1 << 30) - 1
    kept = [one for one in made if len(one.prompt) <= room]
    scored = [one for one in tested if len(one.prompt) <= room]
    if len(kept) < 8 or len(scored) < 2:
        raise SondeError(f"{len(kept)} and {len(scored)} items fit into the {room + 1} positions of {lm.name}: too few")
    positive, negative = [one.positive for one in kept], [one.negative for one in kept]
    left_out = len(made) + len(tested) - len(kept) - len(scored)
    return Task(positive, negative, (positive, negative), _choices(scored)), left_out


def _choices(rendered: "Sequence[Any]") -> "list[Choice]":
    from sonde.concepts.sweep import Choice

    return [Choice(one.prompt, one.match, one.other) for one in rendered]
