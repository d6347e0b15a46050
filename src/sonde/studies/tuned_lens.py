"""How much closer to the model's prediction is a tuned lens than the logit lens, and what does training one take?

Lenses are trained on the first half of a text and scored on the second: distance to the final prediction by layer, bias
of the mean prediction, what happens when a layer's translator is used on another layer, and time of training.
"""

import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, halves, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.lens.evaluation import LensEvaluation, LensScores
    from sonde.lens.tuned import TunedLens
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.finding import Finding
    from sonde.runs.run import Run

LENSES = ("logit", "bias", "ridge", "ridge+muon", "ridge+adam", "muon", "adam", "sgd")
DEFAULT = "ridge+muon"
RECIPE = "sgd"
_BITS = 1 / math.log(2)
_ROGUE = (0, 1, 3, 10)  # dimensions of largest variance that are left out
_PAPER = "Belrose et al. 2023, arXiv:2303.08112"


@dataclass(frozen=True)
class TunedLensConfig(Runnable):
    """Train lenses in several ways and compare them by layer.

    Example: sonde run tuned-lens organism:pebble --lenses logit ridge+muon sgd
    """

    words = ("sonde", "run", "tuned-lens")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What is read. By default the help texts of Python."""
    lenses: Names = ("logit", "bias", "ridge", DEFAULT)
    """Which lenses: logit (nothing to train), bias (only a bias is trained), or a trainer of a full lens: ridge (closed
    form), muon, adam, sgd (the paper's recipe), ridge+muon (the default of Sonde), ridge+adam."""
    tokens: Count = 65536
    """How many tokens of the text are read: half to train, half to score."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "tuned-lens",
    summary="what each layer would predict: logit, bias-only and tuned lens, by every trainer, on one text",
    paper="Belrose et al. 2023, Eliciting Latent Predictions from Transformers with the Tuned Lens (arXiv:2303.08112)",
)
def tuned_lens(config: TunedLensConfig) -> Path:
    """Train the lenses of `config`, score them on held-out text and write the report. Returns its path.

    Raises `SondeError` for unknown lenses and anything wrong with model, text or folder.
    """
    from sonde.data.text import describe
    from sonde.lens.evaluation import LensEvaluation
    from sonde.lm.stream import feed
    from sonde.organisms.loading import load

    chosen = config.lenses or ()
    unknown = [name for name in chosen if name not in LENSES]
    if unknown or "logit" not in chosen or len(set(chosen)) < 2:
        raise SondeError(f"--lenses takes logit and at least one of {', '.join(LENSES[1:])}, not {' '.join(chosen)}")
    check_options(config)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    text = read_text(config, lm)
    fit, held = halves(text, describe(config.text))
    with open_run("tuned-lens", config, lm) as run:
        lenses, seconds = {}, {}
        for name in chosen:
            lenses[name], seconds[name] = _trained(run, lm, fit, name, config.seed)
        evaluation = LensEvaluation(lm, lenses)
        feed(lm, held, [evaluation], progress="scoring")
        best = lenses[DEFAULT if DEFAULT in lenses else next(reversed(lenses))]
        chapters = [
            _distance(evaluation, lm, seconds, shlex.join(config.command())),
            transfer_chapter(lm, held, best, shlex.join(config.command())),
        ]
        return publish(
            run, lm, text, chapters, title=f"Lenses on {lm.name}", source=describe(config.text), timings=seconds
        )


def _trained(run: "Run", lm: "LanguageModel", fit: "TokenBatches", name: str, seed: int) -> "tuple[TunedLens, float]":
    """The lens `name` and the seconds that its training took; from the run folder where it is finished."""
    from sonde.lens.descent import LensTraining, Trainer
    from sonde.lens.tuned import TunedLens

    if name == "logit":
        return TunedLens.logit(lm), 0.0
    step = name.replace("+", "-")
    folder = run.path("lenses", step)
    if run.done(step):
        return TunedLens.load(folder, lm), run.result(step)["seconds"]
    began = time.perf_counter()
    if name == "bias":
        settings = LensTraining(kind="bias", trainer="adam", steps=60, seed=seed)
    else:
        settings = LensTraining(trainer=cast(Trainer, name), seed=seed)
    lens = TunedLens.fit(lm, fit, settings, checkpoint=run.checkpoint(step), progress=f"{name} lens")
    seconds = time.perf_counter() - began
    lens.save(folder)
    run.finish(step, {"seconds": seconds})
    return lens, seconds


def _distance(evaluation: "LensEvaluation", lm: "LanguageModel", seconds: dict[str, float], command: str) -> "Chapter":
    """Distance to the final prediction and bias by layer, for every lens."""
    from sonde.runs.blocks import Chapter, Column, Table
    from sonde.studies.chapters.depth import kl_chart

    scores = evaluation.scores()
    labels = {name: f"{name} lens" for name in scores}
    best = DEFAULT if DEFAULT in scores else next(name for name in scores if name != "logit")
    findings = [_closer(evaluation, best, command)]
    if DEFAULT in scores and RECIPE in scores:
        findings.append(_cheaper(evaluation, scores, seconds, command))
    layers = range(len(scores["logit"].sites))
    return Chapter(
        id="distance",
        question="How far is each layer's reading from the model's prediction?",
        answer=(
            f"{findings[0].sentence} Its bias, the distance of the mean prediction, is at least "
            f"{_least_gain(scores, best):.1f} times smaller."
        ),
        findings=findings,
        blocks=[
            kl_chart(
                {labels[name]: scored.kl for name, scored in scores.items()},
                title=findings[0].sentence,
                name="distance.kl",
            ),
            Table(
                id="distance.kl-table",
                caption=f"KL to the final prediction by layer in bits, on {scores['logit'].n_tokens:,} held-out tokens",
                columns=["lens", *(Column(name=f"{layer}") for layer in layers), "mean", Column(name="time", unit="s")],
                rows=[
                    [name, *(_BITS * layer.estimate for layer in scored.kl), _mean(scored), seconds[name]]
                    for name, scored in scores.items()
                ],
            ),
            Table(
                id="distance.bias-table",
                caption="Bias by layer: KL between the mean final prediction and the mean reading, in bits",
                columns=["lens", *(Column(name=f"{layer}") for layer in layers)],
                rows=[[name, *(_BITS * bias for bias in scored.bias)] for name, scored in scores.items()],
            ),
        ],
        not_shown="One text and one model; lenses trained longer, or on more text, end lower.",
        how=(
            f"Lenses are trained on the first half of the text to give the model's own prediction and scored on the "
            f"second; {lm.n_layers} layers together. logit: nothing is trained. bias: one vector a layer. The others "
            "train one affine map a layer: ridge in closed form, muon and adam by descent, ridge+muon and ridge+adam "
            "from the closed form on, sgd by the published recipe. Every trainer keeps, by layer, the parameters that "
            "were best on held-out tokens of its own half."
        ),
    )


def _closer(evaluation: "LensEvaluation", best: str, command: str) -> "Finding":
    from sonde.runs.finding import Control, Finding

    gaps = [gap.scaled(_BITS) for gap in evaluation.difference(best, "logit")]
    nearer = sum(gap.high < 0 for gap in gaps)
    least = max(gaps, key=lambda gap: gap.estimate)
    where = "at every layer" if nearer == len(gaps) else f"at {nearer} of {len(gaps)} layers"
    return Finding.of(
        least,
        id="distance.closer",
        chapter="distance",
        sentence=f"The {best} lens is closer to the model's prediction than the logit lens {where}.",
        metric="change of KL against the logit lens, at the layer where it is least",
        unit="bits",
        better="lower",
        control=Control("logit lens", 0.0),
        command=command,
        figures=("distance.kl",),
        tables=("distance.kl-table",),
    )


def _least_gain(scores: "dict[str, LensScores]", lens: str) -> float:
    """By how many times the lens's bias is smaller than the logit lens's, at the layer where that is least."""
    return min(logit / max(own, 1e-12) for logit, own in zip(scores["logit"].bias, scores[lens].bias, strict=True))


def _cheaper(
    evaluation: "LensEvaluation", scores: "dict[str, LensScores]", seconds: dict[str, float], command: str
) -> "Finding":
    from sonde.runs.finding import Control, Finding

    gaps = [gap.scaled(_BITS) for gap in evaluation.difference(DEFAULT, RECIPE)]
    middle = gaps[len(gaps) // 2]
    ratio = _mean(scores[DEFAULT]) / _mean(scores[RECIPE])
    share = seconds[DEFAULT] / max(seconds[RECIPE], 1e-9)
    return Finding.of(
        middle,
        id="distance.recipe",
        chapter="distance",
        sentence=(
            f"The default trainer ends at {ratio:.2f} times the mean KL of the paper's recipe, in {share:.2f} times "
            "its time."
        ),
        metric=f"KL of {DEFAULT} minus that of {RECIPE} at the middle layer",
        unit="bits",
        better="lower",
        control=Control("the same lens", 0.0),
        command=command,
        tables=("distance.kl-table",),
    )


def transfer_chapter(lm: "LanguageModel", held: "TokenBatches", lens: "TunedLens", command: str) -> "Chapter":
    """Translators on other layers than their own, against the similarity of the layers."""
    import numpy as np

    from sonde.lens.evaluation import LensSample, covariance_similarity, transfer_penalty
    from sonde.lm.stream import feed
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding, Paper
    from sonde.runs.report.numbers import number
    from sonde.stats.intervals import bootstrap
    from sonde.stats.ranks import spearman

    sample = LensSample(lm, lens.sites)
    feed(lm, held, [sample], progress="transfer")
    rows = sample.rows()
    penalty = transfer_penalty(lens, rows) * _BITS
    pairs = ~np.eye(len(lens), dtype=bool)
    y = penalty.numpy()[pairs]
    left_out = [count for count in _ROGUE if count < lm.d_model]
    similar = {count: covariance_similarity(rows.hidden, without=count).numpy()[pairs] for count in left_out}
    rho = {count: bootstrap(lambda a, b: float(spearman(a, b)), x, y) for count, x in similar.items()}
    layers = [str(layer) for layer in range(len(lens))]
    finding = Finding.of(
        rho[0],
        id="transfer.spearman",
        chapter="transfer",
        sentence="A layer's translator works better on layers whose hidden states vary alike."
        if rho[0].high < 0
        else "How well a translator works on another layer is not explained by how alike the layers vary.",
        metric="Spearman correlation of transfer penalty and covariance similarity",
        better="lower",
        control=Control("no relation", 0.0),
        paper=Paper(-0.78, "Pythia 12B", _PAPER),
        command=command,
        figures=("transfer.penalty", "transfer.scatter"),
        tables=("transfer.rogue",),
    )
    heat = chart_kinds.heat(
        [
            {"translator": i, "layer": j, "bits": float(penalty[i, j])}
            for i in range(len(lens))
            for j in range(len(lens))
        ],
        x="layer",
        y="translator",
        value="bits",
        title="What it costs to read a layer with another layer's translator",
        subtitle="Added cross entropy in bits per token; the diagonal is 0 by definition",
        x_title="layer that is read (input of block)",
        y_title="translator of block",
        x_labels=layers,
        y_labels=layers,
    )
    scatter = chart_kinds.points(
        [{"similarity": float(a), "penalty": float(b)} for a, b in zip(similar[0], y, strict=True)],
        x="similarity",
        y="penalty",
        title=f"Rank correlation {number(rho[0].estimate, 2)}: the more alike two layers vary, the smaller the penalty",
        subtitle="Each dot is an ordered pair of layers; lower is better",
        x_title="cosine of the layers' covariances",
        y_title="transfer penalty (bits)",
    )
    rogue = Table(
        id="transfer.rogue",
        caption="Rank correlation of penalty and similarity, without the dimensions of largest variance",
        columns=["dimensions left out", Column(name="correlation"), Column(name="from"), Column(name="to")],
        rows=[[str(count), found.estimate, found.low, found.high] for count, found in rho.items()],
    )
    return Chapter(
        id="transfer",
        question="Do the layers speak one language?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            Figure(id="transfer.penalty", chart=heat, caption="Transfer penalty of every translator on every layer."),
            Figure(id="transfer.scatter", chart=scatter, caption="Transfer penalty against covariance similarity."),
            rogue,
        ],
        not_shown="Pairs of layers are not independent, so the interval is narrower than it should be.",
        how=(
            "Cross entropy of translator i on the hidden states of layer j less that of translator j, on "
            f"{len(rows):,} held-out tokens; Frobenius cosine of the covariances of the two layers on the same tokens. "
            "A few dimensions of very large variance can make any two layers look alike: the table leaves them out."
        ),
    )


def _mean(scores: "LensScores") -> float:
    return _BITS * sum(layer.estimate for layer in scores.kl) / len(scores.kl)
