"""Are behaviours that take much prompting elicited by fragile prompts?

Twelve tasks or more, targets of growing length in the model's own words and in random tokens: the conditional distance
and the bits of each, how much a trained prompt loses when it is shaken, and the rank correlation of the two over tasks.
And does training under noise make prompts that lose less?
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.information_curve import Numbers
from sonde.studies.options import Count, Folder, Name
from sonde.studies.registry import study
from sonde.studies.running import Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.prompts.examples import Examples
    from sonde.runs.run import Run

_LEAST_TASKS = 4
_CONTEXT = 8  # tokens of each context
_ASCENT = 0.1  # of the noise's length: uphill, a prompt is lost much sooner than in a random direction


@dataclass(frozen=True)
class PromptFragilityConfig(Runnable):
    """Measure how much prompting tasks take and how fragile their prompts are.

    Example: sonde run prompt-fragility --model organism:markov-backdoor --robust noise sam
    """

    words = ("sonde", "run", "prompt-fragility")

    model: Name = "organism:pebble"
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    targets: Numbers = (1, 2, 3, 4, 6, 8)
    """Tokens of the targets. There are two tasks of each: a continuation of the model's own, and random tokens."""
    rows: Count = 40
    """Contexts of each task: the model's own text."""
    lengths: Numbers = (1, 2, 4, 8)
    """Numbers of prompt tokens that the conditional distance is looked for in, besides none."""
    shaken: Count = 4
    """Tokens of the prompts that are shaken: the same for all tasks."""
    rhos: Annotated[tuple[float, ...], arg(metavar="RHO ...")] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Sizes of the noise in units of the embedding's RMS."""
    rho: float = 1.0
    """The size that findings are about and that robust prompts are trained under."""
    draws: Count = 32
    """Draws of the noise, half of them the negatives of the others."""
    tested: Count = 8
    """Unseen contexts on which prompts are shaken."""
    robust: Annotated[tuple[str, ...], arg(metavar="KIND ...")] = ("noise", "sam")
    """Robust training to compare with: noise (of size --rho), sam (a tenth of it), norm, hull."""
    weight: float = 0.1
    """Weight of norm and hull."""
    restarts: Count = 1
    """Prompts trained at each length."""
    lr: float = 0.3
    """Learning rate in units of the embedding's RMS."""
    steps: Count = 60
    """Training steps of each prompt."""
    batch: Count = 8
    """Examples a step."""
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


@dataclass(frozen=True)
class Task:
    """A target of so many tokens: the model's own words or random tokens."""

    name: str
    own: bool
    size: int
    examples: "Examples"


@study(
    "prompt-fragility",
    summary="how fragile trained prompts are, against how much prompting their tasks take; robust prompts",
    paper="Nordby 2025, Soft Prompts for Evaluation: Measuring Conditional Distance of Capabilities (arXiv:2505.14943)",
)
def prompt_fragility(config: PromptFragilityConfig) -> Path:
    """Measure every task of `config` and write the report. Returns its path.

    Raises `SondeError` for anything wrong with options, the model or the folder, before any training.
    """
    from sonde.organisms.loading import load
    from sonde.prompts.elicitation import Budget, require_room
    from sonde.studies.fragility_chapters import fragility_chapter

    check_options(config)
    _check(config)
    budget = Budget(config.lengths, config.restarts, lrs=(config.lr,), steps=config.steps, batch=config.batch)
    lm = load(config.model or "", dtype=config.dtype, device=config.device)
    found = tasks(lm, config)
    for task in found:
        require_room(lm, task.examples, Budget((*config.lengths, config.shaken)))
    command = shlex.join(config.command())
    with open_run("prompt-fragility", config, lm) as run:
        measured = [_step(run, lm, task, budget, config) for task in found]
        rows = [[*c, *t] for task in found for c, t in zip(task.examples.contexts, task.examples.targets, strict=True)]
        return publish(
            run,
            lm,
            Read.of(rows),
            [fragility_chapter(lm, found, measured, config, command)],
            title=f"How fragile are prompts of {lm.name}?",
            source=f"{len(found)} tasks after the model's own text",
            timings=dict(run.timings),
        )


def tasks(lm: "LanguageModel", config: PromptFragilityConfig) -> list[Task]:
    """Two tasks of every target length, on the same contexts.

    Raises `SondeError` where the model's own text ends before it is long enough.
    """
    from sonde.prompts.examples import Examples

    sizes = sorted(set(config.targets))
    contexts = _own_text(lm, config.rows, _CONTEXT, config.seed)
    sources = _own_text(lm, len(sizes), _CONTEXT + sizes[-1], config.seed + 1)
    found = []
    for size, source in zip(sizes, sources, strict=True):
        # the end of another text: likely words that these contexts do not call for
        own = Examples(contexts, [source[_CONTEXT : _CONTEXT + size]] * len(contexts))
        found += [
            Task(f"own-{size}", True, size, own),
            Task(f"random-{size}", False, size, own.random_targets(lm, seed=config.seed + size)),
        ]
    return found


def _check(config: PromptFragilityConfig) -> None:
    from sonde.prompts.robust import KINDS

    sizes = set(config.targets)
    if not sizes or min(sizes) < 1 or 2 * len(sizes) < _LEAST_TASKS:
        raise SondeError(f"--targets takes two or more different lengths from 1, not {' '.join(map(str, sizes))}")
    if min(config.shaken, config.tested - 1, config.lr, *config.rhos) <= 0 or config.rho not in config.rhos:
        raise SondeError(
            f"--rho is {config.rho:g}, --rhos {' '.join(f'{rho:g}' for rho in config.rhos)}, --shaken {config.shaken},"
            f" --tested {config.tested}: give sizes above 0, one of which is --rho, 1 token and 2 contexts at least"
        )
    if config.draws < 4 or config.draws % 2:
        raise SondeError(f"--draws is {config.draws}: give an even number from 4")
    if config.rows < 10:
        raise SondeError(f"--rows is {config.rows}: give 10 or more")
    wrong = [kind for kind in config.robust if kind not in KINDS]
    if wrong or not config.weight > 0:
        raise SondeError(f"--robust takes some of {', '.join(KINDS)}, and --weight a number above 0")


def _own_text(lm: "LanguageModel", n: int, size: int, seed: int) -> list[list[int]]:
    """`n` different texts of `size` tokens that the model writes after its start token, or else after any token."""
    from sonde.prompts.examples import Examples

    start = None if lm.tokenizer is None else lm.tokenizer.bos_token_id
    found: list[list[int]] = []
    for attempt in range(4):
        wanted = 2 * n
        words = Examples([[0]] * wanted, [[i] for i in range(wanted)])
        begun = words.random_targets(lm, seed=seed * 13 + attempt).targets
        begun = begun if start is None else [[int(start)]] * wanted  # type: ignore[arg-type]
        written = lm.generate(begun, max_new_tokens=size, temperature=1.0, seed=seed * 13 + attempt)
        rows = [[*a, *b][:size] for a, b in zip(begun, written, strict=True)]
        found += [row for row in rows if len(row) == size and row not in found]
        if len(found) >= n:
            return found[:n]
    raise SondeError(f"{lm.name} ends its text before {size} tokens too often: give shorter --targets")


def _step(run: "Run", lm: "LanguageModel", task: Task, budget: Any, config: PromptFragilityConfig) -> dict[str, Any]:
    if not run.done(task.name):
        run.finish(task.name, _measured(run, lm, task, budget, config))
    return run.result(task.name)


def _measured(
    run: "Run", lm: "LanguageModel", task: Task, budget: Any, config: PromptFragilityConfig
) -> dict[str, Any]:
    """What the task takes; losses and gradients of its shaken prompts, plain and robust; worst case and trace."""
    from dataclasses import asdict

    from sonde.prompts.bits import quantised
    from sonde.prompts.elicitation import information_curve, parts_of
    from sonde.prompts.fragility import fragility, hessian_trace, worst_case
    from sonde.prompts.robust import train_robust
    from sonde.prompts.training import train_prompts

    parts = training, validation, test = parts_of(task.examples, seed=config.seed)
    curve = information_curve(
        lm, parts, budget, folder=run.path("curves"), seed=config.seed, progress=f"{task.name}, curve"
    )
    distance = curve.conditional_distance()
    bits = math.inf
    if 0 < distance < math.inf:
        coarse = quantised(lm, curve.prompt(int(distance)), validation)
        bits = math.inf if coarse is None else coarse.bits
    elif not distance:
        bits = 0.0
    test = test.select(range(min(config.tested, len(test))))
    options = {"lengths": (config.shaken,), "restarts": config.restarts, "lrs": (config.lr,), "steps": config.steps}
    options |= {"batch": min(config.batch, len(training)), "seed": config.seed, "validation": validation}
    prompts = {"plain": train_prompts(lm, training, validations=1, progress=f"{task.name}, plain", **options)}
    for kind in dict.fromkeys(config.robust):
        strength = {"noise": config.rho, "sam": _ASCENT * config.rho}.get(kind, config.weight)
        prompts[kind] = train_robust(
            lm,
            training,
            kind,  # type: ignore[arg-type]
            strength,
            progress=f"{task.name}, {kind}",
            **options,
        )
    shaken = {}
    for kind, trials in prompts.items():
        prompt = min(trials, key=lambda trial: trial.validation).prompt
        found = fragility(lm, prompt, test, rhos=config.rhos, draws=config.draws, seed=config.seed)
        shaken[kind] = {name: value for name, value in vars(found).items() if name != "rhos"}
        if kind == "plain":
            worst = worst_case(lm, prompt, test, rhos=config.rhos, seed=config.seed)
            shaken[kind]["worst"] = [asdict(rise) for rise in worst]
            shaken[kind]["trace"] = asdict(hessian_trace(lm, prompt, test, draws=config.draws, seed=config.seed))
    return {"distance": distance, "bits": bits, "shaken": shaken}
