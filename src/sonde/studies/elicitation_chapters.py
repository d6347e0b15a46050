"""Chapters that studies of prompts share: a behaviour's curve with its controls, and its information in bits."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sonde.prompts.claims import Claim, Elicited, claim
from sonde.prompts.control_model import SHUFFLED
from sonde.prompts.curve import MOSTLY, Curve, Threshold
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.stats.intervals import Interval

if TYPE_CHECKING:
    from sonde.prompts.bits import Bits

CITE = "Nordby 2025, arXiv:2505.14943"
_CONTROLS = ("control model", "random targets")


def curve_chapter(
    found: Elicited,
    *,
    name: str,
    command: str,
    threshold: Threshold = MOSTLY,
    bits: "Bits | None" = None,
    said: str = "",
) -> Chapter:
    """Question, curves, table and bits of one behaviour on one model. `said` is more to say in the answer."""
    known = None if bits is None or math.isinf(bits.quantised) else bits.quantised
    told = claim(found, threshold, bits=known)
    finding = curve_finding(found, told, name=name, command=command, threshold=threshold)
    blocks: list[Any] = [
        loss_figure(found, name, threshold),
        rate_figure(found, name),
        curve_table(found, name, threshold),
    ]
    if bits is not None:
        blocks.append(bits_table(bits, name, found.curve.conditional_distance(threshold)))
    return Chapter(
        id=name,
        question=f"How much prompting makes {found.model} {found.behaviour}?",
        answer=" ".join(part for part in (told.sentence, told.reason, _verdict(told, found), said) if part),
        findings=[finding],
        blocks=blocks,
        not_shown=(
            "A prompt that was not found may exist: these are upper bounds on what a push takes. "
            + (f"The control model is {found.control_name}. " if found.control_name else "")
            + "What trained vectors do, words need not be able to do."
        ),
        how=how(found, threshold),
    )


def how(found: Elicited, threshold: Threshold) -> str:
    """How a curve was measured."""
    curve = found.curve
    where = "on contexts that no prompt was trained on" if found.held_out else "on the contexts of training"
    return (
        f"{curve.n_restarts} prompts a length, trained by AdamW on vectors alone, the best chosen on other contexts "
        f"and reported {where}: {curve.nats.shape[2]} targets of {curve.tokens.mean():.3g} tokens on average, the same "
        f"tokens at every length. Bands: 95 % over contexts. To work is to reach {threshold}. After {CITE}."
    )


def curve_finding(
    found: Elicited, told: Claim, *, name: str, command: str, threshold: Threshold = MOSTLY, **fields: Any
) -> Finding:
    """What the prompt of C tokens does, against the control model under one of as many tokens.

    Where no length works, what the longest does against the threshold. Successes, or losses for a threshold of nats.
    """
    distance, rates = found.curve.conditional_distance(threshold), threshold.success is not None
    n = found.curve.lengths[-1] if math.isinf(distance) else int(distance)

    def at(curve: Curve) -> Interval:
        return curve.rate(n) if rates else curve.loss(n)

    against: dict[str, Any]
    if found.control is None:
        against = {"control_reason": told.reason}
    elif math.isinf(distance):
        limit = threshold.success if rates else threshold.nats
        against = {"control": Control(f"what counts as working: {threshold}", limit or 0.0)}
    else:
        against = {"control": Control.of("control model", at(found.control))}
    fields = {"chapter": name, "figures": (f"{name}.curve",), "tables": (f"{name}.lengths",)} | fields
    return Finding.of(
        at(found.curve),
        id=f"{name}.push",
        sentence=f"{told.sentence} {told.reason}".strip(),
        metric=f"{'share of exact targets' if rates else 'loss of the whole target'} with {n} prompt tokens",
        unit="" if rates else "nats",
        better="higher" if rates else "lower",
        command=command,
        **against,
        **fields,
    )


def loss_figure(found: Elicited, name: str, threshold: Threshold) -> Figure:
    """L*(n) of the behaviour and of its controls."""
    curve = found.curve
    rows = [
        {"n": i, "curve": label, "nats": loss.estimate, "low": loss.low, "high": loss.high}
        for label, one in found.curves.items()
        for i, loss in enumerate(one.loss(n) for n in one.lengths)
    ]
    distance = curve.conditional_distance(threshold)
    bare, last = curve.loss(0).estimate, curve.loss(curve.lengths[-1]).estimate
    title = (
        f"From {bare:.3g} to {last:.3g} nats by {curve.lengths[-1]} tokens; "
        + (f"it works from {distance:.0f} on" if math.isfinite(distance) else "it does not work")
    )  # fmt: skip
    made = _lines(rows, curve, "nats", title, "loss (nats of the whole target)", found)
    return Figure(id=f"{name}.curve", chart=made, caption=f"Loss by number of prompt tokens: {found.behaviour}.")


def rate_figure(found: Elicited, name: str) -> Figure:
    """Share of exact targets of the behaviour and of its controls."""
    rows = [
        {"n": i, "curve": label, "share": rate.estimate, "low": rate.low, "high": rate.high}
        for label, one in found.curves.items()
        for i, rate in enumerate(one.rate(n) for n in one.lengths)
    ]
    best = max(found.curve.rate(n).estimate for n in found.curve.lengths)
    made = _lines(
        rows,
        found.curve,
        "share",
        f"Exactly right on {best:.0%} of the contexts at best",
        "share of exact targets",
        found,
    )
    return Figure(id=f"{name}.success", chart=made, caption=f"Exact successes by prompt tokens: {found.behaviour}.")


def curve_table(found: Elicited, name: str, threshold: Threshold) -> Table:
    """All curves by length, best and median restart."""
    columns = ["curve", "n", "loss", "low", "high", "median loss", "success", "median success"]
    rows = [
        [label, row["n"], row["nats"], row["low"], row["high"], row["median"], row["success"], row["median_success"]]
        for label, curve in found.curves.items()
        for row in curve.rows()
    ]
    ends = "; ".join(f"{label}: {distance_text(curve, threshold)}" for label, curve in found.curves.items())
    caption = f"Loss in nats of the whole target and share of exact targets. Distance C and saturation S: {ends}"
    return Table(id=f"{name}.lengths", caption=caption, columns=[Column(name=c) for c in columns], rows=rows)


def distance_text(curve: Curve, threshold: Threshold = MOSTLY) -> str:
    """C with its interval, and S."""
    low, high = (tokens(value) for value in curve.distance_interval(threshold))
    return f"C = {tokens(curve.conditional_distance(threshold))} ({low} to {high}), S = {curve.saturation()}"


def tokens(distance: float) -> str:
    """A number of tokens that may be infinite."""
    return "∞" if math.isinf(distance) else f"{distance:.0f}"


def bits_table(bits: "Bits", name: str, n: float) -> Table:
    """The five rulers; a gap where no prompt of the kind works."""
    rows = [[ruler, None if math.isinf(value) else round(value, 1)] for ruler, value in bits.rows()]
    caption = f"Information in the prompt of {tokens(n)} tokens; a gap where no prompt of that kind was found to work"
    return Table(id=f"{name}.bits", caption=caption, columns=["ruler", Column(name="bits", digits=5)], rows=rows)


def summary_chapter(
    found: Sequence[tuple[Elicited, "Bits | None"]], *, command: str, threshold: Threshold = MOSTLY
) -> Chapter:
    """All behaviours on all models in one table."""
    rows = []
    for one, bits in found:
        known = {} if bits is None else dict(bits.rows())
        cells: list[Any] = [one.model, one.behaviour]
        for curve in (one.curve, one.control, one.random):
            cells.append("not measured" if curve is None else tokens(curve.conditional_distance(threshold)))
        cells += [
            known.get(kind) if math.isfinite(known.get(kind, math.inf)) else None for kind in ("quantised", "hard")
        ]
        told = claim(one, threshold).capability
        cells.append("capability" if told == "present" else told)
        rows.append(cells)
    shown = sum(row[-1] == "capability" for row in rows)
    return Chapter(
        id="summary",
        question="What can be elicited, and at what price?",
        answer=f"{shown} of {len(rows)} behaviours take fewer tokens than the control model and random strings do.",
        blocks=[
            Table(
                id="summary.distances",
                caption=f"Conditional distance in tokens ({threshold}), bits where it is finite, and what may be said",
                columns=[
                    *("model", "behaviour", "C", "C of the control model", "C of random targets"),
                    *(Column(name="quantised", unit="bits"), Column(name="hard", unit="bits"), "claim"),
                ],
                rows=rows,
            )
        ],
        not_shown="What longer prompts, other places and more steps would do.",
        how=f"One budget for a behaviour and its controls. Made by {command}",
    )


def _lines(rows: list[dict[str, Any]], curve: Curve, y: str, title: str, y_title: str, found: Elicited) -> Any:
    return chart_kinds.lines(
        rows,
        x="n",
        y=y,
        series="curve",
        low="low",
        high="high",
        title=title,
        subtitle=f"Making {found.model} {found.behaviour}; best restart, 95 % bands over contexts",
        x_title="prompt tokens",
        y_title=y_title,
        control=_CONTROLS,
        x_labels=[str(n) for n in curve.lengths],
    )


def _verdict(told: Claim, found: Elicited) -> str:
    if told.capability != "present":
        return ""
    if found.control_name == SHUFFLED:
        return (
            "Against a network that learned nothing this is a capability of the model; whether it is more than its "
            "language, only a model that was trained without the behaviour can tell."
        )
    return "So this is a capability of the model."
