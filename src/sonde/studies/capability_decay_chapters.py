"""Chapters of the study of decay: how the skill goes, and how it comes back."""

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonde.dynamics.decay_experiment import Unit
    from sonde.dynamics.decay_hypotheses import Tested
    from sonde.runs.blocks import Chapter
    from sonde.runs.finding import Finding
    from sonde.studies.capability_decay import CapabilityDecayConfig

SAYS = {"A": "unrelated", "B": "same map", "C": "translated", "D": "one held out"}  # short: they name lines


def group_of(unit: "Unit", *, widths: bool) -> str:
    """What a unit varies besides the seed, as a line's name."""
    setting = unit.setting
    wide = f", d {setting.width}" if widths else ""
    return f"{SAYS[setting.mixture]}, wd {setting.weight_decay:g}{wide}"


def groups_of(units: "Sequence[Unit]") -> "dict[str, list[Unit]]":
    """Units by what they vary besides the seed."""
    widths = len({unit.setting.width for unit in units}) > 1
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(group_of(unit, widths=widths), []).append(unit)
    return found


def decay_chapter(units: "Sequence[Unit]", tested: "Sequence[Tested]", config: "CapabilityDecayConfig") -> "Chapter":
    """How the skill goes: curves, half-lives of every unit, and the six claims."""
    from sonde.runs.blocks import Chapter, Column, Figure, Table

    command = shlex.join(config.command())
    learned = sum(unit.learned for unit in units)
    ratios = [one for one in tested if one.ratio is not None]
    first = ratios[0] if ratios else None
    said = (
        f"{first.claim[0].upper()}{first.claim[1:]}: by a factor of {first.ratio:.2g} over {first.n} seeds "
        f"({first.verdict})."
        if first is not None
        else "No two kinds of network can be compared: give two mixtures, weight decays or widths."
    )
    return Chapter(
        id="decay",
        question="How fast does a skill go when its training stops?",
        answer=said,
        findings=[_claim(one, command) for one in tested],
        blocks=[
            Figure(
                id="decay.exact",
                chart=_curves(units, "exact", "After {steps} steps {range} of rows are right"),
                caption="Share of the dropped language's rows that are right as a whole, mean over seeds; grey: the "
                "same networks trained on without a drop.",
            ),
            Figure(
                id="decay.masked",
                chart=_curves(
                    units, "masked_exact", "With its own alphabet alone, after {steps} steps {range} are right"
                ),
                caption="The same rows when only symbols of the language can be answered: what is still known.",
            ),
            Table(
                id="decay.claims",
                columns=[
                    "claim",
                    "verdict",
                    "seeds",
                    Column(name="ratio"),
                    Column(name="low"),
                    Column(name="high"),
                    Column(name="p, Holm"),
                    Column(name="log-rank p"),
                    "to keep in mind",
                ],
                rows=[_claim_row(one) for one in tested],
                caption="The six declared claims. Ratios of half-lives by exact match (H3: of savings to 5).",
                empty="No claim could be tested.",
            ),
            Table(
                id="decay.units",
                columns=[
                    "mixture",
                    Column(name="weight decay"),
                    "width",
                    "seed",
                    "least joint exact match",
                    "half-life, exact",
                    "half-life, masked",
                    Column(name="right at the end"),
                    Column(name="right, masked"),
                    Column(name="no drop: skill"),
                ],
                rows=[_unit_row(unit) for unit in units],
                caption="Every network: half-lives by exact match in steps (> where it was not reached), what is right "
                "at the end, both with all tokens and masked, and the skill of the control without a drop.",
            ),
            Table(
                id="decay.laws",
                columns=[
                    "network",
                    "seed",
                    Column(name="area, exact"),
                    Column(name="area, masked skill"),
                    "law of the masked skill",
                ],
                rows=[_law_row(unit) for unit in units],
                caption="Areas under the decay, and which of a power law and an exponential predicts held-out points "
                "better, with its root mean square error there.",
            ),
        ],
        not_shown=(
            f"{len(units) - learned} of {len(units)} networks had a language below 0.95 of rows right when the drop "
            "began; they are kept. Exact match falls with the readout as well as with the knowledge: the masked curves "
            "tell the two apart. Claims need ten seeds; with fewer a sign-flip test over six claims cannot be decided."
        ),
        how=(
            f"Transformers of {config.layers} layers, {'AdamW' if config.optimizer == 'adamw' else 'SGD'} at "
            f"{config.lr:g}, batch 64; {config.steps} steps on {config.languages} languages, then {config.drop_steps} "
            f"without {', '.join(config.drop)}, its share spread over the others; optimiser's state at the switch: "
            f"{config.switch}, 20 steps of warm-up. Half-life: first crossing of one half, linear in log2(1 + t)."
        ),
    )


def revival_chapter(units: "Sequence[Unit]", config: "CapabilityDecayConfig") -> "Chapter":
    """How cheaply the skill comes back."""
    from sonde.dynamics.decay_metrics import reached
    from sonde.errors import SondeError
    from sonde.runs.blocks import Chapter, Table

    rows = []
    ratios: dict[str, list[float]] = {}
    groups = groups_of(units)
    for name, own in groups.items():
        for unit in own:
            scratch = unit.curves["joint"].first(unit.main(), reached)
            for since, curve in sorted(unit.revivals.items()):
                steps = curve.first(unit.main(), reached)
                try:
                    ratio, sign = unit.savings(since)
                    if since == unit.setting.drop_steps:
                        ratios.setdefault(name, []).append(ratio)
                    saved = f"{'' if sign == '=' else sign}{ratio:.3g}"
                except SondeError:
                    saved = "neither met it"
                rows.append([name, unit.setting.seed, since, scratch, steps, saved])
            for kind, curve in unit.variants.items():
                steps = curve.first(unit.main(), reached)
                rows.append([f"{name}, {kind}", unit.setting.seed, config.drop_steps, scratch, steps, ""])
    said = "; ".join(f"{name}: {_geometric(values):.3g}" for name, values in ratios.items())
    return Chapter(
        id="revival",
        question="How cheaply does it come back?",
        answer=(
            f"Steps to learn it over steps to have it back at the end of the drop, geometric mean over seeds: {said}."
            if said
            else "No network met the criterion, from scratch or in revival."
        ),
        blocks=[
            Table(
                id="revival.savings",
                columns=["network", "seed", "after steps of the drop", "steps from scratch", "steps back", "savings"],
                rows=rows,
                caption="Steps until 95 % of tokens and half of the rows are right, first and again; > and < mark a "
                "bound where one of the two was not reached.",
            )
        ],
        not_shown=(
            "From scratch is counted on the joint mixture, where the other languages are new as well; --variants adds "
            "the language learned alone. A revival that needs no step counts as one."
        ),
        how="All languages again at the same shares, the optimiser's state as at the drop; four looks an octave.",
    )


def _curves(units: "Sequence[Unit]", measure: str, title: str) -> Any:
    import numpy as np

    from sonde.runs import chart_kinds

    rows: list[dict[str, Any]] = []
    controls, ends = [], []
    for name, own in groups_of(units).items():
        for stage, shown in (("dropped", name), ("continued", f"{name}: no drop")):
            curve = own[0].curves[stage]
            values = np.mean([unit.curves[stage].mean(unit.main(), measure) for unit in own], axis=0)
            rows += [
                {"steps": math.log2(1 + t), "share": float(v), "of": shown}
                for t, v in zip(curve.times, values, strict=True)
            ]
            if stage == "continued":
                controls.append(shown)
            else:
                ends.append(float(values[-1]))
    # the controls lie on one another at the top: one of them is shown
    rows = [
        row | {"of": row["of"] if row["of"] not in controls else "no drop"}
        for row in rows
        if row["of"] not in controls[1:]
    ]
    return chart_kinds.lines(
        rows,
        x="steps",
        y="share",
        series="of",
        control=("no drop",),
        title=title.format(steps=units[0].setting.drop_steps, range=f"{min(ends):.0%} to {max(ends):.0%}"),
        subtitle="dropped language; control in grey: trained on with all languages",
        x_title="log2(1 + steps since the drop)",
        y_title="share of rows right",
    )


def _claim(one: "Tested", command: str) -> "Finding":
    from sonde.runs.finding import Control, Finding

    fields: dict[str, Any] = {
        "id": f"decay.{one.name.lower()}",
        "chapter": "decay",
        "sentence": f"{one.name}: {one.claim}: {one.verdict}{_note(one)}.",
        "metric": "savings ratio over 5" if one.name == "H3" else "ratio of half-lives, geometric mean over seeds",
        "command": command,
        "figures": ("decay.exact",),
        "tables": ("decay.claims",),
    }
    if one.interval is None:
        reason = one.why or f"an interval over {one.n} seeds would mean nothing: run 3 or more"
        return Finding(
            **fields, refused=reason if one.ratio is None else f"{one.n} seeds give no interval: run 3 or more"
        )
    if one.verdict == "open":
        reason = "the declared test over six claims does not decide it"
        return Finding.of(one.interval, **fields, better="higher", control_reason=reason)
    return Finding.of(one.interval, **fields, better="higher", control=Control("no difference", 1.0))


def _note(one: "Tested") -> str:
    return f" ({one.why})" if one.why else ""


def _claim_row(one: "Tested") -> list[Any]:
    low, high = one.interval.bounds if one.interval is not None else (None, None)
    return [
        f"{one.name}: {one.claim}",
        one.verdict,
        one.n or None,
        one.ratio,
        low,
        high,
        one.adjusted,
        one.log_rank_p,
        one.why,
    ]


def _unit_row(unit: "Unit") -> list[Any]:
    row, setting = unit.summary(), unit.setting
    return [
        setting.mixture,
        setting.weight_decay,
        setting.width,
        setting.seed,
        row["least_exact"],
        life_of(unit, "exact"),
        life_of(unit, "masked_exact"),
        row["final_exact"],
        row["final_masked_exact"],
        row.get("continued_skill"),
    ]


def _law_row(unit: "Unit") -> list[Any]:
    from sonde.dynamics.decay_metrics import fits
    from sonde.errors import SondeError

    row = unit.summary()
    try:
        law = fits(*unit.skill(masked=True))[0]
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in law.parameters.items())
        said = f"{law.law}: {numbers}; off by {math.sqrt(law.held_out_error):.2g}"
    except SondeError as error:
        said = str(error)
    areas = row.get("aud_exact"), row.get("aud_masked_skill")
    return [group_of(unit, widths=False), unit.setting.seed, *areas, said]


def life_of(unit: "Unit", measure: str) -> str:
    """The half-life as it is shown, or why there is none."""
    from sonde.errors import SondeError

    try:
        return str(unit.half_life(measure))
    except SondeError as error:
        return str(error)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
