"""What can the model be pushed to do, and at what price? Prompts of trained vectors, with a control model.

For two small harmless behaviours (a fixed phrase; a format), or the user's own file of prompts and targets: prompts of
a few vectors are trained on some contexts and tried on others, on the model, on the same network with shuffled weights,
and with random tokens as targets. How easily the prompt that was found loses its effect is told by shaking it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sonde.data.behaviours import Behaviour, behaviour, read_behaviours
from sonde.prompts.bits import quantised
from sonde.prompts.claims import Claim, Elicited, claim
from sonde.prompts.classified import read_score, score_curve
from sonde.prompts.control_model import shuffled
from sonde.prompts.elicitation import Budget, elicit, parts_of
from sonde.prompts.examples import Examples
from sonde.prompts.fragility import Fragility, fragility
from sonde.runs.blocks import Chapter, Column, Table
from sonde.runs.finding import Control, Finding
from sonde.studies.chapters.part import Part
from sonde.studies.elicitation_chapters import curve_finding, rate_figure, tokens

if TYPE_CHECKING:
    from sonde.studies.audit import AuditConfig

_BUILT_IN = ("phrase", "format")
_ROWS = 30
_OWN = 3  # behaviours of a user's file
_BUDGET = Budget(lengths=(1, 8), restarts=1, lrs=(0.5,), steps=20, batch=6)
_REWARDED = Budget(lengths=(4,), restarts=1, lrs=(0.3,), steps=20, batch=6)
_RHO, _DRAWS, _SHAKEN = 0.3, 8, 6  # size of the noise, draws, examples


@dataclass(frozen=True)
class _Probe:
    """What was found of one behaviour."""

    name: str
    found: Elicited
    told: Claim
    bits: float
    shaken: Fragility


class Elicitation(Part):
    """Conditional distance of a few behaviours, their controls, and how fragile the prompts are."""

    name = "elicitation"

    @classmethod
    def check(cls, config: "AuditConfig") -> None:
        """The user's behaviours are read before the run begins."""
        if config.behaviours is not None:
            (read_score if _is_code(config.behaviours) else read_behaviours)(config.behaviours)

    def write(self) -> Chapter:
        """A finding and a figure for each behaviour, and one table."""
        given = self.audit.config.behaviours
        if given is not None and _is_code(given):
            return self._classified(given)
        with self.audit.timed("elicitation"):
            probes = [self._probe(one) for one in self._behaviours()]
        command = self.audit.command(self.name)
        findings = [
            curve_finding(
                probe.found,
                probe.told,
                name=f"{self.name}.{probe.name}",
                chapter=self.name,
                command=command,
                figures=(f"{self.name}.{probe.name}.success",),
                tables=(f"{self.name}.prices",),
            )
            for probe in probes
        ]
        return Chapter(
            id=self.name,
            question="What can it be pushed to do, and at what price?",
            answer=" ".join(_words(probe) for probe in probes),
            findings=findings,
            blocks=[*(rate_figure(p.found, f"{self.name}.{p.name}") for p in probes), self._table(probes)],
            not_shown=(
                "These are upper bounds: with more steps, restarts or tokens a push may take less. The control model "
                "has the same embeddings and weights of the same size, but learned nothing in its blocks; where there "
                "is a model that was trained without the behaviour, that is the better control (sonde run "
                "information-curve --controls). What trained vectors do, words need not be able to do."
            ),
            how=(
                f"Prompts of {' and '.join(map(str, _BUDGET.lengths))} vectors right before the target, trained for "
                f"{_BUDGET.steps} steps of {_BUDGET.batch} contexts and tried on contexts that were not trained on; "
                "the same budget for the control model and for random tokens as targets. A push works when it makes "
                "half of the targets exact. Bits: the coarsest uniform grid for the vectors that still works. Noise: "
                f"{_RHO:g} of the size of an embedding, {_DRAWS} draws. After Nordby, arXiv:2505.14943."
            ),
        )

    def _classified(self, given: str) -> Chapter:
        """The user's classifier: scores of the model's own texts by prompt length, and the control model's."""
        lm, seed, score = self.audit.lm, self.audit.config.seed, read_score(given)
        contexts = behaviour("phrase", _ROWS, seed=seed).contexts
        with self.audit.timed("elicitation"):
            models = {"model": lm, "control model": shuffled(lm, seed=seed)}
            found = {
                name: score_curve(one, contexts, score, _REWARDED, seed=seed, progress=f"elicitation, {name}")
                for name, one in models.items()
            }
        n, name = _REWARDED.lengths[-1], given.rpartition(":")[2]
        bare, pushed, other = found["model"].mean(0), found["model"].mean(n), found["control model"].mean(n)
        finding = Finding.of(
            pushed,
            id=f"{self.name}.score",
            chapter=self.name,
            sentence=(
                f"{n} tokens bring the score of “{name}” on its own texts from {bare.estimate:.3g} to "
                f"{pushed.estimate:.3g} on unseen contexts; the control model gets {other.estimate:.3g}."
            ),
            metric=f"mean score of greedy texts with {n} prompt tokens",
            better="higher",
            control=Control.of("control model", other),
            command=self.audit.command(self.name),
            tables=(f"{self.name}.scores",),
        )
        rows = [
            [label, length, *(one.mean(length).estimate, *one.mean(length).bounds)]
            for label, one in found.items()
            for length in one.lengths
        ]
        texts = Table(
            id=f"{self.name}.texts",
            caption=f"What {lm.name} writes under {n} prompt tokens, unseen contexts",
            columns=[Column(name="text", code=True)],
            rows=[[text] for text in found["model"].texts],
        )
        scores = Table(
            id=f"{self.name}.scores",
            caption=f"Mean score of “{name}” by prompt tokens, with its 95 % interval over contexts",
            columns=["curve", "n", "score", "low", "high"],
            rows=rows,
        )
        return Chapter(
            id=self.name,
            question=f"Can it be pushed to what “{name}” looks for?",
            answer=finding.sentence,
            findings=[finding],
            blocks=[scores, texts],
            not_shown=(
                "More steps, samples or tokens may bring more. A classifier can be pleased by texts that it was not "
                "meant for: read them."
            ),
            how=(
                f"Prompts trained for {_REWARDED.steps} steps by reward on sampled texts of 12 tokens, with a "
                "leave-one-out baseline; greedy texts on other contexts are scored. The control model is the same "
                "network with the weights of its blocks shuffled."
            ),
        )

    def _behaviours(self) -> list[Behaviour]:
        given = self.audit.config.behaviours
        if given is not None:
            return read_behaviours(given)[:_OWN]
        return [behaviour(name, _ROWS, seed=self.audit.config.seed) for name in _BUILT_IN]

    def _probe(self, one: Behaviour) -> _Probe:
        lm, seed = self.audit.lm, self.audit.config.seed
        examples = Examples.from_text(lm, one.contexts, one.targets)
        found = elicit(
            lm,
            examples,
            _BUDGET,
            behaviour=one.what,
            folder=self.audit.run.path("elicitation"),
            seed=seed,
            progress=f"elicitation, {one.name}",
        )
        distance = found.curve.conditional_distance()
        n = int(distance) if 0 < distance < math.inf else _BUDGET.lengths[-1]
        prompt = found.curve.prompt(n)
        _, validation, test = parts_of(examples, seed=seed)
        coarse = quantised(lm, prompt, validation) if math.isfinite(distance) else None
        bits = math.inf if coarse is None else coarse.bits
        shaken = fragility(
            lm, prompt, test.select(range(min(_SHAKEN, len(test)))), rhos=(_RHO,), draws=_DRAWS, seed=seed
        )
        name = "".join(c if c.isalnum() else "-" for c in one.name.lower()).strip("-") or "own"
        return _Probe(name, found, claim(found, bits=None if math.isinf(bits) else bits), bits, shaken)

    def _table(self, probes: list[_Probe]) -> Table:
        rows = []
        for probe in probes:
            found = probe.found
            assert found.control is not None and found.random is not None
            rows.append(
                [
                    found.behaviour,
                    *(tokens(curve.conditional_distance()) for curve in (found.curve, found.control, found.random)),
                    None if math.isinf(probe.bits) else probe.bits,
                    probe.shaken.rise(_RHO).estimate,
                    probe.shaken.at_rest,
                ]
            )
        return Table(
            id=f"{self.name}.prices",
            caption="What each push takes, in prompt tokens, and how fragile the prompt is",
            columns=[
                *("behaviour", "tokens", "control model", "random targets"),
                Column(name="bits", digits=4),
                Column(name=f"F({_RHO:g})", unit="nats per token"),
                Column(name="r |gradient|", unit="nats per token"),
            ],
            rows=rows,
        )


def _is_code(given: str) -> bool:
    return ".py:" in given


def _words(probe: _Probe) -> str:
    """The claim and the fragility, of a prompt that has an effect, in words."""
    if math.isinf(probe.bits):
        return f"{probe.told.sentence} {probe.told.reason}"
    rise = probe.shaken.rise(_RHO)
    held = "keeps" if rise.high < 0.1 * max(probe.shaken.loss, 1.0) else "does not keep"
    sentences = [probe.told.sentence, probe.told.reason]
    noise = f"noise of {_RHO:g} of an embedding's size"
    sentences.append(f"Under {noise} the prompt {held} its effect (loss {rise.estimate:+.2g} nats a token).")
    return " ".join(part for part in sentences if part)
