"""Which statistics of its classes does a classifier use, and when? Digits whose statistics are edited or made.

Perceptrons learn handwritten digits while they are shown test digits with the means, marginals or covariances of
another class, and samples that have nothing but the first moments of a class. Then the same question on generated data,
where classes differ a little in means, more in covariances and decisively in third moments, so the order is known.
"""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.dynamics.image_stages import Stage
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run

_CITE = "Belrose et al. 2024, arXiv:2402.04362"
_HELD = 397  # digits; 1,400 are trained on
_BATCH = 128
_PLANTED_STEPS = 4  # times fewer steps on generated data
_JUDGED = 2000


@dataclass(frozen=True)
class ImageStatisticsConfig(Runnable):
    """Follow which statistics of its classes a network uses while it learns digits, and planted classes.

    Example: sonde run image-statistics --steps 8192 --seeds 3
    """

    words = ("sonde", "run", "image-statistics")

    steps: Count = 8192
    """Training steps on digits, batches of 128; generated data get a quarter of them."""
    seeds: Count = 3
    """Networks that are trained side by side, each with its own weights."""
    per_class: Count = 1000
    """Made rows of each class."""
    no_third: bool = False
    """Leave out samples of order 3, which take most of the time."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """Seed of the split, of made data and of the first network."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "image-statistics",
    summary="which order of class statistics a network follows over training: digits and planted classes",
    paper="Belrose et al. 2024, Neural Networks Learn Statistics of Increasing Complexity (arXiv:2402.04362)",
)
def image_statistics(config: ImageStatisticsConfig) -> Path:
    """Make the sets, train, judge and write the report. Returns its path.

    Raises `SondeError` for options that do not fit and anything wrong with the folder.
    """
    from sonde.dynamics.image_stages import Stage

    check_options(config)
    if config.seeds < 2 or config.steps < 8 or config.per_class < 2:
        raise SondeError("--seeds takes 2 or more (an interval is over networks), --steps 8, --per-class 2 or more")
    with open_run("image-statistics", config, Named("digits")) as run:
        for name, work in (("digits", _digits), ("planted", _planted)):
            if not run.done(name):
                stages, facts = work(run, config)
                run.finish(name, {"stages": [asdict(stage) for stage in stages], "facts": facts})
        found = {name: run.result(name) for name in ("digits", "planted")}
        stages = {name: [Stage(**row) for row in tree["stages"]] for name, tree in found.items()}
        for name, rows in stages.items():
            run.table(f"statistics.{name}", [asdict(stage) for stage in rows])
        return publish(
            run,
            Named(f"{config.seeds} perceptrons"),
            Read(),
            [
                _digits_chapter(stages["digits"], found["digits"]["facts"], config),
                _planted_chapter(stages["planted"], config),
            ],
            title="Which statistics a network uses while it learns",
            source="scikit-learn's digits, and rows drawn for the purpose",
            timings=dict(run.timings),
        )


def _digits(run: "Run", config: ImageStatisticsConfig) -> "tuple[list[Stage], dict[str, Any]]":
    import torch

    from sonde.data.digits import digits
    from sonde.dynamics.image_stages import edited_sets, follow
    from sonde.nets.mlp import MLP, MLPShape

    data = digits(test=_HELD, seed=config.seed)
    sets, errors = edited_sets(
        data, seed=config.seed, per_class=config.per_class, third=not config.no_third, progress="made digits"
    )

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(data.train_x), (_BATCH,), generator=torch.Generator().manual_seed(step))
        return data.train_x[rows], data.train_y[rows]

    shape = MLPShape((64, 256, 256, 10), activation="relu")
    stages = follow(
        [MLP(shape, seed=config.seed + i) for i in range(config.seeds)],
        batch,
        sets,
        steps=config.steps,
        lr=0.1,
        checkpoint=run.checkpoint("digits"),
        identity=config.settings(),
        progress="digits",
    )
    return stages, {"errors": errors}


def _planted(run: "Run", config: ImageStatisticsConfig) -> "tuple[list[Stage], dict[str, Any]]":
    from sonde.data.three_orders import ThreeOrders
    from sonde.dynamics.image_stages import REAL, Rows, follow
    from sonde.nets.mlp import MLP, MLPShape

    task = ThreeOrders()
    sets = {REAL: Rows(*task.draw(_JUDGED, 2**40))}
    sets |= {f"order {k}": Rows(*task.draw(_JUDGED, 2**40 + k, orders=(k,))) for k in (1, 2, 3)}
    stages = follow(
        [MLP(MLPShape((task.width, 256, 2), activation="relu"), seed=config.seed + i) for i in range(config.seeds)],
        lambda step: task.draw(2 * _BATCH, config.seed * config.steps + step),
        sets,
        steps=config.steps // _PLANTED_STEPS,
        lr=3e-3,
        optimizer="adam",
        per_octave=2,
        checkpoint=run.checkpoint("planted"),
        identity=config.settings(),
        progress="planted classes",
    )
    return stages, {}


def _digits_chapter(stages: "list[Stage]", facts: dict[str, Any], config: ImageStatisticsConfig) -> "Chapter":
    from sonde.dynamics.image_stages import EDITED, MADE, REAL, course
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.runs.report.numbers import number
    from sonde.stats.intervals import bootstrap_mean

    names = [name for name in (REAL, *EDITED, *MADE) if any(stage.rows == name for stage in stages)]
    courses = {name: [course(stages, name, member) for member in range(config.seeds)] for name in names}
    rise = {name: bootstrap_mean([c.rise for c in found]) for name, found in courses.items()}
    early = max(c.at for c in courses["quantiles"])
    sentence = (
        f"The loss on digits with the marginals of another class is least by step {early:,} and then rises "
        f"{rise['quantiles'].estimate:.1f}-fold; that on real test digits rises {rise[REAL].estimate:.1f}-fold."
    )
    finding = Finding.of(
        rise["quantiles"],
        id="image_statistics.rise",
        chapter="digits",
        sentence=sentence,
        metric="last loss over least, on test digits with the coordinate-wise distribution of another class",
        better="higher",
        command=shlex.join(config.command()),
        figures=("digits.edited", "digits.made"),
        control=Control.of("real test digits", rise[REAL]),
    )
    figures = [
        Figure(
            id=f"digits.{key}",
            chart=_curves(
                stages,
                (*shown, REAL),
                value="loss",
                title=title,
                subtitle=f"cross entropy of the label that follows the statistics, mean of {config.seeds} networks",
                y_title="loss (nats)",
            ),
            caption=caption,
        )
        for key, shown, title, caption in (
            (
                "edited",
                EDITED,
                f"Marginals of another class: least {_mean(courses['quantiles'], 'least'):.2f}, last "
                f"{_mean(courses['quantiles'], 'last'):.2f} nats",
                "Test digits with statistics of another class; the label of that class counts as right.",
            ),
            (
                "made",
                tuple(name for name in MADE if name in names),
                f"Gaussian digits: least {_mean(courses['Gaussian'], 'least'):.2f}, last "
                f"{_mean(courses['Gaussian'], 'last'):.2f} nats",
                "Rows that have only the named statistics of their class.",
            ),
        )
    ]
    last = max(stage.step for stage in stages)
    return Chapter(
        id="digits",
        question="Does it use low orders first and leave them later?",
        answer=sentence,
        findings=[finding],
        blocks=[
            *figures,
            Table(
                id="digits.table",
                columns=[
                    "rows",
                    Column(name="least loss"),
                    "at step",
                    Column(name="last loss"),
                    "last over least",
                    Column(name="last accuracy"),
                    Column(name="error of the moments"),
                ],
                rows=[
                    [
                        name,
                        number(_mean(courses[name], "least"), 3),
                        ", ".join(f"{c.at:,}" for c in courses[name]),
                        number(_mean(courses[name], "last"), 3),
                        f"{rise[name].estimate:.2f} ({rise[name].low:.2f} to {rise[name].high:.2f})",
                        number(_accuracy(stages, name, last), 3),
                        number(facts["errors"][name], 2) if name in facts["errors"] else "",
                    ]
                    for name in names
                ],
                caption="Means over networks; the step of each. The error is the largest relative one of any order and "
                "class of a made set. Made rows of finite number never have their moments exactly.",
            ),
        ],
        not_shown=(
            "Digits are nearly separable by second moments, so that accuracy stays high on edited rows and only the "
            "loss turns. A loss that rises says that confidence went elsewhere, not which statistics it went to."
        ),
        how=(
            f"64-256-256-10, ReLU, SGD 0.1 with momentum 0.9, batches of {_BATCH}, 1,400 digits. Quantiles: dithered "
            "mid-ranks. Transport: optimal between Gaussians, 1e-6 of the mean variance added. Order 1 in the box: "
            f"exponential densities; orders 2 and 3: particles ({_CITE})."
        ),
    )


def _planted_chapter(stages: "list[Stage]", config: ImageStatisticsConfig) -> "Chapter":
    from sonde.dynamics.image_stages import REAL, peak
    from sonde.runs.blocks import Chapter, Figure, Table
    from sonde.runs.finding import Finding
    from sonde.stats.intervals import wilson

    orders = [f"order {k}" for k in (1, 2, 3)]
    peaks = {name: [peak(stages, name, member) for member in range(config.seeds)] for name in orders}
    right = sum(a < b < c for a, b, c in zip(*peaks.values(), strict=True))
    sentence = (
        f"In {right} of {config.seeds} networks the accuracy on rows of order 1 alone peaks first, then on order 2, "
        "then on order 3."
    )
    finding = Finding.of(
        wilson(right, config.seeds),
        id="image_statistics.order",
        chapter="planted",
        sentence=sentence,
        metric="share of networks whose accuracies on rows of one order peak in the order 1, 2, 3",
        better="higher",
        command=shlex.join(config.command()),
        figures=("planted.accuracy",),
        control_reason="the planted order is the only right answer; by chance one network in six has it",
    )
    chart = _curves(
        stages,
        (*orders, REAL),
        value="accuracy",
        title=f"Peaks at steps {', '.join(str(sorted(found)[len(found) // 2]) for found in peaks.values())}",
        subtitle="accuracy on rows whose cues of one order alone are of their class",
        y_title="accuracy",
    )
    return Chapter(
        id="planted",
        question="Are planted orders used one after the other?",
        answer=sentence,
        findings=[finding],
        blocks=[
            Figure(id="planted.accuracy", chart=chart, caption="Two classes with cues of three orders."),
            Table(
                id="planted.peaks",
                columns=["rows", "accuracy peaks at step"],
                rows=[[name, ", ".join(f"{step:,}" for step in found)] for name, found in peaks.items()],
                caption="For each network in turn.",
            ),
        ],
        not_shown="How strong the cues are decides how far apart the peaks are; these are of one generator.",
        how=(
            "4 cues of each order: a shift of 0.3 sd; a correlation of ±0.6; a product of signs. Cues of the other "
            "orders are for a class that is drawn at random. 24-256-2, ReLU, Adam 0.003, fresh batches of 256."
        ),
    )


def _curves(stages: "list[Stage]", names: tuple[str, ...], *, value: str, **words: str) -> Any:
    import numpy as np

    from sonde.dynamics.image_stages import REAL
    from sonde.runs import chart_kinds

    rows = []
    for name in names:
        for step in sorted({stage.step for stage in stages if stage.step}):
            found = [getattr(s, value) for s in stages if s.rows == name and s.step == step]
            rows.append({"doublings": float(np.log2(step)), value: float(np.mean(found)), "of": name})
    return chart_kinds.lines(
        rows,
        x="doublings",
        y=value,
        series="of",
        control=(REAL,),
        log=value == "loss",
        x_title="training steps, as a power of two",
        **words,
    )


def _mean(courses: list[Any], field: str) -> float:
    return sum(getattr(c, field) for c in courses) / len(courses)


def _accuracy(stages: "list[Stage]", name: str, step: int) -> float:
    found = [stage.accuracy for stage in stages if stage.rows == name and stage.step == step]
    return sum(found) / len(found)
