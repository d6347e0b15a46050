"""Which directions of weight space does training use? The Jacobian of a whole training on handwritten digits.

A perceptron is trained, and the derivative of its final weights by its initial ones is formed exactly, for several
seeds. Each is held against trainings from another seed, on permuted labels and on noise, and its directions against
random ones.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.dynamics.update_rules import Rule

_ROWS = 1600


@dataclass(frozen=True)
class TrainingJacobianConfig(Runnable):
    """Say which initial directions training amplifies, forgets or carries through, and whether they matter.

    Example: sonde run training-jacobian --hidden 16 --optimizer adam
    """

    words = ("sonde", "run", "training-jacobian")

    hidden: Count = 16
    """Hidden units; 16 make 1,210 parameters, the paper's 64 make 4,810 and take an hour."""
    epochs: Count = 25
    """Passes over 1,600 digits."""
    batch: Count = 64
    """Rows of a batch, in the same order every epoch."""
    rest: Literal["refuse", "drop", "ragged"] = "refuse"
    """What becomes of rows that fill no batch."""
    optimizer: Literal["sgd", "nesterov", "adam"] = "sgd"
    """SGD with momentum, Nesterov's variant, or Adam with 1e-8 inside the root."""
    lr: Annotated[float | None, arg(metavar="RATE")] = None
    """Learning rate at the start of its cosine; by default 0.1, and 0.003 for Adam."""
    momentum: Annotated[float, arg(metavar="MU")] = 0.9
    """Momentum of SGD."""
    seeds: Count = 3
    """Trainings whose spread is reported; each needs three more to be held against."""
    looks: Count = 5
    """At how many steps on the way the Jacobian is taken too, each half as late as the next."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """Seed of the first initialisation; the others follow it."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""

    def rule(self) -> "Rule":
        """The optimiser. Raises `SondeError` for settings that it does not take."""
        from sonde.dynamics.update_rules import SGD, Adam

        if self.optimizer == "adam":
            return Adam(lr=3e-3 if self.lr is None else self.lr)
        lr = 0.1 if self.lr is None else self.lr
        return SGD(lr=lr, momentum=self.momentum, nesterov=self.optimizer == "nesterov")


@study(
    "training-jacobian",
    summary="which directions of initial weights training amplifies, forgets or leaves alone, and whether they matter",
    paper="Belrose & Scherlis 2024, Understanding Gradient Descent through the Training Jacobian (arXiv:2412.07003)",
)
def training_jacobian(config: TrainingJacobianConfig) -> Path:
    """Train, form the Jacobians, measure, and write the report. Returns its path.

    Raises `SondeError` for options that do not fit, a training that diverges, and anything wrong with the folder.
    """
    import hashlib
    import shutil

    from sonde.dynamics.training_map import batch_order
    from sonde.studies.jacobian_chapters import chapters
    from sonde.studies.jacobian_measures import measure

    check_options(config)
    if config.hidden < 1 or config.looks < 1:
        raise SondeError(f"--hidden is {config.hidden} and --looks {config.looks}: both take 1 or more")
    if config.seeds < 2:
        raise SondeError(f"--seeds is {config.seeds}: give 2 or more, an interval needs them")
    config.rule()
    batch_order(_ROWS, batch=config.batch, epochs=config.epochs, rest=config.rest)
    n = 65 * config.hidden + 10 * (config.hidden + 1)
    with open_run("training-jacobian", config, Named(f"digits-{config.hidden}")) as run:
        measured = []
        for seed in range(config.seed, config.seed + config.seeds):
            step = f"seed-{seed}"
            if not run.done(step):
                folder = run.checkpoint(step).with_suffix("")
                result = measure(config, seed, folder)
                run.finish(step, result)
                shutil.rmtree(folder)
            measured.append(run.result(step))
        run.table("training-jacobian.sigma", [
            {"seed": config.seed + i, "index": j, "sigma": value}
            for i, each in enumerate(measured)
            for j, value in enumerate(each["sigma"].tolist())
        ])  # fmt: skip
        digest = hashlib.sha256(b"".join(each["sigma"].numpy().tobytes() for each in measured)).hexdigest()
        subject = f"{config.seeds} trainings of a perceptron of {n:,} weights"
        return publish(
            run,
            Named(subject, digest, n),
            Read(),
            chapters(measured, config, shlex.join(config.command())),
            title="Which directions of weight space does training use?",
            source=f"{_ROWS:,} handwritten digits for training, 197 held out",
            timings=dict(run.timings),
        )
