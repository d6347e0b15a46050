"""Are the latents of a dictionary easier to explain than the neurons of the MLP that they describe?

Latents, the k largest neurons of every token, the same of a random rotation of the neurons, and all positive neurons
are treated alike: windows, a token set learned on some of them, its balanced accuracy on the others. No language model
explains or judges. Controls: an untrained dictionary, neurons of which no larger share is kept than of latents, and
every explanation on another one's windows.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run
    from sonde.stats.intervals import Interval

LATENTS, NEURONS, ROTATED, RAW = "latents", "largest neurons", "largest rotated neurons", "raw neurons"
RARE, UNTRAINED = "neurons as rare as latents", "untrained latents"
KINDS = (LATENTS, NEURONS, ROTATED, RAW, RARE, UNTRAINED)
_PAPER = "Paulo et al. 2024, arXiv:2410.13928"


@dataclass(frozen=True)
class NeuronsVsLatentsConfig(Runnable):
    """Explain latents and neurons by token sets and compare how far the explanations hold.

    Example: sonde run neurons-vs-latents organism:pebble --units 200
    """

    words = ("sonde", "run", "neurons-vs-latents")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What is read. By default the help texts of Python."""
    tokens: Count = 98304
    """How many tokens of the text are read."""
    layer: Count = 0
    """The block whose MLP is looked at. In the first, what a unit does depends on the token most."""
    expansion: Count = 8
    """Latents of the dictionary as a multiple of the stream's width."""
    k: Count = 16
    """Active latents of a token."""
    neurons: Count = 32
    """Neurons that are kept of a token."""
    epochs: Count = 8
    """How often the dictionaries see the text."""
    seeds: Count = 3
    """Dictionaries that are trained; every seed also draws its own units and windows."""
    units: Count = 150
    """Latents or neurons of each kind that are explained for each seed."""
    min_examples: Count = 100
    """Windows in which a unit must fire to be explained."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """The first seed."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "neurons-vs-latents",
    summary="token sets explain latents, largest neurons and raw neurons: which hold on windows that were held out",
    paper="Paulo et al. 2024, Automatically Interpreting Millions of Features in Large Language Models "
    "(arXiv:2410.13928)",
)
def neurons_vs_latents(config: NeuronsVsLatentsConfig) -> Path:
    """Train dictionaries, cache latents and neurons, explain and score them, write the report. Returns its path.

    Raises `SondeError` for anything wrong with options, model, text or folder.
    """
    from sonde.data.text import describe
    from sonde.organisms.loading import load
    from sonde.studies.latent_steps import text_rows

    check_options(config)
    for name in ("expansion", "k", "neurons", "epochs", "seeds", "units"):
        if getattr(config, name) < 1:
            raise SondeError(f"--{name} is {getattr(config, name)}: give 1 or more")
    lm = load(config.model, dtype=config.dtype, device=config.device)
    layer = config.layer
    if not 0 <= layer < lm.n_layers:
        raise SondeError(f"--layer is {config.layer}: {lm.name} has the blocks 0 to {lm.n_layers - 1}")
    if config.k > config.expansion * lm.d_model:
        raise SondeError(f"--k is {config.k}, more than the {config.expansion * lm.d_model} latents")
    _neurons(lm, layer, config)  # a model without plain MLPs is refused before a folder is made
    text = text_rows(config, lm)
    with open_run("neurons-vs-latents", config, lm) as run:
        if not run.done("survey"):
            run.finish("survey", {"rows": _survey(run, lm, text, layer, config)})
        rows = run.result("survey")["rows"]
        run.table("neurons.units", rows)
        return publish(
            run,
            lm,
            text,
            [_chapter(lm, layer, rows, config)],
            title=f"Latents and neurons of {lm.name}",
            source=describe(config.text),
            timings=dict(run.timings),
        )


def _neurons(lm: "LanguageModel", layer: int, config: NeuronsVsLatentsConfig) -> dict[str, Any]:
    """The kinds of neurons as encoders; of the raw ones only those that are explained."""
    import numpy as np

    from sonde.features.neurons import MLPNeurons

    largest = MLPNeurons(lm, layer, k=config.neurons)
    rng = np.random.default_rng([config.seed, layer])
    chosen = rng.permutation(largest.latents)[: config.units].tolist()
    return {
        NEURONS: largest,
        ROTATED: MLPNeurons(lm, layer, k=config.neurons, rotation=config.seed),
        RAW: MLPNeurons(lm, layer, k=None, only=chosen),
        RARE: MLPNeurons(lm, layer, k=max(1, round(config.k / (config.expansion * lm.d_model) * largest.latents))),
    }


def _survey(
    run: "Run", lm: "LanguageModel", text: Any, layer: int, config: NeuronsVsLatentsConfig
) -> list[dict[str, Any]]:
    """A row for every unit that was looked at."""
    import numpy as np

    from sonde.features.design import Design
    from sonde.features.dictionary import Dictionary
    from sonde.features.latent_cache import n_latents
    from sonde.features.lexical import lexical_survey
    from sonde.features.plan import Plan
    from sonde.features.samplers import Sampling
    from sonde.studies.latent_steps import cached, trained

    site, seeds = f"mlp_out.{layer}", range(config.seed, config.seed + config.seeds)
    design = Design("topk", lm.d_model, config.expansion * lm.d_model, config.k)
    plans = [Plan(site, design, seed=seed) for seed in seeds]
    made = trained(run, lm, text, plans, epochs=config.epochs, seed=config.seed)
    untrained = Dictionary.initialised(design, mean=made[0].b_dec.detach(), seed=config.seed)
    untrained.site = site
    encoders: dict[str, Any] = _neurons(lm, layer, config) | {UNTRAINED: untrained}
    latents = {seed: f"{LATENTS} {seed}" for seed in seeds}
    encoders |= {latents[seed]: dictionary for seed, dictionary in zip(seeds, made, strict=True)}
    cache = cached(run, lm, encoders, text, seed=config.seed)
    sampling = Sampling(min_examples=config.min_examples)
    rows = []
    for seed in seeds:
        for kind in KINDS:
            hookpoint = latents[seed] if kind == LATENTS else kind
            encoder = encoders[hookpoint]
            units = encoder.only if kind == RAW else range(n_latents(encoder))
            chosen = np.random.default_rng([seed, KINDS.index(kind)]).permutation(np.array(units))[: config.units]
            found = lexical_survey(
                cache, hookpoint, chosen.tolist(), config=sampling, seed=seed, progress=f"{kind}, seed {seed}"
            )
            strings = [lm.token_strings(one.explanation.ids) if one.explanation else [] for one in found]
            rows += [
                {
                    "kind": kind,
                    "seed": seed,
                    "unit": one.latent,
                    "accuracy": one.score.balanced_accuracy if one.score else None,
                    "dealt": one.dealt,
                    "tokens": tokens,
                    "reason": one.reason,
                    "active": bool(cache.counts(hookpoint)[one.latent]),
                }
                for one, tokens in zip(found, strings, strict=True)
            ]
    return rows


def _chapter(
    lm: "LanguageModel", layer: int, rows: Sequence[dict[str, Any]], config: NeuronsVsLatentsConfig
) -> "Chapter":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.runs.report.numbers import number

    command = shlex.join(config.command())
    scored = {kind: [row for row in rows if row["kind"] == kind and row["accuracy"] is not None] for kind in KINDS}
    lacking = [kind for kind in (LATENTS, NEURONS) if len(scored[kind]) < 2]
    if lacking:
        raise SondeError(
            f"fewer than two {lacking[0]} fire in {config.min_examples} windows and in some not: give more --tokens or "
            "a smaller --min-examples"
        )
    means = {kind: _mean(own, "accuracy", config.seed) for kind, own in scored.items() if len(own) > 1}
    dealt = _mean([row for row in scored[LATENTS] if row["dealt"] is not None], "dealt", config.seed)
    findings = [
        Finding.of(
            means[LATENTS],
            id="neurons.latents",
            chapter="neurons",
            sentence=f"A token set tells held-out windows of a latent from others in {means[LATENTS].estimate:.0%} of "
            "the cases.",
            metric="mean balanced accuracy of token sets on held-out windows of latents",
            better="higher",
            control=Control.of("the token set of another latent", dealt),
            command=command,
            figures=("neurons.kinds",),
            tables=("neurons.table",),
        )
    ]
    for kind in (NEURONS, RAW, RARE, UNTRAINED):
        if kind not in means:
            continue
        gap = _gap(scored[LATENTS], scored[kind], config.seed)
        verb = (
            "easier to explain than" if gap.low > 0 else "harder to explain than" if gap.high < 0 else "no easier than"
        )
        findings.append(
            Finding.of(
                gap,
                id=f"neurons.gap-{kind.replace(' ', '-')}",
                chapter="neurons",
                sentence=f"Latents are {verb} {kind}.",
                metric=f"mean balanced accuracy of latents less that of {kind}",
                better="higher",
                control=Control("no difference", 0.0),
                command=command,
                figures=("neurons.kinds",),
                tables=("neurons.table",),
            )
        )
    shown = [kind for kind in KINDS if kind in means]
    chart = chart_kinds.intervals(
        [
            {
                "kind": kind,
                "accuracy": means[kind].estimate,
                "low": means[kind].low,
                "high": means[kind].high,
                "dealt": _mean([r for r in scored[kind] if r["dealt"] is not None], "dealt", config.seed).estimate,
            }
            for kind in shown
        ],
        label="kind",
        value="accuracy",
        low="low",
        high="high",
        control="dealt",
        reference=("chance", 0.5),
        title=f"Token sets hold for latents at {number(means[LATENTS].estimate, 2)}, for largest neurons at "
        f"{number(means[NEURONS].estimate, 2)}",
        subtitle="Mean balanced accuracy on held-out windows, 95 % intervals; ticks: another unit's token set",
        x_title="balanced accuracy",
        y_title="kind of unit",
    )
    return Chapter(
        id="neurons",
        question="Are latents easier to explain than neurons?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(id="neurons.kinds", chart=chart, caption="Balanced accuracy of token sets by kind of unit."),
            Table(
                id="neurons.table",
                caption="Units by kind: looked at, scored, too rare, never silent, and mean accuracies by seed",
                columns=["kind", "units", "scored", "too rare", "too dense", "by seed", Column(name="mean accuracy")],
                rows=[_row(kind, rows, scored[kind], means.get(kind)) for kind in KINDS],
            ),
            Table(
                id="neurons.examples",
                caption="Token sets of the first units of each kind that were scored",
                columns=["kind", "unit", Column(name="tokens", code=True), Column(name="accuracy")],
                rows=[
                    [kind, str(row["unit"]), " · ".join(row["tokens"][:8]), row["accuracy"]]
                    for kind in KINDS
                    for row in scored[kind][:4]
                ],
            ),
        ],
        not_shown=(
            "A token set says nothing of context, so a unit that fires on an idea in many words scores low whatever it "
            "is. A unit that is active in every window has no negatives and is not scored: the raw neurons that are "
            "scored are the most selective ones. Explanations by a language model may rank the kinds otherwise."
        ),
        how=(
            f"Block {layer}: a TopK dictionary of {config.expansion * lm.d_model} latents ({config.k} active) of the "
            f"MLP's output, {config.seeds} seeds; the {config.neurons} largest neurons of a token, and of a random "
            "rotation; all positive neurons; the largest neurons, the same share of them as of the latents. Windows of "
            "32 tokens around the peak, 40 active and 40 silent ones to learn the set of at most 20 tokens that has "
            "the highest F1, 50 and 50 others to score it. Intervals resample units "
            f"({_PAPER})."
        ),
    )


def _mean(rows: Sequence[dict[str, Any]], key: str, seed: int) -> "Interval":
    """Mean over units; a neuron that several seeds drew is resampled whole."""
    from sonde.stats.intervals import bootstrap_mean

    return bootstrap_mean([row[key] for row in rows], [_unit(row) for row in rows], seed=seed)


def _unit(row: dict[str, Any]) -> str:
    return f"{row['unit']} {row['seed']}" if row["kind"] == LATENTS else str(row["unit"])


def _gap(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], seed: int) -> "Interval":
    """Difference of the means of two independent groups, both resampled."""
    import numpy as np

    from sonde.stats.intervals import bootstrap

    value = np.array([row["accuracy"] for row in (*first, *second)])
    ours = np.arange(len(value)) < len(first)
    labels = [f"{row['kind']} {_unit(row)}" for row in (*first, *second)]

    def difference(values: Any, mine: Any) -> float:
        return float(values[mine].mean() - values[~mine].mean())

    return bootstrap(difference, value, ours, clusters=labels, seed=seed)


def _row(kind: str, rows: Sequence[dict[str, Any]], scored: Sequence[dict[str, Any]], mean: "Interval | None") -> list:
    own = [row for row in rows if row["kind"] == kind]
    rare, dense = (sum(word in row["reason"] for row in own) for word in ("fewer than", "no negatives"))
    by_seed = []
    for seed in sorted({row["seed"] for row in own}):
        values = [row["accuracy"] for row in scored if row["seed"] == seed]
        by_seed.append(f"{sum(values) / len(values):.3f}" if values else "none")
    return [kind, str(len(own)), str(len(scored)), str(rare), str(dense), ", ".join(by_seed), mean and mean.estimate]
