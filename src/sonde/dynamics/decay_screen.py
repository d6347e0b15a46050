"""Which of eight factors move the half-life? Sixteen cells of two levels each in place of 256.

A 2^(8-4) fractional factorial of resolution IV: four factors take all combinations, the others are products of three of
them (E = BCD, F = ACD, G = ABC, H = ABD), so that no main effect is mixed with another or with a product of two (Box,
Hunter & Hunter 1978). A main effect is the mean response at the upper level minus that at the lower one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from sonde.dynamics.decay_experiment import Setting
from sonde.dynamics.decay_hypotheses import interval_of
from sonde.errors import SondeError
from sonde.stats.intervals import Interval

FACTORS: dict[str, tuple[Any, Any]] = {
    "width": (64, 128),
    "layers": (2, 4),
    "weight_decay": (0.01, 1.0),
    "lr": (3e-4, 2e-3),
    "optimizer": ("adamw", "sgd"),
    "dropout": (0.0, 0.1),
    "steps": (1, 4),  # multiples of the joint phase
    "replay": (0.0, 0.01),
}
_PRODUCTS = ((1, 2, 3), (0, 2, 3), (0, 1, 2), (0, 1, 3))


@dataclass(frozen=True)
class Effect:
    """What a factor does to log(1 + half-life): `ratio` is that of the half-lives, upper level over lower."""

    factor: str
    ratio: float
    interval: Interval | None
    n: int


def signs() -> Float[np.ndarray, "16 8"]:
    """The cells: -1 for the lower level of a factor and 1 for the upper one."""
    full = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
    return np.concatenate([full, np.stack([full[:, list(p)].prod(1) for p in _PRODUCTS], 1)], axis=1)


def cells(base: Setting) -> list[Setting]:
    """The sixteen settings of the screen around a base setting."""
    made = []
    for row in signs():
        levels = {name: pair[int(sign > 0)] for (name, pair), sign in zip(FACTORS.items(), row, strict=True)}
        made.append(replace(base, **{**levels, "steps": base.steps * levels["steps"]}))
    return made


def effects(rows: Sequence[Mapping[str, Any]], *, base_steps: int, measure: str = "exact") -> list[Effect]:
    """Main effects on the half-life from the summaries of units, the largest first; an interval from 3 seeds on.

    Cells whose skill was never learned are left out of a seed's means. Raises `SondeError` where a factor has one
    level.
    """
    found = []
    for name, (low, high) in FACTORS.items():
        scale = base_steps if name == "steps" else 1
        by_seed = []
        for seed in sorted({row["seed"] for row in rows}):
            means = [
                [
                    math.log1p(row[f"half_life_{measure}"])
                    for row in rows
                    if row["seed"] == seed
                    and row[name] == (level * scale if name == "steps" else level)
                    and row.get(f"half_life_{measure}") is not None
                ]
                for level in (low, high)
            ]
            if all(means):
                by_seed.append(float(np.mean(means[1]) - np.mean(means[0])))
        if not by_seed:
            raise SondeError(f"no seed has a half-life at both levels of {name}: the screen cannot say what it does")
        interval = interval_of(by_seed) if len(by_seed) >= 3 else None
        found.append(Effect(name, math.exp(float(np.mean(by_seed))), interval, len(by_seed)))
    return sorted(found, key=lambda effect: -abs(math.log(effect.ratio)))
