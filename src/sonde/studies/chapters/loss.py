"""How well does the model predict this text, does it know how sure it is, and does it use its context?

Every token of the second half is scored once. The control is a 5-gram model of the first half of the text; a
perfectly calibrated model (its own probabilities, answers drawn from them) is the control of calibration.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.lm.stream import Batch
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.calibration import ece, reliability
from sonde.stats.intervals import Interval, bootstrap, bootstrap_mean, bootstrap_ratio
from sonde.studies.chapters.part import NGRAM_ORDER, Audit, Gathered, Part

_WORST = 20
_CONTEXT_SHOWN = 10
_FIRST_BIN = 4
_EARLY = 32
_NGRAM = f"{NGRAM_ORDER}-gram of the first half"


class Loss(Part):
    """Loss in bits per byte, calibration, loss by position, the worst tokens."""

    name = "loss"

    def __init__(self, audit: Audit) -> None:
        super().__init__(audit)
        self._rows = Gathered()

    @property
    def sites(self) -> tuple[str, ...]:
        """The prediction alone."""
        return ("logits",)

    def prepare(self) -> None:
        """Count the n-grams of the fitting half."""
        _ = self.audit.ngram

    def update(self, batch: Batch) -> None:
        """Keep loss, top token and its probability for every scored token."""
        # Row by row: log-probabilities of a whole batch would double the memory that its logits take.
        rows = [
            _scored(logits[:-1], tokens[1:]) for logits, tokens in zip(batch.acts["logits"], batch.tokens, strict=True)
        ]
        nll, top, confidence = (torch.stack(column) for column in zip(*rows, strict=True))
        baseline = -self.audit.ngram.log_prob(batch.tokens.cpu())[:, 1:]
        self._rows.add("tokens", batch.tokens)
        self._rows.add("bytes", batch.n_bytes)
        self._rows.add("nll", nll)
        self._rows.add("top", top)
        self._rows.add("confidence", confidence)
        self._rows.add("baseline", torch.from_numpy(baseline.astype(np.float32)))

    def state(self) -> Any:
        """What was kept so far."""
        return self._rows.state()

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        self._rows.load(state)

    def write(self) -> Chapter:
        """Three findings, three charts, the worst tokens."""
        bits = self._rows["nll"].astype(np.float64) / math.log(2)
        baseline = self._rows["baseline"].astype(np.float64) / math.log(2)
        n_bytes = self._rows["bytes"].astype(np.float64)
        ours = bootstrap_ratio(bits.sum(1), n_bytes, seed=self.audit.config.seed)
        theirs = bootstrap_ratio(baseline.sum(1), n_bytes, seed=self.audit.config.seed)
        loss = self._loss_finding(ours, theirs)
        calibration, reliable = self._calibration()
        findings, figures = [loss, calibration], [reliable]
        if bits.shape[1] >= 4 * _EARLY:
            context, by_position = self._context(bits, baseline)
            findings.append(context)
            figures.insert(0, by_position)
        return Chapter(
            id=self.name,
            question="How well does it predict, and does it know how sure it is?",
            answer=(
                f"It needs {number(ours.estimate)} bits per byte of this text, where {NGRAM_ORDER}-gram counts of the "
                f"text's first half need {number(theirs.estimate)}."
            ),
            findings=findings,
            blocks=[*figures, self._worst(bits)],
            not_shown=(
                "Loss on one text says little about other texts, and a model that has read this text in training looks "
                "better than it is. The n-gram model has an advantage of its own: it has read the first half."
            ),
            how=(
                f"Windows of {self.audit.held.context} tokens; the first token of a window is not scored. Bits per "
                "byte are the summed surprisals divided by the bytes that the scored tokens cover. Intervals: "
                "bootstrap over windows. Calibration: expected error of the top token's probability, 15 equal bins."
            ),
        )

    def _loss_finding(self, ours: Interval, theirs: Interval) -> Finding:
        verb = "better" if ours.high < theirs.low else "worse" if ours.low > theirs.high else "no better or worse"
        return Finding.of(
            ours,
            id="loss.bits-per-byte",
            chapter=self.name,
            sentence=f"It predicts this text {verb} than {NGRAM_ORDER}-gram counts of the text's first half.",
            metric="loss",
            unit="bits per byte",
            better="lower",
            control=Control.of(_NGRAM, theirs),
            command=self.audit.command(self.name),
            figures=("loss.position",),
        )

    def _calibration(self) -> tuple[Finding, Figure]:
        confidence = self._rows["confidence"].astype(np.float64)
        correct = (self._rows["top"] == self._rows["tokens"][:, 1:]).astype(np.float64)
        seed = self.audit.config.seed
        windows = np.repeat(np.arange(len(confidence)), confidence.shape[1])
        measured = bootstrap(ece, confidence.ravel(), correct.ravel(), clusters=windows, draws=200, seed=seed).scaled(
            100
        )
        ideal = _ideal_ece(confidence.ravel(), seed).scaled(100)
        gap = float(confidence.mean() - correct.mean())
        miscalibrated = measured.low > ideal.high
        how = (
            ("more" if gap > 0 else "less") + " sure than it should be" if miscalibrated else "as sure as it should be"
        )
        finding = Finding.of(
            measured,
            id="loss.calibration",
            chapter=self.name,
            sentence=f"It is {how} of its most likely token.",
            metric="expected calibration error",
            unit="points of probability",
            better="none",
            control=Control.of("perfectly calibrated twin", ideal),
            command=self.audit.command(self.name),
            figures=("loss.calibration",),
        )
        rows = [
            {
                "confidence": b.confidence,
                "accuracy": b.accuracy.estimate,
                "low": b.accuracy.low,
                "high": b.accuracy.high,
                "tokens": b.n,
            }
            for b in reliability(confidence.ravel(), correct.ravel())
        ]
        chart = chart_kinds.points(
            rows,
            x="confidence",
            y="accuracy",
            low="low",
            high="high",
            size="tokens",
            diagonal="perfect calibration",
            title=f"The most likely token is right {number(100 * correct.mean(), 2)} % of the time, at a mean "
            f"confidence of {number(100 * confidence.mean(), 2)} %",
            subtitle="Share of tokens for which the most likely one was right, by its probability; on the line is best",
            x_title="probability of the most likely token",
            y_title="share right",
        )
        caption = "Accuracy of the most likely token against its probability, in bins; larger dots hold more tokens."
        return finding, Figure(id="loss.calibration", chart=chart, caption=caption)

    def _context(self, bits: np.ndarray, baseline: np.ndarray) -> tuple[Finding, Figure]:
        edges = _bins(bits.shape[1])
        early, late = (0, _EARLY), (edges[-2], edges[-1])
        gain, control = (_gain(values, early, late, self.audit.config.seed) for values in (bits, baseline))
        helps = gain.low > control.high
        finding = Finding.of(
            gain,
            id="loss.context",
            chapter=self.name,
            sentence=(
                f"Tokens {late[0] + 1} to {late[1]} of a window are easier for it than tokens "
                f"{early[0] + 1} to {early[1]}, "
                + ("by more than" if helps else "but no more than")
                + f" for {NGRAM_ORDER}-gram counts: it "
                + ("uses" if helps else "shows no use of")
                + " distant context."
            ),
            metric="loss saved by context",
            unit="bits per token",
            better="higher",
            control=Control.of(_NGRAM, control),
            command=self.audit.command(self.name),
            figures=("loss.position",),
        )
        rows = []
        for name, values in ((self.audit.lm.name, bits), (f"{NGRAM_ORDER}-gram", baseline)):
            for place, (low, high) in enumerate(pairwise(edges)):
                mean = bootstrap_mean(values[:, low:high].mean(1), seed=self.audit.config.seed)
                rows.append({"place": place, "bits": mean.estimate, "low": mean.low, "high": mean.high, "of": name})
        chart = chart_kinds.lines(
            rows,
            x="place",
            y="bits",
            low="low",
            high="high",
            series="of",
            control=(f"{NGRAM_ORDER}-gram",),
            title=f"With context the loss falls by {number(gain.estimate, 2)} bits per token",
            subtitle="Mean loss in bits per token by place in the window, 95 % bands; lower is better",
            x_title="tokens of the window",
            x_labels=[f"{low + 1}–{high}" for low, high in pairwise(edges)],
            y_title="loss (bits per token)",
        )
        caption = "Loss by the number of tokens that came before, for the model and for n-gram counts."
        return finding, Figure(id="loss.position", chart=chart, caption=caption)

    def _worst(self, bits: np.ndarray) -> Table:
        tokens, top = self._rows["tokens"], self._rows["top"]
        confidence = self._rows["confidence"]
        lm = self.audit.lm
        rows = []
        for place in np.argsort(-bits, axis=None, kind="stable")[:_WORST]:
            row, column = divmod(int(place), bits.shape[1])
            before = tokens[row, max(0, column + 1 - _CONTEXT_SHOWN) : column + 1].tolist()
            true, guess = lm.token_strings([int(tokens[row, column + 1]), int(top[row, column])])
            rows.append(
                ["".join(lm.token_strings(before)), true, bits[row, column], guess, 100 * confidence[row, column]]
            )
        return Table(
            id="loss.worst",
            caption=f"The {len(rows)} tokens that surprised it most",
            columns=[
                Column(name="after", code=True),
                Column(name="came", code=True),
                Column(name="surprisal", unit="bits"),
                Column(name="expected instead", code=True),
                Column(name="with", unit="%", digits=2),
            ],
            rows=rows,
        )


def _scored(
    logits: Float[Tensor, "pos vocab"], targets: Int[Tensor, " pos"]
) -> tuple[Float[Tensor, " pos"], Int[Tensor, " pos"], Float[Tensor, " pos"]]:
    """Surprisal of the targets in nats, the most likely tokens, and their probabilities."""
    logp = logits.float().log_softmax(-1)
    top = logp.max(-1)
    return -logp.gather(-1, targets[:, None])[:, 0], top.indices, top.values.exp()


def _bins(length: int) -> list[int]:
    """Edges of bins of doubling width over places 0 to `length`."""
    edges = [0, _FIRST_BIN]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return [*edges, length] if edges[-1] < length else edges


def _gain(bits: np.ndarray, early: tuple[int, int], late: tuple[int, int], seed: int) -> Interval:
    """Mean loss of the early places of a window less that of the late ones, over windows."""
    difference = bits[:, slice(*early)].mean(1) - bits[:, slice(*late)].mean(1)
    return bootstrap_mean(difference, seed=seed)


def _ideal_ece(confidence: np.ndarray, seed: int, draws: int = 200) -> Interval:
    """Calibration error of a model that is right exactly as often as it says: chance alone."""
    rng = np.random.default_rng(seed)
    errors = np.array([ece(confidence, rng.random(len(confidence)) < confidence) for _ in range(draws)])
    low, high = np.quantile(errors, [0.025, 0.975])
    return Interval(float(np.median(errors)), float(low), float(high), draws)
