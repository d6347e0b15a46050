"""Does a rule come all of a sudden, and does memory come first? Endless data, little data, and no weight decay.

One small transformer learns a sequence task three times over: from fresh sequences at every step, from a fixed set with
weight decay, and from the same set without. With endless data the rule comes suddenly and nothing is memorised first;
with little data memory comes first, and the rule later where there is weight decay, if it comes.
"""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.data.sequence_tasks import SequenceTask
    from sonde.dynamics.phase_change import Arm, Look, Training
    from sonde.runs.blocks import Chapter

_CITE = "Nanda et al. 2023, arXiv:2301.05217"


@dataclass(frozen=True)
class PhaseChangesConfig(Runnable):
    """Watch one rule being learned from endless data, from little, and from little without weight decay.

    Example: sonde run phase-changes --task addition --size 2 --steps 6000
    """

    words = ("sonde", "run", "phase-changes")

    task: Literal["skip-trigram", "phrase", "addition"] = "skip-trigram"
    """A key before answers a question at the end; a phrase that comes back; a sum digit by digit."""
    size: Count | None = None
    """Classes of keys (10), tokens of the phrase (8; the paper 16), or digits of the summands (2; the paper 5)."""
    examples: Count | None = None
    """Sequences of the fixed set: 64 for skip trigrams, 512 and 700 (the paper's numbers) for the others."""
    steps: Count = 1500
    """Training steps of each network."""
    seeds: Count = 3
    """Networks of each kind, each with its own data and weights."""
    lr: Annotated[float, arg(metavar="RATE")] = 3e-3
    """Learning rate of AdamW."""
    weight_decay: Annotated[float, arg(metavar="DECAY")] = 1.0
    """Weight decay of the second network; the first and the third have none."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """Seed of the first network."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""

    def problem(self) -> "tuple[SequenceTask, Training, list[Arm]]":
        """Task, network and arms. Raises `SondeError` for sizes that do not fit."""
        from sonde.data.sequence_tasks import Addition, RepeatedPhrase, SkipTrigram
        from sonde.dynamics.phase_change import Arm, Training
        from sonde.nets.transformer import TransformerShape

        if self.seeds < 2 or self.weight_decay < 0:
            raise SondeError("--seeds takes 2 or more (an interval is over networks), --weight-decay 0 or more")
        task: SequenceTask
        if self.task == "skip-trigram":
            task, width, layers, hidden, examples = SkipTrigram(self.size or 10), 32, 1, 0, 64
        elif self.task == "phrase":
            phrase = self.size or 8
            task = RepeatedPhrase(vocab=4 * phrase, length=5 * phrase, phrase=phrase)
            width, layers, hidden, examples = 48, 2, 0, 512
        else:
            task, width, layers, hidden, examples = Addition(self.size or 2), 64, 1, 256, 700
        shape = TransformerShape(task.vocab, width, layers, 4, task.length, hidden, layer_norm=False)
        training = Training(shape, steps=self.steps, batch=128, lr=self.lr, test=512, seed=self.seed)
        count = self.examples or examples
        return task, training, [Arm(None, 0.0), Arm(count, self.weight_decay), Arm(count, 0.0)]


@study(
    "phase-changes",
    summary="a rule is learned suddenly from endless data, and after memory from little: three sequence tasks",
    paper="Nanda et al. 2023, Progress Measures for Grokking via Mechanistic Interpretability (arXiv:2301.05217)",
)
def phase_changes(config: PhaseChangesConfig) -> Path:
    """Train every arm with every seed and write the report. Returns its path.

    Raises `SondeError` for options that do not fit and anything wrong with the folder.
    """
    from sonde.dynamics.phase_change import Look, learn, row

    check_options(config)
    task, training, arms = config.problem()
    with open_run("phase-changes", config, Named(config.task)) as run:
        seen: dict[str, list[list[Look]]] = {arm.name: [] for arm in arms}
        for place, arm in enumerate(arms):
            for seed in range(config.seeds):
                step = f"training-{place}-{seed}"
                if not run.done(step):
                    own = replace(training, seed=config.seed + seed)
                    looks = learn(
                        task,
                        arm,
                        own,
                        checkpoint=run.checkpoint(step),
                        progress=f"{arm.name}, {seed + 1} of {config.seeds}",
                    )
                    run.finish(step, [asdict(look) for look in looks])
                seen[arm.name].append([Look(**look) for look in run.result(step)])
        run.table(
            "phase_changes.looks",
            [
                {"seed": config.seed + seed, **row(arm, look)}
                for arm in arms
                for seed, looks in enumerate(seen[arm.name])
                for look in looks
            ],
        )
        return publish(
            run,
            Named(config.task),
            Read(),
            [_chapter(seen, arms, config)],
            title=f"How a rule is learned: {config.task}",
            source=f"{task!r}",
            timings=dict(run.timings),
        )


def _chapter(seen: "dict[str, list[list[Look]]]", arms: "list[Arm]", config: PhaseChangesConfig) -> "Chapter":
    import numpy as np

    from sonde.dynamics.phase_change import change
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.runs.report.numbers import number
    from sonde.stats.intervals import bootstrap_mean

    changes = {name: [change(looks) for looks in runs] for name, runs in seen.items()}
    endless, plain = arms[0].name, arms[-1].name
    sharp = {name: bootstrap_mean([c.sharpest for c in found]) for name, found in changes.items()}
    learned = sum(c.learned is not None for c in changes[endless])
    lag = [c.delay for c in changes[endless] if c.delay is not None]
    sentence = (
        f"From endless data {learned} of {config.seeds} networks learn the rule, and one doubling of the steps takes "
        f"{sharp[endless].estimate:.0%} of the fall of the loss"
        + (f"; memory is {np.mean(lag):.1f} times as fast as the rule." if lag else ".")
    )
    finding = Finding.of(
        sharp[endless],
        id="phase_changes.sharpest",
        chapter="phases",
        sentence=sentence,
        metric="largest share of the fall of the test loss within one doubling of the steps",
        better="higher",
        command=shlex.join(config.command()),
        figures=("phases.losses",),
        control=Control.of("the fixed set without weight decay", sharp[plain]),
    )
    shown = [
        {"doublings": float(np.log2(look.step + 1)), "loss": look.test, "of": name, "place": place}
        for name, runs in seen.items()
        for place, look in enumerate(_mean(runs))
    ]
    losses = chart_kinds.lines(
        shown,
        x="doublings",
        y="loss",
        series="of",
        control=(plain,),
        title=f"Endless data: {sharp[endless].estimate:.0%} of the fall in one doubling",
        subtitle=f"test loss, mean of {config.seeds} networks",
        x_title="training steps, log2(1 + step)",
        y_title="test loss (nats a token)",
    )

    def steps(values: list[Any]) -> str:
        return ", ".join("never" if value is None else f"{value:,}" for value in values)

    return Chapter(
        id="phases",
        question="Is the rule learned suddenly, and after memory?",
        answer=sentence,
        findings=[finding],
        blocks=[
            Figure(id="phases.losses", chart=losses, caption="Loss on fresh sequences, by how the network is trained."),
            Table(
                id="phases.table",
                columns=[
                    "training",
                    "memorised at step",
                    "test accuracy over 0.9 at step",
                    Column(name="share of the fall in one doubling"),
                    Column(name="last test accuracy"),
                ],
                rows=[
                    [
                        name,
                        steps([c.memorised for c in found]),
                        steps([c.learned for c in found]),
                        number(sharp[name].estimate, 3),
                        number(float(np.mean([runs[-1].accuracy for runs in seen[name]])), 3),
                    ]
                    for name, found in changes.items()
                ],
                caption="For each seed in turn. Memorised: train loss below a tenth of the first.",
            ),
        ],
        not_shown=(
            "One size of network and of data for each kind: how the delay grows as data shrink is a sweep, "
            "`sonde sweep phase-changes --examples 32,64,128`. With batches drawn from the fixed set the train loss of "
            "endless data is that of sequences not yet seen."
        ),
        how=(
            f"Attention without layer norm, AdamW at {config.lr:g}, batches of 128, looks three times a doubling of "
            f"the steps. The loss is of the tokens that can be known from what stands before them ({_CITE}, appendix)."
        ),
    )


def _mean(runs: "list[list[Look]]") -> "list[Look]":
    from sonde.dynamics.phase_change import Look

    def mean(looks: "tuple[Look, ...]", field: str) -> float:
        return sum(getattr(look, field) for look in looks) / len(looks)

    return [
        Look(looks[0].step, *(mean(looks, field) for field in ("train", "test", "accuracy")))
        for looks in zip(*runs, strict=True)
    ]
