"""Can the model be steered, and how much does it take? Dose and response along a contrast.

The contrast is built in (sentences about the sea, and the same sentences about a forest), or the user's own file of
text pairs. A vector from one half of the pairs is added at the middle of the network; the other half says how far the
model then leans towards the one kind of text.
"""

from sonde.concepts.dose_response import DoseResponse, default_pairs, dose_response, read_pairs
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control as ControlValue
from sonde.runs.finding import Finding
from sonde.stats.intervals import bootstrap_mean, bootstrap_means
from sonde.studies.audit import AuditConfig
from sonde.studies.chapters.part import Part

_STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
_RANDOM = 8


class Control(Part):
    """Preference for one kind of text against the strength of a steering vector."""

    name = "control"

    @classmethod
    def check(cls, config: AuditConfig) -> None:
        """Read the user's contrast."""
        if config.contrast is not None:
            read_pairs(config.contrast).halves()

    def write(self) -> Chapter:
        """One finding, one chart, one table."""
        lm, given = self.audit.lm, self.audit.config.contrast
        self._pairs = default_pairs() if given is None else read_pairs(given)
        site = f"resid_post.{int(0.47 * lm.n_layers)}"
        with self.audit.timed("steering"):
            found = dose_response(
                lm, self._pairs, site=site, strengths=_STRENGTHS, n_random=_RANDOM, seed=self.audit.config.seed
            )
        finding = self._finding(found)
        return Chapter(
            id=self.name,
            question="Can it be steered?",
            answer=finding.sentence,
            findings=[finding],
            blocks=[
                self._chart(found, f"Steered, it leans by {abs(finding.estimate or 0.0):.2f} nats per token"),
                self._table(found),
            ],
            not_shown=(
                "One contrast at one layer. That it can be steered there says nothing about other behaviours, and a "
                "model that leans towards a text need not write it well. Large strengths break any model."
            ),
            how=(
                f"Pairs of texts: {self._pairs.name}. The vector is the difference of the mean activations at {site} "
                f"on {len(self._pairs.positive[::2])} pairs, at the third token from the end, and is added at all "
                f"tokens times the strength. Preference: log-likelihood per token of the positive less that of the "
                f"negative text, on the {found.preference.shape[1]} other pairs. Control: {_RANDOM} random "
                f"directions of the same length ({found.norm:.3g})."
            ),
        )

    def _finding(self, found: DoseResponse) -> Finding:
        """How much preference moves over all strengths, against random directions, whichever way they move it."""
        moved = bootstrap_mean((found.preference[-1] - found.preference[0]).numpy())
        others = (found.random[:, -1] - found.random[:, 0]).mean(1).abs()
        control = bootstrap_mean(others.numpy())
        by = f"{abs(moved.estimate):.2f} nats per token"
        sentence = (
            f"Steering moves its preference between the two kinds of text by {by}, random directions by "
            f"{control.estimate:.2f}."
        )
        return Finding.of(
            moved,
            id="control.response",
            chapter=self.name,
            sentence=sentence,
            metric="rise of the preference from strength −2 to 2",
            unit="nats per token",
            better="higher",
            control=ControlValue.of("random directions, absolute", control),
            command=self.audit.command(self.name),
            figures=("control.dose",),
            tables=("control.strengths",),
        )

    def _chart(self, found: DoseResponse, title: str) -> Figure:
        # each pair against itself unsteered: what the two texts differ in anyway is the same at all strengths
        zero = found.strengths.index(0.0)
        shift = (found.preference - found.preference[zero]).T.numpy()
        others = (found.random - found.random[:, zero : zero + 1]).mean(2).T
        rows = [
            {"strength": strength, "nats": one.estimate, "low": one.low, "high": one.high, "direction": "contrast"}
            for strength, one in zip(found.strengths, bootstrap_means(shift), strict=True)
        ]
        rows += [
            {"strength": strength, "nats": float(one.mean()), "low": float(one.min()), "high": float(one.max())}
            | {"direction": "random"}
            for strength, one in zip(found.strengths, others, strict=True)
        ]
        chart = chart_kinds.lines(
            rows,
            x="strength",
            y="nats",
            low="low",
            high="high",
            series="direction",
            control=("random",),
            title=title,
            subtitle=f"Shift from the unsteered model, 95 % band over pairs; grey: {_RANDOM} random directions",
            x_title="strength (in differences of means)",
            y_title="shift (nats per token)",
        )
        caption = f"Dose and response: preference for {self._pairs.name} against the strength of steering."
        return Figure(id="control.dose", chart=chart, caption=caption)

    def _table(self, found: DoseResponse) -> Table:
        means = found.preference.mean(1).tolist()
        others = found.random.mean(2)
        rows = [
            [strength, means[i], float(others[:, i].min()), float(others[:, i].max())]
            for i, strength in enumerate(found.strengths)
        ]
        return Table(
            id="control.strengths",
            caption="Preference by strength, in nats per token",
            columns=[
                Column(name="strength"),
                Column(name="contrast"),
                Column(name="random, least"),
                Column(name="random, most"),
            ],
            rows=rows,
        )
