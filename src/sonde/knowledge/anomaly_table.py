"""Which features and which detectors tell anomalous inputs from normal ones? Every pair, offline and online.

Detectors are fitted on the features of trusted inputs and score test inputs; labels of the test inputs are used for the
AUROC alone. Online detectors also see the test inputs as one untrusted batch. The control pools trusted and test inputs
and deals them out again, so that there is nothing to tell.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import ArrayLike
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.knowledge.anomaly import Aggregate, Alarm
from sonde.knowledge.anomaly_features import Feature
from sonde.knowledge.recovered_gap import ScoredRows, mean_auroc
from sonde.knowledge.tables import IntervalTable, Undefined
from sonde.stats.intervals import Interval
from sonde.stats.novelty import DETECTORS

ONLINE = " online"


@dataclass(frozen=True)
class Told:
    """How well one feature and one detector tell anomalous from normal inputs; an AUROC of 0.5 is chance.

    `scores` are those of the test inputs, None where there are none; `note` is what the detector had to warn of.
    """

    feature: str
    detector: str
    online: bool
    aggregate: Aggregate
    auroc: Interval | Undefined
    scores: Float[np.ndarray, " n"] | None
    note: str = ""

    @property
    def label(self) -> str:
        """The detector, and whether it saw the batch where it need not."""
        return self.detector + ONLINE * (self.online and DETECTORS[self.detector]().untrusted == "may")


def compare(
    features: Sequence[Feature],
    anomalous: Bool[np.ndarray, " n"],
    *,
    groups: Shaped[np.ndarray, " n"] | None = None,
    answers: tuple[ArrayLike, ArrayLike] | None = None,
    detectors: Sequence[str] = tuple(DETECTORS),
    seed: int = 0,
    progress: str | None = None,
) -> list[Told]:
    """Fit every detector on every feature of trusted inputs and score the test inputs.

    Args:
        features: of the same inputs.
        anomalous: which test inputs are anomalous.
        groups: what test inputs share (a base row); intervals resample it.
        answers: the model's answers to trusted and to test inputs, for "topological".
        detectors: names of `sonde.stats.novelty.DETECTORS`.
        seed: of the alarms' held-out rows and of the bootstrap.
        progress: what a progress bar is called; None shows none.

    Returns:
        One entry for each feature, detector, form (offline, online) and aggregate ("max" only where a feature has
        several layers). What cannot be told has the reason in place of the AUROC.

    Raises:
        SondeError: for an unknown detector, and test rows that are not as many as `anomalous`.

    """
    for feature in features:
        if feature.test.shape[-2] != len(anomalous):
            raise SondeError(f"{feature.name}: {feature.test.shape[-2]} test rows for {len(anomalous)} labels")
    settings = [
        (feature, detector, online)
        for feature in features
        for detector in detectors
        for online in _forms(feature, detector, answers)
    ]
    found: list[Told] = []
    fitted: dict[tuple[str, str], Alarm] = {}
    for feature, detector, online in tqdm(settings, desc=progress, disable=progress is None, unit="detector"):
        aggregates: tuple[Aggregate, ...] = ("mean", "max") if feature.layers > 1 else ("mean",)
        if detector == "topological":
            aggregates = ("mean",)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if (feature.name, detector) not in fitted:
                    fitted = {(feature.name, detector): _fitted(feature, detector, answers, seed)}
                given = {} if answers is None or detector != "topological" else {"answers": answers[1]}
                scores = fitted[feature.name, detector].by_layer(
                    feature.test, feature.test if online else None, **given
                )
            except SondeError as error:
                found.append(Told(feature.name, detector, online, "mean", Undefined(str(error)), None))
                continue
        note = "; ".join(sorted({str(warning.message) for warning in caught}))
        for aggregate in aggregates:
            values = scores.mean(0) if aggregate == "mean" else scores.max(0)
            told = _auroc(values, anomalous, groups, seed)
            found.append(Told(feature.name, detector, online, aggregate, told, values, note))
    return found


def table(told: Sequence[Told], *, caption: str) -> IntervalTable:
    """All entries as a table for Markdown, CSV and LaTeX."""
    rows = [
        (entry.feature, entry.detector, "online" if entry.online else "offline", entry.aggregate, entry.auroc)
        for entry in told
    ]
    return IntervalTable(caption, ("feature", "detector", "form", "over layers", "AUROC"), tuple(rows))


def _forms(feature: Feature, detector: str, answers: object) -> Iterator[bool]:
    """Offline and online forms that a detector has on a feature."""
    if detector not in DETECTORS:
        raise SondeError(f"detector {detector!r} is unknown: use {', '.join(DETECTORS)}")
    if (detector == "l0" and not feature.sparse) or (
        detector == "topological" and (feature.layers < 2 or answers is None)
    ):
        return
    looks: Mapping[str, tuple[bool, ...]] = {"no": (False,), "may": (False, True), "must": (True,)}
    yield from looks[DETECTORS[detector]().untrusted]


def _fitted(feature: Feature, detector: str, answers: tuple[ArrayLike, ArrayLike] | None, seed: int) -> Alarm:
    given = None if answers is None or detector != "topological" else answers[0]
    return Alarm(detector, seed=seed).fit(feature.trusted, answers=given)


def _auroc(
    scores: Float[np.ndarray, " n"], anomalous: Bool[np.ndarray, " n"], groups: np.ndarray | None, seed: int
) -> Interval | Undefined:
    try:
        bases = np.arange(len(scores)) if groups is None else groups
        return mean_auroc([ScoredRows(scores, anomalous, bases)], seed=seed)
    except SondeError as error:
        return Undefined(str(error))
