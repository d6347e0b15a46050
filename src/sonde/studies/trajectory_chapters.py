"""What the study of misled prompts reports: detectors on trajectories, the baseline, right answers by layer, learning.

Scores come by kind of prompt ("plain", "wrong", "order") and by lens ("tuned", "logit"), each a `ChoiceScores`.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from sonde.lens.anomaly import SRM, Detection, Detector, Kind, detection, features, srm_layer
from sonde.lens.choices import ChoiceScores
from sonde.lens.downstream import downstream
from sonde.lens.prediction_depth import Learning, choice_depth, depth_against_learning
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Figure, Table
from sonde.runs.finding import Control, Finding, Paper
from sonde.runs.report.numbers import number
from sonde.stats.intervals import bootstrap_mean, paired_difference
from sonde.studies.chapters.depth import curves

Scores = dict[str, dict[str, ChoiceScores]]

PLAIN, ATTACKS = "plain", {"wrong": "wrong labels", "order": "order"}
_WITH = {"wrong": "wrong labels", "order": "an order"}
_CONTROL = "plain against plain"
_CALIBRATION = ("right (%)", "ECE", "sweep ECE", "calibrated: right (%)", "calibrated: ECE", "calibrated: sweep ECE")
_SHORT = {"lof": "LOF", "isolation-forest": "forest", "one-class-svm": "SVM"}
_CITE = "Belrose et al. 2023, arXiv:2303.08112"


def detect(scores: Scores, detectors: Sequence[Kind], *, neighbors: int, seed: int, command: str) -> Chapter:
    """Detectors on trajectories, on both lenses and both ways to mislead; the first detector makes the findings."""
    first = detectors[0]
    settings: list[tuple[str, str, Kind]] = [
        (attack, lens, kind) for attack in ATTACKS for lens in ("tuned", "logit") for kind in detectors
    ]
    found: dict[tuple[str, str, str], Detection] = {}
    for attack, lens, kind in tqdm(settings, desc="detectors", unit="detector"):
        found[attack, lens, kind] = detection(
            lambda split, kind=kind: Detector(kind, neighbors=neighbors, seed=split),
            features(scores[PLAIN][lens]),
            features(scores[attack][lens]),
            seed=seed,
        )
    findings = [_told_apart(found[attack, "tuned", first], attack, first, command) for attack in ATTACKS]
    rows = [
        {
            "what": f"{ATTACKS[attack]} · {lens} · {_SHORT[kind]}",
            "auroc": made.auroc.estimate,
            "low": made.auroc.low,
            "high": made.auroc.high,
            "plain": made.control.estimate,
        }
        for (attack, lens, kind), made in found.items()
    ]
    chart = chart_kinds.intervals(
        rows,
        label="what",
        value="auroc",
        low="low",
        high="high",
        control="plain",
        reference=("chance", 0.5),
        title=f"AUROC by {_SHORT[first]}: "
        + ", ".join(f"{number(found[name, 'tuned', first].auroc.estimate, 2)} with {_WITH[name]}" for name in ATTACKS),
        subtitle="AUROC of misled against plain prompts; 2.5, 50 and 97.5 % quantiles; grey: plain against plain",
        x_title="AUROC (1: told apart without error)",
        y_title="misled by, lens, detector",
    )
    n = {name: len(made["tuned"]) for name, made in scores.items()}
    return Chapter(
        id="detect",
        question="Do trajectories show that a model is being misled?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(id="detect.auroc", chart=chart, caption="AUROC of every detector, with plain prompts as control."),
            Table(
                id="detect.table",
                caption="AUROC by way to mislead, lens and detector",
                columns=[
                    "misled by",
                    "lens",
                    "detector",
                    "AUROC",
                    "2.5 %",
                    "97.5 %",
                    "plain vs plain",
                ],
                rows=[
                    [ATTACKS[attack], lens, kind, made.auroc.estimate, *made.auroc.bounds, made.control.estimate]
                    for (attack, lens, kind), made in found.items()
                ],
            ),
        ],
        not_shown=(
            "A prompt that misleads the model from its first layers on leaves a trajectory like that of a plain prompt "
            "with the other answer: these detectors see conflict between layers, not wrong answers. They were tried on "
            "two ways to mislead, of the same kind for all questions."
        ),
        how=(
            f"{n[PLAIN]} plain prompts and {n['wrong']} other questions, misled in two ways: every example has a wrong "
            "label, or two dashed rules and an order to print a wrong answer stand before the last answer. Features: "
            "summed log-probabilities of the choices at every layer and at the output (of two choices, their "
            "difference). Detectors are fitted on half of the plain prompts and score the others and the misled ones; "
            f"10 splits, 1,000 bootstraps each. Local outlier factor (lof): {neighbors} neighbours."
        ),
    )


def _told_apart(made: Detection, attack: str, detector: str, command: str) -> Finding:

    what = f"prompts with {_WITH[attack]}"
    if made.auroc.low > made.control.high:
        sentence = f"Trajectories tell {what} from plain ones."
    else:
        sentence = f"Trajectories do not reliably tell {what} from plain ones."
    return Finding.of(
        made.auroc,
        id=f"detect.{attack}",
        chapter="detect",
        sentence=sentence,
        metric=f"AUROC by {_SHORT[detector]} on trajectories of the tuned lens",
        better="higher",
        control=Control.of("plain against plain", made.control),
        paper=Paper(1.0, "Pythia 12B, BoolQ, prompt injection", _CITE) if attack == "order" else None,
        command=command,
        figures=("detect.auroc",),
        tables=("detect.table",),
    )


def srm(scores: Scores, *, seed: int, command: str) -> Chapter:
    """The baseline on hidden states, at every layer; the layer is chosen on plain prompts."""
    plain = scores[PLAIN]["tuned"]
    assert plain.states is not None
    chosen = srm_layer(plain.states, seed=seed)
    by_layer: dict[str, list[Detection]] = {}
    for attack in tqdm(ATTACKS, desc="SRM", unit="way"):
        strange = scores[attack]["tuned"].states
        assert strange is not None
        by_layer[attack] = [
            detection(lambda _: SRM(), normal, other, seed=seed)
            for normal, other in zip(plain.states, strange, strict=True)
        ]
    findings = [
        Finding.of(
            by_layer[attack][chosen].auroc,
            id=f"srm.{attack}",
            chapter="srm",
            sentence=(
                f"At the layer chosen on plain prompts, hidden states {'tell' if told else 'do not reliably tell'} "
                f"prompts with {_WITH[attack]} from plain ones."
            ),
            metric=f"AUROC of SRM at row {chosen} of {len(plain.rows)}",
            better="higher",
            control=Control.of("plain against plain", by_layer[attack][chosen].control),
            paper=Paper(1.0, "Pythia 12B, BoolQ, prompt injection", _CITE) if attack == "order" else None,
            command=command,
            figures=("srm.layers",),
            tables=("srm.table",),
        )
        for attack in ATTACKS
        for told in [by_layer[attack][chosen].auroc.low > by_layer[attack][chosen].control.high]
    ]
    control = [made.control for made in by_layer["wrong"]]
    chart = chart_kinds.lines(
        curves(
            {ATTACKS[name]: [made.auroc for made in found] for name, found in by_layer.items()} | {_CONTROL: control}
        ),
        x="layer",
        y="value",
        low="low",
        high="high",
        series="lens",
        control=(_CONTROL,),
        x_labels=_labels(plain),
        title=f"Hidden states: from {min(_range(by_layer)):.2f} to {max(_range(by_layer)):.2f}, depending on the layer",
        subtitle="AUROC of SRM on mean hidden states, misled against plain; higher is better, 0.5 is chance",
        x_title="input of block",
        y_title="AUROC",
    )
    return Chapter(
        id="srm",
        question="Would hidden states alone have shown it?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(id="srm.layers", chart=chart, caption="AUROC of the baseline at every layer, with its control."),
            Table(
                id="srm.table",
                caption="AUROC of SRM by layer",
                columns=["row", *ATTACKS.values(), _CONTROL, "chosen on plain prompts"],
                rows=[
                    [
                        name,
                        *(found[layer].auroc.estimate for found in by_layer.values()),
                        control[layer].estimate,
                        "yes" if layer == chosen else "",
                    ]
                    for layer, name in enumerate(plain.rows)
                ],
            ),
        ],
        not_shown=(
            "Hidden states differ wherever the words of the prompt do: an order is told by its words, whether or not "
            "the model heeds it. To choose the layer by its AUROC would be to choose on the anomalies."
        ),
        how=(
            "Mean hidden state over the prompt at the input of each block and after the last. SRM: Mahalanobis² less "
            "Mahalanobis² of the diagonal covariance, 1e-3 added to its diagonal (after Ren et al. 2021, "
            "arXiv:2106.09022). The layer is chosen where SRM tells plain prompts from the same states with every "
            "dimension shuffled over the prompts: the deepest within 0.01 of the best AUROC."
        ),
    )


def accuracy(scores: Scores, *, command: str) -> Chapter:
    """How often each layer is right, on plain and on misled prompts."""
    names = {PLAIN: "plain prompts", **ATTACKS}
    found = {
        (name, lens, calibrated): downstream(made, calibrated=calibrated)
        for name, by_lens in scores.items()
        for lens, made in by_lens.items()
        for calibrated in (False, True)
    }
    plain, wrong = scores[PLAIN]["tuned"], scores["wrong"]["tuned"]
    output, middle = found[PLAIN, "tuned", False].accuracy[-1], len(plain.sites) // 2
    right = (wrong.answers == wrong.correct).double()
    over = paired_difference(right[middle], right[-1])
    findings = [
        Finding.of(
            output.scaled(100),
            id="accuracy.output",
            chapter="accuracy",
            sentence="On plain prompts the model answers better than the most frequent answer would."
            if output.low > found[PLAIN, "tuned", False].chance.high
            else "On plain prompts the model answers no better than the most frequent answer would.",
            metric="right answers to plain prompts at the output",
            unit="%",
            better="higher",
            control=Control.of("most frequent answer", found[PLAIN, "tuned", False].chance.scaled(100)),
            command=command,
            figures=("accuracy.layers",),
            tables=("accuracy.table",),
        ),
        Finding.of(
            over.scaled(100),
            id="accuracy.overthinking",
            chapter="accuracy",
            sentence="With wrong labels, the middle layers are right more often than the output."
            if over.low > 0
            else "With wrong labels, the middle layers are not right more often than the output.",
            metric=f"right answers at the input of block {middle} minus those at the output, tuned lens",
            unit="%",
            better="none",
            control=Control("no difference", 0.0),
            command=command,
            figures=("accuracy.layers",),
            tables=("accuracy.table",),
        ),
    ]
    chance = [found[PLAIN, "tuned", False].chance.scaled(100)] * len(plain.rows)
    series = {names[name]: [a.scaled(100) for a in found[name, "tuned", False].accuracy] for name in scores}
    chart = chart_kinds.lines(
        curves(series | {"most frequent answer": chance}),
        x="layer",
        y="value",
        low="low",
        high="high",
        series="lens",
        control=("most frequent answer",),
        x_labels=_labels(plain),
        title=findings[1].sentence.removesuffix("."),
        subtitle="Right answers of the tuned lens at each layer in %, 95 % bands",
        x_title="input of block",
        y_title="right answers (%)",
    )
    return Chapter(
        id="accuracy",
        question="Which layers would have answered rightly?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(id="accuracy.layers", chart=chart, caption="Right answers by layer, plain and misled prompts."),
            Table(
                id="accuracy.table",
                caption="Right answers and calibration by layer, as the log-probabilities stand and median-calibrated",
                columns=["prompts", "lens", "row", *_CALIBRATION],
                rows=[
                    [
                        names[name], lens, row,
                        100 * stands.accuracy[place].estimate, stands.ece[place], stands.sweep_ece[place],
                        100 * levelled.accuracy[place].estimate, levelled.ece[place], levelled.sweep_ece[place],
                    ]
                    for name in scores
                    for lens in scores[name]
                    for stands, levelled in [(found[name, lens, False], found[name, lens, True])]
                    for place, row in enumerate(plain.rows)
                ],
            ),
        ],
        not_shown=(
            "That a layer's reading is right does not mean that the later layers use it. Medians calibrate as if every "
            "choice were right equally often."
        ),
        how=(
            "The answer of a layer is the choice with the largest summed log-probability; median-calibrated (Halawi et "
            "al. 2023, arXiv:2307.09476), each choice's median over all questions is taken off first. ECE: 15 bins of "
            "equal width; sweep ECE: Roelofs et al. 2022, arXiv:2012.08668."
        ),
    )  # fmt: skip


def depth(learned: Learning, scores: dict[str, ChoiceScores], asked: list[str], *, command: str) -> Chapter:
    """Prediction depth against the checkpoint at which a question was learned."""
    iteration = learned.iteration_learned
    rho = {name: depth_against_learning(choice_depth(made), iteration, asked) for name, made in scores.items()}
    clear = rho["tuned"].low > 0
    finding = Finding.of(
        rho["tuned"],
        id="depth.spearman",
        chapter="depth",
        sentence="Questions that are settled late in the network were learned late."
        if clear
        else "Whether a question is settled late does not tell when it was learned.",
        metric="Spearman correlation of prediction depth (tuned lens) and checkpoint learned",
        better="higher",
        control=Control("no relation", 0.0),
        paper=Paper(0.585, "Pythia 12B, QQP", _CITE),
        command=command,
        figures=("depth.learned",),
    )
    depths = choice_depth(scores["tuned"])
    rows = []
    for place, step in enumerate(learned.steps):
        own = depths[iteration == step].double()
        if len(own) > 1:
            mean = bootstrap_mean(own)
            rows.append({"place": place, "depth": mean.estimate, "low": mean.low, "high": mean.high, "n": len(own)})
    everyone = float(depths.double().mean())
    chart = chart_kinds.lines(
        [{**row, "who": "questions learned then"} for row in rows]
        + [{"place": row["place"], "depth": everyone, "low": everyone, "high": everyone, "who": "all"} for row in rows],
        x="place",
        y="depth",
        low="low",
        high="high",
        series="who",
        control=("all",),
        x_labels=[*(str(step) for step in learned.steps[:-1]), "end"],
        title=finding.sentence.removesuffix("."),
        subtitle="Mean prediction depth of plain prompts in blocks, 95 % bands; deeper is settled later",
        x_title="checkpoint from which the answer is the final one",
        y_title="prediction depth (blocks)",
    )
    counted = torch.tensor([int((iteration == step).sum()) for step in learned.steps]).tolist()
    return Chapter(
        id="depth",
        question="Is what was learned late also settled late?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[Figure(id="depth.learned", chart=chart, caption="Prediction depth by the checkpoint of learning.")],
        not_shown="Few layers and few checkpoints give few ranks, with many ties.",
        how=(
            "Prediction depth: the first layer from which the most likely choice is the final one and stays so. "
            f"Learned at: the same over {len(learned.steps)} checkpoints ({', '.join(map(str, counted))} questions). "
            f"With the logit lens the correlation is {number(rho['logit'].estimate, 2)} "
            f"[{number(rho['logit'].low, 2)}, {number(rho['logit'].high, 2)}]. Questions of the same words are drawn "
            "together in the bootstrap."
        ),
    )


def _labels(scores: ChoiceScores) -> list[str]:
    return [*(str(layer) for layer in range(len(scores.sites))), "output"]


def _range(by_layer: dict[str, list[Detection]]) -> list[float]:
    return [made.auroc.estimate for found in by_layer.values() for made in found]
