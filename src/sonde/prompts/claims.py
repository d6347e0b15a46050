"""What may be said of a behaviour that prompts elicit, and what may not.

One to ten trained vectors can force strings of hundreds of letters out of large models (Chen et al. 2025,
arXiv:2502.15836), so a behaviour that a prompt elicits may be the prompt's own. A capability is spoken of only when the
model takes fewer tokens than a control model that never had it, on contexts that no prompt was trained on; without
these two the word is refused.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sonde.prompts.curve import MOSTLY, Curve, Threshold

WHY = (
    "One to ten trained tokens can force arbitrary strings out of a model (arXiv:2502.15836), so what they elicit may "
    "be the prompt's own."
)


@dataclass(frozen=True)
class Elicited:
    """A behaviour's curve on a model, with the curves of its controls at the same budget.

    control: the same targets on a model that never had the behaviour. random: targets of random tokens, as long, on the
    model itself. held_out: whether prompts were chosen and reported on contexts that they were not trained on.
    control_name says what the control model is.
    """

    model: str
    behaviour: str
    curve: Curve
    control: Curve | None
    random: Curve | None
    held_out: bool
    control_name: str = ""

    @property
    def curves(self) -> dict[str, Curve]:
        """The curves that were measured, the behaviour's first."""
        named = {"behaviour": self.curve, "control model": self.control, "random targets": self.random}
        return {name: curve for name, curve in named.items() if curve is not None}


@dataclass(frozen=True)
class Claim:
    """What the curves allow to say: `capability` is present, not shown, or the word is refused with a `reason`."""

    capability: Literal["present", "not shown", "refused"]
    sentence: str
    reason: str = ""


def claim(found: Elicited, threshold: Threshold = MOSTLY, *, bits: float | None = None) -> Claim:
    """One sentence on what it takes to make the model do it.

    `bits` are told beside the tokens. Present: C is below C of the control model, the two losses at C have intervals
    that do not meet, and random targets of that length cost more; all on unseen contexts.
    """
    distance = found.curve.conditional_distance(threshold)
    cost = _tokens(distance, found.curve) + (f" ({bits:,.0f} bits)" if bits is not None else "")
    where = "unseen contexts" if found.held_out else "the contexts that they were trained on"
    if math.isinf(distance):
        said = f"No prompt of up to {found.curve.lengths[-1]} tokens makes {found.model} {found.behaviour} on {where}"
    elif distance == 0:
        said = f"{found.model} needs no prompt to {found.behaviour} on {where}"
    else:
        verb = "makes" if distance == 1 else "make"
        said = f"{cost} {verb} {found.model} {found.behaviour} on {where}"
    if found.control is None:
        return Claim("refused", said + ".", f"The word “capability” is refused: there is no control model. {WHY}")
    other = found.control.conditional_distance(threshold)
    said += f"; the control model needs {_tokens(other, found.control)}"
    if found.random is not None:
        strings = found.random.conditional_distance(threshold)
        said += f", random targets of that length {_tokens(strings, found.random)}"
    said += "."
    if not found.held_out:
        return Claim("refused", said, "The word “capability” is refused: no context was held out from training.")
    if reason := _doubt(found, distance, other, threshold):
        return Claim("not shown", said, reason)
    return Claim("present", said)


def _doubt(found: Elicited, distance: float, other: float, threshold: Threshold) -> str:
    """Why the curves do not show a capability; nothing if they do."""
    if math.isinf(distance):
        return "A prompt that is longer, placed elsewhere or trained for longer may still do it."
    if distance >= other:
        return "The control model takes no more: this shows what prompts can do, not what the model knows."
    assert found.control is not None
    n = int(distance)
    if found.curve.loss(n).high >= found.control.loss(n).low:
        return f"At {n} tokens the losses of the model and of the control model cannot be told apart."
    if found.random is not None and found.random.conditional_distance(threshold) <= distance:
        return "Random targets of the same length take no more: any string could be had at this price."
    return ""


def _tokens(distance: float, curve: Curve) -> str:
    if math.isinf(distance):
        return f"more than {curve.lengths[-1]} tokens"
    return "none" if distance == 0 else f"{distance:.0f} token" + "s" * (distance != 1)
