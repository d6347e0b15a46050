"""Chapters of the study of decay: what is left of the skill, what is shared, what keeps it, sequences, a trigger."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sonde.studies.capability_decay_chapters import group_of, life_of

if TYPE_CHECKING:
    from sonde.dynamics.decay import Curve
    from sonde.dynamics.decay_backdoor import Backdoor
    from sonde.dynamics.decay_experiment import Unit
    from sonde.dynamics.decay_sequence import Passes
    from sonde.runs.blocks import Chapter
    from sonde.studies.capability_decay import CapabilityDecayConfig


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
                        life_of(unit, "exact"),
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


def _means(rows: "Sequence[tuple[Unit, Mapping[str, Any]]]", of: Any) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for unit, one in rows:
        found.setdefault(group_of(unit, widths=False), []).append(of(one))
    return {name: sum(values) / len(values) for name, values in found.items()}
