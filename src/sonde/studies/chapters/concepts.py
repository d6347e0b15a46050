"""Which labelled concepts does the model carry from layer to layer, and what does it cost to take one away?

Probes in closed form are fitted at the input of every block on the first half of the text and scored on the second, for
class of token, capitals, part of speech (by rules) and place in the window, or for the user's own labels on a text of
their own. Then each concept is erased from everything that attention (or recurrence) and MLPs are given, and the loss
is held against that without a random subspace of as many dimensions.
"""

from typing import Any

import torch

from sonde.concepts.layer_probes import LayerProbes, ProbeFitting, ProbeScoring
from sonde.concepts.scrubbing import CleanRun, Scrub, cut_points
from sonde.data.labels import plain_texts, read_labels
from sonde.data.rule_tags import tagged
from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches
from sonde.lm.row_loss import RowLoss, row_loss
from sonde.lm.stream import Batch, feed
from sonde.lm.token_labels import TokenLabels
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval
from sonde.studies.audit import AuditConfig
from sonde.studies.chapters.part import Audit, Part

_FIT_TOKENS = 16384
_SCORED_TOKENS = 4096
_MOST_SITES = 9
_SHORT = 16
_SHUFFLED = "shuffled labels"


class Concepts(Part):
    """Probe accuracy by layer, and the loss after scrubbing, of several labelled concepts."""

    name = "concepts"

    def __init__(self, audit: Audit) -> None:
        super().__init__(audit)
        lm = audit.lm
        inputs = (*lm.match("resid_pre.*"), f"resid_post.{lm.n_layers - 1}")
        step = -(-len(inputs) // _MOST_SITES)
        self._sites = tuple(dict.fromkeys((*inputs[::step], inputs[-1])))
        self._own = audit.config.labels is not None
        self._fit, self._held = audit.fit, audit.held

    @classmethod
    def check(cls, config: AuditConfig) -> None:
        """Read the user's labels."""
        if config.labels is not None:
            read_labels(config.labels)

    @property
    def sites(self) -> tuple[str, ...]:
        """The input of every block (of some of many), unless the user's labels bring a text of their own."""
        return () if self._own else self._sites

    def prepare(self) -> None:
        """Label the tokens, fit probes and erasers in one pass, and take the losses."""
        audit = self.audit
        if self._own:
            self._fit, self._held = self._halves()
        self._concepts = self._labelled()
        with audit.timed("concepts"):
            if not audit.run.done("concepts"):
                fit = _first(self._fit, _FIT_TOKENS)
                probes = ProbeFitting(self._sites, fit, self._concepts, seed=audit.config.seed)
                clean = CleanRun(cut_points(audit.lm), fit, self._concepts, seed=audit.config.seed)
                feed(audit.lm, fit, [probes, clean], progress="concepts")
                audit.run.finish(
                    "concepts", {"probes": probes.finish().state(), "losses": self._losses(clean.finish())}
                )
            kept = audit.run.result("concepts")
            self._loss = [{name: _row_loss(loss) for name, loss in one.items()} for one in kept["losses"]]
            self._scoring = ProbeScoring(LayerProbes.from_state(kept["probes"]), self._held, self._concepts)
            if self._own:
                feed(audit.lm, self._held, [self._scoring], progress="probes")

    def update(self, batch: Batch) -> None:
        """Score the probes."""
        self._scoring.update(batch)

    def state(self) -> Any:
        """What was scored so far."""
        return self._scoring.state()

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        self._scoring.load(state)

    def write(self) -> Chapter:
        """Two findings, two charts, a table by layer."""
        skills = [[self._skill(i, site) for site in self._sites] for i in range(len(self._concepts))]
        present, cost = self._present(skills), self._cost()
        return Chapter(
            id=self.name,
            question="What does it know about its words, and does it need to?",
            answer=f"{present.sentence} {cost.sentence}",
            findings=[present, cost],
            blocks=[self._skill_chart(skills, present.sentence), self._cost_chart(cost.sentence), self._table()],
            not_shown=(
                "That a concept can be read does not mean that the model uses it; that erasing it costs does not mean "
                "that the concept itself is used, and not something that goes along with it. "
                + ("" if self._own else "The rules that label words are right about five times in six.")
            ),
            how=(
                "Linear discriminants with one covariance, in closed form, at the input of blocks, fitted on the first "
                "half of the text (at most 16,384 tokens) and scored on the second. LEACE (Belrose et al. 2023, "
                "https://arxiv.org/abs/2306.03819) erases a concept from the inputs of all mixers and MLPs, fitted on "
                "the unedited run; the study concept-scrubbing fits one eraser after another, which takes out more. "
                "Losses are paired over windows. Intervals: bootstrap over windows."
            ),
        )

    def _halves(self) -> tuple[TokenBatches, TokenBatches]:
        """The user's labelled text, whose second half is held."""
        lm = self.audit.lm
        if lm.tokenizer is None or not lm.tokenizer.is_fast:
            raise SondeError("--labels need a fast tokenizer, which says where in the text its tokens are")
        labelled = read_labels(str(self.audit.config.labels))
        context = min(self.audit.fit.context, 256)
        batches = TokenBatches(
            list(labelled.texts), lm.tokenizer, context=context, limit_tokens=self.audit.config.tokens
        )
        self._labels = labelled
        return batches.split(0.5)

    def _labelled(self) -> list[TokenLabels]:
        """The concepts: the user's first, then those of the rules that occur in the text."""
        lm, fit = self.audit.lm, _first(self._fit, _FIT_TOKENS)
        found = []
        if self._own:
            found.append(TokenLabels.of(fit, self._labels))
            texts = list(self._labels.texts)
        elif lm.tokenizer is not None and lm.tokenizer.is_fast:
            texts = plain_texts(self.audit.config.text, int(fit.extents()[0][-1]) + 1)
        else:
            texts = []
        for concept in ("pos", "class", "capitals") if texts else ():
            try:
                found.append(TokenLabels.of(fit, tagged(texts, concept)))
            except SondeError:  # a text of one class, such as one without capitals
                continue
        return [*found, TokenLabels.by_place(fit.context)] if fit.context > _SHORT else found

    def _losses(self, scrubs: list[tuple[Scrub, Scrub]]) -> list[dict[str, Any]]:
        """Loss of some held rows: as it is, scrubbed, and without a random subspace, for each concept."""
        held = _first(self._held, _SCORED_TOKENS)
        clean = row_loss(self.audit.lm, held)
        return [
            {
                "clean": _tree(clean),
                "leace": _tree(row_loss(self.audit.lm, held, leace.edits, progress=f"without {leace.concept}")),
                "random": _tree(row_loss(self.audit.lm, held, control.edits)),
            }
            for leace, control in scrubs
        ]

    def _name(self, concept: int) -> str:
        return self._concepts[concept].concept

    def _skill(self, concept: int, site: str, *, dealt: bool = False) -> Interval:
        """Share of the mistakes of always naming the most frequent class that the probe avoids, in %."""
        seed = self.audit.config.seed
        rate, base = self._scoring.accuracy(concept, site, dealt=dealt, seed=seed), self._scoring.majority(concept)
        estimate, low, high = (
            100 * (v - base.estimate) / max(1 - base.estimate, 1e-9) for v in (rate.estimate, rate.low, rate.high)
        )
        return Interval(estimate, low, high, rate.n)

    def _present(self, skills: list[list[Interval]]) -> Finding:
        """The first concept at the layer where it is read best."""
        best = max(range(len(self._sites)), key=lambda i: skills[0][i].estimate)
        rate = self._scoring.accuracy(0, self._sites[best], seed=self.audit.config.seed).scaled(100)
        dealt = self._scoring.accuracy(0, self._sites[best], dealt=True, seed=self.audit.config.seed).scaled(100)
        base = 100 * self._scoring.majority(0).estimate
        place = _place(self._sites[best])
        can = rate.low > max(dealt.high, base)
        return Finding.of(
            rate,
            id="concepts.present",
            chapter=self.name,
            sentence=(
                f"Its {self._name(0)} can be read from a token's activations best {place}: "
                f"{number(rate.estimate, 2)} % right, where the most frequent class is {number(base, 2)} %."
                if can
                else f"No layer carries a linear trace of {self._name(0)} that shows."
            ),
            metric=f"{self._name(0)} told right by a linear probe {place}",
            unit="%",
            better="higher",
            control=Control.of("probe of shuffled labels", dealt),
            command=self.audit.command(self.name),
            figures=("concepts.skill",),
            tables=("concepts.layers",),
        )

    def _added(self, concept: int, kind: str) -> Interval:
        losses = self._loss[concept]
        return losses[kind].above(losses["clean"], seed=self.audit.config.seed)

    def _cost(self) -> Finding:
        """The concept that costs most beyond its control."""
        added = [self._added(i, "leace").estimate - self._added(i, "random").estimate for i in range(len(self._loss))]
        dearest = max(range(len(added)), key=added.__getitem__)
        leace, random = self._added(dearest, "leace"), self._added(dearest, "random")
        needs = leace.low > random.high
        return Finding.of(
            leace,
            id="concepts.cost",
            chapter=self.name,
            sentence=(
                f"It leans most on {self._name(dearest)}: erased at every layer, that costs "
                f"{number(leace.estimate, 2)} bits per byte, and a random subspace of as many dimensions "
                f"{number(random.estimate, 2)}."
                if needs
                else "Erasing any of these concepts costs no more than erasing a random subspace."
            ),
            metric=f"loss added by erasing {self._name(dearest)}",
            unit="bits per byte",
            control=Control.of("random subspace", random),
            command=self.audit.command(self.name),
            figures=("concepts.cost",),
        )

    def _skill_chart(self, skills: list[list[Interval]], title: str) -> Figure:
        rows = [
            {"layer": i, "value": point.estimate, "low": point.low, "high": point.high, "concept": self._name(concept)}
            for concept, points in enumerate(skills)
            for i, point in enumerate(points)
        ]
        shuffled = [
            [self._skill(concept, site, dealt=True).estimate for concept in range(len(self._concepts))]
            for site in self._sites
        ]
        rows += [
            {"layer": i, "value": value, "low": value, "high": value, "concept": _SHUFFLED}
            for i, value in enumerate(sum(values) / len(values) for values in shuffled)
        ]
        chart = chart_kinds.lines(
            rows,
            x="layer",
            y="value",
            low="low",
            high="high",
            series="concept",
            control=(_SHUFFLED,),
            title=title.partition(":")[0],
            subtitle="100 %: always told right; 0: no better than naming the most frequent class; 95 % bands",
            x_title="input of block",
            x_labels=[site.partition(".")[2] for site in self._sites[:-1]] + ["output"],
            y_title="mistakes avoided (%)",
        )
        caption = "How well each concept can be read at each layer, with a probe of shuffled labels as control."
        return Figure(id="concepts.skill", chart=chart, caption=caption)

    def _cost_chart(self, title: str) -> Figure:
        rows = []
        for i in range(len(self._concepts)):
            leace, random = self._added(i, "leace"), self._added(i, "random")
            rows.append(
                {
                    "concept": self._name(i),
                    "added": leace.estimate,
                    "low": leace.low,
                    "high": leace.high,
                    "random": random.estimate,
                }
            )
        chart = chart_kinds.intervals(
            rows,
            label="concept",
            value="added",
            low="low",
            high="high",
            control="random",
            title=title.partition(":")[0].removesuffix("."),
            subtitle="Loss added when a concept is erased from all inputs of parts; grey ticks: a random subspace",
            x_title="added loss (bits per byte)",
            y_title="what is erased",
        )
        caption = "What erasing each concept costs, with a random subspace of as many dimensions as control."
        return Figure(id="concepts.cost", chart=chart, caption=caption)

    def _table(self) -> Table:
        concepts = range(len(self._concepts))
        rows = [
            [
                _place(site).replace(" ", "\N{NO-BREAK SPACE}"),
                *(100 * self._scoring.accuracy(i, site).estimate for i in concepts),
            ]
            for site in self._sites
        ]
        rows.append(["most frequent class", *(100 * self._scoring.majority(i).estimate for i in concepts)])
        names = (f"{self._name(i)} ({len(labels.names)} classes)" for i, labels in enumerate(self._concepts))
        return Table(
            id="concepts.layers",
            caption="Share of labelled tokens told right by the probe at each layer, in %",
            columns=["read", *(Column(name=name) for name in names)],
            rows=rows,
        )


def _first(batches: TokenBatches, tokens: int) -> TokenBatches:
    """The first rows of a text, as many as take that many tokens, and at least two."""
    share = max(tokens / batches.context, 2) / batches.n_chunks
    return batches if share >= 1 else batches.split(1 - share)[0]


def _place(site: str) -> str:
    kind, _, layer = site.partition(".")
    return f"before block {layer}" if kind == "resid_pre" else "after the last block"


def _tree(loss: RowLoss) -> dict[str, Any]:
    return {name: torch.from_numpy(values) for name, values in vars(loss).items()}


def _row_loss(tree: dict[str, Any]) -> RowLoss:
    return RowLoss(**{name: values.numpy() for name, values in tree.items()})
