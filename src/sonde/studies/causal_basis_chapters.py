"""What the study of causal directions reports: the directions, and their fidelity in the model."""

import math
from typing import Any

from sonde.lens.causal_basis import CausalBasis, describe
from sonde.lens.fidelity import DirectionEffects, Fidelity
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel
from sonde.runs import chart_kinds
from sonde.runs.blocks import Block, Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding, Paper
from sonde.runs.report.numbers import number
from sonde.stats.intervals import bootstrap_ratio

_BITS = 1 / math.log(2)
_PAPER = "Belrose et al. 2023, arXiv:2303.08112"
_TOP = 4
_SHOWN = 3  # directions of a layer whose tokens are listed


def directions(
    lm: LanguageModel,
    lens: TunedLens,
    bases: list[CausalBasis],
    found: list[Fidelity],
    tokens: int,
    command: str,
) -> Chapter:
    """Energies by direction, and what the strongest ones do."""
    strength = [layer.strength(_TOP) for layer in found]
    least = min(range(len(found)), key=lambda place: strength[place].estimate)
    where = "at every layer" if all(ratio.low > 1 for ratio in strength) else "at some layers"
    finding = Finding.of(
        strength[least],
        id="directions.strength",
        chapter="directions",
        sentence=f"The {_TOP} most influential directions change the model's prediction more than random ones {where}.",
        metric=(
            f"effect of the {_TOP} most influential directions over that of a random one, at {found[least].site}, "
            "where it is least"
        ),
        better="higher",
        control=Control("a random direction", 1.0),
        command=command,
        figures=("directions.energy",),
        tables=("directions.tokens", "directions.strength-table"),
    )
    return Chapter(
        id="directions",
        question="Which directions do predictions depend on?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[_energies(found), _tokens(lm, lens, bases, found), _strengths(found)],
        not_shown=(
            "Directions are found one after the other; another order would turn those of like energy into each other. "
            "Tokens are what adding the direction to any state would promote, not what the model says when it is there."
        ),
        how=(
            f"Causal basis extraction ({_PAPER}): each direction maximises the change of the tuned lens's prediction "
            "when the component along it is replaced by its mean, among those orthogonal to all before it. They were "
            f"found on the first half of the text; energies (lens) and effects (model) are measured on {tokens:,} "
            "tokens of the second. Intervals: bootstrap over rows of text."
        ),
    )


def agreement(found: list[Fidelity], tokens: int, command: str) -> Chapter:
    """Energies against effects."""
    rho = [layer.basis.spearman() for layer in found]
    control = [layer.control.spearman() for layer in found]
    later = range(1, len(found)) if len(found) > 1 else range(1)
    least = min(later, key=lambda place: rho[place].estimate)
    k = len(found[0].basis.effects)
    finding = Finding.of(
        rho[least],
        id="fidelity.spearman",
        chapter="fidelity",
        sentence=(
            "What the lens depends on is what the model depends on."
            if rho[least].low > 0
            else "What the lens depends on is not always what the model depends on."
        ),
        metric=f"rank correlation of energy and effect at {found[least].site}, the lowest but for the first layer",
        better="higher",
        control=Control("no relation", 0.0),
        paper=Paper(0.89, "Pythia-410M, layer 18", _PAPER),
        command=command,
        figures=("fidelity.layers", *(f"fidelity.scatter-{place}" for place in _some(found))),
        tables=("fidelity.table",),
    )
    rows = [
        {
            "layer": layer.site,
            "rho": own.estimate,
            "low": own.low,
            "high": own.high,
            "random": other.estimate,
        }
        for layer, own, other in zip(found, rho, control, strict=True)
    ]
    chart = chart_kinds.intervals(
        rows,
        label="layer",
        value="rho",
        low="low",
        high="high",
        control="random",
        title=f"Rank correlation {number(rho[least].estimate, 2)} or more after the first layer",
        subtitle=f"Spearman over {k} directions, 95 %; grey: over {k} random orthonormal directions",
        x_title="rank correlation of energy in the lens and effect in the model",
        y_title="state",
    )
    blocks: list[Block] = [
        Figure(id="fidelity.layers", chart=chart, caption="Rank correlation by layer, with random directions.")
    ]
    blocks += [_scatter(found[place], place) for place in _some(found)]
    blocks.append(
        Table(
            id="fidelity.table",
            caption="Spearman correlation of energy and effect over directions, with 95 % intervals",
            columns=["state", "causal directions", "low", "high", "random directions", "random: low", "random: high"],
            rows=[
                [layer.site, own.estimate, *own.bounds, other.estimate, *other.bounds]
                for layer, own, other in zip(found, rho, control, strict=True)
            ],
        )
    )
    return Chapter(
        id="fidelity",
        question="Does the model depend on the directions that the lens depends on?",
        answer=finding.sentence,
        findings=[finding],
        blocks=blocks,
        not_shown=(
            "One direction at a time: what several do together may be more or less than the sum. The interval is over "
            "directions, as if another text would give other ones. Random directions correlate too, in a much narrower "
            "range of effects."
        ),
        how=(
            "Each direction is ablated at one layer of the model, at all positions: its component becomes the mean. "
            f"The effect is KL(model || ablated model) on {tokens:,} tokens, the energy the same for the lens at that "
            "layer."
        ),
    )


def _some(found: list[Fidelity]) -> list[int]:
    """First, middle and last layer."""
    return sorted({0, len(found) // 2, len(found) - 1})


def _energies(found: list[Fidelity]) -> Figure:
    rows = []
    for place in _some(found):
        for rank, point in enumerate(found[place].basis.energy_intervals(), 1):
            rows.append(
                {
                    "direction": rank,
                    "value": _BITS * point.estimate,
                    "low": _BITS * point.low,
                    "high": _BITS * point.high,
                    "state": found[place].site,
                }
            )
    middle = found[len(found) // 2].control
    chance = _BITS * bootstrap_ratio(middle.energies.mean(0), middle.tokens).estimate
    k = len(middle.energies)
    rows += [
        {"direction": rank, "value": chance, "low": chance, "high": chance, "state": "random"}
        for rank in range(1, k + 1)
    ]
    half = _half(found[len(found) // 2].basis)
    chart = chart_kinds.lines(
        rows,
        x="direction",
        y="value",
        low="low",
        high="high",
        series="state",
        control=("random",),
        log=True,
        title=f"{half} of {k} directions hold half of the energy at {found[len(found) // 2].site}",
        subtitle="Energy: KL(lens || lens without the direction) in bits per token, 95 % bands",
        x_title="direction, strongest first on the first half of the text",
        y_title="energy (bits)",
    )
    return Figure(id="directions.energy", chart=chart, caption="Energy of each direction, with random directions.")


def _half(effects: DirectionEffects) -> int:
    """How many of the strongest directions hold half of the energies' sum."""
    energy = sorted(effects.energy, reverse=True)
    total, seen = sum(energy), 0.0
    for count, value in enumerate(energy, 1):
        seen += value
        if seen >= total / 2:
            return count
    return len(energy)


def _tokens(lm: LanguageModel, lens: TunedLens, bases: list[CausalBasis], found: list[Fidelity]) -> Table:
    rows: list[list[Any]] = []
    for basis, layer in zip(bases, found, strict=True):
        for rank, direction in enumerate(describe(lens, basis)[:_SHOWN]):
            ends = ["  ".join(lm.token_strings(end)) for end in (direction.promotes, direction.suppresses)]
            numbers = (layer.basis.energy[rank], layer.basis.effect[rank])
            rows.append([basis.site, rank + 1, *(_BITS * float(value) for value in numbers), *ends])
    return Table(
        id="directions.tokens",
        caption=f"The {_SHOWN} most influential directions of each layer, with the tokens at their two ends",
        columns=[
            "state",
            "direction",
            Column(name="energy", unit="bits"),
            Column(name="effect", unit="bits"),
            Column(name="one end", code=True),
            Column(name="other end", code=True),
        ],
        rows=rows,
    )


def _strengths(found: list[Fidelity]) -> Table:
    rows = []
    for layer in found:
        strength = layer.strength(_TOP)
        rows.append(
            [
                layer.site,
                _BITS * float(layer.basis.effect[:_TOP].mean()),
                _BITS * float(layer.control.effect.mean()),
                strength.estimate,
                *strength.bounds,
                _BITS * float(layer.basis.effect.min()),
            ]
        )
    return Table(
        id="directions.strength-table",
        caption=f"Effect on the model of the {_TOP} most influential directions and of random ones",
        columns=[
            "state",
            Column(name=f"top {_TOP}", unit="bits"),
            Column(name="random", unit="bits"),
            "ratio",
            "low",
            "high",
            Column(name="least of all causal directions", unit="bits"),
        ],
        rows=rows,
    )


def _scatter(layer: Fidelity, place: int) -> Figure:
    """Energy against effect of every direction of a layer, random ones in grey."""
    import altair as alt

    rows = [
        {"energy": _BITS * float(x), "effect": _BITS * float(y), "kind": kind}
        for kind, effects in (("causal", layer.basis), ("random", layer.control))
        for x, y in zip(effects.energy, effects.effect, strict=True)
        if x > 0 and y > 0
    ]
    rho = layer.basis.spearman()
    kinds = ["causal", "random"]
    colour = alt.Scale(domain=kinds, range=["var(--accent)", "var(--ctl)"])
    shape = alt.Scale(domain=kinds, range=["circle", "square"])
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_point(filled=True, opacity=0.85, size=46)
        .encode(
            x=_log_axis(alt, "energy", "energy in the lens (bits, log scale)", [row["energy"] for row in rows]),
            y=_log_axis(alt, "effect", "effect on the model (bits, log scale)", [row["effect"] for row in rows]),
            color=alt.Color("kind:N", scale=colour, legend=None),
            shape=alt.Shape("kind:N", scale=shape, legend=None),
            tooltip=[alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("energy", "effect")],
        )
        .properties(
            title=alt.TitleParams(
                f"At {layer.site}, energy and effect correlate at {number(rho.estimate, 2)}",
                subtitle=f"Each dot is a direction, grey squares are random ones; Spearman, 95 % interval "
                f"{number(rho.low, 2)} to {number(rho.high, 2)}",
            ),
            padding={"left": 5, "top": 4, "bottom": 5, "right": 24},
        )
    )
    caption = f"Energy in the lens against effect on the model at {layer.site}; grey squares are random directions."
    return Figure(id=f"fidelity.scatter-{place}", chart=chart, caption=caption)


def _log_axis(alt: Any, field: str, title: str, values: list[float]) -> Any:
    """A logarithmic axis around the values, with ticks at 1, 2 and 5 times powers of ten."""
    low, high = min(values) / 1.3, max(values) * 1.3
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis = alt.Axis(values=ticks, tickCount=len(ticks), format="~g", grid=False)
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return (alt.X if field == "energy" else alt.Y)(f"{field}:Q", title=title, axis=axis, scale=scale)
