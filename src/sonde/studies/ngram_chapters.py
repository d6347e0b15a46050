"""The report of `ngram-stages`: when a network comes closest to each order of n-grams, and how it leaves them again."""

import math
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.dynamics.ngram_stages import Yardsticks, lowest
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number
from sonde.stats.intervals import Interval, bootstrap, bootstrap_mean, bootstrap_ratio

if TYPE_CHECKING:
    from sonde.studies.ngram_stages import NgramStagesConfig

Trace = dict[int, dict[str, Any]]

_CITE = "Belrose et al. 2024, arXiv:2402.04362"
_APART = 2.0  # two stages are apart when their steps are


def chapters(
    config: "NgramStagesConfig",
    traces: dict[int, Trace],
    yardsticks: Yardsticks,
    *,
    tokens_per_byte: float,
    notes: Sequence[str],
) -> list[Chapter]:
    """Chapters on the stages and on what is left of them, of measures by seed and step."""
    return [_stages(config, traces, yardsticks, tokens_per_byte, notes), _samples(config, traces, yardsticks)]


def curve(trace: Trace, kind: str, name: str) -> dict[int, float]:
    """Mean of one measure by step."""
    return {step: float(tree[kind][name].mean()) for step, tree in trace.items()}


def in_order(trace: Trace, kind: str, names: Sequence[str]) -> bool:
    """Whether the curves of successive orders are lowest at steps that are twice as far or more."""
    return _least_ratio([lowest(curve(trace, kind, name)) for name in names]) >= _APART


def apart(traces: dict[int, Trace], names: Sequence[str]) -> Interval:
    """The smallest ratio of the steps at which successive orders are closest, means over seeds; over sequences."""
    steps = sorted(next(iter(traces.values())))
    values = np.mean(
        [[[trace[step]["kl"][name].numpy() for step in steps] for name in names] for trace in traces.values()], axis=0
    )

    def statistic(rows: np.ndarray) -> float:
        return _least_ratio([steps[i] for i in rows.mean(0).argmin(-1)])

    return bootstrap(statistic, values.transpose(2, 0, 1), draws=500)


def _least_ratio(steps: Sequence[int]) -> float:
    return min(max(b, 1) / max(a, 1) for a, b in pairwise(steps))


def rise(traces: dict[int, Trace], name: str) -> Interval:
    """Last divergence from an order over the lowest: over seeds where there are three or more, else sequences."""
    tops, bottoms = [], []
    for trace in traces.values():
        kl = {step: tree["kl"][name].numpy() for step, tree in trace.items()}
        least = lowest({step: values.mean() for step, values in kl.items()})
        tops.append(kl[max(kl)])
        bottoms.append(kl[least])
    axis = 1 if len(traces) >= 3 else 0
    return bootstrap_ratio(np.mean(tops, axis), np.mean(bottoms, axis))


def _stages(
    config: "NgramStagesConfig",
    traces: dict[int, Trace],
    yardsticks: Yardsticks,
    tokens_per_byte: float,
    notes: Sequence[str],
) -> Chapter:
    orders = list(yardsticks.samples)
    mixed = ["1", *(name for name in yardsticks.predictions if name.startswith("shuffled"))]
    when = _when(traces, "kl", orders)
    command = shlex.join(config.command())
    unit = f"{len(traces)} networks" if len(traces) > 1 else "1 network"
    findings = []
    if len(orders) > 1:
        ratio, control = apart(traces, orders), apart(traces, mixed)
        agree = sum(in_order(trace, "kl", orders) for trace in traces.values())
        findings.append(
            Finding.of(
                ratio,
                id="stages.order",
                chapter="stages",
                sentence=f"It comes closest to the n-grams of order {', '.join(orders)} at step {when}; the steps "
                f"are in that order and at least {_APART:g} times apart in {agree} of {unit}.",
                metric="smallest ratio between the steps of successive orders",
                better="higher",
                control=Control.of("n-grams of the shuffled text", control),
                command=command,
                figures=("stages.kl",),
                tables=("stages.steps",),
            )
        )
        rises = {name: rise(traces, name) for name in (orders[0], orders[-1])}
        findings.append(
            Finding.of(
                rises[orders[0]],
                id="stages.rise",
                chapter="stages",
                sentence=f"At the end it is {number(rises[orders[0]].estimate, 2)} times as far from unigrams as it "
                "was when it was closest to them.",
                metric="last divergence from unigrams over the smallest",
                better="higher",
                control=Control.of(f"the same of order {orders[-1]}", rises[orders[-1]]),
                command=command,
                figures=("stages.kl",),
                tables=("stages.steps",),
            )
        )
    shown = [*orders, mixed[-1]] if len(orders) > 1 else orders
    chart = _by_step(
        traces,
        "kl",
        shown,
        control=mixed[-1:] if len(orders) > 1 else [],
        title=f"Closest to {', '.join(f'{n}-grams' for n in orders)} at step {when}",
        subtitle=f"means of {unit} on {yardsticks.held.shape[0]} held-out sequences, with 95 % bands",
        y_title="KL from the n-gram model (nats)",
    )
    bits = tokens_per_byte / math.log(2)
    steps = sorted(next(iter(traces.values())))
    columns = [Column(name=f"KL {n}", unit="nats") for n in orders] + [
        Column(name=f"JS {n}", unit="nats") for n in orders
    ]
    rows = [
        [step]
        + [_mean(traces, step, kind, n) for kind in ("kl", "js") for n in orders]
        + [_mean(traces, step, "sampled", n) for n in orders]
        + [float(np.mean([float(t[step]["loss"].mean()) for t in traces.values()])) * bits]
        for step in steps
    ]
    return Chapter(
        id="stages",
        question="Which order of n-grams does it resemble, and when?",
        answer=findings[0].sentence if findings else f"It comes closest to unigrams at step {when}.",
        findings=findings,
        blocks=[
            Figure(id="stages.kl", chart=chart, caption="Divergence from the n-gram models by training step."),
            Table(
                id="stages.steps",
                caption=f"Means over {unit} by step: divergences, loss on n-gram samples, loss on held-out text",
                columns=[
                    "step",
                    *columns,
                    *(Column(name=f"loss on {n}-gram samples", unit="nats") for n in orders),
                    Column(name="loss on text", unit="bits/byte"),
                ],
                rows=rows,
            ),
        ],
        not_shown=(
            "That a network is close to an n-gram model does not say that it computes one. The step of the minimum "
            "depends on learning rate and batch. N-gram models are estimates from finite text: what keeps a network "
            "away from them may be their own error."
        ),
        how=(
            f"N-gram models with {config.smoothing} smoothing, counted on the text that is trained on (with --model, "
            "the first half of the text); contexts end at the position whose logits are compared, and all "
            f"orders are compared at the same positions. Two stages are apart when their steps are {_APART:g} times "
            f"apart. Control: n-grams of the same tokens in shuffled order ({_CITE}). One nat a token is "
            f"{number(bits)} bits per byte of this text."
            + (" " + " ".join(f"{note[0].upper()}{note[1:]}." for note in notes) if notes else "")
        ),
    )


def _samples(config: "NgramStagesConfig", traces: dict[int, Trace], yardsticks: Yardsticks) -> Chapter:
    orders = list(yardsticks.samples)
    when = _when(traces, "sampled", orders)
    last = max(next(iter(traces.values())))
    entropy = {n: f"entropy {n}" for n in orders}
    by_step = _by_step(
        traces,
        "sampled",
        orders,
        title=f"Loss on {', '.join(f'{n}-gram' for n in orders)} samples is lowest at step {when}",
        subtitle="grey: the entropy of each n-gram model, the least that this loss can be",
        y_title="loss on samples (nats)",
        flat={entropy[n]: yardsticks.entropies[n] for n in orders},
    )
    blocks = [Figure(id="samples.loss", chart=by_step, caption="Loss on n-gram samples by training step.")]
    ends = [2**i for i in range(20) if 2**i < yardsticks.held.shape[1] - 1] + [yardsticks.held.shape[1] - 1]
    bins = list(pairwise([0, *ends]))
    position = []
    for n in orders:
        for i, (low, high) in enumerate(bins):
            each = [float(t[last]["by_position"][n][low:high].mean()) for t in traces.values()]
            position.append({"position": i, "loss": float(np.mean(each)), "samples": f"order {n}"})
        position += [{"position": i, "loss": yardsticks.entropies[n], "samples": entropy[n]} for i in range(len(bins))]
    chart = chart_kinds.lines(
        position,
        x="position",
        y="loss",
        series="samples",
        control=tuple(entropy.values()),
        title=f"Loss along n-gram samples at step {last}",
        subtitle="falls towards the entropy (grey) where the network learns a sample's statistics from its context",
        x_title="position in the sequence",
        y_title="loss (nats)",
        x_labels=[str(high) if high - low < 2 else f"{low + 1}–{high}" for low, high in bins],
    )
    blocks.append(Figure(id="samples.position", chart=chart, caption="Loss on n-gram samples by position."))
    excess = _mean(traces, last, "sampled", orders[0]) - yardsticks.entropies[orders[0]]
    return Chapter(
        id="samples",
        question="How does it predict text that has nothing beyond n tokens?",
        answer=(
            f"Its loss on samples of order {', '.join(orders)} is lowest at step {when}; in the end it needs "
            f"{number(excess, 2)} nats a token more than it must on unigram samples."
        ),
        blocks=blocks,
        not_shown=(
            "A network that recognises from context that a sample has no order would do well on all of them; short "
            "sequences leave little room for that."
        ),
        how=(
            f"{len(yardsticks.samples[orders[0]])} sequences of {yardsticks.held.shape[1]} tokens from each n-gram "
            f"model, seed {config.seed}; by position, bins of doubling length. Entropies of the models: "
            + ", ".join(f"{number(yardsticks.entropies[n])} nats for order {n}" for n in orders)
            + "."
        ),
    )


def _when(traces: dict[int, Trace], kind: str, orders: Sequence[str]) -> str:
    """Steps of the lowest means over the networks, in words."""
    steps = sorted(next(iter(traces.values())))
    found = [lowest({step: _mean(traces, step, kind, name) for step in steps}) for name in orders]
    return ", ".join(map(str, found))


def _mean(traces: dict[int, Trace], step: int, kind: str, name: str) -> float:
    return float(np.mean([float(trace[step][kind][name].mean()) for trace in traces.values()]))


def _by_step(
    traces: dict[int, Trace],
    kind: str,
    names: Sequence[str],
    *,
    title: str,
    subtitle: str,
    y_title: str,
    control: Sequence[str] = (),
    flat: "dict[str, float] | None" = None,
) -> Any:
    """Lines over checkpoints, at even distances, with bands over sequences (means over the networks)."""
    steps = sorted(next(iter(traces.values())))
    rows = []
    for name in names:
        for i, step in enumerate(steps):
            each = np.mean([trace[step][kind][name].numpy() for trace in traces.values()], axis=0)
            mean = bootstrap_mean(each, draws=400)
            label = f"order {name}" if name.isdigit() else f"order {name.removeprefix('shuffled ')}, shuffled"
            rows.append({"step": i, "nats": mean.estimate, "low": mean.low, "high": mean.high, "against": label})
    for name, value in (flat or {}).items():
        rows += [{"step": i, "nats": value, "low": value, "high": value, "against": name} for i in range(len(steps))]
    grey = [row["against"] for row in rows if row["against"] in (flat or {}) or "shuffled" in row["against"]]
    return chart_kinds.lines(
        rows,
        x="step",
        y="nats",
        low="low",
        high="high",
        series="against",
        control=tuple(dict.fromkeys(grey)) if control or flat else (),
        title=title,
        subtitle=subtitle,
        x_title="training step",
        y_title=y_title,
        x_labels=[str(step) for step in steps],
    )
