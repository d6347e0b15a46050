"""Rows that a probe is trained or tested on: states, what is true, what the untrusted say, and the base row of each.

The subsets of a quirky set are A and B (Alice's and Bob's records), AE, AH, BE, BH (their easy and hard ones) and all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from sonde.data.quirky import EASY, HARD, Records
from sonde.errors import SondeError
from sonde.knowledge.states import States

SUBSETS = ("A", "B", "AE", "AH", "BE", "BH", "all")


@dataclass(frozen=True)
class Sample:
    """Rows of one distribution.

    Attributes:
        name: of the distribution, such as "AE" or "cities".
        states: of each row.
        truth: whether each row's statement is true.
        bases: what rows share that must not be on both sides of a split; intervals resample it.
        untrusted: what the untrusted label of each row is (Bob's); None where there is none.
        templates: the number of each row's template; None where there is one.

    Raises `SondeError` for no rows and for arrays of other lengths.

    """

    name: str
    states: States
    truth: Bool[np.ndarray, " n"]
    bases: Int[np.ndarray, " n"]
    untrusted: Bool[np.ndarray, " n"] | None = None
    templates: Int[np.ndarray, " n"] | None = None

    def __post_init__(self) -> None:
        arrays = {"truth": self.truth, "bases": self.bases, "untrusted": self.untrusted, "templates": self.templates}
        if not len(self.states):
            raise SondeError(f"{self.name} has no rows")
        for what, values in arrays.items():
            if values is not None and len(values) != len(self.states):
                raise SondeError(f"{self.name}: {len(self.states)} states and {len(values)} values of {what}")

    def __len__(self) -> int:
        return len(self.truth)

    @staticmethod
    def of(states: States, records: Records, *, name: str = "all") -> "Sample":
        """The states of quirky records, in their order."""
        return Sample(name, states, records.truth, records.rows, records.bob, records.template)

    def take(self, rows: Int[np.ndarray, " k"] | Bool[np.ndarray, " n"], *, name: str | None = None) -> "Sample":
        """Some of the rows, by number or mask."""
        return Sample(
            name or self.name,
            self.states[rows],
            self.truth[rows],
            self.bases[rows],
            None if self.untrusted is None else self.untrusted[rows],
            None if self.templates is None else self.templates[rows],
        )

    def relabelled(self, labels: Bool[np.ndarray, " n"], *, name: str) -> "Sample":
        """The same rows with other labels in the place of the truth, to train on."""
        return replace(self, name=name, truth=labels)

    def shuffled(self, seed: int) -> "Sample":
        """The same rows with the labels of others, drawn at random: what a probe learns from them is no knowledge."""
        return self.relabelled(np.random.default_rng(seed).permutation(self.truth), name=f"{self.name}, shuffled")

    def require_disjoint(self, train: "Sample") -> None:
        """Raise `SondeError` when a base row of these is among those of `train`."""
        shared = np.intersect1d(self.bases, train.bases)
        if len(shared):
            raise SondeError(
                f"{len(shared)} base rows of {self.name} are among those trained on in {train.name}, such as "
                f"{shared[0]}: a probe is tested on other base rows, so split by base row"
            )


@dataclass(frozen=True)
class Subsets:
    """The subsets of a quirky set by name, and why others do not exist."""

    samples: Mapping[str, Sample]
    missing: Mapping[str, str]


def subsets(states: States, records: Records) -> Subsets:
    """A, B, AE, AH, BE, BH and all of the records. Easy and hard are missing where all rows are equally difficult.

    Raises `SondeError` for states of another number of rows.
    """
    if len(states) != len(records):
        raise SondeError(f"{len(states)} states of {len(records)} records: extract the states of these records")
    whole = Sample.of(states, records)
    chosen = {"A": records.alice, "B": ~records.alice, "E": records.quantile <= EASY, "H": records.quantile >= HARD}
    level = bool((records.quantile == 0.5).all())
    samples, missing = {"all": whole}, {}
    for name in SUBSETS[:-1]:
        rows = np.logical_and.reduce([chosen[letter] for letter in name])
        if level and len(name) > 1:
            missing[name] = f"easy and hard are undefined: all rows of {records.name} are equally difficult"
        elif not rows.any():
            missing[name] = f"{records.name} has no rows of {name}"
        else:
            samples[name] = whole.take(rows, name=name)
    return Subsets(samples, missing)
