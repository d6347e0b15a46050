"""Latents of a dictionary as a report shows them: a card for each, and an index of all of them.

Values without HTML, as in `sonde.runs.blocks`. A latent about which there is little to say (it never fired, or too
rarely) has a card that says so: none is left out.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class FeatureWindow:
    """A piece of text in which the latent fires: the text of each token and the activation there.

    `quantile` says where it stands among all such windows, 10 the strongest tenth.
    """

    tokens: Sequence[str]
    activations: Sequence[float]
    quantile: int | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations):
            raise ValueError(f"a window has {len(self.tokens)} tokens and {len(self.activations)} activations")

    @property
    def peak(self) -> int:
        """The token at which the latent fires most."""
        return max(range(len(self.activations)), key=lambda i: self.activations[i])


@dataclass(frozen=True, kw_only=True)
class FeatureScore:
    """A test of the explanation: its value with its interval and what chance would give; or None and the reason.

    `main` is the one measure by which the test is known; others stand behind it.
    """

    test: str
    measure: str
    estimate: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    chance: float | None = None
    reason: str = ""
    main: bool = True


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One latent.

    Attributes:
        number: in its dictionary.
        status: what became of it in a word or two, such as "scored", "too rare" or "never fired".
        reason: why there is no more to say, where there is none.
        fires: tokens at which it fires, out of `tokens`.
        largest: its strongest activation; None where it never fired.
        explanation: a sentence, or empty.
        scores: tests of that sentence.
        facts: what else counting tells, as (name, value).
        windows: the strongest first.
        strengths: numbers of activations in bins of equal width from 0 to `largest`.
        promoted, suppressed: tokens and how far it moves their logits.
        near: by the name of a kind of nearness, the nearest latents and their nearness.

    """

    number: int
    status: str
    fires: int
    tokens: int
    reason: str = ""
    largest: float | None = None
    explanation: str = ""
    scores: Sequence[FeatureScore] = ()
    facts: Sequence[tuple[str, str]] = ()
    windows: Sequence[FeatureWindow] = ()
    strengths: Sequence[int] = ()
    promoted: Sequence[tuple[str, float]] = ()
    suppressed: Sequence[tuple[str, float]] = ()
    near: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Share of the tokens at which it fires."""
        return self.fires / self.tokens if self.tokens else 0.0

    @property
    def strongest_token(self) -> str:
        """The token at which it fires most; empty where no window is known."""
        return self.windows[0].tokens[self.windows[0].peak] if self.windows else ""


@dataclass(frozen=True, kw_only=True)
class FeatureView:
    """An index of latents that can be sorted and searched, and the card of the one that is chosen.

    `start` is the number of the one that is open at first; where it is not given, the first that has most to show.
    `command` is what makes the cards again.
    """

    id: str
    title: str
    caption: str
    features: Sequence[Feature]
    start: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"feature view id {self.id!r}: use lower-case letters, digits, '.', '-' and '_'")
        numbers = [feature.number for feature in self.features]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"feature view {self.id!r} needs latents, each of them once")
        if self.start is not None and self.start not in set(numbers):
            raise ValueError(f"feature view {self.id!r}: latent {self.start} is not among its latents")
        for feature in self.features:
            given = [a for window in feature.windows for a in window.activations]
            if not all(math.isfinite(a) for a in given):
                raise ValueError(
                    f"feature view {self.id!r}: latent {feature.number} has activations that are not finite"
                )

    @property
    def opened(self) -> Feature:
        """The latent whose card is open at first."""
        if self.start is not None:
            return next(feature for feature in self.features if feature.number == self.start)
        return max(self.features, key=lambda feature: (bool(feature.windows), bool(feature.scores)))

    @property
    def tests(self) -> list[str]:
        """The tests that some latent has a score of."""
        return list(dict.fromkeys(score.test for feature in self.features for score in feature.scores if score.main))
