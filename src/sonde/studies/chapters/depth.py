"""Where in the network is the prediction made? Logit and tuned lens at the input of every block.

The tuned lens is fitted on the first half of the text. A token is decided at a layer when the lens's most likely token
there is the final one and stays so in every later layer. What a lens reads is not what later layers use: so each block
is deleted in turn, and the directions are shown on which the lens's prediction depends most.
"""

import math
from typing import Any

import torch

from sonde.errors import SondeError
from sonde.lens.causal_basis import InfluentialDirection, influential_directions, random_basis
from sonde.lens.direction_loss import direction_loss
from sonde.lens.evaluation import LensEvaluation, LensScores
from sonde.lens.tuned import DEFAULT_SITES, TunedLens
from sonde.lm.batches import TokenBatch, TokenBatches
from sonde.lm.stream import Batch
from sonde.lm.surgery import deletion_effects
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval, bootstrap_mean
from sonde.studies.chapters.part import Part

_BITS = 1 / math.log(2)
_KINDS = ("tuned", "logit")
_ROWS = 8  # windows on which blocks are deleted, fewer in deep models
_DELETED = 64  # blocks times windows, at most
_STATES = 1024  # hidden states in which influential directions are searched, and as many to measure them in
_DIRECTIONS, _RANDOM = 2, 8  # at each of three layers


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
        """Four findings, three charts, tables by layer and of directions."""
        scores = self._scoring.scores()
        closer, decided = self._closer(scores), self._decided(scores)
        deleted, deletion_chart = self._deletion()
        influence, directions = self._influence()
        layers = range(len(scores["tuned"].sites))
        return Chapter(
            id=self.name,
            question="At which layer is the prediction made?",
            answer=decided.sentence,
            findings=[closer, decided, deleted, influence],
            blocks=[
                kl_chart({f"{kind} lens": scores[kind].kl for kind in _KINDS}, title=closer.sentence),
                self._decided_chart(scores),
                deletion_chart,
                *directions,
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
                "still change how sure it is. A model without one of its blocks is another model: what it loses is not "
                "what that block alone does. The tokens of a direction are those that it moves most, not its meaning."
            ),
            how=(
                "The logit lens applies the model's own final norm and unembedding to the input of each block. The "
                "tuned lens first applies one affine map per block, trained on the first half of the text to give the "
                "final distribution (Belrose et al. 2023, https://arxiv.org/abs/2303.08112). KL(final || lens), mean "
                "over tokens; intervals: bootstrap over windows. A token is decided at the first layer from which the "
                "lens's most likely token is the final one in every layer. A deleted block passes its input on; the "
                "control adds to its output a random vector as long as what the block adds. A direction is averaged "
                "away in the input of a block, and its influence is how far that moves the tuned lens's prediction; "
                "searched on the first half of the text, measured on the second (causal basis extraction, same paper)."
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

    def _deletion(self) -> tuple[Finding, Figure]:
        """What the loss is without each block."""
        lm, seed = self.audit.lm, self.audit.config.seed
        rows = max(2, min(_ROWS, _DELETED // lm.n_layers))
        effects = deletion_effects(lm, _middle(self.audit.held, rows), seed=seed, progress="deleting blocks")
        cost, noise = effects.loss_by_layer(seed=seed), effects.loss_by_layer(noise=True, seed=seed)
        order = sorted(range(lm.n_layers), key=lambda layer: cost[layer].estimate, reverse=True)
        worst = order[0]
        if lm.n_layers == 1:
            sentence = "Its only block is deleted here, which leaves the embedding alone."
        else:
            sentence = (
                f"It can do without block {worst} least; without any one of the others its loss rises by at most "
                f"{number(max(cost[order[1]].estimate, 0.0), 2)} bits per byte."
            )
        finding = Finding.of(
            cost[worst],
            id="depth.deletion",
            chapter=self.name,
            sentence=sentence,
            metric=f"loss added by deleting block {worst}",
            unit="bits per byte",
            better="none",
            control=Control.of("random change of the same length", noise[worst]),
            command=self.audit.command(self.name),
            figures=("depth.deletion",),
        )
        chart = chart_kinds.bars(
            [
                {"block": layer, "added": a.estimate, "low": a.low, "high": a.high, "random": b.estimate}
                for layer, (a, b) in enumerate(zip(cost, noise, strict=True))
            ],
            x="block",
            y="added",
            low="low",
            high="high",
            control="random",
            control_name="random",
            x_labels=[str(layer) for layer in range(lm.n_layers)],
            title=f"Without block {worst} the loss rises by {number(cost[worst].estimate, 2)} bits per byte",
            subtitle="Loss added by deleting a block, 95 % intervals; grey: by a random change of the same length",
            x_title="deleted block",
            y_title="added loss (bits per byte)",
        )
        caption = f"What deleting each block adds to the loss, on {int(effects.scored.sum()):,} held tokens."
        return finding, Figure(id="depth.deletion", chart=chart, caption=caption)

    def _influence(self) -> tuple[Finding, list[Table]]:
        """The directions on which the tuned lens's prediction depends most, at three layers."""
        lens, depth, seed = self.audit.lens, self.audit.lm.n_layers, self.audit.config.seed
        layers = sorted({depth // 4, depth // 2, 3 * depth // 4})
        found: list[tuple[int, InfluentialDirection, Interval, Interval]] = []
        try:
            searched = self._states(self.audit.fit, layers)
            measured = self._states(self.audit.held, layers)
            for layer in layers:
                states = searched[layer].flatten(0, 1)
                best = influential_directions(lens, layer, states, k=_DIRECTIONS)
                both = torch.cat(
                    [torch.stack([d.vector for d in best]), random_basis(_RANDOM, lens.d_model, seed=seed)]
                )
                held = measured[layer]
                loss = direction_loss(lens, layer, held.flatten(0, 1), states.mean(0))
                by_row = loss.by_token(both.to(held)).cpu().view(len(both), *held.shape[:2]).mean(-1) * _BITS
                control = bootstrap_mean(by_row[_DIRECTIONS:].mean(0), seed=seed)
                found += [
                    (layer, direction, bootstrap_mean(row, seed=seed), control)
                    for direction, row in zip(best, by_row[:_DIRECTIONS], strict=True)
                ]
        except SondeError as error:
            return self._no_influence(str(error)), []
        layer, _, most, control = max(found, key=lambda entry: entry[2].estimate)
        clear = "more than" if most.low > control.high else "no more than"
        finding = Finding.of(
            most,
            id="depth.direction",
            chapter=self.name,
            sentence=(
                f"Averaging away one direction at the input of block {layer} moves the prediction {clear} averaging "
                "away a random one."
            ),
            metric="influence of the strongest direction on the tuned lens",
            unit="bits per token",
            better="higher",
            control=Control.of("random direction", control),
            command=self.audit.command(self.name),
            tables=("depth.directions",),
        )
        table = Table(
            id="depth.directions",
            caption="The most influential directions, with the tokens that they move most",
            columns=[
                "input of block",
                Column(name="influence", unit="bits"),
                Column(name="random direction", unit="bits"),
                Column(name="makes likelier", code=True),
                Column(name="makes unlikelier", code=True),
            ],
            rows=[
                [
                    str(layer),
                    influence.estimate,
                    random.estimate,
                    *(
                        " · ".join(self.audit.lm.token_strings(end))
                        for end in (direction.promotes, direction.suppresses)
                    ),
                ]
                for layer, direction, influence, random in found
            ],
        )
        return finding, [table]

    def _states(self, text: TokenBatches, layers: list[int]) -> dict[int, torch.Tensor]:
        """About a thousand hidden states (rows, pos, d) from the middle of a text, at the lens's layers."""
        lm, lens = self.audit.lm, self.audit.lens
        every = max(1, _ROWS * text.context // _STATES)
        parts = []
        with torch.no_grad(), lm.reading(*(lens.sites[layer] for layer in layers)) as acts:
            for batch in _middle(text, _ROWS):
                lm(batch.tokens.to(lm.device))
                parts.append({layer: acts[lens.sites[layer]][:, ::every].float() for layer in layers})
        return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}

    def _no_influence(self, reason: str) -> Finding:
        return Finding(
            id="depth.direction",
            chapter=self.name,
            sentence="No influential directions could be found.",
            metric="influence of the strongest direction on the tuned lens",
            command=self.audit.command(self.name),
            refused=reason,
        )


def _middle(text: TokenBatches, rows: int) -> list[TokenBatch]:
    """So many rows from the middle of a text, or all that there are, in batches."""
    in_one = len(text[0].tokens)
    count = min(text.n_batches, -(-rows // in_one))
    first = (text.n_batches - count) // 2
    return [_first_rows(text[first + i], rows - i * in_one) for i in range(count)]


def _first_rows(batch: TokenBatch, rows: int) -> TokenBatch:
    parts = (batch.documents, batch.chunks, batch.n_bytes)
    return TokenBatch(batch.tokens[:rows], batch.mask[:rows], batch.index, *(part[:rows] for part in parts))


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
