"""Where in the network is the prediction made? Logit and tuned lens at the input of every block.

The tuned lens is fitted on the first half of the text. A token is decided at a layer when the lens's most likely token
there is the final one and stays so in every later layer.
"""

import math
from typing import Any

from sonde.lens.evaluation import LensEvaluation, LensScores
from sonde.lens.tuned import DEFAULT_SITES, TunedLens
from sonde.lm.stream import Batch
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval
from sonde.studies.chapters.part import Part

_BITS = 1 / math.log(2)
_KINDS = ("tuned", "logit")


class Depth(Part):
    """KL to the final prediction by layer, and the share of tokens that are decided there."""

    name = "depth"

    @property
    def sites(self) -> tuple[str, ...]:
        """The input of every block, and the stream after the last."""
        lm = self.audit.lm
        return (*lm.match(*DEFAULT_SITES), f"resid_post.{lm.n_layers - 1}")

    def prepare(self) -> None:
        """Fit the tuned lens."""
        lm = self.audit.lm
        self._scoring = LensEvaluation(lm, {"tuned": self.audit.lens, "logit": TunedLens.logit(lm)})

    def update(self, batch: Batch) -> None:
        """Score both lenses."""
        self._scoring.update(batch)

    def state(self) -> Any:
        """What was scored so far."""
        return self._scoring.state()

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        self._scoring.load(state)

    def write(self) -> Chapter:
        """Two findings, two charts, a table by layer."""
        scores = self._scoring.scores()
        closer, decided = self._closer(scores), self._decided(scores)
        layers = range(len(scores["tuned"].sites))
        return Chapter(
            id=self.name,
            question="At which layer is the prediction made?",
            answer=decided.sentence,
            findings=[closer, decided],
            blocks=[
                kl_chart({f"{kind} lens": scores[kind].kl for kind in _KINDS}, title=closer.sentence),
                self._decided_chart(scores),
                Table(
                    id="depth.layers",
                    caption="By layer: distance to the final prediction and agreement with it",
                    columns=[
                        "input of block",
                        Column(name="logit lens", unit="bits"),
                        Column(name="tuned lens", unit="bits"),
                        Column(name="same top token", unit="% (tuned)"),
                        Column(name="decided", unit="% (tuned)"),
                    ],
                    rows=[
                        [
                            str(layer),
                            _BITS * scores["logit"].kl[layer].estimate,
                            _BITS * scores["tuned"].kl[layer].estimate,
                            100 * scores["tuned"].agreement[layer].estimate,
                            100 * scores["tuned"].decided[layer].estimate,
                        ]
                        for layer in layers
                    ],
                ),
            ],
            not_shown=(
                "A lens shows what can be read from a layer by one linear map, not what the later layers use. That a "
                "layer's best guess is already the final one does not mean that the later layers do nothing: they may "
                "still change how sure it is."
            ),
            how=(
                "The logit lens applies the model's own final norm and unembedding to the input of each block. The "
                "tuned lens first applies one affine map per block, trained on the first half of the text to give the "
                "final distribution (Belrose et al. 2023, https://arxiv.org/abs/2303.08112). KL(final || lens), mean "
                "over tokens; intervals: bootstrap over windows. A token is decided at the first layer from which the "
                "lens's most likely token is the final one in every layer."
            ),
        )

    def _closer(self, scores: dict[str, LensScores]) -> Finding:
        difference = self._scoring.difference("tuned", "logit")
        nearer = sum(gap.high < 0 for gap in difference)
        where = "at every layer" if nearer == len(difference) else f"at {nearer} of {len(difference)} layers"
        middle = len(difference) // 2
        tuned, logit = (scores[kind].kl[middle].scaled(_BITS) for kind in _KINDS)
        return Finding.of(
            tuned,
            id="depth.tuned-kl",
            chapter=self.name,
            sentence=f"The tuned lens is closer to the final prediction than the logit lens {where}.",
            metric=f"KL to the final prediction at the input of block {middle}",
            unit="bits",
            better="lower",
            control=Control.of("logit lens", logit),
            command=self.audit.command(self.name),
            figures=("depth.kl",),
            tables=("depth.layers",),
        )

    def _decided(self, scores: dict[str, LensScores]) -> Finding:
        """The first layer at which half of the tokens are decided."""
        shares = scores["tuned"].decided
        n_layers = len(scores["tuned"].sites)
        layer = next(i for i, share in enumerate(shares) if share.estimate >= 0.5)
        if layer == 0:
            sentence = "Half of the tokens are decided before the first block has run."
        elif layer == n_layers:
            sentence = "Half of the tokens are decided only by the last block."
            layer -= 1
        else:
            sentence = f"Half of the tokens are decided after {layer} of {n_layers} blocks."
        tuned, logit = (scores[kind].decided[layer].scaled(100) for kind in _KINDS)
        return Finding.of(
            tuned,
            id="depth.decided",
            chapter=self.name,
            sentence=sentence,
            metric=f"tokens decided at the input of block {layer}, tuned lens",
            unit="%",
            better="none",
            control=Control.of("logit lens", logit),
            command=self.audit.command(self.name),
            figures=("depth.decided",),
            tables=("depth.layers",),
        )

    def _decided_chart(self, scores: dict[str, LensScores]) -> Figure:
        n_layers = len(scores["tuned"].sites)
        last = 100 * scores["tuned"].decided[n_layers - 1].estimate
        chart = chart_kinds.lines(
            curves({f"{kind} lens": [s.scaled(100) for s in scores[kind].decided[:n_layers]] for kind in _KINDS}),
            x="layer",
            y="value",
            low="low",
            high="high",
            series="lens",
            control=("logit lens",),
            x_labels=[str(layer) for layer in range(n_layers)],
            title=f"Before the last block, {number(last, 2)} % of the tokens are decided",
            subtitle="Share of tokens whose most likely continuation no longer changes, in %, 95 % bands",
            x_title="input of block",
            y_title="decided tokens (%)",
        )
        caption = "Share of tokens decided at each layer, by the tuned and the logit lens."
        return Figure(id="depth.decided", chart=chart, caption=caption)


def kl_chart(kl: dict[str, list[Interval]], *, title: str, name: str = "depth.kl") -> Figure:
    """KL to the final prediction by layer of several lenses, in bits; the logit lens is the control."""
    chart = chart_kinds.lines(
        curves({lens: [layer.scaled(_BITS) for layer in layers] for lens, layers in kl.items()}),
        x="layer",
        y="value",
        low="low",
        high="high",
        series="lens",
        control=("logit lens",),
        log=True,
        x_labels=[str(layer) for layer in range(max(map(len, kl.values())))],
        title=title.removesuffix("."),
        subtitle="KL(final || lens) in bits per token, 95 % bands; lower is closer",
        x_title="input of block",
        y_title="KL to the final prediction (bits)",
    )
    caption = "Distance of each lens's prediction to the model's own, by layer, with the logit lens as control."
    return Figure(id=name, chart=chart, caption=caption)


def curves(by_layer: dict[str, list[Interval]]) -> list[dict[str, Any]]:
    """Rows of a line chart over layers: fields layer, value, low, high, lens."""
    return [
        {"layer": layer, "value": point.estimate, "low": point.low, "high": point.high, "lens": name}
        for name, points in by_layer.items()
        for layer, point in enumerate(points)
    ]
