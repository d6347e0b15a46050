"""Which n-grams of the text does the model's prediction resemble, now and at its checkpoints?

N-gram models of order 1 to 4 are counted on the first half of the text; at places of the second half the divergence of
each from the model's prediction is measured. The control has the same tokens in shuffled order, so that nothing but
their frequencies is left in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sonde.dynamics.ngram_stages import Yardsticks, checkpoints_in, logits_of, lowest, measure, shuffled
from sonde.lm.stream import Batch
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval, bootstrap_means, paired_difference
from sonde.stats.ngram import NgramModel
from sonde.studies.chapters.part import Audit, Gathered, Part

_ORDERS = (1, 2, 3, 4)
_NAMES = {1: "single tokens", 2: "pairs", 3: "triples", 4: "runs of four"}
_EVERY = 8  # one place in so many is looked at
_CHECKPOINTS = 12
_WINDOWS, _LENGTH = 16, 128  # of held text, for each checkpoint


class Statistics(Part):
    """Divergence from n-gram models by order, with shuffled text as the control."""

    name = "statistics"

    def __init__(self, audit: Audit) -> None:
        super().__init__(audit)
        self._rows = Gathered()

    @property
    def sites(self) -> tuple[str, ...]:
        """The prediction alone."""
        return ("logits",)

    def prepare(self) -> None:
        """Count the n-grams of the fitting half, and of its tokens in shuffled order."""
        self._models = [self.audit.ngram]
        with self.audit.timed("n-gram counts"):
            windows = shuffled(
                torch.cat([batch.tokens for batch in self.audit.fit]).numpy(), seed=self.audit.config.seed
            )
            order = min(_ORDERS[-1], self.audit.ngram.order)
            self._models.append(NgramModel.fit(windows, order=order, vocab_size=self.audit.lm.vocab_size))
        self._orders = tuple(n for n in _ORDERS if n <= order)

    def update(self, batch: Batch) -> None:
        """Keep the mean divergence of each order in every window."""
        first = self._orders[-1] - 1
        logits = batch.acts["logits"][:, first::_EVERY].float()
        tokens = batch.tokens.cpu().numpy()
        for name, model in zip(("text", "shuffled"), self._models, strict=True):
            found = []
            for n in self._orders:
                rows = model.predictions(tokens, order=n, first=first, every=_EVERY)
                found.append(rows.kl(logits.flatten(0, 1)).view(len(tokens), -1).mean(1))
            self._rows.add(name, torch.stack(found, 1))

    def state(self) -> Any:
        """What was kept so far."""
        return self._rows.state()

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        self._rows.load(state)

    def write(self) -> Chapter:
        """One finding and one chart; a second chart where the model has checkpoints."""
        kl, mixed = self._rows["text"], self._rows["shuffled"]
        seed = self.audit.config.seed
        means, others = bootstrap_means(kl, seed=seed), bootstrap_means(mixed, seed=seed)
        best = _closest(kl, seed)
        finding = self._finding(kl, mixed, means, best)
        blocks: list[Any] = [self._chart(means, others, best)]
        answer = finding.sentence
        series = self._checkpoints()
        if series:
            with self.audit.timed("checkpoints"):
                said, more = self._over_checkpoints(series)
            answer, blocks = f"{answer} {said}", [*blocks, *more]
        return Chapter(
            id=self.name,
            question="Which statistics of the text does it use?",
            answer=answer,
            findings=[finding],
            blocks=blocks,
            not_shown=(
                "Being closest to one order does not make it an n-gram model: one that knows more is far from all of "
                "them. Of orders that are equally close the lowest is named. The counts come from half of this text, "
                "so longer n-grams are estimated from little; with more --tokens they come closer."
                + ("" if series else " The model came without checkpoints, so nothing is said of when it learned this.")
            ),
            how=(
                "Interpolated Kneser-Ney models of the first half of the text; KL(n-gram ‖ model) of the next token "
                f"in nats, at every {_EVERY}th token of the second half. Bootstrap over {means[0].n} windows. Control "
                "(grey): the first half with its tokens shuffled. Checkpoints are folders such as step1000 or "
                "checkpoint-500 in the model's folder; of others, and of branches on the hub, sonde run ngram-stages "
                "--model NAME --revisions … tells the same. After arXiv:2402.04362."
            ),
        )

    def _finding(self, kl: np.ndarray, mixed: np.ndarray, means: Sequence[Interval], best: int) -> Finding:
        seed = self.audit.config.seed
        shown = best or 1  # what order adds is asked of pairs where single tokens are the closest
        shown = min(shown, len(means) - 1)
        gain = paired_difference(kl[:, 0], kl[:, shown], seed=seed)
        control = paired_difference(mixed[:, 0], mixed[:, shown], seed=seed)
        order = self._orders[best]
        apart = f"{number(means[best].estimate)} nats per token apart"
        if order == 1:
            sentence = f"Of all n-grams, the frequencies of single tokens are closest to what it predicts, {apart}."
        else:
            sentence = (
                f"What it predicts is closest to n-grams of order {order} ({_NAMES[order]}), {apart}; the frequencies "
                f"of single tokens are {number(means[0].estimate)} nats apart."
            )
        return Finding.of(
            gain,
            id="statistics.order",
            chapter=self.name,
            sentence=sentence,
            metric=f"how much closer n-grams of order {self._orders[shown]} are to it than single tokens",
            unit="nats per token",
            better="higher",
            control=Control.of("the same of shuffled text", control),
            command=self.audit.command(self.name),
            figures=("statistics.orders",),
        )

    def _chart(self, means: Sequence[Interval], others: Sequence[Interval], best: int) -> Figure:
        rows = [
            {
                "order": f"{n} ({_NAMES[n]})",
                "nats": mean.estimate,
                "low": mean.low,
                "high": mean.high,
                "shuffled": other.estimate,
            }
            for n, mean, other in zip(self._orders, means, others, strict=True)
        ]
        chart = chart_kinds.intervals(
            rows,
            label="order",
            value="nats",
            low="low",
            high="high",
            control="shuffled",
            title=f"Its predictions are closest to n-grams of order {self._orders[best]}",
            subtitle="distance of n-gram models from the model's predictions, 95 % interval; grey: of shuffled text",
            x_title="KL(n-gram ‖ model), nats per token",
            y_title="order of the n-grams",
        )
        caption = "Divergence of n-gram models from the model's prediction by order; grey ticks: the text shuffled."
        return Figure(id="statistics.orders", chart=chart, caption=caption)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Checkpoints in the model's folder, or beside it where it is one itself; as many as are worth a point."""
        folder = Path(self.audit.config.model).resolve()
        beside = checkpoints_in(folder.parent)
        found = checkpoints_in(folder) or (beside if folder in {path for _, path in beside} else [])
        if len(found) < 2:
            return []
        picked = np.unique(np.linspace(0, len(found) - 1, min(len(found), _CHECKPOINTS)).round().astype(int))
        return [found[i] for i in picked]

    def _over_checkpoints(self, series: Sequence[tuple[int, Path]]) -> tuple[str, list[Any]]:
        """What each checkpoint is closest to: a sentence, a chart and a table."""
        from sonde.lm.load import load

        audit, names = self.audit, [str(n) for n in self._orders]
        held = torch.cat([batch.tokens for batch in audit.held])[:_WINDOWS, : _LENGTH + 1]
        models = {name: (self._models[0], int(name)) for name in names}
        models["shuffled"] = (self._models[1], self._orders[-1])
        yardsticks = Yardsticks.build(models, held)
        found = {}
        for i, (step, path) in enumerate(series):
            lm = load(path, device=audit.config.device, dtype=audit.config.dtype)
            found[step] = measure(logits_of(lm), yardsticks, jensen_shannon=False)["kl"]
            audit.run.progress("checkpoints", done=i + 1, total=len(series))
        steps = [step for step, _ in series]
        rows = [
            {
                "step": i,
                "nats": float(found[step][name].mean()),
                "n-grams": "shuffled" if name == "shuffled" else f"order {name}",
            }
            for name in models
            for i, step in enumerate(steps)
        ]
        when = [lowest({step: float(found[step][name].mean()) for step in steps}) for name in names]
        said = f"Over its checkpoints it was closest to order {', '.join(names)} at step {', '.join(map(str, when))}."
        chart = chart_kinds.lines(
            rows,
            x="step",
            y="nats",
            series="n-grams",
            control=("shuffled",),
            title=f"Closest to order {', '.join(names)} at step {', '.join(map(str, when))}",
            subtitle=f"{len(held)} held-out windows; grey: order {self._orders[-1]} of the shuffled text",
            x_title="training step",
            y_title="KL(n-gram ‖ model), nats",
            x_labels=[str(step) for step in steps],
        )
        table = Table(
            id="statistics.steps",
            caption="KL(n-gram ‖ model) by checkpoint",
            columns=["step", *(Column(name=f"order {name}", unit="nats") for name in names)],
            rows=[[step, *(float(found[step][name].mean()) for name in names)] for step in steps],
        )
        figure = Figure(id="statistics.checkpoints", chart=chart, caption="Divergence from n-grams by checkpoint.")
        return said, [figure, table]


def _closest(kl: np.ndarray, seed: int) -> int:
    """The lowest order that no other is clearly closer than, of `kl [windows, orders]`."""
    least = int(kl.mean(0).argmin())
    for order in range(least):
        if paired_difference(kl[:, order], kl[:, least], seed=seed).low <= 0:
            return order
    return least
