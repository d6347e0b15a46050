"""A probe is trained where labels can be trusted. What does it read where they cannot?

Every probe is fitted on every training sample and scored on every test sample, on other base rows, at all layers. The
layer is the earliest informative one on held-out rows of the training distribution, and the last. Labels are the truth.
On disagreements, where truth and untrusted label part, an AUROC of 1 follows the truth and 0 the untrusted label. PGR
says how much of the gap between the two was recovered. After Mallen et al. 2023 (arXiv:2312.01037).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.knowledge.earliest_layer import earliest_informative_layer
from sonde.knowledge.probes import PROBES, FittedProbe, fit
from sonde.knowledge.random_probes import random_probes
from sonde.knowledge.recovered_gap import ScoredRows, mean_auroc, recovered_gap_interval
from sonde.knowledge.samples import Sample
from sonde.knowledge.tables import Cell, IntervalTable, Undefined
from sonde.stats.intervals import Interval
from sonde.stats.ranks import auroc

BOUND = "logr"  # of the probes that are floor and ceiling of the recovered gap
_BOB = "B, labels of Bob"

Rows = Literal["all", "disagreements"]


@dataclass(frozen=True)
class Target:
    """What is true of the rows that probes are scored on."""

    truth: Bool[np.ndarray, " n"]
    bases: Int[np.ndarray, " n"]
    untrusted: Bool[np.ndarray, " n"] | None

    def rows(self, which: Rows) -> Bool[np.ndarray, " n"]:
        """A mask of the rows: all, or those on which truth and untrusted label part."""
        if which == "all" or self.untrusted is None:
            return np.full(len(self.truth), which == "all")
        return self.truth != self.untrusted


@dataclass(frozen=True)
class Scored:
    """One probe, from one training sample, on one test sample.

    `log_odds [n layers]` are on the scale of held-out rows of the training distribution; `layer` is the earliest
    informative one of probe and training sample. Where `sign_known` is False the probe says which rows are alike, not
    which are true.
    """

    probe: str
    train: str
    test: str
    log_odds: Float[np.ndarray, "n layers"]
    layer: int
    sign_known: bool


class Transfers:
    """What every probe from every training sample reads on every test sample. Made by `transfer`.

    Attributes:
        sites: of the layers.
        targets: what is true of the test samples, by name.
        cells: by (probe, train, test).
        missing: why there is no cell, by (probe, train).

    """

    def __init__(
        self,
        sites: Sequence[str],
        targets: Mapping[str, Target],
        cells: Sequence[Scored],
        missing: Mapping[tuple[str, str], str],
    ) -> None:
        self.sites = tuple(sites)
        self.targets = dict(targets)
        self.cells = {(cell.probe, cell.train, cell.test): cell for cell in cells}
        self.missing = dict(missing)

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the probes, in order."""
        return tuple(dict.fromkeys(probe for probe, *_ in self.cells))

    @property
    def trains(self) -> tuple[str, ...]:
        """Names of the training samples, in order, without those that are floors."""
        return tuple(dict.fromkeys(train for _, train, _ in self.cells if train != _BOB))

    def cell(self, probe: str, train: str, test: str) -> Scored:
        """One cell. Raises `SondeError` for one that does not exist, with the reason."""
        if (probe, train, test) not in self.cells:
            reason = self.missing.get((probe, train), f"there is no {probe} from {train} on {test}")
            raise SondeError(reason)
        return self.cells[probe, train, test]

    def auroc(
        self, probe: str, train: str, test: str, *, layer: int | None = None, rows: Rows = "all"
    ) -> Interval | Undefined:
        """AUROC against the truth at the earliest informative layer, or at `layer` (-1 is the last).

        Never a number where there is none: rows of one class, no disagreements, and cells that do not exist are
        undefined, with the reason.
        """
        return pooled_auroc([self], probe, train, test, layer=layer, rows=rows)

    def by_layer(self, probe: str, train: str, test: str, *, rows: Rows = "all") -> list[Interval | Undefined]:
        """AUROC at every layer."""
        return [self.auroc(probe, train, test, layer=layer, rows=rows) for layer in range(len(self.sites))]

    def gap_rows(self, probe: str, train: str, test: str) -> tuple[ScoredRows, ScoredRows, ScoredRows]:
        """The transferred probe at its layer, the floor and the ceiling at the last: of `recovered_gap_interval`.

        Raises `SondeError` where one of them does not exist or has rows of one class.
        """
        hard = "H" if test.endswith("H") else ""
        cells = self.cell(probe, train, test), self.cell(BOUND, _BOB, f"B{hard}"), self.cell(BOUND, "A", f"A{hard}")
        return (
            self.scored_rows(cells[0], cells[0].layer),
            self.scored_rows(cells[1], -1),
            self.scored_rows(cells[2], -1),
        )

    def gap(self, probe: str, train: str, test: str) -> Interval | Undefined:
        """Performance gap recovered."""
        return pooled_gap([self], probe, train, test)

    def matrix(self, probe: str, *, rows: Rows = "all") -> IntervalTable:
        """AUROC at the earliest informative layer from every training sample (rows) to every test sample."""
        made: list[tuple[Cell, ...]] = [
            (train, *(self.auroc(probe, train, test, rows=rows) for test in self.targets)) for train in self.trains
        ]
        what = "" if rows == "all" else ", disagreements"
        return IntervalTable(
            f"AUROC of {probe}, trained on rows, tested on columns{what}", ("trained on", *self.targets), tuple(made)
        )

    def table(self, train: str, test: str) -> IntervalTable:
        """One transfer, all probes: layer, AUROC there and at the last layer, on disagreements, and PGR."""
        rows: list[tuple[Cell, ...]] = []
        for probe in self.probes:
            if (probe, train, test) not in self.cells:
                reason = Undefined(self.missing.get((probe, train), f"{probe} was not trained on {train}"))
                rows.append((probe, reason, None, None, None, None, None))
                continue
            cell = self.cells[probe, train, test]
            rows.append(
                (
                    probe,
                    self.sites[cell.layer],
                    self.auroc(probe, train, test),
                    self.auroc(probe, train, test, layer=-1),
                    self.auroc(probe, train, test, rows="disagreements"),
                    self.gap(probe, train, test),
                    "known" if cell.sign_known else "sign unknown",
                )
            )
        columns = ("probe", "layer", "AUROC", "AUROC, last layer", "AUROC, disagreements", "PGR", "sign")
        return IntervalTable(f"{train} to {test}", columns, tuple(rows))

    def state(self) -> dict[str, Any]:
        """Everything as a tree for `sonde.files.save_bundle`."""
        return {
            "sites": list(self.sites),
            "targets": {
                name: {
                    "truth": torch.from_numpy(one.truth),
                    "bases": torch.from_numpy(one.bases),
                    "untrusted": None if one.untrusted is None else torch.from_numpy(one.untrusted),
                }
                for name, one in self.targets.items()
            },
            "cells": [{**vars(cell), "log_odds": torch.from_numpy(cell.log_odds)} for cell in self.cells.values()],
            "missing": [[*key, reason] for key, reason in self.missing.items()],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Transfers":
        """What `state` returned."""
        targets = {
            name: Target(
                one["truth"].numpy(),
                one["bases"].numpy(),
                None if one["untrusted"] is None else one["untrusted"].numpy(),
            )
            for name, one in state["targets"].items()
        }
        cells = [Scored(**{**cell, "log_odds": cell["log_odds"].numpy()}) for cell in state["cells"]]
        return Transfers(state["sites"], targets, cells, {(a, b): reason for a, b, reason in state["missing"]})

    def scored_rows(self, cell: Scored, layer: int, rows: Rows = "all") -> ScoredRows:
        """Scores at one layer with their truth. Raises `SondeError` where there are none, or of one class only."""
        target = self.targets[cell.test]
        chosen = target.rows(rows)
        if not chosen.any():
            raise SondeError(f"{cell.test} has no {rows}")
        return ScoredRows(cell.log_odds[chosen, layer], target.truth[chosen], target.bases[chosen])


def pooled_auroc(
    found: Sequence[Transfers], probe: str, train: str, test: str, *, layer: int | None = None, rows: Rows = "all"
) -> Interval | Undefined:
    """`Transfers.auroc`, averaged over several models, each at its own layer."""
    try:
        cells = [one.cell(probe, train, test) for one in found]
        return mean_auroc(
            [
                one.scored_rows(cell, cell.layer if layer is None else layer, rows)
                for one, cell in zip(found, cells, strict=True)
            ]
        )
    except SondeError as error:
        return Undefined(f"{probe}, {train} to {test}: {error}")


def pooled_gap(found: Sequence[Transfers], probe: str, train: str, test: str) -> Interval | Undefined:
    """`Transfers.gap` over several models, whose AUROCs are averaged before the ratio."""
    try:
        return recovered_gap_interval([one.gap_rows(probe, train, test) for one in found])
    except SondeError as error:
        return Undefined(f"{probe}, {train} to {test}: {error}")


def transfer(
    train: Mapping[str, Sample],
    test: Mapping[str, Sample],
    *,
    probes: Sequence[str] = ("logr", "logr-pair", "diff-in-means", "diff-in-means-pair", "lda"),
    held: Mapping[str, Sample] | None = None,
    trusted: str | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> Transfers:
    """Fit every probe on every training sample and score it on every test sample.

    Args:
        train: samples by name.
        test: samples by name, of other base rows than `train`.
        probes: names, see `sonde.knowledge.probes.PROBES`. A logistic probe is always among them where there are A and
            B: floor and ceiling of the recovered gap are made of it.
        held: samples by the names of `train`, of other base rows, on which the layer is chosen; by default those of
            `test`, as in the paper.
        trusted: the training sample whose labels give unsupervised probes their sign; without it the sign is unknown.
        seed: of probes that draw.
        progress: what the progress bar says; none without it.

    Raises:
        SondeError: for test or held rows whose base row is trained on, other numbers of layers or widths, a training
            sample without held rows, and an unknown probe.

    """
    held = test if held is None else held
    _check(train, test, held)
    first = next(iter(train.values()))
    jobs = [(probe, name, sample) for probe in probes for name, sample in train.items()]
    if {"A", "B"} <= train.keys() and train["B"].untrusted is not None:
        jobs += [(BOUND, name, train[name]) for name in ("A", "B") if BOUND not in probes]
        jobs.append((BOUND, _BOB, train["B"].relabelled(train["B"].untrusted, name=_BOB)))
    cells, missing = [], {}
    for probe, name, sample in tqdm(jobs, desc=progress, unit="probe", disable=progress is None):
        if len(np.unique(sample.truth)) < 2:
            missing[probe, name] = f"all {len(sample)} rows of {name} have one label: a probe learns from both"
            continue
        fitted = _fitted(probe, sample, train[trusted] if trusted else None, seed)
        chosen = held["B" if name == _BOB else name]
        layer = _earliest(_scores(fitted, chosen), chosen)
        scaled = _on_scale(fitted, chosen)
        cells += [
            Scored(probe, name, place, _scores(scaled, target), layer, fitted.sign_known)
            for place, target in test.items()
        ]
    targets = {name: Target(one.truth, one.bases, one.untrusted) for name, one in test.items()}
    return Transfers(first.states.sites, targets, cells, missing)


def random_aurocs(
    train: Sample, test: Sample, *, draws: int = 256, rows: Rows = "all", seed: int = 0
) -> Float[np.ndarray, "draws layers"]:
    """AUROC on `test` of `random_probes`, each with its sign from `train`; nan where the rows have one class."""
    chosen = Target(test.truth, test.bases, test.untrusted).rows(rows)
    if len(np.unique(test.truth[chosen])) < 2:
        return np.full((draws, len(test.states.sites)), np.nan)
    scored = test.states[torch.from_numpy(chosen)]
    return random_probes(train.states, train.truth, scored, test.truth[chosen], draws=draws, seed=seed).aurocs


def shuffled_aurocs(
    probe: str, train: Sample, test: Sample, *, draws: int = 8, seed: int = 0
) -> Float[np.ndarray, "draws layers"]:
    """AUROC on `test` of a probe that was fitted on labels dealt at random: what is found in noise."""
    found = []
    for draw in range(draws):
        dealt = train.shuffled(seed + draw)
        scores = _scores(_fitted(probe, dealt, dealt, seed), test).T
        found.append(auroc(scores, np.broadcast_to(test.truth, scores.shape)))
    return np.array(found)


def _fitted(probe: str, sample: Sample, trusted: Sample | None, seed: int) -> FittedProbe:
    """A supervised probe by the sample's labels; another without labels, its sign from those that are trusted."""
    if PROBES[probe].supervised if probe in PROBES else True:
        return fit(probe, sample.states, sample.truth, seed=seed)
    found = fit(probe, sample.states, templates=sample.templates, seed=seed)
    if trusted is None:
        return found
    return found.calibrated(trusted.states, trusted.truth, templates=trusted.templates)


def _scores(probe: FittedProbe, sample: Sample) -> Float[np.ndarray, "n layers"]:
    return probe.log_odds(sample.states, templates=sample.templates).numpy()


def _on_scale(probe: FittedProbe, held: Sample) -> FittedProbe:
    """The probe with the scale that held-out rows of its training distribution give it; its sign stays as it is."""
    scaled = probe.calibrated(held.states, held.truth, templates=held.templates)
    if not (probe.sign_known and scaled.sign_known):
        return probe
    same = (scaled.weight * probe.weight).sum(1) > 0
    return replace(
        probe,
        weight=torch.where(same[:, None], scaled.weight, probe.weight),
        bias=torch.where(same, scaled.bias, probe.bias),
        template_bias=None
        if probe.template_bias is None or scaled.template_bias is None
        else torch.where(same, scaled.template_bias, probe.template_bias),
    )


def _earliest(log_odds: Float[np.ndarray, "n layers"], held: Sample) -> int:
    """The layer by held-out rows of the training distribution; the middle one where these have one class."""
    if len(np.unique(held.truth)) < 2:
        return log_odds.shape[1] // 2
    return earliest_informative_layer(auroc(log_odds.T, np.broadcast_to(held.truth, log_odds.T.shape)))


def _check(train: Mapping[str, Sample], test: Mapping[str, Sample], held: Mapping[str, Sample]) -> None:
    if not train or not test:
        raise SondeError("a transfer needs samples to train on and samples to test on")
    first = next(iter(train.values())).states
    for sample in (*train.values(), *test.values(), *held.values()):
        sample.states.require_like(first.sites, first.d, "what is trained on")
    for name, sample in train.items():
        if name not in held:
            raise SondeError(f"there are no held-out rows of {name} to choose its layer on: give them as `held`")
        for other in (*test.values(), *held.values()):
            other.require_disjoint(sample)
