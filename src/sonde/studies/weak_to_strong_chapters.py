"""The chapter of the report on weak to strong: the share of the gap by recipe, beside two controls."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.knowledge.recovered_gap import LEAST_GAP
from sonde.runs import chart_kinds
from sonde.runs.blocks import Block, Chapter, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.stats.intervals import Interval, bootstrap_mean, bootstrap_ratio, paired_difference

if TYPE_CHECKING:
    from sonde.studies.weak_to_strong import WeakToStrongConfig

_CITE = "Burns et al. 2023, arXiv:2312.09390"
_ERRORS, _LABELS = "errors shuffled", "labels shuffled"
_PLAIN = "xent"


@dataclass(frozen=True)
class Taught:
    """The runs of a study, one a seed, as `weak_to_strong` kept them. names: of the recipes."""

    config: "WeakToStrongConfig"
    runs: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    task: str
    command: str

    def areas(self, name: str) -> np.ndarray:
        """Test AUROC of every seed: of a recipe's students, the supervisor, the ceiling or a control."""
        return np.array([(run["students"][name] if name in self.names else run[name])["auroc"] for run in self.runs])

    def recovered(self, name: str) -> Interval | None:
        """The share of the gap with its interval over seeds; None where there is no gap to close."""
        floor, top = self.areas("supervisor"), self.areas("ceiling")
        if (top - floor).mean() < LEAST_GAP or (top - floor).min() < 0:
            return None
        return bootstrap_ratio(self.areas(name) - floor, top - floor, seed=self.config.seed)


def chapters(taught: Taught) -> list[Chapter]:
    """The one chapter."""
    rows = {name: taught.recovered(name) for name in (*taught.names, _ERRORS, _LABELS)}
    shares = {name: one for name, one in rows.items() if one is not None}
    floor, top = (float(taught.areas(which).mean()) for which in ("supervisor", "ceiling"))
    blocks: list[Block] = []
    if shares:
        blocks.append(Figure(id="gap.recipes", chart=_chart(taught, shares), caption="Share of the gap by recipe."))
    blocks.append(_table(taught, rows))
    if not shares:
        answer = f"There is no gap: the supervisor's AUROC is {floor:.3f}, the ceiling's {top:.3f}."
    else:
        best = max(taught.names, key=lambda name: shares[name].estimate)
        answer = (
            f"Taught with weak labels alone, by cross-entropy, the student {_outcome(shares[_PLAIN])} between its "
            f"supervisor ({floor:.3f}) and its ceiling ({top:.3f}); with the best recipe, {best}, the share is "
            f"{_two(shares[best])}."
        )
    run = taught.runs[0]
    return [
        Chapter(
            id="gap",
            question="How much of the gap does a student close that weak labels alone have taught?",
            answer=answer,
            findings=[_main(taught, shares), *_better(taught, shares)],
            blocks=blocks,
            not_shown=(
                "How a larger student would do: supervisor, student and ceiling are of one task and one size. The best "
                "of many recipes looks a little too good."
            ),
            how=(
                f"{run['rows']:,} weak labels, {run['test']:,} test rows, {len(taught.runs)} seeds. AUROCs are "
                "averaged before the ratio, and seeds resampled for the intervals. With errors shuffled the same "
                "errors are dealt anew among the rows, so that they cannot be learned; with labels shuffled the labels "
                "say nothing. The "
                f"ceiling learns as many true labels by cross-entropy. After {_CITE}."
            ),
        )
    ]


def _main(taught: Taught, shares: dict[str, Interval]) -> Finding:
    shared: dict[str, Any] = {
        "id": "gap.xent",
        "chapter": "gap",
        "metric": "share of the gap between supervisor and ceiling recovered, AUROC, cross-entropy",
        "command": taught.command,
        "better": "higher",
        "tables": ("gap.all",),
    }
    if _PLAIN not in shares:
        floor, top = (float(taught.areas(which).mean()) for which in ("supervisor", "ceiling"))
        return Finding(
            sentence=f"On {taught.task} there is no gap for a student to close.",
            refused=f"the ceiling's AUROC, {top:.3f}, is less than {LEAST_GAP} above the supervisor's, {floor:.3f}, or "
            "below it in a seed",
            **shared,
        )
    one = shares[_PLAIN]
    return Finding.of(
        one,
        sentence=(
            f"On {taught.task} a student taught by weak labels alone {_outcome(one)} between its supervisor and its "
            f"ceiling; with the same errors dealt anew among the rows, so that they cannot be learned, the share is "
            f"{_two(shares[_ERRORS])}, and with labels that say nothing {_two(shares[_LABELS])}."
        ),
        control=Control("the supervisor itself", 0.0),
        figures=("gap.recipes",),
        **shared,
    )


def _outcome(one: Interval) -> str:
    if one.low > 0:
        return f"recovers {_two(one)} of the gap"
    return f"shows no recovery ({_two(one)}) of the gap"


def _two(one: Interval) -> str:
    return f"{round(one.estimate, 2) + 0.0:.2f}"


def _better(taught: Taught, shares: dict[str, Interval]) -> list[Finding]:
    """The best other recipe against cross-entropy, by AUROC."""
    others = [name for name in taught.names if name != _PLAIN]
    if not shares or not others:
        return []
    best = max(others, key=lambda name: shares[name].estimate)
    gain = paired_difference(taught.areas(best), taught.areas(_PLAIN), seed=taught.config.seed)
    return [
        Finding.of(
            gain,
            id="gap.best-recipe",
            chapter="gap",
            sentence=(
                f"Of {len(others)} other recipes {best} does best, with an AUROC of {taught.areas(best).mean():.3f} "
                f"where cross-entropy has {taught.areas(_PLAIN).mean():.3f}."
            ),
            metric="test AUROC of the best other recipe less that of cross-entropy",
            better="higher",
            control=Control("no difference", 0.0),
            command=taught.command,
            figures=("gap.recipes",),
            tables=("gap.all",),
        )
    ]


def _chart(taught: Taught, shares: dict[str, Interval]) -> Any:
    shown = sorted((name for name in shares if name != _LABELS), key=lambda name: -shares[name].estimate)
    named = {_ERRORS: "xent, errors shuffled"}
    rows = [
        {"recipe": named.get(name, name), "share": i.estimate, "low": i.low, "high": i.high}
        for name in shown
        for i in (shares[name],)
    ]
    return chart_kinds.intervals(
        rows,
        label="recipe",
        value="share",
        low="low",
        high="high",
        title=f"With cross-entropy the student {_outcome(shares[_PLAIN])}",
        subtitle=f"Share of the gap to the ceiling, 1 is all of it; 95 % over {len(taught.runs)} seeds",
        x_title="share of the gap recovered",
        y_title="how the student learns",
        reference=("the supervisor", 0.0),
    )


def _table(taught: Taught, rows: dict[str, Interval | None]) -> Table:
    cells = []
    for name in ("supervisor", *rows, "ceiling"):
        area = bootstrap_mean(taught.areas(name), seed=taught.config.seed)
        share = rows.get(name)
        label = f"xent, {name}" if name in (_ERRORS, _LABELS) else name
        cells.append(
            [
                label,
                f"{area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]",
                "" if share is None else f"{share.estimate:.2f} [{share.low:.2f}, {share.high:.2f}]",
            ]
        )
    return Table(
        id="gap.all",
        caption="Test AUROC and the share of the gap recovered, with 95 % intervals over seeds",
        columns=["who", "AUROC", "share of the gap"],
        rows=cells,
    )
