"""Two checks in the study of quirky models: does the model use what the probe reads, and does an alarm go off?"""

import numpy as np

from sonde.knowledge.recovered_gap import mean_auroc
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Figure
from sonde.runs.finding import Control
from sonde.runs.report.numbers import number
from sonde.stats.intervals import bootstrap_mean
from sonde.studies.knowledge_blocks import percentiles
from sonde.studies.quirky_elk_pooled import CITE, Written


def cause(w: Written) -> Chapter:
    """Answers after the reflection of the state through the plane of the probe."""
    rows, findings = [], []
    for name, alice in (("Alice", True), ("Bob", False)):
        flips, controls, bases = [], [], []
        for number_, one in enumerate(w.found):
            chosen = one.alice[one.reflected_rows] == alice
            flips.append(one.reflected.changed[chosen])
            controls.append(one.reflected.changed_at_random[chosen])
            bases.append(one.bases[one.reflected_rows][chosen] + number_ * 10**9)
        flipped = bootstrap_mean(np.concatenate(flips), np.concatenate(bases))
        control = bootstrap_mean(np.concatenate(controls), np.concatenate(bases))
        rows.append(
            {
                "asked": name,
                "flipped": 100 * flipped.estimate,
                "low": 100 * flipped.low,
                "high": 100 * flipped.high,
                "random": 100 * control.estimate,
            }
        )
        findings.append(
            w.finding(
                flipped.scaled(100),
                id=f"cause.{name.lower()}",
                chapter="cause",
                sentence=f"Mirrored in the probe's plane, its state changes "
                f"{100 * flipped.estimate:.0f} % of the answers to "
                f"{name}, mirrored in a random plane {100 * control.estimate:.0f} %.",
                metric=f"answers to {name} that change",
                unit="%",
                better="higher",
                control=Control.of("random directions", control.scaled(100)),
                figures=("cause.flipped",),
            )
        )
    chart = chart_kinds.intervals(
        rows,
        label="asked",
        value="flipped",
        low="low",
        high="high",
        control="random",
        title=f"The probe's direction has a part in {rows[0]['flipped']:.0f} % of the answers to Alice, "
        f"{rows[1]['flipped']:.0f} % of those to Bob",
        subtitle="Answers changed by reflecting the last token's state; 95 % intervals; grey: 16 random directions",
        x_title="answers that change (%)",
        y_title="asked",
    )
    return Chapter(
        id="cause",
        question="Does the model use what the probe reads?",
        answer=" ".join(one.sentence for one in findings),
        findings=findings,
        blocks=[Figure(id="cause.flipped", chart=chart, caption="Share of answers that a reflection changes.")],
        not_shown="A direction without effect at one token and one layer may be used elsewhere, or copied before.",
        how=(
            "h <- m + (c - 2 (c.u) u), c = h - m, at the last prompt token and the probe's layer, u the direction of a "
            f"logistic probe from Alice's records; {len(w.found[0].reflected_rows)} test records a model. After {CITE}."
        ),
    )


def alarm(w: Written) -> Chapter:
    """An alarm that knows Alice's records only, on Bob's."""
    alarms = {name: mean_auroc([one.alarmed(name) for one in w.found]) for name in w.found[0].alarms}
    random = np.array([one.estimate for name, one in alarms.items() if name.startswith("random")])
    found = alarms["A"]
    rings = found.low > 0.5
    finding = w.finding(
        found,
        id="alarm.auroc",
        chapter="alarm",
        sentence="An alarm that watches the probe's log-odds at all layers, and knows Alice's records only, "
        + (
            f"tells Bob's from hers with an AUROC of {number(found.estimate, 2)}; one on random directions does "
            f"with {number(float(random.mean()), 2)}."
            if rings
            else "does not go off on Bob's."
        ),
        metric="AUROC of Bob's against Alice's records, Mahalanobis distance of log-odds",
        better="higher",
        control=Control("random directions in place of the probe", float(random.mean()), percentiles(random)),
        figures=("alarm.auroc",),
    )
    rows = [
        {
            "watches": {"A": "probe of Alice's records", "AE": "probe of her easy records"}[name],
            "auroc": one.estimate,
            "low": one.low,
            "high": one.high,
            "random": float(random.mean()),
        }
        for name, one in alarms.items()
        if not name.startswith("random")
    ]
    chart = chart_kinds.intervals(
        rows,
        label="watches",
        value="auroc",
        low="low",
        high="high",
        control="random",
        reference=("chance", 0.5),
        title=f"Bob's records look strange: AUROC {number(found.estimate, 2)}"
        if rings
        else "Bob's records look like Alice's",
        subtitle="Mahalanobis distance from Alice's held-out records; 95 % intervals; grey: random directions",
        x_title="AUROC (1: told apart without error)",
        y_title="what the alarm watches",
    )
    return Chapter(
        id="alarm",
        question="Does an alarm that knows trusted inputs only go off where the model is wrong?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[Figure(id="alarm.auroc", chart=chart, caption="How well alarms tell Bob's records from Alice's.")],
        not_shown=(
            "An alarm hears that something is unusual, not that it is wrong: the name Bob alone may do it, as random "
            "directions show."
        ),
        how=(
            "Features: log-odds of a logistic probe at every layer. A Gaussian on held-out records of Alice that "
            f"the probe has not seen. Control: {len(random)} sets of random directions. After {CITE}; the study "
            "anomaly-detection compares features and detectors."
        ),
    )
