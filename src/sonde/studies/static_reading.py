"""Do the weights of a model say something in tokens, and is a tuned lens the better reader of them?

Directions of every block's matrices are read through the tuned lens and the logit lens of the layer at which they meet
the stream: what is read at the block's input, what is written at the next one's. Scores are the coherence of each
direction's top tokens; random matrices of the same shapes are the control.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, halves, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.lens.tuned import TunedLens
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter

_PARTS = {
    "w_in": "MLP reads",
    "w_out": "MLP writes",
    "ov_in": "heads read",
    "ov_out": "heads write",
    "qk_query": "queries",
    "qk_key": "keys",
}
_SHOWN, _TOKENS_SHOWN = 20, 8
_PAPER = "Belrose et al. 2023, arXiv:2303.08112"


@dataclass(frozen=True)
class StaticReadingConfig(Runnable):
    """Read the weights of a model as tokens.

    Example: sonde run static-reading organism:pebble --directions 8
    """

    words = ("sonde", "run", "static-reading")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What the tuned lens is trained on. By default the help texts of Python."""
    tokens: Count = 32768
    """How many tokens of the text are read: the lens is trained on the first half."""
    directions: Count = 4
    """How many directions of each matrix (of each head) are read, the strongest first."""
    top: Count = 10
    """How many tokens of a direction are held against one another."""
    trainer: Name = None
    """How the lens is trained: ridge+muon (the default), ridge (closed form, fastest), ridge+adam, muon, adam, sgd."""
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
    "static-reading",
    summary="the weights of every block as tokens, through tuned and logit lens, against random matrices",
    paper="Belrose et al. 2023, Eliciting Latent Predictions from Transformers with the Tuned Lens (arXiv:2303.08112)",
)
def static_reading(config: StaticReadingConfig) -> Path:
    """Train a lens, read the weights through it and write the report. Returns its path.

    Raises `SondeError` for anything wrong with options, model, text or folder, and for models none of whose matrices
    can be told apart.
    """
    from sonde.data.text import describe
    from sonde.lens.descent import LensTraining, Trainer
    from sonde.lens.tuned import TunedLens
    from sonde.organisms.loading import load

    check_options(config)
    if config.directions < 1 or config.top < 2:
        raise SondeError("--directions takes 1 or more, --top 2 or more")
    settings = LensTraining(trainer=cast(Trainer, config.trainer or LensTraining.trainer), seed=config.seed)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    text = read_text(config, lm)
    fit, _ = halves(text, describe(config.text))
    with open_run("static-reading", config, lm) as run:
        if run.done("lens"):
            lens = TunedLens.load(run.path("lens"), lm)
        else:
            lens = TunedLens.fit(lm, fit, settings, checkpoint=run.checkpoint("lens"), progress="tuned lens")
            lens.save(run.path("lens"))
            run.finish("lens")
        rows, refused = _read(lm, lens, config)
        if not rows:
            raise SondeError(f"no matrix of {lm.name} can be read: {next(iter(refused.values()))}")
        run.table("static.directions", rows)
        return publish(
            run,
            lm,
            text,
            [_chapter(lm, rows, config)],
            title=f"The weights of {lm.name} as tokens",
            source=describe(config.text),
            timings=dict(run.timings),
            skipped=refused,
        )


def _read(
    lm: "LanguageModel", lens: "TunedLens", config: StaticReadingConfig
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each direction, and why parts could not be read."""
    from tqdm import tqdm

    from sonde.lens.static import Part, read_directions, weight_directions
    from sonde.lens.tuned import TunedLens

    logit = TunedLens.logit(lm)
    rows, refused = [], {}
    for layer in tqdm(range(lm.n_layers), desc="reading weights", unit="block"):
        for part in _PARTS:
            at = layer + 1 if part.endswith("out") else layer
            try:
                kind = cast(Part, part)
                found = weight_directions(lm, layer, kind, k=config.directions)
                noise = weight_directions(lm, layer, kind, k=config.directions, random=config.seed)
            except SondeError as error:
                refused[f"{_PARTS[part]}, block {layer}"] = str(error)
                continue
            tuned, plain, random = (
                read_directions(lm, reader, at, directions.vectors, k=config.top)
                for reader, directions in ((lens, found), (logit, found), (lens, noise))
            )
            rows += [
                {
                    "block": layer,
                    "part": _PARTS[part],
                    "matrix": found.matrices[i],
                    "tuned": float(tuned.score[i]),
                    "logit": float(plain.score[i]),
                    "random": float(random.score[min(i, len(random.score) - 1)]),
                    "tokens": lm.token_strings(tuned.best(i)[:_TOKENS_SHOWN]),
                }
                for i in range(len(found.vectors))
            ]
    return rows, refused


def _chapter(lm: "LanguageModel", rows: list[dict[str, Any]], config: StaticReadingConfig) -> "Chapter":
    """Coherence by block and part, against random matrices, and the most coherent directions."""
    import numpy as np

    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.runs.report.numbers import number
    from sonde.stats.intervals import Interval, bootstrap_mean, paired_difference

    def mean(name: str, some: list[dict[str, Any]]) -> Interval:
        return bootstrap_mean([row[name] for row in some], [_matrix(row) for row in some], seed=config.seed)

    command = shlex.join(config.command())
    tuned, random = mean("tuned", rows), mean("random", rows)
    # behind the last block both lenses are the unembedding
    both = [row for row in rows if row["block"] < lm.n_layers - 1 or not row["part"].endswith(("writes", "write"))]
    gain = paired_difference(
        [row["tuned"] for row in both],
        [row["logit"] for row in both],
        [_matrix(row) for row in both],
        seed=config.seed,
    )
    says = "more" if tuned.low > random.high else "no more"
    better = "better" if gain.low > 0 else "worse" if gain.high < 0 else "neither better nor worse"
    findings = [
        Finding.of(
            tuned,
            id="static.coherence",
            chapter="static",
            sentence=f"The top tokens of the weights' directions belong together {says} than those of random matrices.",
            metric="mean cosine of the embeddings of a direction's top tokens",
            better="higher",
            control=Control.of("random matrices", random),
            command=command,
            figures=("static.blocks",),
            tables=("static.parts",),
        ),
        Finding.of(
            gain,
            id="static.tuned-gain",
            chapter="static",
            sentence=f"The tuned lens reads weights {better} than the logit lens.",
            metric="coherence through the tuned lens less that through the logit lens",
            better="higher",
            control=Control("logit lens", 0.0),
            command=command,
            figures=("static.blocks",),
            tables=("static.parts",),
        ),
    ]
    blocks = sorted({row["block"] for row in rows})
    curve = [
        {"block": place, "of": name, "score": point.estimate, "low": point.low, "high": point.high}
        for key, name in (("tuned", "tuned lens"), ("logit", "logit lens"), ("random", "random matrices"))
        for place, block in enumerate(blocks)
        for point in [mean(key, [row for row in rows if row["block"] == block])]
    ]
    chart = chart_kinds.lines(
        curve,
        x="block",
        y="score",
        low="low",
        high="high",
        series="of",
        control=("random matrices",),
        x_labels=[str(block) for block in blocks],
        title=f"Directions of weights score {number(tuned.estimate, 2)}, those of random matrices "
        f"{number(random.estimate, 2)}",
        subtitle=f"Mean cosine between the embeddings of the top {config.top} tokens, 95 % bands; higher is better",
        x_title="block",
        y_title="coherence of top tokens",
    )
    parts = [part for part in _PARTS.values() if any(row["part"] == part for row in rows)]
    order = np.argsort([-row["tuned"] for row in rows], kind="stable")[:_SHOWN]
    return Chapter(
        id="static",
        question="Do the weights say something in tokens?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(id="static.blocks", chart=chart, caption="Coherence of the tokens of weights' directions by block."),
            Table(
                id="static.parts",
                caption="By part: coherence through both lenses, and of random matrices through the tuned one",
                columns=["part", *(Column(name=name) for name in ("tuned lens", "logit lens", "random")), "directions"],
                rows=[
                    [part, *(mean(key, own).estimate for key in ("tuned", "logit", "random")), str(len(own))]
                    for part in parts
                    for own in [[row for row in rows if row["part"] == part]]
                ],
            ),
            Table(
                id="static.best",
                caption="The directions whose tokens belong together most",
                columns=["block", "part", "matrix", Column(name="coherence"), Column(name="tokens", code=True)],
                rows=[
                    [str(row["block"]), row["part"], row["matrix"], row["tuned"], " · ".join(row["tokens"])]
                    for row in (rows[int(i)] for i in order)
                ],
            ),
        ],
        not_shown=(
            "That tokens belong together does not say that the model uses the direction for them. Directions of one "
            "matrix are drawn together in the intervals, matrices of one block are not."
        ),
        how=(
            f"The {config.directions} strongest singular vectors of each matrix, of each head for attention, after the "
            "norm before it is folded in and what the final norm takes away is taken out. A direction is read where it "
            "meets the stream, both signs, and the better one counts. Control: random matrices of the same shapes, "
            f"folded alike, through the tuned lens ({_PAPER}, appendix)."
        ),
    )


def _matrix(row: dict[str, Any]) -> str:
    return f"{row['block']} {row['part']} {row['matrix']}"
