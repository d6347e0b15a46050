"""Where in the network is the prediction made? Logit and tuned lens at the input of every block.

The tuned lens is fitted on the other half of the text. A token is decided at a layer when the lens's most likely token
there is the final one and stays so in every later layer.
"""

import math
from typing import Any

import numpy as np
import torch

from sonde.lens.trajectory import prediction_depth
from sonde.lens.tuned import DEFAULT_SITES, TunedLens
from sonde.lm.stream import Batch
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats import information
from sonde.stats.intervals import Interval, bootstrap_mean, bootstrap_means
from sonde.studies.chapters.part import Audit, Gathered, Part

_CHUNK_ELEMENTS = 1 << 22
_KINDS = ("logit", "tuned")


class Depth(Part):
    """KL to the final prediction by layer, and the share of tokens that are decided there."""

    name = "depth"

    def __init__(self, audit: Audit) -> None:
        super().__init__(audit)
        self._rows = Gathered()

    @property
    def sites(self) -> tuple[str, ...]:
        """The input of every block, and the stream after the last."""
        lm = self.audit.lm
        return (*lm.match(*DEFAULT_SITES), f"resid_post.{lm.n_layers - 1}")

    def prepare(self) -> None:
        """Fit the tuned lens."""
        self._lenses = {"logit": TunedLens.logit(self.audit.lm), "tuned": self.audit.lens}

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Keep the mean KL of every window and layer, and every token's depth."""
        lm = self.audit.lm
        sites = lm.match(*DEFAULT_SITES)
        shape = batch.tokens.shape
        final = batch.acts[f"resid_post.{lm.n_layers - 1}"].flatten(0, 1)
        hidden = [batch.acts[site].flatten(0, 1) for site in sites]
        kl = {kind: torch.empty(len(sites), len(final)) for kind in _KINDS}
        top = {kind: torch.empty(len(sites) + 1, len(final), dtype=torch.long) for kind in _KINDS}
        for part in torch.arange(len(final)).split(max(16, _CHUNK_ELEMENTS // lm.vocab_size)):
            last = information.log_probs(lm.unembed(final[part]))
            for kind, lens in self._lenses.items():
                top[kind][-1, part] = last.argmax(-1).cpu()
                for layer in range(len(sites)):
                    here = information.log_probs(lens(hidden[layer][part], layer))
                    kl[kind][layer, part] = information.kl(last, here).float().cpu()
                    top[kind][layer, part] = here.argmax(-1).cpu()
        for kind in _KINDS:
            self._rows.add(f"kl {kind}", kl[kind].view(-1, *shape).mean(-1).T)
            self._rows.add(f"depth {kind}", prediction_depth(top[kind]).view(shape).to(torch.int16))
            self._rows.add(f"same {kind}", (top[kind][:-1] == top[kind][-1]).view(-1, *shape).float().mean(-1).T)

    def state(self) -> Any:
        """What was kept so far."""
        return self._rows.state()

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        self._rows.load(state)

    def write(self) -> Chapter:
        """Two findings, two charts, a table by layer."""
        seed, lm = self.audit.config.seed, self.audit.lm
        layers = lm.match(*DEFAULT_SITES)
        bits = {kind: self._rows[f"kl {kind}"].astype(np.float64) / math.log(2) for kind in _KINDS}
        by_layer = {kind: bootstrap_means(bits[kind], seed=seed) for kind in _KINDS}
        decided = {
            kind: bootstrap_means(
                np.stack([(self._rows[f"depth {kind}"] <= layer).mean(1) for layer in range(len(layers))], 1), seed=seed
            )
            for kind in _KINDS
        }
        closer = self._closer(bits, by_layer)
        half = self._half(decided["tuned"], len(layers))
        same = self._rows["same tuned"].mean(0)
        return Chapter(
            id=self.name,
            question="At which layer is the prediction made?",
            answer=half.sentence,
            findings=[closer, half],
            blocks=[
                self._kl_chart(by_layer, layers),
                self._decided_chart(decided, layers),
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
                            by_layer["logit"][layer].estimate,
                            by_layer["tuned"][layer].estimate,
                            100 * float(same[layer]),
                            100 * decided["tuned"][layer].estimate,
                        ]
                        for layer in range(len(layers))
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
                "tuned lens first applies one affine map per block, trained on the other half of the text to give the "
                "final distribution (Belrose et al. 2023, https://arxiv.org/abs/2303.08112). KL(final || lens), "
                "mean over tokens; intervals: bootstrap over windows. A token is decided at the first layer from which "
                "the lens's most likely token is the final one in every layer."
            ),
        )

    def _closer(self, bits: dict[str, np.ndarray], by_layer: dict[str, list[Interval]]) -> Finding:
        tuned, logit = (bootstrap_mean(bits[kind].mean(1), seed=self.audit.config.seed) for kind in ("tuned", "logit"))
        nearer = [t.estimate < o.estimate for t, o in zip(by_layer["tuned"], by_layer["logit"], strict=True)]
        where = "at every layer" if all(nearer) else f"at {sum(nearer)} of {len(nearer)} layers"
        return Finding(
            id="depth.tuned-kl",
            chapter=self.name,
            sentence=f"The tuned lens is closer to the final prediction than the logit lens {where}.",
            metric="KL to the final prediction, mean over layers",
            unit="bits",
            better="lower",
            estimate=tuned.estimate,
            interval=tuned.bounds,
            interval_method="bootstrap",
            n=tuned.n,
            control=Control("logit lens", logit.estimate, logit.bounds),
            command=self.audit.command(self.name),
            figures=("depth.kl",),
            tables=("depth.layers",),
        )

    def _half(self, decided: list[Interval], n_layers: int) -> Finding:
        depth = {
            kind: bootstrap_mean(self._rows[f"depth {kind}"].mean(1), seed=self.audit.config.seed) for kind in _KINDS
        }
        layer = next((i for i, share in enumerate(decided) if share.estimate >= 0.5), None)
        first = decided[0].estimate
        if layer is None:
            sentence = "Fewer than half of the tokens are decided before the last block has run."
        elif layer == 0:
            sentence = f"{number(100 * first, 2)} % of the tokens are decided before the first block has run."
        else:
            sentence = f"Half of the tokens are decided after {layer} of {n_layers} blocks."
        return Finding(
            id="depth.decided",
            chapter=self.name,
            sentence=sentence,
            metric="mean depth at which a token is decided, tuned lens",
            unit="blocks",
            better="none",
            estimate=depth["tuned"].estimate,
            interval=depth["tuned"].bounds,
            interval_method="bootstrap",
            n=depth["tuned"].n,
            control=Control("logit lens", depth["logit"].estimate, depth["logit"].bounds),
            command=self.audit.command(self.name),
            figures=("depth.decided",),
            tables=("depth.layers",),
        )

    def _kl_chart(self, by_layer: dict[str, list[Interval]], layers: tuple[str, ...]) -> Figure:
        chart = chart_kinds.lines(
            _curves(by_layer, "bits"),
            x="layer",
            y="bits",
            low="low",
            high="high",
            series="lens",
            control=("logit lens",),
            log=True,
            x_labels=[str(layer) for layer in range(len(layers))],
            title="How far each layer's prediction is from the final one",
            subtitle="KL(final || lens) in bits per token, 95 % bands; lower is closer",
            x_title="input of block",
            y_title="KL to the final prediction (bits)",
        )
        caption = "Distance of the lens's prediction to the model's own, by layer, for the tuned and the logit lens."
        return Figure(id="depth.kl", chart=chart, caption=caption)

    def _decided_chart(self, decided: dict[str, list[Interval]], layers: tuple[str, ...]) -> Figure:
        shares = {kind: [interval.scaled(100) for interval in found] for kind, found in decided.items()}
        chart = chart_kinds.lines(
            _curves(shares, "decided"),
            x="layer",
            y="decided",
            low="low",
            high="high",
            series="lens",
            control=("logit lens",),
            x_labels=[str(layer) for layer in range(len(layers))],
            title=f"Before the last block, {number(shares['tuned'][-1].estimate, 2)} % of the tokens are decided",
            subtitle="Share of tokens whose most likely continuation no longer changes, in %, 95 % bands",
            x_title="input of block",
            y_title="decided tokens (%)",
        )
        caption = "Share of tokens decided at each layer, by the tuned and the logit lens."
        return Figure(id="depth.decided", chart=chart, caption=caption)


def _curves(by_layer: dict[str, list[Interval]], value: str) -> list[dict[str, Any]]:
    return [
        {"layer": layer, value: point.estimate, "low": point.low, "high": point.high, "lens": f"{kind} lens"}
        for kind in ("tuned", "logit")
        for layer, point in enumerate(by_layer[kind])
    ]
