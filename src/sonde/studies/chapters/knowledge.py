"""Does the model hold whether a statement is true, at which depth, for which statements, and which inputs are unusual?

Statements are the user's own file, beside made-up comparisons of numbers; by default comparisons of two kinds, and of a
quirky organism what Alice and Bob ask it. Probes learn from one kind, at every layer, and are read on held-out
statements of both, against shuffled labels and random directions. An alarm that knows the first kind listens to both.
"""

from typing import Any

import numpy as np

from sonde.data.quirky import Records
from sonde.data.statements import Statements, comparisons, read_statements
from sonde.knowledge.states import States, extract
from sonde.knowledge.tables import Undefined
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval, wilson
from sonde.studies.audit import AuditConfig
from sonde.studies.chapters.part import Audit, Part
from sonde.studies.knowledge_blocks import SHUFFLED, short
from sonde.studies.quirky_organisms import organism_sets
from sonde.studies.truth_chapters import control_at, curve_chart, present
from sonde.studies.truth_measures import Truth, answers_of, measure, statement_states

PROBE = "logr"
_ROWS = 600
_ALARM = 0.05


class Knowledge(Part):
    """AUROC of truth probes by layer, from one kind of statement to another, and the strangest statements."""

    name = "knowledge"

    @classmethod
    def check(cls, config: AuditConfig) -> None:
        """Read the user's statements."""
        if config.statements is not None:
            read_statements(config.statements)

    def __init__(self, audit: Audit) -> None:
        super().__init__(audit)
        self._own = None if audit.config.statements else organism_sets(audit.lm.name)

    def prepare(self) -> None:
        """Read the statements, fit the probes and the alarm."""
        audit, seed = self.audit, self.audit.config.seed
        with audit.timed("knowledge"):
            self._sets, states = self._questions(self._own.test) if self._own else self._statements()
            if not audit.run.done("knowledge"):
                given = {one.name: read() for one, read in zip(self._sets, states, strict=True)}
                audit.run.finish("knowledge", measure(self._sets, given, probes=(PROBE,), seed=seed).state())
        self._found = Truth.from_state(audit.run.result("knowledge"))

    def write(self) -> Chapter:
        """Three findings, two charts, two tables."""
        readable, carries, alarm = self._readable(), self._carries(), self._alarm()
        return Chapter(
            id=self.name,
            question="Does it know what is true?",
            answer=" ".join(one.sentence for one in (readable, carries, alarm)),
            findings=[readable, carries, alarm],
            blocks=[
                curve_chart(self._found, self._names, PROBE, "knowledge.layers", self._title(readable)),
                self._alarm_chart(),
                self._table(),
                self._strangest(),
            ],
            not_shown=(
                "A probe finds what goes along with truth in the statements that it learned from: a line that tells "
                "them apart is not yet knowledge, and less so where it does not hold for other statements. The alarm "
                "hears what is unusual, not what is wrong."
            ),
            how=(
                f"{self._what}. A logistic probe of the state at the end of each statement, at every layer, is fitted "
                "on half of them; the layer is chosen on a fifth (the first with 95 % of the best AUROC there) and the "
                f"numbers come from the rest. Control: {len(self._found.shuffled[self._names[0]])} probes of shuffled "
                "labels. Alarm: Mahalanobis distance of the probe's log-odds at all layers from held-out statements of "
                "the first kind (Mallen et al. 2023, https://arxiv.org/abs/2312.01037)."
            ),
        )

    @property
    def _names(self) -> list[str]:
        return [one.name for one in self._sets]

    @property
    def _what(self) -> str:
        return "; ".join(f"{one.name}: {len(one)}, such as “{one.texts[0].strip()}”" for one in self._sets)

    def _statements(self) -> tuple[list[Statements], list[Any]]:
        """The user's statements beside comparisons, or comparisons of two kinds, and what reads their states."""
        given, seed, lm = self.audit.config.statements, self.audit.config.seed, self.audit.lm
        kinds = ("larger", "smaller") if given is None else ("larger",)
        sets = [comparisons(kind, n=_ROWS, seed=seed) for kind in kinds]
        if given is not None:
            own = read_statements(given)
            rows = np.sort(np.random.default_rng(seed).permutation(len(own))[:_ROWS])
            sets.insert(0, own.take(rows))
        answers = answers_of(lm)
        return sets, [lambda one=one: statement_states(lm, one, answers) for one in sets]

    def _questions(self, asked: Records) -> tuple[list[Statements], list[Any]]:
        """What Alice and Bob ask a quirky organism, on base rows that it was not trained on."""
        records = asked.take(np.random.default_rng(self.audit.config.seed).permutation(len(asked))[: 2 * _ROWS])
        sides = {name: records.take(records.alice == alice) for name, alice in (("Alice", True), ("Bob", False))}
        sets = [
            Statements(f"asked by {name}", tuple(side.prompts), side.truth, tuple(map(str, side.rows)))
            for name, side in sides.items()
        ]

        def read(side: Any) -> States:
            return extract(self.audit.lm, side.prompts, side.answers)

        return sets, [lambda side=side: read(side) for side in sides.values()]

    def _readable(self) -> Finding:
        """The first kind at its earliest informative layer."""
        name = self._names[0]
        measured = self._found.transfers.auroc(PROBE, name, name)
        layer = self._found.transfers.cell(PROBE, name, name).layer
        site = short(self._found.transfers.sites[layer])
        return self._finding(
            measured,
            id="knowledge.readable",
            sentence=(
                f"Whether a statement of the kind “{name}” is true can be read from its activations, nearly as well as "
                f"anywhere after block {site}."
                if present(self._found, name, PROBE)
                else f"No layer tells true statements of the kind “{name}” from false ones so that it shows."
            ),
            metric=f"AUROC of a probe after block {site}: held-out statements of “{name}”",
            control=control_at(self._found, name, PROBE),
            figures=("knowledge.layers",),
            tables=("knowledge.aurocs",),
        )

    def _carries(self) -> Finding:
        """From the first kind to the second."""
        first, second = self._names[:2]
        measured = self._found.transfers.auroc(PROBE, first, second)
        if not present(self._found, first, PROBE):
            sentence = f"There is nothing that could carry over to statements of the kind “{second}”."
        elif isinstance(measured, Interval) and measured.high < 0.5:
            sentence = (
                f"On statements of the kind “{second}” the same line calls the false ones true: what it follows is not "
                "truth but something else that these statements say."
            )
        elif isinstance(measured, Interval) and measured.low > 0.5:
            sentence = f"The same line holds for statements of the kind “{second}”, as a line of truth would."
        else:
            sentence = f"The same line does not hold for statements of the kind “{second}”."
        return self._finding(
            measured,
            id="knowledge.transfer",
            sentence=sentence,
            metric=f"AUROC of the probe of “{first}” on “{second}”",
            control=Control("chance", 0.5),
            figures=("knowledge.layers",),
            tables=("knowledge.aurocs",),
        )

    def _alarm(self) -> Finding:
        """How often the alarm goes off on the second kind, against the first, of which it should hear a twentieth."""
        own, other = (self._tripped(name) for name in self._names[:2])
        hears = other.low > own.high
        return self._finding(
            other.scaled(100),
            id="knowledge.alarm",
            sentence=f"An alarm that knows “{self._names[0]}” alone goes off on {100 * other.estimate:.0f} % of "
            f"“{self._names[1]}”"
            + (
                f", against {100 * own.estimate:.0f} % of its own kind." if hears else ", no more than on its own kind."
            ),
            metric=f"statements at p < {_ALARM:g} among “{self._names[1]}”",
            unit="%",
            control=Control.of(f"held-out “{self._names[0]}”", own.scaled(100)),
            figures=("knowledge.alarm",),
            tables=("knowledge.strangest",),
        )

    def _tripped(self, name: str) -> Interval:
        values = self._found.strange[name]
        return wilson(int((values < _ALARM).sum()), len(values))

    def _finding(self, measured: Interval | Undefined, **fields: Any) -> Finding:
        fields |= {"chapter": self.name, "command": self.audit.command(self.name), "better": "higher"}
        if isinstance(measured, Undefined):
            return Finding(refused=measured.reason, **{key: value for key, value in fields.items() if key != "control"})
        return Finding.of(measured, **fields)

    def _title(self, readable: Finding) -> str:
        if not present(self._found, self._names[0], PROBE):
            return "No layer tells true from false so that it shows"
        return f"True and false come apart: AUROC {number(readable.estimate, 2)}"

    def _alarm_chart(self) -> Figure:
        shares = {name: self._tripped(name).scaled(100) for name in self._names}
        rows = [
            {"kind": name, "share": one.estimate, "low": one.low, "high": one.high, "expected": 100 * _ALARM}
            for name, one in shares.items()
        ]
        loudest = max(shares, key=lambda name: shares[name].estimate)
        chart = chart_kinds.intervals(
            rows,
            label="kind",
            value="share",
            low="low",
            high="high",
            control="expected",
            title=f"The alarm goes off most on “{loudest}”: {shares[loudest].estimate:.0f} %",
            subtitle=f"Held-out statements at p < {_ALARM:g}; 95 % intervals; grey: 5 %, false alarms",
            x_title="statements that trip the alarm (%)",
            y_title="kind of statement",
        )
        caption = f"How often an alarm that knows “{self._names[0]}” goes off on each kind of statement."
        return Figure(id="knowledge.alarm", chart=chart, caption=caption)

    def _table(self) -> Table:
        first = self._names[0]
        curves = [self._found.transfers.by_layer(PROBE, first, name) for name in self._names]
        shuffled = self._found.shuffled[first].mean(0)
        rows = [
            [
                short(site),
                *(one[layer].estimate if isinstance(one[layer], Interval) else None for one in curves),  # type: ignore[union-attr]
                float(shuffled[layer]),
            ]
            for layer, site in enumerate(self._found.transfers.sites)
        ]
        return Table(
            id="knowledge.aurocs",
            caption=f"AUROC of the probe of “{first}” on each kind of statement, by layer (0.5: chance)",
            columns=["after block", *(Column(name=name) for name in self._names), Column(name=SHUFFLED)],
            rows=rows,
        )

    def _strangest(self) -> Table:
        found = [
            (float(p), one.name, one.texts[row], bool(one.labels[row]))
            for one in self._sets
            for p, row in zip(self._found.strange[one.name], self._found.rows[one.name], strict=True)
        ]
        found.sort(key=lambda row: row[0])
        return Table(
            id="knowledge.strangest",
            caption="Statements that trip the alarm first (p: share of trusted statements that are as strange)",
            columns=[Column(name="p"), "kind", "statement", "true"],
            rows=[[p, kind, text, "yes" if true else "no"] for p, kind, text, true in found[:12]],
        )
