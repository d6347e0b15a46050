"""Does a circuit form before the test accuracy moves? A network of modular addition, its hidden progress, its circuit.

A one-layer transformer is trained on sums, or on products in any finite group, until it generalises, and its
checkpoints are read: losses with the circuit alone and without it, the concentration of its weights, and at the end
what each part of the network computes. The control is the same training without weight decay, which never generalises.
"""

import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.dynamics.circuit_report import CircuitReport
    from sonde.dynamics.grokking import Grokking, History, Phases, Point
    from sonde.dynamics.progress_measures import Grid
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run

_CITE = "Nanda et al. 2023, arXiv:2301.05217"
_ARCHITECTURES = {
    "one-layer": "One layer of attention and MLP, 4 heads",
    "mlp": "A perceptron with one hidden layer",
    "transformer": "A transformer, 4 heads",
}
_CONTROL_SHARE = 0.4  # of the steps: long enough to memorise and to see that nothing else comes


@dataclass(frozen=True)
class GrokkingConfig(Runnable):
    """Watch a network grok modular addition, and say what it computes.

    Example: sonde run grokking --modulus 113 --share 0.3 --hidden 512 --steps 5000
    """

    words = ("sonde", "run", "grokking")

    modulus: Count = 59
    """P: the network adds numbers modulo P. The paper's is 113, which takes about 6 minutes."""
    group: Annotated[str | None, arg(metavar="NAME")] = None
    """Multiply in a group in place of adding: c12 (cyclic), d29 (symmetries of a polygon), s4 (permutations)."""
    share: Annotated[float, arg(metavar="SHARE")] = 0.4
    """Share of all pairs that are trained on; the paper's is 0.3."""
    hidden: Count = 256
    """Neurons of the MLP; the paper's network has 512."""
    steps: Count = 2600
    """Training steps on the full batch."""
    lr: Annotated[float, arg(metavar="RATE")] = 3e-3
    """Learning rate; the paper's is 0.001, with three times the steps."""
    weight_decay: Annotated[float, arg(metavar="DECAY")] = 1.0
    """Weight decay; without it nothing but memory is learned."""
    every: Count = 100
    """Steps between checkpoints."""
    architecture: Literal["one-layer", "mlp", "transformer"] = "one-layer"
    """The paper's network, a perceptron, or a transformer of more layers."""
    layers: Count = 2
    """Blocks of the architecture "transformer"."""
    dropout: Annotated[float, arg(metavar="SHARE")] = 0.0
    """Dropout of the architecture "transformer", which regularises too."""
    l1: Annotated[float, arg(metavar="WEIGHT")] = 0.0
    """Weight of the sum of absolute weights in the loss, which does not do what weight decay does."""
    no_control: bool = False
    """Leave out the training without weight decay."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """Seed of the split and of the weights."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""

    def training(self) -> "Grokking":
        """The settings as the wing has them. Raises `SondeError` for ones that do not fit."""
        from sonde.data.groups import GroupTask
        from sonde.data.modular import ModularTask
        from sonde.dynamics.grokking import Grokking
        from sonde.nets.one_layer import Shape

        if self.hidden < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise SondeError("--hidden takes 1 or more, --lr a number above 0, --weight-decay 0 or more")
        if self.group is None:
            task = ModularTask(self.modulus, share=self.share, seed=self.seed)
        else:
            task = GroupTask(self.group, share=self.share, seed=self.seed)
        return Grokking(
            task=task,
            shape=Shape(task.modulus, hidden=self.hidden),
            steps=self.steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            every=self.every,
            seed=self.seed,
            architecture=self.architecture,
            layers=self.layers,
            dropout=self.dropout,
            l1=self.l1,
        )


@study(
    "grokking",
    summary="a network learns modular addition late and all at once: its hidden progress, phases and circuit",
    paper="Nanda et al. 2023, Progress Measures for Grokking via Mechanistic Interpretability (arXiv:2301.05217)",
)
def grokking(config: GrokkingConfig) -> Path:
    """Train, measure every checkpoint, take the circuit apart and write the report. Returns its path.

    Raises `SondeError` for options that do not fit and anything wrong with the folder.
    """
    import dataclasses
    import hashlib

    from sonde.data.modular import ModularTask
    from sonde.dynamics.circuit_report import circuit_report
    from sonde.dynamics.grokking import grid_of, grok, phases, trace
    from sonde.nets.one_layer import OneLayer

    check_options(config)
    settings = config.training()
    p = settings.task.modulus
    subject = f"addition modulo {p}" if config.group is None else f"multiplication in {config.group.upper()}"
    with open_run("grokking", config, Named(config.group or f"modulo-{p}")) as run:
        history = grok(settings, folder=run.checkpoint("training").with_suffix(""), progress="training")
        grid = grid_of(history.network(), settings.task)
        keys = _keys(grid)
        points = trace(history, keys, progress="measuring")
        control = None
        if not config.no_control:
            steps = max(settings.every, int(_CONTROL_SHARE * settings.steps))
            other = dataclasses.replace(settings, weight_decay=0.0, steps=steps)
            folder = run.checkpoint("control").with_suffix("")
            control = trace(grok(other, folder=folder, progress="without weight decay"), keys)
        _save(run, history, points, control or [])
        found = phases(points, p)
        network = history.network()
        weights = hashlib.sha256(b"".join(p.numpy().tobytes() for p in network.state_dict().values())).hexdigest()
        return publish(
            run,
            Named(subject, weights, sum(p.numel() for p in network.parameters())),
            Read(),
            [
                _progress_chapter(points, control, found, config),
                _circuit_chapter(circuit_report(network, settings.task, keys), config)
                if isinstance(settings.task, ModularTask) and isinstance(network, OneLayer)
                else _components_chapter(grid, keys, config),
            ],
            title=f"How a network learned {subject}",
            source=f"all {p**2} pairs, {config.share:.0%} trained on",
            timings=dict(run.timings),
        )


def _keys(grid: Any) -> tuple[int, ...]:
    """Key frequencies of the last checkpoint; the five largest where none stands out, which is the case of memory."""
    try:
        with warnings.catch_warnings():  # the report says where it does not generalise
            warnings.simplefilter("ignore")
            return grid.key_frequencies()
    except SondeError:
        shares = grid.shares()
        return tuple(sorted(shares, key=shares.__getitem__, reverse=True)[:5])


def _save(run: "Run", history: "History", points: "list[Point]", control: "list[Point]") -> None:
    """The history as one file, and a row for every checkpoint; those of the control apart."""
    history.save(run.path("history.safetensors"))
    run.table("grokking.checkpoints", [_row(point) for point in points])
    if control:
        run.table("grokking.control", [_row(point) for point in control])


def _row(point: "Point") -> dict[str, Any]:
    m = point.measures
    return {
        "step": point.step,
        "train": m.train,
        "test": m.test,
        "accuracy_train": m.accuracy_train,
        "accuracy_test": m.accuracy_test,
        **{f"restricted_{which}": value for which, value in m.restricted.items()},
        "excluded": m.excluded,
        "wide": m.wide,
        "trig_loss": m.trig_loss,
        "trig_fve": m.trig_fve,
        "share": m.share,
        "gini_embedding": point.gini_embedding,
        "gini_logits": point.gini_logits,
        "squared_weights": point.squared_weights,
    }


def _progress_chapter(
    points: "list[Point]", control: "list[Point] | None", found: "Phases", config: GrokkingConfig
) -> "Chapter":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import wilson

    command = shlex.join(config.command())
    task = config.training().task
    tested = int((~task.trained).sum())
    last = points[-1].measures
    right = wilson(round(last.accuracy_test * tested), tested)
    held: dict[str, Any] = {"control_reason": "left out by --no-control"}
    if control is not None:
        share = wilson(round(control[-1].measures.accuracy_test * tested), tested)
        held = {"control": Control.of("the same training without weight decay", share)}
    gap = f"{found.grokked - found.memorised} steps after it had memorised" if found.grokked and found.memorised else ""
    sentence = (
        f"It generalises at step {found.grokked}, {gap}."
        if gap
        else f"It does not generalise in {config.steps} steps: no grokking transition found, and frequencies that are "
        "chosen on such a network mean little."
    )
    finding = Finding.of(
        right,
        id="grokking.accuracy",
        chapter="progress",
        sentence=sentence,
        metric="share of the pairs that it was not trained on that it answers right",
        better="higher",
        command=command,
        figures=("progress.losses",),
        **held,
    )
    shown = [
        {"step": point.step, "loss": max(value, 1e-9), "of": name}
        for point in points
        for name, value in (
            ("test", point.measures.test),
            ("restricted (circuit alone)", point.measures.restricted["test"]),
            ("excluded (without it)", point.measures.excluded),
            ("train", point.measures.train),
        )
    ]
    if control is not None:
        shown += [{"step": p.step, "loss": p.measures.test, "of": "test, no weight decay"} for p in control]
    losses = chart_kinds.lines(
        shown,
        x="step",
        y="loss",
        series="of",
        control=("test, no weight decay",),
        log=True,
        title=f"The circuit is there at step {found.onset}, the test follows at {found.grokked}"
        if found.grokked
        else "No circuit takes over",
        subtitle="cross entropy of the network, of its circuit alone, and without its circuit",
        x_title="training step",
        y_title="loss (nats)",
    )
    concentration = chart_kinds.lines(
        [
            {"step": point.step, "gini": value, "of": name}
            for point in points
            for name, value in (("embedding", point.gini_embedding), ("logit map", point.gini_logits))
        ],
        x="step",
        y="gini",
        series="of",
        title=f"The embedding's Gini coefficient goes from {points[0].gini_embedding:.2f} to "
        f"{points[-1].gini_embedding:.2f}",
        subtitle="concentration of the Fourier rows of W_E and W_L: 0 all frequencies alike, 1 a single one",
        x_title="training step",
        y_title="Gini coefficient",
    )
    steps = [
        ("memorised", "train loss below 0.01", found.memorised),
        ("circuit onset", "restricted test loss below half of that of guessing", found.onset),
        ("displacement", "excluded train loss above 1", found.displaced),
        ("half", "test accuracy above 0.5", found.half),
        ("grokked", "test accuracy above 0.99", found.grokked),
        ("cleanup begins", "steepest fall of the test loss", None if found.cleanup is None else found.cleanup[0]),
        ("cleanup ends", "the embedding concentrates no further", None if found.cleanup is None else found.cleanup[1]),
    ]
    return Chapter(
        id="progress",
        question="Does something form before it can be seen from outside?",
        answer=sentence,
        findings=[finding],
        blocks=[
            Figure(id="progress.losses", chart=losses, caption="Losses over training, on a logarithmic scale."),
            Figure(id="progress.gini", chart=concentration, caption="Concentration of the weights in frequencies."),
            Table(
                id="progress.phases",
                columns=["phase", "rule", "step"],
                rows=[[name, rule, "not seen" if step is None else str(step)] for name, rule, step in steps],
                caption="Phases, by rule and not by eye.",
            ),
        ],
        not_shown=(
            "One network and one split: `sonde sweep grokking --seed 0..4` says how phases vary. Key frequencies are "
            "those of the last checkpoint; earlier ones may use others."
        ),
        how=(
            f"{_ARCHITECTURES[config.architecture]}, width 128, {config.hidden} neurons; full batch AdamW, weight "
            f"decay {config.weight_decay:g}, learning rate {config.lr:g}, cross entropy in float64. Restricted: "
            "logits on all pairs, projected on functions of the sum (product) at the key frequencies, the mean kept, "
            f"on test pairs. Excluded: without that projection, on train pairs ({_CITE})."
        ),
    )


def _components_chapter(grid: "Grid", keys: tuple[int, ...], config: GrokkingConfig) -> "Chapter":
    from sonde.dynamics.progress_measures import trigonometric
    from sonde.runs.blocks import Chapter, Column, Table
    from sonde.runs.report.numbers import number

    shares, components = grid.shares(), grid.harmonics.components
    coefficients, _ = trigonometric(grid, list(components))
    inside = sum(shares[k] for k in keys)
    return Chapter(
        id="components",
        question="What does it compute?",
        answer=f"{inside:.0%} of the variance of its logits are functions of the product in {len(keys)} components.",
        blocks=[
            Table(
                id="components.table",
                columns=["component", "functions", Column(name="share of variance"), Column(name="on the character")],
                rows=[
                    [str(k), str(q.shape[1]), number(shares[k], 3), number(coefficients[k], 3)]
                    for k, q in components.items()
                ],
                caption="Components of the group, how many functions each has, its share of the variance of the "
                "logits, and its coefficient on the character of the product and the inverse of the answer.",
            )
        ],
        not_shown="A component says which functions the network uses, not how its neurons make them.",
        how=(
            "Components are those that neither translation of the group leaves; a share is of the logits, centred "
            "over answers and pairs, on all pairs (Chughtai et al. 2023, arXiv:2302.03025)."
        ),
    )


def _circuit_chapter(report: "CircuitReport", config: GrokkingConfig) -> "Chapter":
    from sonde.runs.blocks import Chapter, Column, Table
    from sonde.runs.report.numbers import number

    def shown(value: float | None) -> str:
        return "" if value is None else number(value, 3)

    agree = "agree" if report.agree else "do not agree: a frequency may have logits without neurons, or the reverse"
    return Chapter(
        id="circuit",
        question="What does it compute?",
        answer=(
            f"Logits are sums of cos w(a+b-c) at {len(report.keys)} frequencies, and {report.clustered:.0%} of the "
            f"neurons belong to one frequency each. Both counts of frequencies {agree}."
        ),
        blocks=[
            Table(
                id="circuit.frequencies",
                columns=["rule", "frequencies"],
                rows=[
                    ["over 2 % of the variance of the logits", ", ".join(map(str, sorted(report.keys)))],
                    ["5 neurons or more", ", ".join(map(str, sorted(report.keys_by_neurons)))],
                    [
                        "norm in W_E over a quarter of the largest",
                        ", ".join(map(str, sorted(report.keys_by_embedding))),
                    ],
                ],
                caption="Key frequencies by three rules.",
            ),
            Table(
                id="circuit.checks",
                columns=["claim", Column(name="variance explained"), Column(name="loss on all pairs, nats")],
                rows=[[check.what, shown(check.explained), shown(check.loss)] for check in report.checks],
                caption="Each claim about the circuit: how much it explains, and the loss when only it is kept.",
            ),
        ],
        not_shown=(
            "Variance explained is of one network at its last checkpoint. A loss that does not rise says that what was "
            "thrown away did not matter, not that nothing else computes the same."
        ),
        how=(
            "Neurons: {1, cos, sin} x {1, cos, sin} of one frequency explains 85 % of a neuron's variance over all "
            f"pairs. W_L is what each neuron adds to each logit ({_CITE}, section 4)."
        ),
    )
