"""What the study of shaken prompts found: correlations over tasks, robust training, the Hessian's prediction."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.runs import chart_kinds
from sonde.runs.blocks import Block, Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.stats.intervals import Interval, bootstrap, bootstrap_mean, paired_difference
from sonde.stats.ranks import spearman
from sonde.studies.elicitation_chapters import tokens

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.prompts.fragility import Fragility
    from sonde.studies.prompt_fragility import PromptFragilityConfig, Task

_SHUFFLES = 2000
_NEAR = 0.15  # how far a rise may be from the expansion


def fragility_chapter(
    lm: "LanguageModel",
    tasks: Sequence["Task"],
    measured: Sequence[dict[str, Any]],
    config: "PromptFragilityConfig",
    command: str,
) -> Chapter:
    """Correlations over tasks with shuffled pairings as the control, robust against plain prompts, all numbers."""
    of = {kind: [_fragility(one["shaken"][kind], config.rhos) for one in measured] for kind in measured[0]["shaken"]}
    plain = of["plain"]
    distance = np.array([one["distance"] for one in measured])
    numbers = {
        "conditional distance": distance,
        "quantised bits": np.array([one["bits"] for one in measured]),
        "target length": np.array([task.size for task in tasks], dtype=float),
        "loss at rest": np.array([f.loss for f in plain]),
        **{f"F({rho:g})": np.array([f.rise(rho).estimate for f in plain]) for rho in config.rhos},
        **{f"G({rho:g})": np.array([f.gradient(rho).estimate for f in plain]) for rho in config.rhos},
    }
    rise, slope = f"F({config.rho:g})", f"G({config.rho:g})"
    pairs = [("conditional distance", rise), ("conditional distance", slope), ("quantised bits", rise), (rise, slope)]
    common = {"chapter": "fragility", "command": command}
    findings = [_correlated(a, b, numbers[a], numbers[b], common) for a, b in pairs]
    findings += [_expansion(measured, plain, config, common)]
    findings += [_robust(kind, of[kind], plain, config.rho, common) for kind in of if kind != "plain"]
    return Chapter(
        id="fragility",
        question="Are tasks that take much prompting elicited by fragile prompts?",
        answer=" ".join(finding.sentence for finding in (findings[0], *findings[len(pairs) + 1 :])),
        findings=findings,
        blocks=[
            _scatter(lm, distance, plain, config),
            _by_size(lm, of, measured, config),
            _task_table(lm, tasks, measured, plain, config),
            _correlation_table(numbers, config),
            _trace_table(tasks, measured, plain, config),
            _robust_table(of, config),
        ],
        not_shown=(
            f"Other models, longer training and tasks that are no fixed targets. {len(tasks)} tasks give wide"
            " intervals. Targets of growing length are one way to make tasks harder; the correlation is over these. A"
            " harder task also leaves a higher loss at rest after as many steps, and the table correlates that too."
        ),
        how=(
            f"F(ρ) = E L(s + δ) − L(s) and G(ρ) = r E |∇L(s + δ)|, δ of {config.draws} antithetic draws from"
            f" N(0, (ρ r)² I), r the embedding's coordinate RMS, L in nats a token on {config.tested} unseen contexts;"
            f" all prompts have {config.shaken} vectors and {config.steps} steps, so that F is not of their size. Worst"
            " case: 10 steps of ascent in the ball |δ| ≤ ρ r √(nd). Spearman's correlation over tasks, bootstrap over"
            f" tasks; the control is {_SHUFFLES} random pairings. A task that no prompt length achieves ranks above all"
            " others."
        ),
    )


def _fragility(tree: dict[str, Any], rhos: Sequence[float]) -> "Fragility":
    from sonde.prompts.fragility import Fragility

    return Fragility(tuple(rhos), tree["loss"], tree["losses"], tree["gradients"], tree["at_rest"])


def _ranked(x: np.ndarray) -> np.ndarray:
    """Infinite values as one number above all others."""
    finite = x[np.isfinite(x)]
    return np.where(np.isfinite(x), x, 2 * finite.max(initial=1.0))


def _spearman(x: np.ndarray, y: np.ndarray) -> Interval | str:
    """The correlation over tasks, or why there is none."""
    x, y = _ranked(x), _ranked(y)
    if min(len(set(x)), len(set(y))) < 2:
        return "one of the two is the same for all tasks"
    try:
        return bootstrap(spearman, x, y, batched=True)
    except ValueError:
        return "nearly all tasks have the same value, so that resampled tasks often have but one"


def _correlated(a: str, b: str, x: np.ndarray, y: np.ndarray, common: dict[str, Any]) -> Finding:
    names = {"conditional distance": "distance", "quantised bits": "bits"}
    parts = [names.get(name, name[0].lower()) for name in (a, b)]
    fields: dict[str, Any] = common | {"id": f"fragility.{'-'.join(parts)}", "metric": f"Spearman's ρ of {a} and {b}"}
    fields |= {"figures": ("fragility.tasks",), "tables": ("fragility.tasks", "fragility.correlations")}
    found = _spearman(x, y)
    if isinstance(found, str):
        return Finding(sentence=f"Nothing is said of {a} and {b}.", refused=found, **fields)
    rng = np.random.default_rng(0)
    others = np.stack([rng.permutation(_ranked(y)) for _ in range(_SHUFFLES)])
    shuffled = spearman(np.broadcast_to(_ranked(x), others.shape), others)
    low, middle, high = (float(v) for v in np.quantile(shuffled, [0.025, 0.5, 0.975]))
    together, against = found.low > middle and found.estimate > high, found.high < middle and found.estimate < low
    verdict = "are not told apart from shuffled tasks."
    if together or against:
        verdict = "rise together." if together else "go against each other."
    return Finding.of(
        found,
        sentence=f"Over {found.n} tasks, {a} and {b} {verdict}",
        control=Control("shuffled pairing", middle, None if together or against else (low, high)),
        **fields | {"metric": f"{fields['metric']} (95 % of shuffled pairings: {low:.2f} to {high:.2f})"},
    )


def _expansion(measured: Any, plain: Any, config: "PromptFragilityConfig", common: dict[str, Any]) -> Finding:
    """F against rho^2 r^2 tr(H) / 2, at the smallest noise and, where it need not hold, at the largest."""
    trace = np.array([one["shaken"]["plain"]["trace"]["estimate"] for one in measured])

    def ratio(rho: float) -> Interval:
        rises = np.array([f.rise(rho).estimate for f in plain])
        return bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), rises, 0.5 * rho**2 * trace, batched=True)

    small, large = min(config.rhos), max(config.rhos)
    found = ratio(small)
    near = "within" if abs(found.estimate - 1) <= _NEAR else "but not within"
    return Finding.of(
        found,
        id="fragility.trace",
        sentence=f"At ρ = {small:g} losses rise as the trace of the Hessian predicts, {near} {_NEAR:.0%}.",
        metric=f"F({small:g}) over ρ² r² tr(H) / 2, sums over tasks",
        control=Control.of(f"ρ = {large:g}", ratio(large)),
        tables=("fragility.trace",),
        **common,
    )


def _robust(kind: str, found: Any, plain: Any, rho: float, common: dict[str, Any]) -> Finding:
    ours, theirs = ([f.rise(rho).estimate for f in each] for each in (found, plain))
    gap = paired_difference(ours, theirs)
    rest = np.mean([f.loss for f in found]) - np.mean([f.loss for f in plain])
    verb = "lose less" if gap.high < 0 else "lose more" if gap.low > 0 else "lose neither clearly less nor more"
    return Finding.of(
        gap,
        id=f"fragility.robust-{kind}",
        sentence=(
            f"Prompts of {kind} training {verb} than plain ones when shaken at ρ = {rho:g}; at rest their loss is "
            f"{abs(rest):.2g} nats a token {'higher' if rest > 0 else 'lower'}."
        ),
        metric=f"F({rho:g}) less that of plain prompts, mean over tasks",
        unit="nats per token",
        better="lower",
        control=Control("no difference", 0.0),
        figures=("fragility.sizes",),
        tables=("fragility.robust",),
        **common,
    )


def _scatter(lm: "LanguageModel", distance: np.ndarray, plain: Any, config: "PromptFragilityConfig") -> Figure:
    rises = [f.rise(config.rho) for f in plain]
    never = 2 * max(config.lengths)
    rows = [
        {"x": never if math.isinf(n) else n, "y": rise.estimate, "low": rise.low, "high": rise.high}
        for n, rise in zip(distance.tolist(), rises, strict=True)
    ]
    chart = chart_kinds.points(
        rows,
        x="x",
        y="y",
        low="low",
        high="high",
        title=f"{len(rows)} tasks: prompt tokens they take, and what a shaken prompt loses",
        subtitle=f"{lm.name}, prompts of {config.shaken} vectors, noise of {config.rho:g} r"
        + (f"; at {never}: none of the lengths works" if np.isinf(distance).any() else ""),
        x_title="conditional distance (tokens)",
        y_title=f"F({config.rho:g}) (nats per token)",
    )
    return Figure(id="fragility.tasks", chart=chart, caption="Conditional distance and fragility of every task.")


def _by_size(lm: "LanguageModel", of: Any, measured: Any, config: "PromptFragilityConfig") -> Figure:
    rows: list[dict[str, Any]] = []
    for i, rho in enumerate(config.rhos):
        rises = {kind: [f.rise(rho).estimate for f in found] for kind, found in of.items()}
        rises["plain, worst case"] = [one["shaken"]["plain"]["worst"][i]["estimate"] for one in measured]
        for kind, values in rises.items():
            mean = bootstrap_mean(values)
            rows.append({"x": i, "kind": kind, "y": mean.estimate, "low": mean.low, "high": mean.high})
    least = min((row["y"] for row in rows if row["y"] > 0), default=1e-6)
    for row in rows:  # a band that reaches 0 ends at the edge of a logarithmic axis
        row["low"] = max(row["low"], least / 2)
        row["y"] = row["y"] if row["y"] > 0 else None
    chart = chart_kinds.lines(
        rows,
        x="x",
        y="y",
        series="kind",
        low="low",
        high="high",
        control=("plain, worst case",),
        log=True,
        title="What a prompt loses when it is shaken",
        subtitle=f"{lm.name}, mean over {len(measured)} tasks, 95 % bands; noise training at {config.rho:g} r",
        x_title="size of the noise (r)",
        y_title="rise of the loss (nats per token)",
        x_labels=[f"{rho:g}" for rho in config.rhos],
    )
    return Figure(id="fragility.sizes", chart=chart, caption="Rise of the loss by the size of the noise.")


def _task_table(lm: "LanguageModel", tasks: Any, measured: Any, plain: Any, config: "PromptFragilityConfig") -> Block:
    at = config.rhos.index(config.rho)
    rows = []
    for task, one, found in zip(tasks, measured, plain, strict=True):
        own = one["shaken"]["plain"]
        rows.append(
            [
                "own" if task.own else "random",
                lm.decode(task.examples.targets[0]) if lm.tokenizer else str(task.examples.targets[0]),
                task.size,
                tokens(one["distance"]),
                one["bits"] if math.isfinite(one["bits"]) else None,
                found.loss,
                found.rise(config.rho).estimate,
                found.gradient(config.rho).estimate,
                own["worst"][at]["estimate"],
            ]
        )
    names = ("task", "target", "tokens", "distance", "bits", "loss", f"F({config.rho:g})")
    names += (f"G({config.rho:g})", f"worst({config.rho:g})")
    return Table(
        id="fragility.tasks",
        caption=f"Tokens and bits of the shortest prompt that works; losses (nats a token) of {config.shaken} vectors",
        columns=[Column(name=name, code=name == "target") for name in names],
        rows=rows,
    )


def _trace_table(tasks: Any, measured: Any, plain: Any, config: "PromptFragilityConfig") -> Block:
    small = min(config.rhos)
    rows = [
        ["own" if task.own else "random", task.size, found.rise(small).estimate, 0.5 * small**2 * trace["estimate"]]
        for task, found, trace in zip(tasks, plain, (one["shaken"]["plain"]["trace"] for one in measured), strict=True)
    ]
    return Table(
        id="fragility.trace",
        caption=f"F({small:g}) and what the trace of the Hessian predicts, nats a token",
        columns=["task", "tokens", f"F({small:g})", "ρ² r² tr(H) / 2"],
        rows=rows,
    )


def _correlation_table(numbers: dict[str, np.ndarray], config: "PromptFragilityConfig") -> Block:
    rows = []
    for name in ("conditional distance", "quantised bits", "target length", "loss at rest"):
        for rho in config.rhos:
            for of in (f"F({rho:g})", f"G({rho:g})"):
                found = _spearman(numbers[name], numbers[of])
                values = [None] * 3 if isinstance(found, str) else [found.estimate, *found.bounds]
                rows.append([name, of, *values])
    return Table(
        id="fragility.correlations",
        caption="Spearman's correlation over tasks, 95 % bootstrap intervals; none where a value is the same for all",
        columns=["of", "and", "correlation", "low", "high"],
        rows=rows,
    )


def _robust_table(of: Any, config: "PromptFragilityConfig") -> Block:
    rows = [
        [kind, float(np.mean([f.loss for f in found])), float(np.mean([f.at_rest for f in found]))]
        + [float(np.mean([f.rise(rho).estimate for f in found])) for rho in config.rhos]
        for kind, found in of.items()
    ]
    return Table(
        id="fragility.robust",
        caption="Plain and robust training, means over tasks, nats a token",
        columns=["training", "loss", "r |gradient|", *(f"F({rho:g})" for rho in config.rhos)],
        rows=rows,
    )
