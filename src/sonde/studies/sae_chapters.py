"""Chapters on trained dictionaries: what they reconstruct, what the model loses with them, what seeds share."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding, Paper
from sonde.runs.report.numbers import number
from sonde.studies.feature_blocks import density_figure
from sonde.studies.sae import COMPONENTS, RANDOM

if TYPE_CHECKING:
    from sonde.features.dictionary import Dictionary
    from sonde.features.metrics import Metrics
    from sonde.features.plan import Plan
    from sonde.stats.intervals import Interval

_CURVES = 4  # lines that a chart can tell apart
_BINS = np.linspace(0, 1, 26)


@dataclass(frozen=True)
class Setting:
    """Sizes, the command, all dictionaries and controls by name, and their numbers."""

    latents: int
    k: int
    command: str
    dictionaries: "Mapping[str, Dictionary]"
    metrics: "Mapping[str, Metrics]"

    @property
    def first(self) -> str:
        """The dictionary that findings speak of."""
        return self.trained[0]

    @property
    def trained(self) -> list[str]:
        """Names that are not controls'."""
        return [name for name in self.dictionaries if not name.endswith((RANDOM, COMPONENTS))]

    def label(self, name: str) -> str:
        """A name without its site, where all are of one."""
        sites = {self.dictionaries[one].site for one in self.trained}
        return name.removeprefix(f"{next(iter(sites))}").lstrip("-: ") if len(sites) == 1 else name

    def control(self, name: str, what: str) -> str:
        """The name of a control at the site of a dictionary."""
        return f"{self.dictionaries[name].site}: {what}"


def reconstruction(setting: Setting) -> Chapter:
    """FVU, L0, density and curves of training."""
    first = setting.metrics[setting.first].reconstruction
    names = {what: setting.control(setting.first, what) for what in (COMPONENTS, RANDOM)}
    components = setting.metrics[names[COMPONENTS]].reconstruction
    share = f"{number(100 * first.fvu.estimate, 3)} %"
    finding = Finding.of(
        first.fvu,
        id="reconstruction.fvu",
        chapter="reconstruction",
        sentence=(
            f"With {number(round(first.l0.estimate))} of {setting.latents:,} directions a token, the dictionary leaves "
            f"{share} of the variance unexplained; as many principal components leave "
            f"{number(100 * components.fvu.estimate, 3)} %."
        ),
        metric=f"fraction of variance unexplained by {setting.first}",
        better="lower",
        control=Control.of(f"{setting.k} principal components", components.fvu),
        command=setting.command,
        figures=("reconstruction.fvu", "reconstruction.curves"),
        tables=("reconstruction.table",),
    )
    return Chapter(
        id="reconstruction",
        question="How much of the activations do few directions explain?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            Figure(
                id="reconstruction.fvu",
                chart=_intervals(
                    {setting.label(name): one.reconstruction.fvu for name, one in setting.metrics.items()},
                    title=f"{share} of the variance is left unexplained",
                    subtitle="Fraction of variance unexplained on held-out text, with 95 % intervals; controls last",
                    axis="fraction of variance unexplained",
                ),
                caption="Unexplained variance of every dictionary and of the controls.",
            ),
            _curves(setting),
            _density(setting),
            _table(setting),
        ],
        not_shown="That the directions mean something, or that the model uses them.",
        how=_how(setting),
    )


def prediction(setting: Setting) -> Chapter:
    """What the model loses with each dictionary in place of its activations."""
    losses = {name: one.losses for name, one in setting.metrics.items() if one.losses is not None}
    first, random = losses[setting.first], losses[setting.control(setting.first, RANDOM)]
    components = losses[setting.control(setting.first, COMPONENTS)]
    share = first.ce_recovered["mean"]
    tables: dict[str, Any] = {"figures": ("prediction.delta",), "tables": ("prediction.table",)}
    findings = [
        Finding.of(
            first.delta,
            id="prediction.delta",
            chapter="prediction",
            sentence=(
                f"With the dictionary in place of its activations the model loses {number(first.delta.estimate, 2)} "
                f"nats a token; with as many principal components, {number(components.delta.estimate, 2)}."
            ),
            metric=f"cross-entropy above that of the untouched model, {setting.first}",
            unit="nats",
            better="lower",
            control=Control.of(f"{setting.k} principal components", components.delta),
            command=setting.command,
            **tables,
        )
    ]
    about: dict[str, Any] = {
        "id": "prediction.recovered",
        "chapter": "prediction",
        "metric": "share of the cross-entropy recovered that is lost when the activations are put to their mean",
        "better": "higher",
        "command": setting.command,
        **tables,
    }
    if share.interval is None:
        findings.append(
            Finding(sentence="No share of what the model loses can be given.", refused=share.reason, **about)
        )
    else:
        other = random.ce_recovered["mean"].interval
        held: dict[str, Any] = {"control_reason": "with random directions no share could be given"}
        if other is not None:
            held = {"control": Control.of("random directions", other)}
        findings.append(
            Finding.of(
                share.interval,
                sentence=(
                    f"Of what the model loses without these activations, the dictionary gives back "
                    f"{number(100 * share.value, 3)} % (ablation: their mean)."
                ),
                **about,
                **held,
            )
        )
    return Chapter(
        id="prediction",
        question="What does the model lose with a dictionary in place of its activations?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(
                id="prediction.delta",
                chart=_intervals(
                    {setting.label(name): one.delta for name, one in losses.items()},
                    title=f"The model loses {number(first.delta.estimate, 2)} nats a token",
                    subtitle="Cross-entropy with the dictionary less without it, with 95 % intervals; controls last",
                    axis="change of cross-entropy (nats)",
                ),
                caption="What the model loses with each dictionary and each control in place of its activations.",
            ),
            Table(
                id="prediction.table",
                caption=f"Losses on {first.tokens:,} tokens; recovered shares by ablation",
                columns=[
                    "dictionary",
                    Column(name="clean", unit="nats", digits=4),
                    Column(name="spliced", unit="nats", digits=4),
                    Column(name="change", unit="nats"),
                    Column(name="from"),
                    Column(name="to"),
                    Column(name="KL", unit="nats"),
                    Column(name="CE recovered (mean)"),
                    Column(name="CE recovered (zero)"),
                    Column(name="KL recovered (mean)"),
                ],
                rows=[
                    [
                        name,
                        one.clean.estimate,
                        one.spliced.estimate,
                        one.delta.estimate,
                        one.delta.low,
                        one.delta.high,
                        one.kl.estimate,
                        *(_or_gap(s) for s in (one.ce_recovered["mean"], one.ce_recovered["zero"])),
                        _or_gap(one.kl_recovered["mean"]),
                    ]
                    for name, one in losses.items()
                ],
            ),
        ],
        not_shown="A recovered share depends on the ablation: against zero it looks better than against the mean.",
        how=(
            "The model runs on held-out text as it is, with the reconstruction in place of the activations, and with "
            "the activations put to 0 and to their mean. Intervals are bootstraps over documents (rows of text where "
            "documents are few), paired. Opening tokens keep their activations."
        ),
    )


def seeds(setting: Setting, plans: "Sequence[Plan]") -> Chapter:
    """What dictionaries share that differ in their seed alone."""
    from sonde.features.controls import random_directions
    from sonde.features.input_scale import Sample
    from sonde.features.seed_overlap import best_cosines, mean_max_cosine, seed_overlap

    pairs = [
        (a.name, b.name)
        for a, b in itertools.combinations(plans, 2)
        if (a.reads, a.design) == (b.reads, b.design) and a.seed != b.seed
    ]
    found = {(a, b): seed_overlap(setting.dictionaries[a], setting.dictionaries[b]) for a, b in pairs}
    one, other = pairs[0]
    random = setting.dictionaries[setting.control(one, RANDOM)]
    sample = Sample.of(random.b_dec.detach().cpu()[None])
    again = random_directions(sample, setting.latents, setting.k, seed=2001)
    chance = seed_overlap(random.cpu(), again)
    first = found[one, other]
    finding = Finding.of(
        first.shared,
        id="seeds.shared",
        chapter="seeds",
        sentence=(
            f"{number(100 * first.shared.estimate, 2)} % of the latents are found again by another seed "
            f"({number(100 * chance.shared.estimate, 2)} % of random directions would be)."
        ),
        metric="share of latents whose partner by encoder and by decoder is the same, both cosines above 0.7",
        better="higher",
        control=Control.of("two sets of random directions", chance.shared),
        paper=Paper(0.53, "TopK, 32k latents, MLP of Pythia-160m, 8 billion tokens", "EleutherAI, SAEs of two seeds"),
        command=setting.command,
        figures=("seeds.cosines",),
        tables=("seeds.table",),
    )
    shown = {
        "two seeds": best_cosines(setting.dictionaries[one].w_dec, setting.dictionaries[other].w_dec),
        RANDOM: best_cosines(random.w_dec, again.w_dec),
    }
    counts = {name: np.histogram(values.cpu().numpy(), _BINS)[0] / len(values) for name, values in shown.items()}
    rows = [
        {"cosine": 50 * float(_BINS[i] + _BINS[i + 1]), "share": float(share), "of": name}
        for name, shares in counts.items()
        for i, share in enumerate(shares)
    ]
    chart = chart_kinds.lines(
        rows,
        x="cosine",
        y="share",
        series="of",
        control=(RANDOM,),
        title=f"{number(100 * first.shared.estimate, 2)} % of the latents come back with another seed",
        subtitle="Share of latents by the largest cosine of their decoder row with one of the other dictionary",
        x_title="100 × largest cosine with a decoder row of the other",
        y_title="share of latents",
    )
    return Chapter(
        id="seeds",
        question="Does another seed find the same directions?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            Figure(id="seeds.cosines", chart=chart, caption="Best cosines of two seeds, and of random directions."),
            Table(
                id="seeds.table",
                caption="Latents that two dictionaries share, by pair",
                columns=["first", "second", "shared", "from", "to", "mean largest cosine"],
                rows=[
                    [
                        a,
                        b,
                        overlap.shared.estimate,
                        overlap.shared.low,
                        overlap.shared.high,
                        mean_max_cosine(setting.dictionaries[a], setting.dictionaries[b]).estimate,
                    ]
                    for (a, b), overlap in found.items()
                ],
            ),
        ],
        not_shown=(
            "Which of the two is right. A latent that only one seed finds may be one way among several to write the "
            "same activations."
        ),
        how=(
            "Latents are paired one to one so that the sum of cosines is largest, once by encoder and once by decoder "
            "rows. Both dictionaries saw the same rows in the same order; only their first weights differ."
        ),
    )


def _intervals(values: "Mapping[str, Interval]", *, title: str, subtitle: str, axis: str) -> Any:
    rows = [{"name": name, "value": one.estimate, "low": one.low, "high": one.high} for name, one in values.items()]
    return chart_kinds.intervals(
        rows,
        label="name",
        value="value",
        low="low",
        high="high",
        title=title,
        subtitle=subtitle,
        x_title=axis,
        y_title="dictionary",
    )


def _curves(setting: Setting) -> Figure:
    chosen = setting.trained[:_CURVES]
    rows = [
        {"tokens": point["tokens"] / 1e3, "fvu": point["fvu"], "dictionary": setting.label(name)}
        for name in chosen
        for point in setting.dictionaries[name].facts["curve"]
    ]
    last = setting.dictionaries[setting.first].facts["curve"][-1]
    chart = chart_kinds.lines(
        rows,
        x="tokens",
        y="fvu",
        series="dictionary",
        title=f"Training ends at {number(100 * last['fvu'], 3)} % unexplained",
        subtitle="Fraction of variance unexplained on the rows of each stretch of training, before their steps",
        x_title="tokens learned from (thousands)",
        y_title="fraction unexplained",
    )
    shown = "" if len(chosen) == len(setting.trained) else f" of the first {len(chosen)} dictionaries"
    return Figure(id="reconstruction.curves", chart=chart, caption=f"Training curves{shown}.")


def _density(setting: Setting) -> Figure:
    random = setting.control(setting.first, RANDOM)
    shown = (*setting.trained[: _CURVES - 1], random)
    result = setting.metrics[setting.first].reconstruction
    return density_figure(
        "reconstruction.density",
        {setting.label(name): setting.metrics[name].reconstruction.density for name in shown},
        control=(setting.label(random),),
        title=f"{number(100 * result.alive, 3)} % of the latents fire on {result.tokens:,} tokens",
        caption="How often latents fire, beside random directions.",
    )


def _table(setting: Setting) -> Table:
    return Table(
        id="reconstruction.table",
        caption="Reconstruction on held-out text",
        columns=[
            "dictionary",
            "unexplained",
            "from",
            "to",
            "L0",
            "alive",
            "norm ratio",
            "cosine",
            "relative bias",
        ],
        rows=[
            [
                name,
                one.reconstruction.fvu.estimate,
                one.reconstruction.fvu.low,
                one.reconstruction.fvu.high,
                one.reconstruction.l0.estimate,
                one.reconstruction.alive,
                one.reconstruction.l2_ratio.estimate,
                one.reconstruction.cosine.estimate,
                None if one.reconstruction.relative_bias is None else one.reconstruction.relative_bias.estimate,
            ]
            for name, one in setting.metrics.items()
        ],
    )


def _how(setting: Setting) -> str:
    facts = setting.dictionaries[setting.first].facts
    cut = " The text had fewer than were asked for." if facts["truncated"] else ""
    measured = setting.metrics[setting.first]
    return (
        f"All dictionaries learned from the same {facts['tokens']:,} tokens of one pass, on activations scaled to norm "
        f"√d, and are measured on {measured.reconstruction.tokens:,} others.{cut} Opening tokens are left out. "
        f"Intervals are bootstraps over {measured.units}. Controls: the projection on {setting.k} principal "
        f"components, and {setting.latents:,} random directions of which the {setting.k} strongest are kept."
    )


def _or_gap(share: Any) -> float | None:
    return None if share.interval is None else share.value
