"""Chapters of the study of decay: how the skill goes and comes back, what is left of it, what keeps it."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonde.dynamics.decay import Curve
    from sonde.dynamics.decay_backdoor import Backdoor
    from sonde.dynamics.decay_experiment import Unit
    from sonde.dynamics.decay_hypotheses import Tested
    from sonde.dynamics.decay_sequence import Passes
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
                chart=_curves(units, "exact", "Rows that are still right as a whole"),
                caption="Share of the dropped language's rows that are right as a whole, mean over seeds; grey: the "
                "same networks trained on without a drop.",
            ),
            Figure(
                id="decay.masked",
                chart=_curves(units, "masked_exact", "The same, with the readout limited to the language's alphabet"),
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
                caption="Areas under the decay, and which of a power law and an exponential predicts held-out points.",
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


def gate_chapter(gates: "Sequence[tuple[Unit, Mapping[str, Any]]]") -> "Chapter":
    """What is left of the skill by other readings."""
    from sonde.runs.blocks import Chapter, Column, Table

    readings = ("skill", "masked", "linear")
    light = list(gates[0][1]["light"])
    verdicts: dict[str, list[str]] = {}
    for unit, gate in gates:
        verdicts.setdefault(group_of(unit, widths=False), []).append(gate["verdict"])
    said = "; ".join(f"{name}: {', '.join(values)}" for name, values in verdicts.items())
    grafts = sorted(gates[0][1]["grafts"], key=lambda name: -max(gate["grafts"][name] for _, gate in gates))[:6]
    return Chapter(
        id="gate",
        question="Is the skill erased, or only switched off?",
        answer=f"By the gating index, one word a seed: {said}.",
        blocks=[
            Table(
                id="gate.readings",
                columns=["network", "seed", *(Column(name=name) for name in (*readings, *light, "best", "index")),
                         "verdict"],
                rows=[
                    [
                        group_of(unit, widths=False),
                        unit.setting.seed,
                        *(gate[name] for name in readings),
                        *gate["light"].values(),
                        gate["best"],
                        gate["index"],
                        gate["verdict"],
                    ]
                    for unit, gate in gates
                ],
                caption="Normalised skill at the end of the drop: as it answers, with the readout masked, read by a "
                "linear probe, and after a light revival with almost all weights frozen; the gating index of the best.",
            ),
            Table(
                id="gate.weights",
                columns=["network", "seed", Column(name="barrier", unit="nats"), Column(name="CKA, first"),
                         Column(name="CKA, last"), *(Column(name=name) for name in grafts)],
                rows=[
                    [
                        group_of(unit, widths=False),
                        unit.setting.seed,
                        gate["barrier"],
                        gate["cka"][0],
                        gate["cka"][-1],
                        *(gate["grafts"][name] for name in grafts),
                    ]
                    for unit, gate in gates
                ],
                caption="Loss barrier on the line between the weights before and after, CKA of the streams before and "
                "after on the language's items, and the skill that comes back when one module is put back.",
            ),
        ],
        not_shown=(
            "An index at or above 0.7 is called gated, at or below 0.3 scrambled. A light revival learns as well as it "
            "uncovers: how much a network that never had the skill gains by it is not taken off."
        ),
        how=(
            "Skill: (floor - loss) / (floor - loss before the drop), the floor of the same reading in a network that "
            "never read the language. Gating index: (best - skill) / (1 - skill)."
        ),
    )  # fmt: skip


def sharing_chapter(rows: "Sequence[tuple[Unit, Mapping[str, Any]]]") -> "Chapter":
    """What the dropped language shares with one that is kept, before the drop."""
    from sonde.runs.blocks import Chapter, Column, Table

    return Chapter(
        id="sharing",
        question="How much do the dropped language and one that is kept share?",
        answer=(
            "Before the drop, the streams of the two on the same states have a CKA (last layer) of "
            + "; ".join(f"{name}: {value:.2f}" for name, value in _means(rows, lambda found: found["cka"][-1]).items())
            + "."
        ),
        blocks=[
            Table(
                id="sharing.predictors",
                columns=["network", "seed", Column(name="CKA"), Column(name="CKA, other rows"), Column(name="swap"),
                         Column(name="without swap"), Column(name="gradient cosine"), Column(name="rate of decay"),
                         "half-life, exact"],
                rows=[
                    [
                        group_of(unit, widths=False),
                        unit.setting.seed,
                        found["cka"][-1],
                        found["cka_control"][-1],
                        found["swap"],
                        found["swap_control"],
                        found["cosine"],
                        found["rate"],
                        _life(unit, "exact"),
                    ]
                    for unit, found in rows
                ],
                caption="CKA of the last stream on rows with the same states and, as control, on rows in another "
                "order; how often a state that is patched in from the other language is gone on from; cosine of the "
                "gradients of what is kept and what is dropped, and the first-order rate -<g_A, g_B>.",
            )
        ],
        not_shown="In mixture A the two languages render states alike but run different maps.",
        how="Streams at each point less the mean of the place; swaps at the middle of the network, at one state.",
    )  # fmt: skip


def baseline_chapter(rows: "Sequence[tuple[str, int, str, Curve]]", dropped: Sequence[str]) -> "Chapter":
    """What keeps the skill: `(network, seed, baseline, curve)`."""
    from sonde.dynamics.decay_metrics import area_under_decay, half_life
    from sonde.errors import SondeError
    from sonde.runs.blocks import Chapter, Column, Table

    made = []
    kept: dict[str, list[float]] = {}
    for name, seed, baseline, curve in rows:
        values = curve.mean(dropped)
        others = [task for task in curve.scores[-1] if task not in dropped and ">" not in task]
        try:
            life = str(half_life(curve.times, values))
        except SondeError:
            life = "not learned"
        kept.setdefault(baseline, []).append(float(values[-1]))
        made.append(
            [name, seed, baseline, life, area_under_decay(curve.times, values), float(values[-1]),
             float(curve.mean(dropped, "masked_exact")[-1]), float(curve.mean(others)[-1])]
        )  # fmt: skip
    means = {baseline: sum(values) / len(values) for baseline, values in kept.items()}
    best = max(means, key=lambda baseline: means[baseline])
    return Chapter(
        id="baselines",
        question="What keeps it?",
        answer=f"{best} keeps most: {means[best]:.2f} of rows right at the end, against {means['plain']:.2f} without.",
        blocks=[
            Table(
                id="baselines.kept",
                columns=["network", "seed", "baseline", "half-life, exact", Column(name="area"),
                         Column(name="retention"), Column(name="masked retention"), Column(name="kept languages")],
                rows=made,
                caption="The drop with one thing changed: how long the skill lasts, and how well the others are kept.",
            )
        ],
        not_shown="Strengths are fixed, not tuned: a baseline that loses here may win at another strength.",
        how="Replay, self-generated replay: 1 % of the batch. L2: 0.01. EWC: 1,000. Changes of rank 4. Shrink by 0.8 "
        "and perturb by 0.1 of a fresh network. Low rate: a tenth.",
    )  # fmt: skip


def turn_chapter(passes: "Passes", steps: int) -> "Chapter":
    """One language after the other, twice round."""
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table

    found = passes.summary()
    first, *again = passes.steps_to_criterion()
    rises = passes.anticipation() if again else {}
    matrix = passes.matrix()
    chart = chart_kinds.heat(
        [
            {"task": j, "stage": i, "accuracy": float(matrix[i, j])}
            for i in range(len(passes.tasks))
            for j in range(len(passes.tasks))
        ],
        x="task",
        y="stage",
        value="accuracy",
        title=f"After the sequence {found.average:.0%} of tokens are right, mean over languages",
        subtitle="token accuracy on each language after each turn of the first pass",
        x_title="language",
        y_title="after the turn of",
        x_labels=list(passes.tasks),
        y_labels=list(passes.tasks),
    )
    return Chapter(
        id="sequence",
        question="What is left when languages come one after the other?",
        answer=(
            f"Average accuracy {found.average:.2f}, backward transfer {found.backward:+.2f}, forward transfer "
            f"{found.forward:+.2f}, and each language loses {sum(found.forgetting) / len(found.forgetting):.2f}."
        ),
        blocks=[
            Figure(id="sequence.matrix", chart=chart, caption="Scores on every language after every turn."),
            Table(
                id="sequence.turns",
                columns=["language", "steps, first pass", "steps, second pass", Column(name="forgetting"),
                         Column(name="anticipation"), Column(name="effective rank"), Column(name="dead units")],
                rows=[
                    [
                        task,
                        first[j],
                        again[0][j] if again else None,
                        found.forgetting[j] if j < len(found.forgetting) else None,
                        rises.get(task),
                        passes.ranks[j],
                        passes.dead[j],
                    ]
                    for j, task in enumerate(passes.tasks)
                ],
                caption="Steps to the criterion in both passes, what each lost, what it had risen by just before its "
                "second turn, and the network's effective rank and dead units after its first turn.",
            ),
        ],
        not_shown="One network and one order: both matter.",
        how=f"{steps} steps on each language, no replay, optimiser reset at each switch.",
    )  # fmt: skip


def backdoor_chapter(arms: "Sequence[Backdoor]", config: "CapabilityDecayConfig") -> "Chapter":
    """A planted trigger under training without it."""
    from sonde.errors import SondeError
    from sonde.runs.blocks import Chapter, Column, Table

    rows = []
    for seed, one in enumerate(arms, start=config.seed):
        for arm in ("clean", "near-triggers"):
            try:
                life = str(one.half_life(arm))
            except SondeError:
                life = "not learned"
            rate = one.rate(arm)[1]
            rows.append([seed, arm, float(rate[0]), float(rate[-1]), life, one.control])
    clean, near = (sum(row[3] for row in rows if row[1] == arm) / len(arms) for arm in ("clean", "near-triggers"))
    return Chapter(
        id="backdoor",
        question="Does a planted trigger outlive training without it?",
        answer=(
            f"After {config.drop_steps} steps it still works on {clean:.0%} of rows without any, on {near:.0%} with "
            "near-triggers that teach when not to."
        ),
        blocks=[
            Table(
                id="backdoor.rates",
                columns=["seed", "training without the trigger", Column(name="rate before"), Column(name="rate after"),
                         "half-life", Column(name="never planted")],
                rows=rows,
                caption="Share of held-out triggered rows that are continued as planted, before and after.",
            )
        ],
        not_shown="The trigger is a token of its own, in no other row: one that must be recognised may go sooner.",
        how="A token at a random place turns the map of one language into x - 1; a decoy token changes nothing.",
    )  # fmt: skip


def _curves(units: "Sequence[Unit]", measure: str, title: str) -> Any:
    import numpy as np

    from sonde.runs import chart_kinds

    rows: list[dict[str, Any]] = []
    controls = []
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
        title=title,
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
        _life(unit, "exact"),
        _life(unit, "masked_exact"),
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
        said = f"{law.law}: {', '.join(f'{k} {v:.3g}' for k, v in law.parameters.items())}"
    except SondeError as error:
        said = str(error)
    areas = row.get("aud_exact"), row.get("aud_masked_skill")
    return [group_of(unit, widths=False), unit.setting.seed, *areas, said]


def _life(unit: "Unit", measure: str) -> str:
    from sonde.errors import SondeError

    try:
        return str(unit.half_life(measure))
    except SondeError as error:
        return str(error)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _means(rows: "Sequence[tuple[Unit, Mapping[str, Any]]]", of: Any) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for unit, one in rows:
        found.setdefault(group_of(unit, widths=False), []).append(of(one))
    return {name: sum(values) / len(values) for name, values in found.items()}
