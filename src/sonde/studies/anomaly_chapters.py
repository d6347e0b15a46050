"""What the study of anomaly detection reports: the alarm of the paper, every feature and detector, other seeds."""

from collections.abc import Mapping, Sequence

import numpy as np

from sonde.knowledge.anomaly_table import table
from sonde.knowledge.recovered_gap import ScoredRows, mean_auroc
from sonde.knowledge.tables import IntervalTable
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Figure
from sonde.runs.finding import Control, Finding, Paper
from sonde.runs.report.numbers import number
from sonde.runs.run import Run
from sonde.stats.intervals import Interval
from sonde.studies.anomaly_measures import ALL, FIRST, HARD, LOG_ODDS, RANDOM, STREAM, TASKS, Measured, curve
from sonde.studies.knowledge_blocks import interval_block

CITE = "Mallen et al. 2023, arXiv:2312.01037"
DEALT = "records dealt out again"
_PAPER = {HARD: Paper(0.95, "mean of 96 quirky models, Mahalanobis on log-odds", CITE)}
_SHORT = {HARD: "hard", ALL: "all", "names": "names"}
_FEATURES = {
    LOG_ODDS: "log-odds",
    STREAM: "stream",
    "effects: mean": "mean",
    "effects: zero": "zero",
    "effects: components": "PCs",
    "effects: gradient": "gradient",
    "effects on the probe": "on probe",
    "fine-tuning": "tuning",
    RANDOM: "random",
}
_DETECTORS = {
    "mahalanobis": "Mahalanobis",
    "relative-mahalanobis": "relative",
    "lof": "LOF",
    "lof online": "LOF online",
    "isolation-forest": "forest",
    "one-class-svm": "SVM",
    "flow": "flow",
    "abstraction": "abstraction",
    "l2": "L2",
    "l0": "L0",
    "topological": "topology",
    "likelihood-ratio": "ratio*",
    "two-gaussians": "2 Gaussians*",
    "quantum-entropy": "entropy*",
    "spectral": "spectral*",
}
Found = Mapping[str, Measured]


def chapters(quirky: Found, twins: Found, others: Sequence[Found], run: Run, *, command: str) -> list[Chapter]:
    """All chapters. `quirky`: by task; `twins`: the same without the quirk; `others`: networks of other seeds."""
    written = [_alarm(quirky, twins, command), _features(quirky, twins, run, command)]
    return [*written, _seeds(quirky, others, command)] if others else written


def _alarm(quirky: Found, twins: Found, command: str) -> Chapter:
    """The alarm of the paper on every task."""
    findings, rows = [], []
    for name, made in quirky.items():
        found = _interval(made, LOG_ODDS)
        findings.append(
            Finding.of(
                found,
                id=f"alarm.{name}",
                chapter="alarm",
                sentence=f"Bob's records set off an alarm that watches a probe's log-odds ({TASKS[name]})."
                if found.low > 0.5
                else f"An alarm that watches a probe's log-odds does not go off on Bob's records ({TASKS[name]}).",
                metric="AUROC of Bob's against Alice's records, Mahalanobis distance of a probe's log-odds over layers",
                better="higher",
                control=Control.of(DEALT, made.control[LOG_ODDS]),
                paper=_PAPER.get(name),
                command=command,
                figures=("alarm.tasks", "alarm.curve"),
            )
        )
        rows.append(_row(f"{_SHORT[name]} · probe's log-odds", made, LOG_ODDS))
        rows.append(_row(f"{_SHORT[name]} · random", made, RANDOM))
        if name in twins:
            rows.append(_row(f"{_SHORT[name]} · honest twin", twins[name], LOG_ODDS))
    first = next(iter(quirky))
    findings.append(_random(quirky[first], command))
    if twins:
        findings.append(_twin(quirky[first], twins[first], command))
    chart = chart_kinds.intervals(
        rows,
        label="what",
        value="auroc",
        low="low",
        high="high",
        control="dealt",
        reference=("chance", 0.5),
        title="AUROC of the alarm: "
        + ", ".join(f"{number(_interval(made, LOG_ODDS).estimate, 2)} {_SHORT[name]}" for name, made in quirky.items()),
        subtitle=f"Bob's against Alice's records; 95 % intervals over base rows; grey: {DEALT}",
        x_title="AUROC (1: told apart without error)",
        y_title="looked at",
    )
    return Chapter(
        id="alarm",
        question="Does an alarm that knows trusted records only go off on Bob's?",
        answer=" ".join(one.sentence for one in findings),
        findings=findings,
        blocks=[
            Figure(id="alarm.tasks", chart=chart, caption="AUROC of the alarm on each task, and of its controls."),
            Figure(id="alarm.curve", chart=_curves(quirky), caption="True against false alarms at every threshold."),
        ],
        not_shown=(
            "An alarm says that a record is unlike the trusted ones, not that its answer is wrong: a name alone may do "
            "it, as the twin without the quirk shows."
        ),
        how=(
            "Features: log-odds of a logistic probe at every layer, fitted on Alice's records of other base rows. A "
            "Gaussian of trusted records; score: squared Mahalanobis distance. Random directions stand in the probe's "
            f"place; the twin was trained the same without Bob's rule. After {CITE}, section 5."
        ),
    )


def _random(made: Measured, command: str) -> Finding:
    return _less(
        _interval(made, RANDOM),
        Control.of("the probe's log-odds", _interval(made, LOG_ODDS)),
        id="alarm.random",
        less="Random directions in the probe's place set the alarm off less.",
        as_well="Random directions in the probe's place set the alarm off as well: it does not need the truth.",
        metric="AUROC of the same alarm on random directions of the residual stream",
        command=command,
    )


def _twin(quirky: Measured, twin: Measured, command: str) -> Finding:
    return _less(
        _interval(twin, LOG_ODDS),
        Control.of("the quirky model", _interval(quirky, LOG_ODDS)),
        id="alarm.twin",
        less="A twin without the quirk sets the alarm off less.",
        as_well="A twin without the quirk sets the alarm off as well.",
        metric="AUROC of the same alarm in a model that answers Bob as it answers Alice",
        command=command,
    )


def _less(other: Interval, own: Control, *, less: str, as_well: str, **fields: str) -> Finding:
    """What should set the alarm off less than `own` does."""
    assert own.interval is not None
    return Finding.of(
        other,
        chapter="alarm",
        sentence=less if other.high < own.interval[0] else as_well,
        better="lower",
        control=own,
        figures=("alarm.tasks",),
        **fields,
    )


def _curves(quirky: Found) -> object:
    rows = [
        {"false": float(false), "true": float(true), "what": _SHORT[name]}
        for name, made in quirky.items()
        for false, true in curve(made.rows(made.of(LOG_ODDS)))
    ]
    rows += [{"false": share, "true": share, "what": "chance"} for share in (0.0, 1.0)]
    caught = {name: _caught(made.rows(made.of(LOG_ODDS))) for name, made in quirky.items()}
    return chart_kinds.lines(
        rows,
        x="false",
        y="true",
        series="what",
        control=("chance",),
        title="At 5 % false alarms it catches "
        + ", ".join(f"{100 * share:.0f} % ({_SHORT[name]})" for name, share in caught.items()),
        subtitle="The alarm on a probe's log-odds, by task",
        x_title="false alarms (share of Alice's records)",
        y_title="alarms on Bob's records (share)",
    )


def _caught(rows: ScoredRows) -> float:
    return float(np.mean(rows.scores[rows.truth] > np.quantile(rows.scores[~rows.truth], 0.95)))


def _features(quirky: Found, twins: Found, run: Run, command: str) -> Chapter:
    """Every feature with every detector."""
    first = next(iter(quirky))
    findings = [_best(quirky[first], first, command)]
    if twins:
        findings.append(_stream(quirky[first], twins[first], command))
    blocks = [_heat(name, made) for name, made in quirky.items()]
    tables = [
        interval_block(
            f"features.{name}",
            table(made.told, caption=f"AUROC of every feature and detector: {TASKS[name]}"),
            run=run,
        )
        for name, made in quirky.items()
    ]
    if twins:
        tables.append(interval_block("features.twin", _beside(quirky, twins), run=run))
    notes = sorted({one.note for made in quirky.values() for one in made.told if one.note})
    return Chapter(
        id="features",
        question="What should an alarm look at, and how should it judge?",
        answer=" ".join(one.sentence for one in findings),
        findings=findings,
        blocks=[*blocks, *tables],
        not_shown="The order of features and detectors on one small network and one rule need not be that of others.",
        how=(
            "Scores of each layer are standardised by trusted records that were held out, and averaged (the maximum is "
            "in the tables). Online detectors also see the test records as one unlabelled batch. Effects are to first "
            "order, at the last token." + "".join(f" Warned: {note}." for note in notes)
        ),
    )


def _heat(name: str, made: Measured) -> Figure:
    told = [one for one in made.told if one.aggregate == "mean"]
    features, labels = (
        list(dict.fromkeys(names)) for names in ([one.feature for one in told], [one.label for one in told])
    )
    labels.reverse()  # the first on top
    rows = [
        {"x": features.index(one.feature), "y": labels.index(one.label), "auroc": one.auroc.estimate}
        for one in told
        if isinstance(one.auroc, Interval)
    ]
    medians = {
        feature: float(np.median([row["auroc"] for row in rows if row["x"] == place]))
        for place, feature in enumerate(features)
        if any(row["x"] == place for row in rows)
    }
    best = max(medians, key=lambda feature: medians[feature])
    chart = chart_kinds.heat(
        rows,
        x="x",
        y="y",
        value="auroc",
        title=f"Best over all detectors: {best}, median AUROC {number(medians[best], 2)}",
        subtitle=f"AUROC of Bob's against Alice's records, {TASKS[name]}; 0.5 is chance; * online",
        x_title="looked at",
        y_title="detector",
        x_labels=[_FEATURES.get(feature, feature) for feature in features],
        y_labels=[_DETECTORS.get(label, label) for label in labels],
    )
    return Figure(
        id=f"features.{name}-map", chart=chart, caption=f"AUROC of every feature and detector, {TASKS[name]}."
    )


def _best(made: Measured, name: str, command: str) -> Finding:
    """The pair that is best on one half of the base rows, on the other half; the paper's pair on the same."""
    first = np.isin(made.bases, np.random.default_rng(0).permutation(np.unique(made.bases))[::2])
    told = [one for one in made.told if one.scores is not None and one.feature != RANDOM]

    def half(which: np.ndarray, one: object) -> ScoredRows:
        rows = made.rows(one)  # type: ignore[arg-type]
        return ScoredRows(rows.scores[which], rows.truth[which], rows.bases[which])

    best = max(told, key=lambda one: mean_auroc([half(first, one)], draws=1).estimate)
    found, paper = (mean_auroc([half(~first, one)]) for one in (best, made.of(LOG_ODDS)))
    return Finding.of(
        found,
        id="features.best",
        chapter="features",
        sentence=f"The best pair on one half of the base rows, {best.feature} by {best.label}, "
        + ("is better than" if found.low > paper.high else "is not clearly better than")
        + " the probe's log-odds by Mahalanobis distance on the other half.",
        metric=f"AUROC of Bob's against Alice's records, {TASKS[name]}",
        better="higher",
        control=Control.of("probe's log-odds, Mahalanobis", paper),
        command=command,
        tables=(f"features.{name}",),
    )


def _stream(quirky: Measured, twin: Measured, command: str) -> Finding:
    """What of an alarm on raw activations is the name alone."""
    own, other = _interval(quirky, STREAM), _interval(twin, STREAM)
    return Finding.of(
        other,
        id="features.stream-twin",
        chapter="features",
        sentence="An alarm on raw activations goes off in a twin without the quirk too: it hears the name."
        if other.low > 0.5
        else "An alarm on raw activations does not go off in a twin without the quirk.",
        metric="AUROC of Bob's against Alice's records, Mahalanobis distance of the residual stream, twin",
        better="lower",
        control=Control.of("the quirky model", own),
        command=command,
        tables=("features.twin",),
    )


def _beside(quirky: Found, twins: Found) -> IntervalTable:
    rows = [
        (_SHORT[name], one.feature, one.auroc, twins[name].of(one.feature).auroc, made.control.get(one.feature))
        for name, made in quirky.items()
        for one in made.told
        if name in twins and one is made.of(one.feature)
    ]
    return IntervalTable(
        "AUROC by Mahalanobis distance in the quirky model, in its twin, and of records dealt out again",
        ("task", "feature", "quirky", "twin", DEALT),
        tuple(rows),
    )


def _seeds(quirky: Found, others: Sequence[Found], command: str) -> Chapter:
    """The alarm of the paper in networks of other seeds."""
    findings, rows = [], []
    for name in others[0]:
        models = [quirky[name], *(found[name] for found in others)]
        mean = mean_auroc([made.rows(made.of(LOG_ODDS)) for made in models])
        controls = [made.control[LOG_ODDS] for made in models]
        findings.append(
            Finding.of(
                mean,
                id=f"seeds.{name}",
                chapter="seeds",
                sentence=f"Over {len(models)} networks the alarm tells Bob's records from Alice's ({TASKS[name]})."
                if mean.low > 0.5
                else f"Over {len(models)} networks the alarm does not tell the records apart ({TASKS[name]}).",
                metric="AUROC, Mahalanobis distance of a probe's log-odds, mean over networks",
                better="higher",
                control=Control(
                    DEALT,
                    float(np.mean([one.estimate for one in controls])),
                    (min(one.low for one in controls), max(one.high for one in controls)),
                ),
                paper=_PAPER.get(name),
                command=command,
                figures=("seeds.auroc",),
            )
        )
        rows += [_row(f"{_SHORT[name]} · seed {seed}", made, LOG_ODDS) for seed, made in enumerate(models)]
    chart = chart_kinds.intervals(
        rows,
        label="what",
        value="auroc",
        low="low",
        high="high",
        control="dealt",
        reference=("chance", 0.5),
        title="Mean AUROC: "
        + ", ".join(f"{number(one.estimate or 0.0, 2)} {name}" for one, name in zip(findings, others[0], strict=True)),
        subtitle=f"The alarm on a probe's log-odds; 95 % intervals over base rows; grey: {DEALT}",
        x_title="AUROC (1: told apart without error)",
        y_title="looked at",
    )
    return Chapter(
        id="seeds",
        question="Is that so in networks of other seeds?",
        answer=" ".join(one.sentence for one in findings),
        findings=findings,
        blocks=[Figure(id="seeds.auroc", chart=chart, caption="AUROC of the alarm in each network.")],
        not_shown="Intervals are about records, not about what further networks would give.",
        how="Weights, split and order are those of the seed; the alarm knows records of that network's own test split.",
    )


def _interval(made: Measured, feature: str) -> Interval:
    found = made.of(feature, FIRST).auroc
    assert isinstance(found, Interval), found
    return found


def _row(what: str, made: Measured, feature: str) -> dict[str, object]:
    found = _interval(made, feature)
    return {
        "what": what,
        "auroc": found.estimate,
        "low": found.low,
        "high": found.high,
        "dealt": made.control[feature].estimate,
    }
