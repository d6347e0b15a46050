"""Does a strong student outgrow the weak supervisor that taught it? The share of the gap recovered, by loss and repair.

The student sees weak labels alone. It is held against its supervisor and against its ceiling, the same student taught
the truth on as many rows: PGR = (student - supervisor) / (ceiling - supervisor) on test AUROC. By default on a planted
task; with a language model on true and false statements, where the supervisor reads the first block alone.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Names
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.knowledge.label_problem import Problem
    from sonde.knowledge.weak_to_strong import Recipe
    from sonde.lm.model import LanguageModel
    from sonde.runs.run import Run

Student = Literal["head", "adapters", "all-weights"]


@dataclass(frozen=True)
class WeakToStrongConfig(Runnable):
    """Teach a strong student with a weak supervisor's labels and measure how much of the gap it closes.

    Example: sonde run weak-to-strong --model organism:pebble --rows 1000
    """

    words = ("sonde", "run", "weak-to-strong")

    model: Name = None
    """A language model: the student reads its residual stream, or is fine-tuned. By default a planted task."""
    statements: Name = None
    """A .csv, .json or .jsonl file with `statement` and `label` for --model. By default comparisons of numbers."""
    student: Annotated[Student, arg(metavar="KIND")] = "head"
    """head (linear, on frozen features), adapters (rank 8) or all-weights, the last two with --model."""
    recipes: Names = None
    """Losses and repairs, by name: xent, log-confidence, confidence-window, window-at-the-median, entropy, kl,
    kNN-relabel, kNN-filter, logistic-relabel, logistic-filter, topological-filter, strong-to-strong. By default all
    for a head, the losses for a student that is fine-tuned."""
    rows: Count = 2000
    """Weak labels that the student learns from, and true ones of its ceiling."""
    supervisor_rows: Count = 200
    """True rows that the supervisor of a language model learns from."""
    weak_accuracy: float = 0.75
    """Stop the supervisor of a language model when it is right on this share of held-out rows."""
    site: Name = None
    """Where the student reads --model. By default the middle layer."""
    weak_site: str = "resid_post.0"
    """Where its supervisor reads."""
    test: Count = 1000
    """Test rows."""
    seeds: Count = 5
    """How often everything is repeated, with other rows and another supervisor."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """The first seed."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "weak-to-strong",
    summary="how much of the gap between a weak supervisor and the truth a strong student closes, by loss and repair",
    paper="Burns et al. 2023, Weak-to-Strong Generalization (arXiv:2312.09390)",
)
def weak_to_strong(config: WeakToStrongConfig) -> Path:
    """Make supervisors, teach students and ceilings, and write the report. Returns its path.

    Raises `SondeError` for options that make no sense, files that cannot be used and more rows than there are.
    """
    _check(config)
    from sonde.studies.weak_to_strong_chapters import Taught, chapters
    from sonde.studies.weak_to_strong_sources import Source

    lm = None
    if config.model is not None:
        from sonde.organisms.loading import load

        lm = load(config.model)
    source = Source.of(config, lm)
    recipes = _recipes(config, lm)
    subject = lm or Named(name="planted-task")
    with open_run("weak-to-strong", config, subject) as run:
        taught = Taught(
            config=config,
            runs=tuple(_taught(run, config, source, recipes)),
            names=tuple(_typed(recipe) for recipe in recipes),
            task=source.name,
            command=shlex.join(config.command()),
        )
        return publish(
            run,
            subject,
            Read(),
            chapters(taught),
            title="How much of the truth a student learns from a supervisor that errs",
            source=source.name,
            timings=dict(run.timings),
        )


def _check(config: WeakToStrongConfig) -> None:
    check_options(config)
    from sonde.knowledge.weak_to_strong import RECIPES

    known = [_typed(recipe) for recipe in RECIPES]
    wrong = sorted(set(config.recipes or ()) - set(known))
    if wrong:
        raise SondeError(f"--recipes takes any of {', '.join(known)}, not {' '.join(wrong)}")
    if config.student not in ("head", "adapters", "all-weights"):
        raise SondeError(f"--student is {config.student!r}: expected head, adapters or all-weights")
    if config.model is None and (config.statements or config.site or config.student != "head"):
        raise SondeError("--statements, --site and a --student that is fine-tuned need --model")
    if config.seeds < 2:
        raise SondeError(f"--seeds is {config.seeds}: with fewer than 2 nothing is known of the noise; 5 is better")
    for name in ("rows", "test", "supervisor_rows"):
        if getattr(config, name) < 60:
            raise SondeError(f"--{name.replace('_', '-')} is {getattr(config, name)}: at least 60 are needed")


def _typed(recipe: "Recipe") -> str:
    return recipe.name.replace(" ", "-")


def _recipes(config: WeakToStrongConfig, lm: "LanguageModel | None") -> "list[Recipe]":
    """Those asked for, on the student; cross-entropy first, which the controls use."""
    from dataclasses import replace

    from sonde.knowledge.label_head import Head
    from sonde.knowledge.label_lm import FineTuned
    from sonde.knowledge.weak_to_strong import RECIPES

    tuned = lm is not None and config.student != "head"
    default = [r for r in RECIPES if not tuned or (r.repair is None and not r.iterations)]
    chosen = default if config.recipes is None else [r for r in RECIPES if _typed(r) in config.recipes]
    if not any(recipe.name == "xent" for recipe in chosen):
        chosen = [RECIPES[0], *chosen]
    if not tuned:
        return chosen
    made = []
    for recipe in chosen:
        assert lm is not None and isinstance(recipe.backend, Head)
        rank = 8 if config.student == "adapters" else None
        made.append(replace(recipe, backend=FineTuned(lm, rank=rank, loss=recipe.backend.loss)))
    return made


def _taught(run: "Run", config: WeakToStrongConfig, source: Any, recipes: "list[Recipe]") -> list[dict[str, Any]]:
    """Test AUROCs of every seed: of supervisor, ceiling and students, and of the controls."""
    from tqdm import tqdm

    found = []
    with tqdm(total=config.seeds * (len(recipes) + 3), desc="students") as bar:
        for seed in range(config.seed, config.seed + config.seeds):
            step = f"seed-{seed}"
            if not run.done(step):
                run.finish(step, _one_seed(config, source.problem(seed), recipes, seed, bar))
            else:
                bar.update(len(recipes) + 3)
            found.append(run.result(step))
            run.progress("students", done=seed - config.seed + 1, total=config.seeds)
    return found


def _one_seed(
    config: WeakToStrongConfig, problem: "Problem", recipes: "list[Recipe]", seed: int, bar: Any
) -> dict[str, Any]:
    from dataclasses import replace

    from sonde.knowledge.label_methods import Only
    from sonde.knowledge.label_problem import Purchase, log_odds
    from sonde.knowledge.label_score import rates
    from sonde.knowledge.weak_labels import shuffled_errors
    from sonde.studies.label_economics import without_meaning

    weak, oracle = problem.sources
    rows = min(config.rows, problem.size)

    def student(recipe: "Recipe", task: "Problem") -> dict[str, Any]:
        outcome = recipe(task, Purchase(task, {"weak": rows}, seed=seed), seed=seed)
        accuracy, area, _ = rates(outcome.scores, task.test_truth)
        bar.update()
        return {"auroc": area, "accuracy": accuracy, "notes": list(outcome.notes)}

    assert weak.test_labels is not None
    supervisor = rates(log_odds(weak.test_labels).numpy(), problem.test_truth)
    plain = next(recipe for recipe in recipes if recipe.name == "xent")
    top = Only(backend=plain.backend)(problem, Purchase(problem, {"oracle": rows}, seed=seed), seed=seed)
    bar.update()
    dealt = shuffled_errors(weak.labels, oracle.labels.argmax(1).numpy(), seed=seed)
    unlearnable = replace(problem, sources=(replace(weak, labels=dealt), oracle))
    return {
        "seed": seed,
        "rows": rows,
        "test": len(problem.test_truth),
        "supervisor": {"auroc": supervisor[1], "accuracy": supervisor[0]},
        "ceiling": {"auroc": rates(top.scores, problem.test_truth)[1]},
        "students": {_typed(recipe): student(recipe, problem) for recipe in recipes},
        "errors shuffled": student(plain, unlearnable),
        "labels shuffled": student(plain, without_meaning(problem, seed)),
        "settings": {key: str(value) for key, value in plain.backend.settings.items()},
    }
