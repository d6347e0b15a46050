"""What happens to a skill when its training stops? Small networks on toy languages, of which one is dropped.

Each network learns all languages of a mixture, goes on without one, and is given it back. The mixtures differ in what
the languages share; controls go on without a drop, start without the language, and learn it from scratch.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.dynamics.decay import Curve
    from sonde.dynamics.decay_backdoor import Backdoor
    from sonde.dynamics.decay_experiment import Setting, Unit
    from sonde.dynamics.decay_sequence import Passes
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
    no_gate: bool = False
    """Leave out what else can be read of the lost skill, and what the languages share."""
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
        if min(self.drift_steps, self.floor_steps) < 1 or self.in_turn < 0:
            raise SondeError("--drift-steps and --floor-steps take 1 or more, --in-turn 0 or more")
        made = [
            Setting(
                mixture=mixture,  # type: ignore[arg-type]
                languages=self.languages,
                width=width,
                layers=self.layers,
                dropout=self.dropout,
                lr=self.lr,
                weight_decay=decay,
                optimizer=self.optimizer,  # type: ignore[arg-type]
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
        for setting in {replace(unit, seed=self.seed) for unit in made}:
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

    from sonde.dynamics.decay_hypotheses import declared
    from sonde.dynamics.decay_scores import alphabets_differ
    from sonde.studies import capability_decay_chapters as chapters
    from sonde.studies import capability_decay_readings as readings

    check_options(config)
    settings = config.units()
    subject = f"{len(settings)}-networks"
    with open_run("capability-decay", config, Named(subject)) as run:
        units = [_unit(run, setting, config) for setting in tqdm(settings, desc="networks")]
        joint = settings[0].joint()
        if warning := alphabets_differ([joint.task(name) for name in units[0].main()]):
            run.log(warning)
        rows = [unit.summary() for unit in units]
        run.table("capability-decay.units", rows)
        run.table("capability-decay.scores", [row for unit in units for row in unit.rows()])
        made = [
            chapters.decay_chapter(units, declared(rows, forced=config.force), config),
            chapters.revival_chapter(units, config),
        ]
        if not config.no_gate:
            able = [unit for unit in units if unit.summary()["half_life_exact"] is not None]
            if able:
                made.append(readings.gate_chapter([(unit, _gate(run, unit)) for unit in tqdm(able, desc="gates")]))
            shared = [(unit, found) for unit in units if (found := _sharing(run, unit)) is not None]
            if shared:
                made.append(readings.sharing_chapter(shared))
        base = [unit for unit in units if unit.setting.weight_decay == min(config.weight_decay)]
        if config.baselines:
            made.append(readings.baseline_chapter(_baselines(run, base), base[0].main()))
        if config.in_turn:
            made.append(readings.turn_chapter(_in_turn(run, base[0].setting, config), config.in_turn))
        if config.backdoor:
            own = {unit.setting.seed: unit.setting for unit in base}
            made.append(readings.backdoor_chapter([_backdoor(run, s, config) for s in own.values()], config))
        shape = units[0].before.weights
        return publish(
            run,
            Named(subject.replace("-", " "), n_parameters=sum(p.numel() for p in shape.values())),
            Read(sum(row["tokens"] for row in rows)),
            made,
            title="What happens to a skill when its training stops?",
            source="toy languages, every next token known",
            timings=dict(run.timings),
        )


def _kept(run: "Run", step: str, make: Callable[[Path], Any]) -> Any:
    """The tree of a step, from the run where it is finished; `make` is given a folder for its checkpoints."""
    if not run.done(step):
        stages = run.checkpoint(step).with_suffix("")
        run.finish(step, make(stages))
        shutil.rmtree(stages, ignore_errors=True)
    return run.result(step)


def _gate(run: "Run", unit: "Unit") -> "dict[str, Any]":
    """Every reading of what is left of the skill."""
    from sonde.dynamics.decay_gate import gate

    def made(_: Path) -> "dict[str, Any]":
        branching = unit.setting.branching()
        floor = {measure: unit.floor(measure) for measure in ("loss", "masked_loss")}
        found = gate(branching, unit.before, unit.after, unit.main(), floor=floor, untrained=branching.start())
        index = None if found.verdict == "kept" else found.index
        return {**asdict(found), "best": found.best, "index": index, "verdict": found.verdict}

    return _kept(run, f"gate-{unit_name(unit.setting)}", made)


def _sharing(run: "Run", unit: "Unit") -> "dict[str, Any] | None":
    """The predictors, before the drop, of the dropped language beside the first kept one that is written alike."""
    from sonde.data.toy_languages import LANGUAGES, WIDTH
    from sonde.dynamics.decay_sharing import sharing

    second = unit.main()[0]
    ours = LANGUAGES.get(second)
    if ours is None or ours.rendering is None:
        return None
    alike = [
        name
        for name, language in LANGUAGES.items()
        if name in unit.curves["joint"].scores[0]
        and name not in unit.dropped
        and language.rendering is not None
        and language.rendering.places == ours.rendering.places
    ]
    if not alike:
        return None

    def made(_: Path) -> "dict[str, Any]":
        branching = unit.setting.branching()
        joint = branching.joint
        kept = [task for task in joint.tasks if task.name not in unit.dropped and joint.shares[task.name] > 0]
        dropped = [joint.task(name) for name in unit.main()]
        net = unit.before.into(branching.module).eval()
        return asdict(sharing(net, alike[0], second, kept, dropped, width=WIDTH, seed=unit.setting.seed))

    return _kept(run, f"sharing-{unit_name(unit.setting)}", made)


def _baselines(run: "Run", units: "Sequence[Unit]") -> "list[tuple[str, int, str, Curve]]":
    from sonde.dynamics.decay import Curve, Stage
    from sonde.dynamics.decay_baselines import BASELINES, dropped_with
    from sonde.studies.capability_decay_chapters import group_of

    found = []
    for unit in units:
        setting = unit.setting
        stage = Stage("dropped", setting.drop_steps, drop=unit.dropped, switch=setting.switch)
        fresh = replace(setting, seed=setting.seed + 1000).branching().module

        def made(_: Path, baseline: Any, unit: "Unit" = unit, stage: Stage = stage, fresh: Any = fresh) -> Any:
            return dropped_with(baseline, unit.setting.branching(), stage, unit.before, fresh=fresh)[1].tree()

        for baseline in BASELINES:
            step = f"baseline-{baseline}-{unit_name(setting)}"
            tree = _kept(run, step, partial(made, baseline=baseline))
            found.append((group_of(unit, widths=False), setting.seed, baseline, Curve.of_tree(tree)))
    return found


def _in_turn(run: "Run", setting: "Setting", config: CapabilityDecayConfig) -> "Passes":
    from sonde.data.toy_languages import languages_of
    from sonde.dynamics.decay_sequence import Passes, in_turn

    tasks = languages_of(setting.mixture, setting.languages)

    def made(stages: Path) -> Any:
        branching = setting.branching()
        return in_turn(branching, tasks, steps=config.in_turn, switch=setting.switch, folder=stages).tree()

    return Passes.of_tree(_kept(run, f"turns-{unit_name(setting)}", made))


def _backdoor(run: "Run", setting: "Setting", config: CapabilityDecayConfig) -> "Backdoor":
    from sonde.dynamics.decay_backdoor import Backdoor, run_backdoor

    def made(stages: Path) -> Any:
        return run_backdoor(setting, control_steps=config.floor_steps, folder=stages).tree()

    return Backdoor.of_tree(_kept(run, f"backdoor-{unit_name(setting)}", made))


def _unit(run: "Run", setting: "Setting", config: CapabilityDecayConfig) -> "Unit":
    from sonde.dynamics.decay_experiment import Unit, run_unit

    def made(stages: Path) -> Any:
        return run_unit(
            setting,
            floor_steps=config.floor_steps,
            drift_steps=config.drift_steps,
            variants=config.variants,
            alone=config.variants,
            folder=stages,
        ).tree()

    return Unit.of_tree(_kept(run, unit_name(setting), made))


def unit_name(setting: "Setting") -> str:
    """The step of a unit: what it varies."""
    return f"unit-{setting.mixture.lower()}-width{setting.width}-decay{setting.weight_decay:g}-seed{setting.seed}"
