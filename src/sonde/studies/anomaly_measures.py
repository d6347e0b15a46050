"""What the study of anomaly detection measures: tasks of trusted and test records, features, detectors, the control.

A task has records that the probe learns the truth from, trusted records that alarms are fitted on, and test records of
other base rows, of which Bob's are the anomalous ones. Labels of the test records are used for the AUROC alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sonde.data.quirky import Records, Splits
from sonde.errors import SondeError
from sonde.knowledge.anomaly_features import Feature, look
from sonde.knowledge.anomaly_table import Told, compare
from sonde.knowledge.fine_tuning_distance import fine_tuning_distance
from sonde.knowledge.probes import fit
from sonde.knowledge.recovered_gap import ScoredRows
from sonde.knowledge.states import extract
from sonde.knowledge.tables import Undefined
from sonde.lm.model import LanguageModel
from sonde.stats.intervals import Interval

LOG_ODDS, RANDOM, STREAM = "probe's log-odds", "random directions", "residual stream"
FIRST = "mahalanobis"
"""The detector of the paper, which makes the findings."""
HARD, ALL, NAMES = "hard", "all", "names"
TASKS = {
    HARD: "hard questions after easy ones",
    ALL: "all questions",
    NAMES: "names that were not trusted",
}
_LEAST = 40  # records of each kind
Groups = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    """Records of one task. Raises `SondeError` for too few of one kind, and base rows on both sides."""

    name: str
    probed: Records
    trusted: Records
    test: Records

    def __post_init__(self) -> None:
        for what, records in (
            ("to fit the probe on", self.probed),
            ("to trust", self.trusted),
            ("that are normal", self.test.where(character="Alice")),
            ("that are anomalous", self.test.where(character="Bob")),
        ):
            if len(records) < _LEAST:
                raise SondeError(
                    f"{self.name}: {len(records)} records {what} of {records.name}; give at least {_LEAST} by a "
                    "larger set, --trusted or --test"
                )
        self.test.require_disjoint(self.trusted)
        self.test.require_disjoint(self.probed)

    @property
    def anomalous(self) -> Bool[np.ndarray, " n"]:
        """Which test records are Bob's."""
        return ~self.test.alice


def task(name: str, splits: Splits, *, trusted: int, test: int, seed: int, names: Groups | None = None) -> Task:
    """One of `TASKS` from the validation and test records of a set, at most `trusted` and `test` of them.

    hard: Alice's easy records are trusted; her hard ones are normal, Bob's hard ones anomalous. all: hers of one half
    of the base rows are trusted, all of the other half tested. names: the same with `names` (trusted, other), names
    of Alice's kind, of which only the first are trusted and only the others are tested.
    """
    held, other = splits.validation, splits.test
    if name == HARD:
        chosen = [held.where(character="Alice", easy=True), other.where(character="Alice", easy=True)]
        chosen.append(other.where(hard=True))
    else:
        bases = np.random.default_rng(seed).permutation(np.unique(other.rows))
        first = np.isin(other.rows, bases[: len(bases) // 2])
        chosen = [held.where(character="Alice"), other.take(first & other.alice), other.take(~first)]
    if names is not None:
        usual, unknown = names
        chosen[:2] = [records.take(np.array([one.asked in usual for one in records])) for records in chosen[:2]]
        keep = [one.character == "Bob" or one.asked in unknown for one in chosen[2]]
        chosen[2] = chosen[2].take(np.array(keep))
    most = (trusted, trusted, test)
    cut = [records.sample(n, seed) if len(records) > n else records for records, n in zip(chosen, most, strict=True)]
    return Task(TASKS[name], *cut)


@dataclass(frozen=True)
class Measured:
    """One model on one task: every feature with every detector, and the control of the first detector.

    `control`: by feature, the AUROC where trusted and test records were pooled and dealt out again.
    """

    told: tuple[Told, ...]
    control: dict[str, Interval]
    anomalous: Bool[np.ndarray, " n"]
    bases: Int[np.ndarray, " n"]

    def of(self, feature: str, detector: str = FIRST) -> Told:
        """The entry of a feature and a detector, offline where there is a choice, by the mean over layers."""
        return next(
            one
            for one in self.told
            if (one.feature, one.detector, one.aggregate) == (feature, detector, "mean") and one.label == detector
        )

    def rows(self, told: Told) -> ScoredRows:
        """An entry's scores of the test records, beside what they are."""
        assert told.scores is not None
        return ScoredRows(told.scores, self.anomalous, self.bases)

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        scores = [one.scores for one in self.told if one.scores is not None]
        return {
            "told": [[one.feature, one.detector, one.online, one.aggregate, _packed(one.auroc), one.note,
                      one.scores is not None] for one in self.told],
            "scores": torch.from_numpy(np.stack(scores)),
            "control": {name: _packed(made) for name, made in self.control.items()},
            "anomalous": torch.from_numpy(self.anomalous),
            "bases": torch.from_numpy(self.bases),
        }  # fmt: skip

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "Measured":
        """What `state` returned."""
        scores = iter(state["scores"].numpy())
        told = tuple(
            Told(feature, detector, online, aggregate, _unpacked(auroc), next(scores) if scored else None, note)
            for feature, detector, online, aggregate, auroc, note, scored in state["told"]
        )
        control = {name: Interval(**made) for name, made in state["control"].items()}
        return Measured(told, control, state["anomalous"].numpy(), state["bases"].numpy())


def measured(
    lm: LanguageModel,
    given: Task,
    detectors: Sequence[str],
    *,
    batch: int,
    seed: int,
    fine_tuning: bool = False,
    progress: str | None = None,
) -> Measured:
    """Fit a probe for the truth and look at trusted and test records with every feature and detector.

    A feature more is what random directions read in the probe's place, and with `fine_tuning` how far training on
    trusted records moves the answers.
    """
    label = progress and f"{progress}: reading"
    probed = extract(lm, given.probed.prompts, given.probed.answers, batch=batch, progress=label)
    probe = fit("logr", probed, given.probed.truth, seed=seed)
    sides = [(records.prompts, records.answers) for records in (given.trusted, given.test)]
    looked = look(lm, probe, *sides, batch=batch, progress=label)
    stream = next(feature for feature in looked.features if feature.name == STREAM)
    directions = torch.randn(
        len(stream.trusted), stream.trusted.shape[-1], generator=torch.Generator().manual_seed(seed)
    )
    trusted, test = (torch.einsum("lnd,ld->nl", rows, directions) for rows in (stream.trusted, stream.test))
    features = [*looked.features, Feature(RANDOM, trusted, test)]
    if fine_tuning:
        truth = torch.from_numpy(given.trusted.truth)
        label = progress and f"{progress}: fine-tuning"
        features.append(fine_tuning_distance(lm, sides[0], truth, sides[1], batch=batch, seed=seed, progress=label))
    told = compare(
        features,
        given.anomalous,
        groups=given.test.rows,
        answers=looked.answers,
        detectors=detectors,
        seed=seed,
        progress=progress and f"{progress}: detectors",
    )
    dealt = [feature.dealt_again(seed) for feature in features]
    control = compare(dealt, given.anomalous, groups=given.test.rows, detectors=[FIRST], seed=seed)
    return Measured(
        tuple(told),
        {one.feature: one.auroc for one in control if one.aggregate == "mean" and isinstance(one.auroc, Interval)},
        given.anomalous,
        given.test.rows,
    )


def curve(rows: ScoredRows, *, points: int = 50) -> Float[np.ndarray, "points 2"]:
    """False and true alarms at thresholds from the highest to the lowest, at evenly spaced shares of false alarms."""
    normal = np.sort(rows.scores[~rows.truth])
    shares = np.linspace(0, 1, points)
    caught = [np.mean(rows.scores[rows.truth] >= np.quantile(normal, 1 - share)) if share else 0.0 for share in shares]
    return np.stack([shares, caught], 1)


def _packed(auroc: Interval | Undefined) -> Any:
    if isinstance(auroc, Undefined):
        return auroc.reason
    return {name: getattr(auroc, name) for name in Interval.__dataclass_fields__}


def _unpacked(kept: Any) -> Interval | Undefined:
    return Undefined(kept) if isinstance(kept, str) else Interval(**kept)
