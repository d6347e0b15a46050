"""Can an alarm that knows trusted inputs only tell when a model comes to its answer by another mechanism?

A quirky model is right for Alice and, by a rule, wrong for Bob. Alarms are fitted on Alice's records and scored on
others of hers and on Bob's: what they look at (a probe's log-odds, activations, effects of ablations) against how they
judge (distances, densities, neighbourhoods, with or without the untrusted batch). The controls are records dealt out
again, so that there is nothing to tell, random directions in place of the probe, and a twin of the model without quirk.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names
from sonde.studies.registry import study
from sonde.studies.running import Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.runs.run import Run
    from sonde.studies.anomaly_measures import Groups, Measured, Task

ORGANISM = "organism:quirky-comparison"
ALICES = ("Alice", "Ada", "Agnes", "Amy", "Anna", "Ava", "Abby", "Alma")
BOBS = ("Bob", "Ben", "Bill", "Boris", "Brad", "Bruno", "Bert", "Basil")
NAMES, FIRST_DETECTOR = "names", "mahalanobis"
TASKS = ("hard", "all", NAMES)
_LEAST = 100


@dataclass(frozen=True)
class AnomalyDetectionConfig(Runnable):
    """Fit alarms on Alice's records of a quirky model and score them on Bob's, with every feature and detector.

    Example: sonde run anomaly-detection --seeds 3
    """

    words = ("sonde", "run", "anomaly-detection")

    model: Model = ORGANISM
    """A quirky model: an organism, a local folder in Hugging Face format, or a name on the hub."""
    twin: Name = None
    """The same model without the quirk, such as the one that was fine-tuned. By default trained for the organism."""
    quirk: str = "comparison"
    """The quirky set that it was trained on: addition, comparison … `sonde.data.quirky_catalogue` has all."""
    source: Name = None
    """A .csv, .json or .jsonl file of rows, for the sets that are made from text."""
    mode: Literal["single", "mixture", "standardised"] = "single"
    """One template, all of them, or one fixed question after a random context."""
    tasks: Names = TASKS
    """hard: trusted easy questions, tested hard ones. all: all questions. names: the network is trained with 16 names
    (organism:quirky-comparison only, two minutes), of which 4 are trusted."""
    detectors: Names = None
    """Which detectors: mahalanobis, lof … `sonde.stats.novelty.DETECTORS` has all, and all is the default."""
    fine_tuning: bool = False
    """Also look at how far the answers move when the model is trained on trusted records; needs sonde[tune]."""
    trusted: Count = 1000
    """Most records that alarms are fitted on, and that the probe is."""
    test: Count = 1000
    """Most records that they are tested on."""
    seeds: Count = 1
    """Models. The second and later ones are organism:quirky-comparison trained again, a minute each."""
    steps: Count = 500
    """Steps of the networks that are trained for the twin, the names and --seeds."""
    batch: Count = 64
    """Most prompts of a pass."""
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
    "anomaly-detection",
    summary="alarms that know trusted inputs only, against a model that answers by another mechanism",
    paper="Mallen et al. 2023, Eliciting Latent Knowledge from Quirky Language Models (arXiv:2312.01037)",
)
def anomaly_detection(config: AnomalyDetectionConfig) -> Path:
    """Measure every task, write tables, charts and the report. Returns its path.

    Raises `SondeError` for options that do not fit and anything wrong with model, set, source or folder.
    """
    from sonde.lm.prompt_rows import prompt_ids
    from sonde.organisms.loading import load
    from sonde.studies.anomaly_chapters import chapters

    names, detectors = _check(config)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    tasks = {name: _task(config, name, 0) for name in names}
    with open_run("anomaly-detection", config, lm) as run:
        work = _Work(run, config, lm, detectors)
        quirky = {name: work.of("quirky", name, tasks[name]) for name in names}
        twins = {name: work.of("twin", name, tasks[name]) for name in names if _has_twin(config)}
        others = [
            {name: work.of("quirky", name, _task(config, name, number), number) for name in names if name != NAMES}
            for number in range(1, config.seeds)
        ]
        first = tasks[names[0]]
        return publish(
            run,
            lm,
            Read.of(prompt_ids(lm, first.test.prompts)),
            chapters(quirky, twins, others, run, command=shlex.join(config.command())),
            title=f"What sets off an alarm in {lm.name}",
            source=f"quirky set {first.test.name}",
            timings=dict(run.timings),
        )


class _Work:
    """The measured tasks; from the run folder where they are there."""

    def __init__(
        self, run: "Run", config: AnomalyDetectionConfig, lm: "LanguageModel", detectors: tuple[str, ...]
    ) -> None:
        self._run, self._config, self._lm, self._detectors = run, config, lm, detectors
        # the last one only: tasks of one network follow each other
        self._models: dict[tuple[str, bool, int], LanguageModel] = {}

    def of(self, kind: str, name: str, task: "Task", number: int = 0) -> "Measured":
        from sonde.studies.anomaly_measures import FIRST, Measured, measured

        step = f"{kind}-{name}-{number}"
        if not self._run.done(step):
            found = measured(
                self._model(kind, name, number),
                task,
                self._detectors if kind == "quirky" and not number else (FIRST,),
                batch=self._config.batch,
                seed=self._config.seed,
                fine_tuning=self._config.fine_tuning,
                progress=f"{kind}, {task.name}",
            )
            self._run.finish(step, found.state())
        return Measured.from_state(self._run.result(step))

    def _model(self, kind: str, name: str, number: int) -> "LanguageModel":
        from sonde.organisms.loading import load
        from sonde.organisms.quirky_comparison import quirky_comparison

        if kind == "quirky" and name != NAMES and not number:
            return self._lm
        if kind == "twin" and self._config.twin is not None:
            return load(self._config.twin, dtype=self._config.dtype, device=self._config.device)
        key = (kind, name == NAMES, number)
        if key not in self._models:
            label = f"{kind} network" + (" of 16 names" if name == NAMES else f" {number}" if number else "")
            made = quirky_comparison(
                number, steps=self._config.steps, names=_names(name), quirky=kind == "quirky", progress=label
            )
            self._models = {key: made}
        return self._models[key]


def _check(config: AnomalyDetectionConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tasks and detectors, checked."""
    from sonde.stats.novelty import DETECTORS

    check_options(config)
    trained = config.model == ORGANISM
    tasks = config.tasks or ()
    if tasks == TASKS and not trained:
        tasks = TASKS[:-1]
    detectors = config.detectors or tuple(DETECTORS)
    for option, given, known in (("--tasks", tasks, TASKS), ("--detectors", detectors, tuple(DETECTORS))):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise SondeError(f"{option} takes some of {', '.join(known)}, not {' '.join(unknown) or 'none'}")
    for option, value in (("--trusted", config.trusted), ("--test", config.test)):
        if value < _LEAST:
            raise SondeError(f"{option} is {value}: give {_LEAST} or more")
    for option, value in (("--seeds", config.seeds), ("--steps", config.steps), ("--batch", config.batch)):
        if value < 1:
            raise SondeError(f"{option} is {value}: give at least 1")
    if trained and (config.quirk, config.mode) != ("comparison", "single"):
        raise SondeError(f"{ORGANISM} knows the first template of comparison only: give --model too")
    if not trained and config.seeds > 1:
        raise SondeError(f"--seeds is {config.seeds}: only {ORGANISM} is trained again, not {config.model}")
    if not trained and NAMES in tasks:
        raise SondeError(f"the task names trains {ORGANISM} with 16 names, not {config.model}: leave it out of --tasks")
    if FIRST_DETECTOR not in detectors:
        detectors = (FIRST_DETECTOR, *detectors)
    return tasks, detectors


def _has_twin(config: AnomalyDetectionConfig) -> bool:
    return config.twin is not None or config.model == ORGANISM


def _names(name: str) -> "Groups":
    from sonde.organisms.quirky_comparison import NAMES as TWO

    return (ALICES, BOBS) if name == NAMES else TWO


def _task(config: AnomalyDetectionConfig, name: str, number: int) -> "Task":
    """The records of a task: those of its own seed where the model is trained here, so that none of them was read."""
    from sonde.data.quirky import quirky_sets
    from sonde.organisms.quirky_comparison import comparison_sets
    from sonde.studies.anomaly_measures import task

    if config.model == ORGANISM:
        splits = comparison_sets(number, _names(name))
    else:
        splits = quirky_sets(config.quirk, mode=config.mode, seed=config.seed, source=config.source)
    groups = (ALICES[: len(ALICES) // 2], ALICES[len(ALICES) // 2 :]) if name == NAMES else None
    return task(name, splits, trusted=config.trusted, test=config.test, seed=config.seed, names=groups)
