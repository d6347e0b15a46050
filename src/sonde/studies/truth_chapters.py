"""What the study of truth probes reports: where true and false come apart, and what carries over to others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sonde.data.statements import Statements
from sonde.knowledge.agreement import agreement
from sonde.knowledge.tables import Cell, IntervalTable, Undefined
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Figure
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.runs.run import Run
from sonde.stats.intervals import Interval
from sonde.studies.knowledge_blocks import RANDOM, SHUFFLED, interval_block, layer_chart, percentiles, short
from sonde.studies.truth_measures import Truth

if TYPE_CHECKING:
    from sonde.studies.truth_probes import TruthProbesConfig

_LINES = 3  # sets whose curves one chart holds


def chapters(
    found: Truth, sets: Sequence[Statements], run: Run, config: "TruthProbesConfig", command: str
) -> list[Chapter]:
    """Two chapters: within each set, and (with several) from each to the others."""
    probe = config.probes[0]
    made = [_within(found, sets, probe, run, command)]
    return [*made, _across(found, sets, probe, run, command)] if len(sets) > 1 else made


def control_at(found: Truth, name: str, probe: str) -> Control:
    """What a probe of shuffled labels reads at the layer where the probe is read."""
    values = found.shuffled[name][:, found.transfers.cell(probe, name, name).layer]
    return Control(SHUFFLED, float(values.mean()), (float(values.min()), float(values.max())))


def present(found: Truth, name: str, probe: str) -> bool:
    """Whether the truth of a set shows: clear of shuffled labels and of random directions at that layer."""
    one = found.transfers.auroc(probe, name, name)
    layer = found.transfers.cell(probe, name, name).layer
    limits = (control_at(found, name, probe).interval or (1.0, 1.0))[1], percentiles(found.random[name][:, layer])[1]
    return isinstance(one, Interval) and one.low > max(limits)


def curve_chart(found: Truth, names: Sequence[str], probe: str, figure: str, title: str) -> Figure:
    """AUROC within each of a few sets by layer; the controls are those of the first."""
    return layer_chart(
        figure,
        {name: found.transfers.by_layer(probe, name, name) for name in names[:_LINES]},
        {RANDOM: found.random[names[0]], SHUFFLED: found.shuffled[names[0]]},
        found.transfers.sites,
        title=title,
        subtitle="AUROC of true against false; bands: 95 % over held-out statements; grey: 95 % of the controls' draws",
        caption="How well true and false statements can be told apart at each layer, with both controls.",
    )


def _within(found: Truth, sets: Sequence[Statements], probe: str, run: Run, command: str) -> Chapter:
    findings, names = [], [one.name for one in sets]
    for place, name in enumerate(names):
        measured = found.transfers.auroc(probe, name, name)
        site = found.transfers.sites[found.transfers.cell(probe, name, name).layer]
        there = present(found, name, probe)
        sentence = (
            f"True and false statements of “{name}” come apart along a line, first after block {short(site)}."
            if there
            else f"No layer tells true statements of “{name}” from false ones so that it shows."
        )
        findings.append(
            _finding(
                measured,
                id=f"within.set-{place}",
                chapter="within",
                sentence=sentence,
                metric=f"AUROC of {probe} on held-out statements of “{name}”, at the earliest informative layer",
                better="higher",
                control=control_at(found, name, probe),
                command=command,
                figures=("within.layers",),
                tables=("within.probes",),
            )
        )
    table = IntervalTable(
        "AUROC within each set at the earliest informative layer",
        ("probe", *names, "sign"),
        tuple(_probe_row(found, other, [(name, name) for name in names]) for other in found.transfers.probes),
    )
    best = max((one.estimate for one in findings if one.estimate is not None), default=float("nan"))
    title = f"True and false come apart with an AUROC of {number(best, 2)} at best"
    return Chapter(
        id="within",
        question="At which depth does it tell true from false?",
        answer=" ".join(one.sentence for one in findings),
        findings=findings,
        blocks=[
            curve_chart(found, names, probe, "within.layers", title),
            interval_block("within.probes", table, run=run),
            interval_block("within.agreement", _agreement(found, names[0]), run=run),
        ],
        not_shown=(
            "What goes along with truth in these statements (likely words, frequent names) reads as truth. Other "
            "statements, in the next chapter, tell more."
        ),
        how=(
            "State of the last token of each statement, or of the answer behind it. Probes are fitted on half of the "
            "statements, the layer is chosen on a fifth and the numbers come from the rest; what belongs together is "
            f"never split. Control: {len(found.shuffled[names[0]])} probes of shuffled labels (least to most), and "
            f"{len(found.random[names[0]])} random directions with their sign from the training half."
        ),
    )


def _across(found: Truth, sets: Sequence[Statements], probe: str, run: Run, command: str) -> Chapter:
    names = [one.name for one in sets]
    pairs = [(a, b) for a in names for b in names if a != b]
    findings, cells = [], []
    for place, (a, b) in enumerate(pairs):
        measured = found.transfers.auroc(probe, a, b)
        if isinstance(measured, Interval):
            verdict = (
                "carries over"
                if measured.low > 0.5
                else "is turned round"
                if measured.high < 0.5
                else "does not carry over"
            )
        else:
            verdict = "cannot be held against them"
        findings.append(
            _finding(
                measured,
                id=f"across.pair-{place}",
                chapter="across",
                sentence=f"What {probe} learned from “{a}” {verdict} to “{b}”."
                if verdict != "is turned round"
                else f"What {probe} learned from “{a}” {verdict} in “{b}”: it calls the false ones true.",
                metric=f"AUROC of {probe} from “{a}” on “{b}”",
                better="higher",
                control=Control("chance", 0.5),
                command=command,
                figures=("across.heat",),
                tables=("across.probes",),
            )
        )
    for y, a in enumerate(names):
        for x, b in enumerate(names):
            one = found.transfers.auroc(probe, a, b)
            if isinstance(one, Interval):
                cells.append({"test": x, "train": y, "auroc": one.estimate})
    worst = min(cells, key=lambda cell: cell["auroc"])
    heat = chart_kinds.heat(
        cells,
        x="test",
        y="train",
        value="auroc",
        title=f"Worst from {names[worst['train']]} to {names[worst['test']]}: AUROC {number(worst['auroc'], 2)}",
        subtitle=f"AUROC of {probe} at its earliest informative layer; 0.5 is chance, 0 the wrong way round",
        x_title="tested on",
        y_title="trained on",
        x_labels=names,
        y_labels=names,
    )
    table = IntervalTable(
        "AUROC from set to set at the earliest informative layer",
        ("probe", *(f"{a} to {b}" for a, b in pairs), "sign"),
        tuple(_probe_row(found, other, pairs) for other in found.transfers.probes),
    )
    shown = (
        findings if len(findings) <= 4 else [*sorted(findings, key=lambda one: one.estimate or 0.0)[:2], findings[0]]
    )
    return Chapter(
        id="across",
        question="Does what it learned from one kind of statement hold for another?",
        answer=" ".join(dict.fromkeys(one.sentence for one in shown)),
        findings=findings,
        blocks=[
            Figure(id="across.heat", chart=heat, caption="AUROC from every set of statements to every other."),
            interval_block("across.probes", table, run=run),
        ],
        not_shown="A direction that holds for all of these sets may still be another than truth.",
        how="The layer is that of the training set. Bases are held out in all sets at once.",
    )


def _finding(measured: Interval | Undefined, **fields: object) -> Finding:
    if isinstance(measured, Undefined):
        return Finding(refused=measured.reason, **{k: v for k, v in fields.items() if k != "control"})  # type: ignore[arg-type]
    return Finding.of(measured, **fields)


def _probe_row(found: Truth, probe: str, pairs: Sequence[tuple[str, str]]) -> tuple[Cell, ...]:
    known = [found.transfers.cells[probe, a, b].sign_known for a, b in pairs if (probe, a, b) in found.transfers.cells]
    return (
        probe,
        *(found.transfers.auroc(probe, a, b) for a, b in pairs),
        "known" if known and all(known) else "sign unknown",
    )


def _agreement(found: Truth, name: str) -> IntervalTable:
    cells = [found.transfers.cells.get((probe, name, name)) for probe in found.transfers.probes]
    said = {cell.probe: cell.log_odds[:, cell.layer] for cell in cells if cell is not None}
    rows: list[tuple[Cell, ...]] = []
    if len(said) > 1:
        rows = [
            (one.one, one.other, one.same, one.correlation)
            for one in agreement(said, found.transfers.targets[name].bases)
        ]
    return IntervalTable(
        f"Agreement of probes on held-out statements of “{name}”",
        ("probe", "other probe", "same verdict", "rank correlation"),
        tuple(rows),
    )
