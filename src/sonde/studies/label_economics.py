"""How should a labelling budget be split between many cheap labels that err and few good ones? What to buy, and why.

A pilot buys labels for several budgets and shares, trains on each purchase, and scores on rows whose truth is known.
From it: the regime at each budget, the efficient frontier, what one label is worth in others, and a plan for a budget.
By default on a planted task; on a user's features, or on texts that a language model reads, with a column of weak and
one of true labels.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Names
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.knowledge.label_problem import Problem
    from sonde.knowledge.label_salience import SalienceCurve
    from sonde.knowledge.label_score import LabelRun
    from sonde.runs.run import Run

Numbers = Annotated[tuple[float, ...] | None, arg(metavar="N ...")]


@dataclass(frozen=True)
class LabelEconomicsConfig(Runnable):
    """Plan how to spend a labelling budget on weak and oracle labels.

    Example: sonde run label-economics --data pilot.npz --weak model --truth expert --weak-price 0.05 --budget 400
    """

    words = ("sonde", "run", "label-economics")

    data: Name = None
    """A .npz or .safetensors file with features [rows, d] and two columns of labels, or a .csv, .jsonl or .parquet
    table of numbers (or texts, see --model) with them. By default a planted task."""
    weak: Name = "weak"
    """The column of weak labels: probabilities from 0 to 1."""
    truth: Name = "truth"
    """The column of true labels: 0 or 1, empty where unknown."""
    model: Name = None
    """A language model that reads the texts of --data: its residual stream at the last token is the features."""
    text: Name = "text"
    """The column of texts."""
    site: Name = None
    """Where in --model, such as resid_post.3. By default the middle layer."""
    budget: float = 512.0
    """What the plan is to spend, in the unit of the prices."""
    weak_price: str = "0.1"
    """The price of a weak label, such as 0.1 or 1/10."""
    oracle_price: str = "1"
    """The price of a true label."""
    budgets: Numbers = None
    """Budgets of the pilot. By default 8, 32, 128, 512 and 1,500 for the planted task, five up to what a file holds."""
    shares: Numbers = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
    """Shares of a budget that are spent on weak labels; 0 and 1 are among them."""
    methods: Names = ("sequential", "uncertainty")
    """How labels are used; the plan is for the first. sequential, uncertainty, most-confident, pooled, oracle-only,
    head, log-confidence, random."""
    seeds: Count = 5
    """How often everything is repeated."""
    test: Count = 4000
    """Test rows: of the planted task, or at most of a file, where they are a third of what is known at most."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """The first seed."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "label-economics",
    summary="what to buy with a labelling budget: many weak labels, few good ones, or both",
    paper="Mallen & Belrose 2024, Balancing Label Quantity and Quality for Scalable Elicitation (arXiv:2410.13215)",
)
def label_economics(config: LabelEconomicsConfig) -> Path:
    """Run the pilot, decide regimes, plan, and write the report. Returns its path.

    Raises `SondeError` for prices, budgets and shares that make no sense, for files that cannot be used, and for more
    labels than there are.
    """
    _check(config)
    from sonde.knowledge.label_sweep import cells
    from sonde.studies import label_chapters as chapters
    from sonde.studies import label_sources as sources
    from sonde.studies.label_pilot import Pilot

    if config.data is None:
        budgets = sources.planted_budgets(config)
        first = sources.planted(config, budgets, config.seed)
    else:
        first = sources.read_problem(config)
        budgets = sources.pilot_budgets(first, config.budgets)
    cells(first, budgets, config.shares or ())
    shown = Named(first.name.replace(" ", "-"))
    with open_run("label-economics", config, shown) as run:
        runs, control, curves = _pilot(run, config, first, budgets)
        pilot = Pilot(
            config=config,
            problem=first,
            budgets=budgets,
            runs=tuple(runs),
            control=tuple(control),
            curves=tuple(curves),
            command=shlex.join(config.command()),
        )
        run.table("runs", [_flat(one) for one in runs])
        return publish(
            run,
            shown,
            Read(hash=first.test_hash),
            chapters.all_chapters(pilot),
            title="What to buy with a labelling budget",
            source="a planted task" if config.data is None else Path(config.data).name,
            timings=dict(run.timings),
        )


def _check(config: LabelEconomicsConfig) -> None:
    check_options(config)
    from sonde.knowledge.label_ledger import exact_price
    from sonde.knowledge.label_methods import METHODS

    shares = config.shares or ()
    if not {0.0, 1.0} <= set(shares) or not any(0 < share < 1 for share in shares) or max(shares) > 1:
        raise SondeError("--shares are between 0 and 1, with 0, 1 and at least one between them")
    wrong = sorted(set(config.methods or ()) - set(METHODS))
    if wrong or not config.methods:
        raise SondeError(f"--methods takes any of {', '.join(METHODS)}, not {' '.join(wrong) or 'none'}")
    if config.seeds < 2:
        raise SondeError(f"--seeds is {config.seeds}: with fewer than 2 nothing is known of the noise; 5 is better")
    if config.test < 10:
        raise SondeError(f"--test is {config.test}: at least 10 rows are needed to score anything")
    if (config.model or config.site) and not config.data:
        raise SondeError("--model reads the texts of --data: give that file")
    if config.site and not config.model:
        raise SondeError("--site is a place in --model: give the model")
    weak, oracle = exact_price(config.weak_price, "a weak label"), exact_price(config.oracle_price, "a true label")
    if not oracle:
        raise SondeError("--oracle-price is 0: where the truth is free there is nothing to plan")
    for budget in (config.budget, *(config.budgets or ())):
        if not budget >= max(weak, oracle):
            raise SondeError(
                f"a budget of {budget:g} is below the price of a label, {float(max(weak, oracle)):g}: it would buy none"
            )
    if config.budgets is not None and len(config.budgets) < 2:
        raise SondeError("--budgets needs at least two: one says nothing of how accuracy grows")


def _pilot(
    run: "Run", config: LabelEconomicsConfig, first: "Problem", budgets: Sequence[float]
) -> "tuple[list[LabelRun], list[LabelRun], list[SalienceCurve]]":
    """All runs, those with shuffled weak labels (the control), and the salience of both concepts."""
    from tqdm import tqdm

    from sonde.knowledge.label_logistic import Logistic, StageMemory
    from sonde.knowledge.label_methods import method_named
    from sonde.knowledge.label_salience import salience
    from sonde.knowledge.label_score import LabelRun
    from sonde.knowledge.label_sweep import cells, sweep
    from sonde.studies import label_sources as sources

    runs: list[LabelRun] = []
    control: list[LabelRun] = []
    todo = cells(first, budgets, config.shares or ())
    nearest = control_budget(config.budget, budgets)
    with tqdm(total=config.seeds * (len(todo) * len(config.methods or ()) + len(config.shares or ()))) as bar:
        for seed in range(config.seed, config.seed + config.seeds):
            step = f"seed-{seed}"
            if not run.done(step):
                problem = first
                if config.data is None and seed != config.seed:
                    problem = sources.planted(config, budgets, seed)
                memory = StageMemory()
                methods = [method_named(name, Logistic(memory=memory)) for name in config.methods or ()]
                made = sweep(problem, methods, todo, seed=seed, report=lambda *_: _step(bar))
                some = [cell for cell in todo if cell.budget == nearest]
                shuffled = sweep(without_meaning(problem, seed), methods[:1], some, seed=seed)
                run.finish(step, {"runs": [r.to_json() for r in made], "control": [r.to_json() for r in shuffled]})
                bar.update(len(some))
            kept = run.result(step)
            runs += [LabelRun(**{**one, "notes": tuple(one["notes"])}) for one in kept["runs"]]
            control += [LabelRun(**{**one, "notes": tuple(one["notes"])}) for one in kept["control"]]
            run.progress("pilot", done=seed - config.seed + 1, total=config.seeds)
    # Deterministic, and seconds: made again on resuming.
    curves = salience(first, seeds=tuple(range(config.seed, config.seed + max(2, min(3, config.seeds)))))
    return runs, control, curves


def _step(bar: Any) -> None:
    bar.update()


def control_budget(budget: float, budgets: Sequence[float]) -> float:
    """The pilot's budget that is nearest to the one that is planned."""
    return min(budgets, key=lambda one: abs(one - budget))


def without_meaning(problem: "Problem", seed: int) -> "Problem":
    """The same task with weak labels dealt anew among the rows that have one: the control."""
    from dataclasses import replace

    import numpy as np
    import torch

    weak = problem.sources[0]
    there = np.flatnonzero(weak.available)
    labels = weak.labels.clone()
    labels[torch.from_numpy(there)] = labels[torch.from_numpy(np.random.default_rng(seed).permutation(there))]
    return replace(problem, sources=(replace(weak, labels=labels, test_labels=None), *problem.sources[1:]))


def _flat(one: "LabelRun") -> dict[str, Any]:
    counts = {f"{name} labels": count for name, count in one.counts.items()}
    return {
        "method": one.method,
        "seed": one.seed,
        "budget": one.budget,
        "share": one.share,
        **counts,
        "cost": float(one.cost),
        "accuracy": one.accuracy,
        "auroc": one.auroc,
        "calibrated": one.calibrated,
        "notes": "; ".join(one.notes),
    }
