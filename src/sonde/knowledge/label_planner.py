"""How many weak and how many oracle labels should a budget buy? A recommendation from pilot runs, with its uncertainty.

A surface A(n_weak, n_oracle) is fitted to pilot runs at budgets that were affordable, and once more to every resample
of their seeds. On each, the best share of the money is sought on a grid; the recommendation is the share with the
largest mean accuracy over resamples, its interval the spread of the resamples' own best shares. A resample calls the
regime mixed when its best share gains 0.01 on both ends, and by the better end otherwise; the verdict is the one that
four fifths of them agree on. A plan beyond the pilot's largest budget is extrapolated, and says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.knowledge.label_ledger import Price, affordable, exact_price
from sonde.knowledge.label_regime import TOLERANCE, Verdict
from sonde.knowledge.label_score import LabelRun
from sonde.knowledge.label_surface import (
    GaussianProcess,
    PowerLaw,
    Surface,
    fit_gaussian_process,
    fit_power_law,
    rate_of_substitution,
    table_of,
)
from sonde.stats.intervals import Interval

GRID = tuple(Fraction(i, 40) for i in range(41))
_SURE = 0.8


@dataclass(frozen=True)
class Plan:
    """What to buy.

    counts: recommended numbers of labels. cost: of them. accuracy: predicted, with the interval over resamples.
    share: of the money for weak labels, with the interval of the best share. by_share: predicted accuracy of every
    share of the grid. regime: the verdict, with the chances of each. substitution: weak labels that the next oracle
    label is worth, at the recommendation; price_ratio: and costs. fewest_weak, most_weak: what the ends of the interval
    of the share buy. extrapolated: how many times the largest pilot budget this is, or 1.
    """

    budget: float
    counts: Mapping[str, int]
    cost: float
    accuracy: Interval
    share: Interval
    by_share: tuple[tuple[float, Interval], ...]
    regime: Verdict
    chances: Mapping[str, float]
    substitution: float
    price_ratio: float
    fewest_weak: Mapping[str, int]
    most_weak: Mapping[str, int]
    extrapolated: float

    @property
    def words(self) -> str:
        """The plan as sentences."""
        bought = " and ".join(f"{count:,} {name} labels" for name, count in self.counts.items())
        verdict = {
            "quantity": "Quantity counts: no mixture gains a point on weak labels alone.",
            "quality": "Quality counts: no mixture gains a point on oracle labels alone.",
            "mixed": "A mixture is better than either alone.",
            "undecided": "Undecided: the pilot does not tell the mixture from the ends.",
        }[self.regime]
        far = (
            f" This is {self.extrapolated:.1f} times the largest pilot budget: an extrapolation."
            if self.extrapolated > 1
            else ""
        )
        return (
            f"For {self.budget:,g}, buy {bought}: accuracy {self.accuracy.estimate:.3f} "
            f"({self.accuracy.low:.3f} to {self.accuracy.high:.3f}). {verdict} The best share of weak labels is "
            f"between {self.share.low:.2f} and {self.share.high:.2f} of the money.{far}"
        )


def plan(
    runs: Sequence[LabelRun],
    *,
    budget: Price,
    prices: Mapping[str, Price],
    caps: Mapping[str, int] | None = None,
    chance: float = 0.5,
    surface: Literal["power law", "gaussian process"] = "power law",
    resamples: int = 100,
    seed: int = 0,
) -> Plan:
    """Recommend a purchase from pilot `runs` of one method, over at least two seeds.

    prices: by source, two of them, the oracle last. caps: labels of a source that exist at most, such as the pool.

    Raises `SondeError` for fewer than two seeds, another number of sources, a free weak label without a cap, a budget
    below the cheapest label and too few different purchases.
    """
    names = list(prices)
    if len(names) != 2:
        raise SondeError(f"a plan weighs two sources against each other, not {len(names)}: plan in pairs")
    methods = {run.method for run in runs}
    if len(methods) != 1:
        raise SondeError(f"a plan is for one method, not for {len(methods)}: {', '.join(sorted(methods))}")
    seeds = sorted({run.seed for run in runs})
    if len(seeds) < 2:
        raise SondeError(f"{len(seeds)} seed of pilot runs says nothing of the uncertainty: run at least 2, better 5")
    whole = exact_price(budget, "the budget")
    offers = _offers(whole, names, prices, caps or {})
    table = np.array([[counts[name] for name in names] for _, counts in offers], dtype=np.float64)
    by_seed = {s: table_of([run for run in runs if run.seed == s], names) for s in seeds}
    counts, accuracy = table_of(runs, names)
    main = _fit(surface, counts, accuracy, names, chance, None)
    rng = np.random.default_rng(seed)
    predicted = np.empty((resamples, len(offers)))
    for i in range(resamples):
        drawn = [by_seed[seeds[j]] for j in rng.integers(len(seeds), size=len(seeds))]
        again = _fit(
            surface, np.concatenate([c for c, _ in drawn]), np.concatenate([a for _, a in drawn]), names, chance, main
        )
        predicted[i] = again.predict(table)
    shares = np.array([float(share) for share, _ in offers])
    best = int(predicted.mean(0).argmax())
    own = shares[predicted.argmax(1)]
    ends = predicted[:, [int(shares.argmin()), int(shares.argmax())]]
    mixed = predicted.max(1) - ends.max(1) >= TOLERANCE
    toward_weak = ~mixed & (ends[:, 1] >= ends[:, 0])
    chances = {
        "quantity": float(toward_weak.mean()),
        "quality": float((~mixed & ~toward_weak).mean()),
        "mixed": float(mixed.mean()),
    }
    likeliest = max(chances, key=lambda name: chances[name])
    verdict = likeliest if chances[likeliest] >= _SURE else "undecided"
    low, high = np.quantile(own, [0.025, 0.975])
    bought = offers[best][1]
    exact = {name: exact_price(prices[name], name) for name in names}
    cheap = float(exact[names[0]])
    pilot = max(float(run.cost) for run in runs)
    return Plan(
        budget=float(whole),
        counts=bought,
        cost=float(sum(exact[name] * count for name, count in bought.items())),
        accuracy=_spread(predicted[:, best], len(seeds)),
        share=Interval(shares[best], min(low, shares[best]), max(high, shares[best]), len(seeds)),
        by_share=tuple((float(s), _spread(predicted[:, i], len(seeds))) for i, s in enumerate(shares)),
        regime=verdict,  # type: ignore[arg-type]
        chances=chances,
        substitution=rate_of_substitution(main, bought, weak=names[0], oracle=names[1]),
        price_ratio=float(exact[names[1]]) / cheap if cheap else float("inf"),
        fewest_weak=offers[int(np.abs(shares - low).argmin())][1],
        most_weak=offers[int(np.abs(shares - high).argmin())][1],
        extrapolated=float(whole) / pilot if float(whole) > pilot * (1 + 1e-9) else 1.0,
    )


def _offers(
    budget: Fraction, names: Sequence[str], prices: Mapping[str, Price], caps: Mapping[str, int]
) -> list[tuple[Fraction, dict[str, int]]]:
    """Shares of the grid and what they buy; a source that is used up leaves its money unspent."""
    weak, oracle = names
    free = [name for name in names if not exact_price(prices[name], name)]
    if free:
        if free != [weak] or weak not in caps:
            raise SondeError(f"labels of {free[0]!r} are free, so no budget limits them: give a cap on their number")
        whole = {weak: caps[weak], oracle: min(int(budget / exact_price(prices[oracle])), caps.get(oracle, 10**12))}
        return [(Fraction(0), whole)]
    made = []
    for share in GRID:
        bought = affordable(budget, {weak: share, oracle: 1 - share}, prices)
        made.append((share, {name: min(count, caps.get(name, count)) for name, count in bought.items()}))
    return made


def _fit(
    kind: str,
    counts: Float[np.ndarray, "runs 2"],
    accuracy: Float[np.ndarray, " runs"],
    names: Sequence[str],
    chance: float,
    start: Surface | None,
) -> Surface:
    if kind == "power law":
        return fit_power_law(
            counts, accuracy, names, chance=chance, start=start if isinstance(start, PowerLaw) else None
        )
    if kind == "gaussian process":
        return fit_gaussian_process(
            counts, accuracy, names, start=start if isinstance(start, GaussianProcess) else None
        )
    raise SondeError(f"there is no surface {kind!r}: there are power law and gaussian process")


def _spread(values: Float[np.ndarray, " resamples"], n: int) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    mean = float(values.mean())
    return Interval(mean, min(float(low), mean), max(float(high), mean), n)
