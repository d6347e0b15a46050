"""What does a defence cost the one who pushes? C(defended) - C(undefended), in tokens and in each kind of bits.

A defence is anything that stands between a prompt and an output: a system prompt before every context, another model
(a fine-tune of the first), an edit of activations that is on during training and use of the prompt, or a filter of what
comes out. The attacker knows it: prompts are trained against the defended model. A filter changes what counts as a
success and leaves losses alone, so it is seen in distances of success and not in those of loss.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.taps import Edit
from sonde.prompts.bits import Bits, measure_bits
from sonde.prompts.curve import MOSTLY, Curve, Threshold
from sonde.prompts.elicitation import Budget, information_curve, parts_of
from sonde.prompts.examples import Examples
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class Defence:
    """One or several of the four kinds, under one name.

    system: text before every context. model: a fine-tune in the place of the model. edits: by site, as for
    `lm.editing`. allowed: whether an output (its text) may leave.

    Raises `SondeError` for one that defends by nothing.
    """

    name: str
    system: str = ""
    model: LanguageModel | None = None
    edits: Mapping[str, Edit] | None = None
    allowed: Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        if not self.system and self.model is None and not self.edits and self.allowed is None:
            raise SondeError(f"defence {self.name!r} has no system prompt, model, edit or filter: give one of them")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it defends by."""
        named = {"system prompt": self.system, "fine-tune": self.model, "edit": self.edits, "filter": self.allowed}
        return tuple(kind for kind, value in named.items() if value)

    def contexts(self, lm: LanguageModel, examples: Examples) -> Examples:
        """The examples with the system prompt before every context."""
        if not self.system:
            return examples
        before = lm.encode(self.system)
        slots = None if examples.slots is None else [slot + len(before) for slot in examples.slots]
        return replace(examples, contexts=[[*before, *context] for context in examples.contexts], slots=slots)


@dataclass(frozen=True)
class Measured:
    """A curve, and the bits of its shortest prompt that works (None where none does, or none is needed)."""

    curve: Curve
    bits: Bits | None


@dataclass(frozen=True)
class Strength:
    """How much more a push takes under a defence. Differences are infinite where no prompt in the grid breaks it.

    tokens: C(defended) - C(undefended), and its 95 % interval over contexts. bits: the same by each ruler that both
    have.
    """

    defence: str
    kinds: tuple[str, ...]
    undefended: Measured
    defended: Measured
    threshold: Threshold

    @property
    def tokens(self) -> float:
        """Prompt tokens; infinite where the defence held, nan where the behaviour was not had without it either."""
        return _difference(
            *(one.curve.conditional_distance(self.threshold) for one in (self.defended, self.undefended))
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the tokens, from the intervals of both distances."""
        above, below = (one.curve.distance_interval(self.threshold) for one in (self.defended, self.undefended))
        return _difference(above[0], below[1]), _difference(above[1], below[0])

    @property
    def bits(self) -> dict[str, float]:
        """By ruler; a prompt that is not needed has no bits."""
        with_it, without = (_bits(one, self.threshold) for one in (self.defended, self.undefended))
        return {ruler: _difference(with_it[ruler], without[ruler]) for ruler in with_it}


def defence_strength(
    lm: LanguageModel,
    examples: Examples,
    defences: list[Defence],
    budget: Budget | None = None,
    *,
    threshold: Threshold = MOSTLY,
    bits: bool = True,
    bit_steps: int = 60,
    folder: Path | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> list[Strength]:
    """The undefended model once, and each defence, at the same budget on the same contexts.

    Raises `SondeError` for a fine-tune of another vocabulary, and as `information_curve` does.
    """

    def measured(defence: Defence | None) -> Measured:
        model = lm if defence is None or defence.model is None else defence.model
        if model.vocab_size != lm.vocab_size:
            raise SondeError(
                f"{model.name} has {model.vocab_size} tokens, {lm.name} has {lm.vocab_size}: no defence of it"
            )
        edits = None if defence is None else defence.edits
        # split before the system prompt, so that attacks on all defences have the same contexts
        parts = parts_of(examples, seed=seed)
        if defence is not None:
            training, validation, test = (defence.contexts(lm, part) for part in parts)
            parts = training, validation, test
        allowed = None if defence is None else defence.allowed
        label = None if progress is None else f"{progress}, {'undefended' if defence is None else defence.name}"
        with model.editing(edits) if edits else nullcontext():
            # an edit has no hash: its curves are not kept
            curve = information_curve(
                model,
                parts,
                budget,
                allowed=None if allowed is None else lambda ids: allowed(model.decode(ids)),
                folder=None if edits else folder,
                seed=seed,
                progress=label,
            )
            n = curve.conditional_distance(threshold)
            found = None
            if bits and 0 < n < math.inf:
                found = measure_bits(
                    model, curve.prompt(int(n)), *parts[:2], threshold=threshold, steps=bit_steps, seed=seed
                )
        return Measured(curve, found)

    bare = measured(None)
    return [Strength(one.name, one.kinds, bare, measured(one), threshold) for one in defences]


@torch.no_grad()
def projection_against(lm: LanguageModel, prompt: SoftPrompt, examples: Examples, site: str) -> Edit:
    """An edit for `site` that takes out the direction in which a prompt moves the last position before the target."""
    passes, ends = Passes(lm, examples, cached=False), []
    for one in (prompt, SoftPrompt.empty(lm)):
        rows = passes.rows(range(len(examples)), [len(one)], [one.position])
        with lm.reading(site) as acts:
            passes.score(one.vectors.to(lm.device), rows)
        last = (rows.context + rows.n - 1).to(acts[site].device)
        ends.append(acts[site][torch.arange(len(rows), device=last.device), last].float().mean(0))
    return projection(ends[0] - ends[1])


def projection(direction: Float[Tensor, " d"]) -> Edit:
    """An edit that takes one direction out."""
    unit = direction / direction.norm()

    def edit(x: Tensor) -> Tensor:
        u = unit.to(x.device, x.dtype)
        return x - (x @ u)[..., None] * u

    return edit


def _bits(one: Measured, threshold: Threshold) -> dict[str, float]:
    names = ("nominal", "quantised", "noise-coded", "hard", "delivered")
    if one.bits is not None:
        return dict(one.bits.rows())
    return dict.fromkeys(names, 0.0 if one.curve.conditional_distance(threshold) == 0 else math.inf)


def _difference(above: float, below: float) -> float:
    return math.nan if math.isinf(below) else above - below
