"""Linear probes of what a model holds to be true, fitted at all layers at once, all with one interface.

    probe = fit("logr", states, labels);   probe.log_odds(other_states)        # [n layers]

Every probe ends as a weight and a bias for each layer: of h, the state of the last prompt token, or of [h-; h+], those
of the two answers (`PAIR`). What differs is how they are found: see the modules `supervised`, `contrast_probes`, `ccs`
and `vinc`. A probe that is fitted without labels knows a direction and not which end of it is true: its sign and scale
come from trusted labels (Platt 1999: logistic regression of the label on the score), else the sign is unknown.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.knowledge.ccs import fit_ccs
from sonde.knowledge.contrast_probes import fit_crc
from sonde.knowledge.fitting import Solution, Task
from sonde.knowledge.layer_moments import Part
from sonde.knowledge.states import States
from sonde.knowledge.supervised import fit_diff_in_means, fit_erased, fit_lda, fit_logr, fit_random
from sonde.knowledge.vinc import fit_vinc
from sonde.stats.logistic import logistic
from sonde.stats.ranks import auroc

FORMAT = "sonde probe 1"
Signs = Literal["platt", "flip"]
Classes = Tensor | np.ndarray | list[int]


@dataclass(frozen=True)
class ProbeKind:
    """One way to find a probe: what it reads, whether it needs labels, whether it takes something out first."""

    solve: Callable[[Task], Solution]
    part: Part
    supervised: bool
    erases: bool = False


_SUPERVISED: dict[str, ProbeKind] = {
    "logr": ProbeKind(fit_logr, "last", True),
    "logr-pair": ProbeKind(fit_logr, "pair", True),
    "diff-in-means": ProbeKind(fit_diff_in_means, "last", True),
    "diff-in-means-pair": ProbeKind(fit_diff_in_means, "pair", True),
    "lda": ProbeKind(fit_lda, "last", True),
}
PROBES: dict[str, ProbeKind] = {
    **_SUPERVISED,
    "crc": ProbeKind(fit_crc, "pair", False),
    "ccs": ProbeKind(fit_ccs, "pair", False),
    "vinc": ProbeKind(fit_vinc, "pair", False),
    "random": ProbeKind(fit_random, "last", True),
    **{
        f"leace-{name}": ProbeKind(fit_erased(kind.solve), kind.part, True, erases=True)
        for name, kind in _SUPERVISED.items()
    },
}


@dataclass(frozen=True)
class FittedProbe:
    """A weight and a bias for each layer. Made by `fit` or `FittedProbe.load`.

    Attributes:
        kind: name in `PROBES`.
        part: "last", the last prompt token's state, or "pair", those of both answers.
        weight: of the rows of `States.by_layer(part)`.
        bias: added to the score.
        sites: of the layers.
        sign_known: whether more means "true"; else only the direction means something.
        template_scale: for a probe that normalises by template, what the scores of h- and h+ are multiplied with; the
            last row is for templates that it was not fitted on.
        template_bias: as `template_scale`, added.
        facts: what the fit reported.

    """

    kind: str
    part: Part
    weight: Float[Tensor, "layers width"]
    bias: Float[Tensor, " layers"]
    sites: tuple[str, ...]
    sign_known: bool
    template_scale: Float[Tensor, "templates layers 2"] | None = None
    template_bias: Float[Tensor, "templates layers"] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def d(self) -> int:
        """Width of a state."""
        return self.weight.shape[1] // (2 if self.part == "pair" else 1)

    @property
    def direction(self) -> Float[Tensor, "layers d"]:
        """Along which a state is told true from false: the weight, or for a pair half of w+ - w-."""
        if self.part == "last":
            return self.weight
        negative, positive = self.weight.unflatten(1, (2, -1)).unbind(1)
        return (positive - negative) / 2

    @torch.no_grad()
    def log_odds(self, states: States, *, templates: ArrayLike | None = None) -> Float[Tensor, "n layers"]:
        """Log-odds of "true" for every row and layer, float32; `templates [n]` as they were numbered in `fit`.

        Raises `SondeError` for states of other sites or of another width.
        """
        states.require_like(self.sites, self.d, f"the probe ({self.kind})")
        rows = states.by_layer(self.part)
        if self.template_scale is None or self.template_bias is None:
            scores = torch.stack([x.to(w) @ w for x, w in zip(rows, self.weight, strict=True)])
            return (scores + self.bias[:, None]).T
        own = torch.full((len(states),), -1) if templates is None else _numbers(templates, len(states), "templates")
        own = torch.where((own >= 0) & (own < len(self.template_bias) - 1), own, len(self.template_bias) - 1)
        halves = self.weight.unflatten(1, (2, -1))
        scores = torch.stack(
            [torch.einsum("npd,pd->np", x.unflatten(1, (2, -1)), w) for x, w in zip(rows, halves, strict=True)], 1
        )
        return (scores * self.template_scale[own]).sum(-1) + self.template_bias[own] + self.bias

    def calibrated(
        self, states: States, labels: ArrayLike | Tensor, *, signs: Signs = "platt", templates: ArrayLike | None = None
    ) -> "FittedProbe":
        """The probe with its sign from trusted labels (0, 1, or -1 for unknown), and with "platt" its scale too.

        Where the labels are of one class they decide nothing: the probe comes back with `sign_known` False and the
        reason among its facts.
        """
        y = _labels(labels, len(states))
        known = y >= 0
        truth = y[known] == 1
        if not bool(truth.any()) or bool(truth.all()):
            reason = f"{int(truth.sum())} of {len(truth)} trusted labels are true: they decide no sign"
            return replace(self, sign_known=False, facts={**self.facts, "sign": reason})
        scores = self.log_odds(states, templates=templates)[known].T
        if signs == "flip":
            area = auroc(scores.numpy(), np.broadcast_to(truth.numpy(), scores.shape))
            scale = torch.from_numpy(np.where(area < 0.5, -1.0, 1.0)).float()
            shift = torch.zeros_like(scale)
        elif signs == "platt":
            # Platt's targets: with labels of 0 and 1 a score that separates them would grow without end.
            ones = int(truth.sum())
            target = torch.where(truth, (ones + 1) / (ones + 2), 1 / (len(truth) - ones + 2))
            fitted = logistic(scores[..., None].double(), target, l2=0.0)
            scale, shift = fitted.weight[:, 0].float(), fitted.bias.float()
        else:
            raise ValueError(f"signs {signs!r} is unknown: use platt or flip")
        return replace(
            self,
            weight=self.weight * scale[:, None],
            bias=self.bias * scale + shift,
            template_bias=None if self.template_bias is None else self.template_bias * scale,
            sign_known=True,
            facts={**self.facts, "sign": f"{signs}, {len(truth)} trusted labels"},
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tree = {"format": FORMAT, **{name: getattr(self, name) for name in FittedProbe.__dataclass_fields__}}
        save_bundle(path, tree)

    @staticmethod
    def load(path: str | Path) -> "FittedProbe":
        """Read what `save` wrote. Raises `SondeError` for a file that is missing, damaged or something else."""
        tree = load_bundle(path)
        if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
            raise SondeError(f"{path} holds no probe")
        return FittedProbe(**{**tree, "sites": tuple(tree["sites"])})


@torch.no_grad()
def fit(
    kind: str,
    states: States,
    labels: ArrayLike | Tensor | None = None,
    *,
    templates: ArrayLike | Tensor | None = None,
    groups: ArrayLike | Tensor | None = None,
    erase: Classes | tuple[States, Classes] | None = None,
    signs: Signs = "platt",
    seed: int = 0,
    **options: Any,
) -> FittedProbe:
    """Fit a probe at all layers.

    Args:
        kind: a name in `PROBES`.
        states: what to fit on.
        labels: 1 for true, 0 for false, -1 for unknown. Supervised probes learn from the rows that have one; others
            learn from all rows, without labels, and get their sign and scale from those that have one.
        templates: which template each row was asked with, from 0: what CCS and VINC normalise by.
        groups: which question each row asks; rows of one question in several templates should agree (VINC, and CCS
            with `loss="prompt-variance"`).
        erase: for leace-… probes, what to take out first: a class for each row, such as its template or its character,
            or other states with such classes, where these rows have only one.
        signs: "platt", or "flip" to change the sign where the AUROC is below 0.5 and leave the scale.
        seed: of what is drawn.
        options: of the kind; see the function that fits it.

    Raises:
        SondeError: for an unknown kind, fewer than two rows, labels that are missing or of one class where they are
            needed, something to erase that is missing, constant or not wanted, and options that the kind does not have.

    """
    if kind not in PROBES:
        raise SondeError(f"probe {kind!r} is unknown: use {', '.join(PROBES)}")
    how = PROBES[kind]
    if len(states) < 2:
        raise SondeError(f"{len(states)} row(s): a probe is fitted on two at least")
    if how.erases != (erase is not None):
        what = "needs erase=, a class for each row" if how.erases else f"erases nothing: fit leace-{kind}"
        raise SondeError(f"{kind} {what}")
    y = None if labels is None else _labels(labels, len(states))
    used, numbers, questions = (
        states,
        _maybe(templates, len(states), "templates"),
        _maybe(groups, len(states), "groups"),
    )
    erased = None
    if erase is not None:
        other, classes = erase if isinstance(erase, tuple) else (states, erase)
        other.require_like(states.sites, states.d, "what is fitted on")
        erased = other, _numbers(classes, len(other), "erase")
    if how.supervised:
        if y is None:
            raise SondeError(f"{kind} learns from labels: give labels, 1 for true and 0 for false")
        known = y >= 0
        if len(y[known].unique()) < 2:
            one = "none" if not bool(known.any()) else "true" if bool(y.max() == 1) else "false"
            raise SondeError(f"{kind} needs labels of both classes: of {int(known.sum())} labels all are {one}")
        if not bool(known.all()):
            used, y = states[known], y[known]
            numbers, questions = (None if t is None else t[known] for t in (numbers, questions))
    rows = used.by_layer(how.part)
    task = Task(used, how.part, rows, used.moments, y if how.supervised else None, numbers, questions, erased, seed)
    try:
        found = how.solve(task, **options)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise SondeError(f"{kind} has no option {str(error).rpartition(' ')[2]}") from error
        raise
    probe = FittedProbe(
        kind,
        how.part,
        found.weight.float(),
        found.bias.float(),
        states.sites,
        how.supervised,
        None if found.template_scale is None else found.template_scale.float(),
        None if found.template_bias is None else found.template_bias.float(),
        {"n": len(used), **found.facts},
    )
    if how.supervised:
        return probe
    if y is None:
        return replace(probe, facts={**probe.facts, "sign": "sign unknown: no trusted labels"})
    return probe.calibrated(states, y, signs=signs, templates=templates)


def _labels(labels: ArrayLike | Tensor, n: int) -> Int[Tensor, " n"]:
    y = _numbers(labels, n, "labels")
    if not bool(((y >= -1) & (y <= 1)).all()):
        raise SondeError("labels are 1 for true, 0 for false and -1 for unknown")
    return y


def _maybe(values: ArrayLike | Tensor | None, n: int, what: str) -> Int[Tensor, " n"] | None:
    return None if values is None else _numbers(values, n, what)


def _numbers(values: ArrayLike | Tensor, n: int, what: str) -> Int[Tensor, " n"]:
    found = torch.as_tensor(values if isinstance(values, Tensor) else np.array(values))
    if (
        found.shape != (n,)
        or found.is_complex()
        or (found.is_floating_point() and bool((found != found.round()).any()))
    ):
        raise SondeError(f"{what} of shape {tuple(found.shape)}: expected a whole number for each of {n} rows")
    return found.long()
