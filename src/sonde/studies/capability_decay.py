"""What happens to a skill when its training stops? Small networks on toy languages, of which one is dropped.

Each network learns all languages of a mixture, goes on without one, and is given it back. The mixtures differ in what
the languages share; controls go on without a drop, start without the language, and learn it from scratch.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.dynamics.decay_experiment import Setting, Unit
    from sonde.runs.run import Run


@dataclass(frozen=True)
class CapabilityDecayConfig(Runnable):
    """Drop a language from the training mixture of small networks, and measure how its skill goes and comes back.

    Example: sonde run capability-decay --mixtures A B --weight-decay 0.01 1 --seeds 3
    """

    words = ("sonde", "run", "capability-decay")

    mixtures: Annotated[tuple[str, ...], arg(metavar="A|B|C|D ...")] = ("A", "B")
    """A: unrelated maps. B: the same map. C: B with translation. D: C with the translation of one pair held out."""
    weight_decay: Annotated[tuple[float, ...], arg(metavar="DECAY ...")] = (0.01, 1.0)
    """Weight decays, each with networks of its own."""
    widths: Annotated[tuple[int, ...], arg(metavar="N ...")] = (96,)
    """Widths of the network, each with networks of its own."""
    seeds: Count = 3
    """Networks of each kind: seeds SEED, SEED + 1, …; data, weights and order are drawn anew. Claims need ten."""
    languages: Count = 4
    """Languages of a mixture: 10, or 2 to 4 of maps alone."""
    layers: Count = 2
    """Layers of the network."""
    dropout: Annotated[float, arg(metavar="SHARE")] = 0.0
    """Dropout of the network."""
    steps: Count = 1200
    """Steps of the joint phase, of 64 rows each."""
    limit: Count = 1
    """In multiples of these steps, how long it goes on where a language is not learned."""
    drop_steps: Count = 384
    """Steps without the dropped languages."""
    drift_steps: Count = 128
    """Steps of the control that goes on with all languages."""
    floor_steps: Count = 200
    """Steps of the control that never reads them."""
    drop: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("digits",)
    """What is dropped: languages, translations such as `digits>words`, or `translation` for all of them."""
    everything_but: bool = False
    """Drop everything but these."""
    replay: Annotated[float, arg(metavar="SHARE")] = 0.0
    """Share of the batch that the dropped languages keep."""
    revive_from: Annotated[tuple[int, ...], arg(metavar="N ...")] = (64,)
    """Steps of the drop, beside its end, from which all is trained again."""
    switch: Annotated[str, arg(metavar="keep|reset|decay")] = "reset"
    """The optimiser's state at a switch."""
    lr: Annotated[float, arg(metavar="RATE")] = 1e-3
    """Learning rate, constant."""
    optimizer: Annotated[str, arg(metavar="adamw|sgd")] = "adamw"
    """AdamW, or SGD with momentum."""
    variants: bool = False
    """Revive on the dropped languages alone, and on 16 rows of them, as well; learn them alone from scratch."""
    baselines: bool = False
    """Drop with replay, self-generated replay, L2, EWC, low rank, shrink-and-perturb and a low rate as well."""
    in_turn: Count = 0
    """Steps on each language one after the other, twice round; 0 leaves the sequence out."""
    backdoor: bool = False
    """Plant a trigger in one language and train on without it."""
    force: bool = False
    """Compare mixtures although they were trained for different numbers of steps."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """First seed."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""

    def units(self) -> "list[Setting]":
        """The settings of all units. Raises `SondeError` for ones that do not fit."""
        from sonde.dynamics.decay_experiment import Setting

        if self.seeds < 1 or not self.mixtures or not self.weight_decay or not self.widths:
            raise SondeError("--seeds takes 1 or more, --mixtures, --weight-decay and --widths one value or more")
        made = [
            Setting(
                mixture=mixture,  # type: ignore[arg-type]
                languages=self.languages,
                width=width,
                layers=self.layers,
                dropout=self.dropout,
                lr=self.lr,
                weight_decay=decay,
                optimizer=self.optimizer,
                steps=self.steps,
                limit=self.limit,
                drop_steps=self.drop_steps,
                dropped=self.drop,
                everything_but=self.everything_but,
                replay=self.replay,
                switch=self.switch,  # type: ignore[arg-type]
                revive_from=self.revive_from,
                seed=seed,
            )
            for seed in range(self.seed, self.seed + self.seeds)
            for width in self.widths
            for decay in self.weight_decay
            for mixture in self.mixtures
        ]
        for setting in {replace(unit, seed=self.seed, weight_decay=self.weight_decay[0]) for unit in made}:
            branching = setting.branching()
            setting.tasks_dropped(branching.joint)
        return made


@study(
    "capability-decay",
    summary="a skill that is no longer trained: half-life, gate or scramble, and the price of bringing it back",
)
def capability_decay(config: CapabilityDecayConfig) -> Path:
    """Train, drop, revive and control every unit, and write the report. Returns its path.

    Raises `SondeError` for options that do not fit and anything wrong with the folder.
    """
    from tqdm import tqdm

    check_options(config)
    settings = config.units()
    subject = f"{len(settings)}-networks"
    with open_run("capability-decay", config, Named(subject)) as run:
        units = [_unit(run, setting, config) for setting in tqdm(settings, desc="networks")]
        run.table("capability-decay.units", [unit.summary() for unit in units])
        run.table("capability-decay.scores", [row for unit in units for row in unit.rows()])
        return run.folder


def _unit(run: "Run", setting: "Setting", config: CapabilityDecayConfig) -> "Unit":
    from sonde.dynamics.decay_experiment import Unit, run_unit

    name = unit_name(setting)
    if not run.done(name):
        stages = run.checkpoint(name).with_suffix("")
        unit = run_unit(
            setting,
            floor_steps=config.floor_steps,
            drift_steps=config.drift_steps,
            variants=config.variants,
            alone=config.variants,
            folder=stages,
        )
        run.finish(name, unit.tree())
        shutil.rmtree(stages, ignore_errors=True)
    return Unit.of_tree(run.result(name))


def unit_name(setting: "Setting") -> str:
    """The step of a unit: what it varies."""
    return f"unit-{setting.mixture.lower()}-width{setting.width}-decay{setting.weight_decay:g}-seed{setting.seed}"
