"""Can prompts that are written from two numbers make a model walk a maze as straight or as clumsily as is asked?

Boards of 8 x 8 cells with walls, and walks from A to B with a known number of extra moves and of hits. A small network
writes the prompt from these two numbers; the curve of its loss by prompt length is held against the same on a network
with shuffled weights, and the use that is made of the condition against conditions of other boards.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.information_curve import Numbers
from sonde.studies.options import Count, Folder, Name
from sonde.studies.registry import study
from sonde.studies.running import Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    import numpy as np

    from sonde.lm.model import LanguageModel
    from sonde.prompts.examples import Examples
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run

_SCALE = 10.0  # of both conditions
_PAPER = {"70M": (4.00, 1.15, 0.761, 0.678, 0.638), "410M": (3.69, 1.08, 0.635, 0.544, 0.588)}
_PAPER_LENGTHS = (0, 1, 4, 16, 64)


@dataclass(frozen=True)
class PathfindingConfig(Runnable):
    """Elicit walks on boards by prompts that are written from the number of extra moves and of hits.

    Example: sonde run pathfinding --model organism:pebble --steps 500
    """

    words = ("sonde", "run", "pathfinding")

    model: Name = "organism:pebble"
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    size: Count = 8
    """Cells on a side of the board."""
    boards: Count = 96
    """Boards: three fifths to train on, a fifth to choose by, a fifth to report on."""
    longest: Count = 24
    """Moves of a walk at most; longer walks are left out."""
    lengths: Numbers = (1, 4, 16)
    """Numbers of prompt tokens, besides none."""
    hidden: Count = 128
    """Width of the network that writes the prompt."""
    steps: Count = 100
    """Training steps."""
    batch: Count = 4
    """Boards a step."""
    lr: float = 3e-3
    """Learning rate of AdamW."""
    skip_control_model: bool = False
    """Leave the control model out. Nothing is then said of a capability."""
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
    "pathfinding",
    summary="walks on boards, elicited by prompts that are written from the number of extra moves and of hits",
    paper="Nordby 2025, Soft Prompts for Evaluation: Measuring Conditional Distance of Capabilities (arXiv:2505.14943)",
)
def pathfinding(config: PathfindingConfig) -> Path:
    """Train a generator for every length and write the report. Returns its path.

    Raises `SondeError` for boards that are longer than the model's context, and anything wrong with options.
    """
    from sonde.organisms.loading import load
    from sonde.prompts.control_model import shuffled
    from sonde.prompts.elicitation import Budget, parts_of, require_room

    check_options(config)
    lengths = sorted(set(config.lengths) - {0})
    if not lengths or lengths[0] < 0 or min(config.steps, config.batch, config.longest, config.hidden) < 1:
        raise SondeError("--lengths, --steps, --batch, --longest and --hidden are numbers above 0")
    if config.boards < 10:
        raise SondeError(f"--boards is {config.boards}: give 10 or more")
    lm = load(config.model or "", dtype=config.dtype, device=config.device)
    examples = boards(lm, config)
    require_room(lm, examples, Budget(tuple(lengths)))
    parts = parts_of(examples, seed=config.seed)
    command = shlex.join(config.command())
    with open_run("pathfinding", config, lm) as run:
        models = {"model": lm} | (
            {} if config.skip_control_model else {"control model": shuffled(lm, seed=config.seed)}
        )
        found = {
            (name, n): _step(run, f"{name.replace(' ', '-')}-{n}", model, parts, n, config)
            for name, model in models.items()
            for n in (0, *lengths)
        }
        if not run.done("walks"):
            run.finish("walks", _walked(run, lm, parts[2], lengths[-1], config))
        return publish(
            run,
            lm,
            Read.of([[*c, *t] for c, t in zip(examples.contexts, examples.targets, strict=True)]),
            [_chapter(lm, found, [0, *lengths], parts[2], run.result("walks"), config, command)],
            title=f"Can {lm.name} be prompted to walk a maze?",
            source=f"{config.boards} generated boards",
            timings=dict(run.timings),
        )


def boards(lm: "LanguageModel", config: PathfindingConfig) -> "Examples":
    """Boards and walks as examples, their two conditions over 10. Raises `SondeError` where none is short enough."""
    import torch

    from sonde.data.pathfinding import walks
    from sonde.prompts.examples import Examples

    drawn = [w for w in walks(4 * config.boards, size=config.size, seed=config.seed) if len(w.moves) <= config.longest]
    if len(drawn) < config.boards:
        raise SondeError(
            f"{len(drawn)} of {4 * config.boards} walks have {config.longest} moves at most: raise --longest"
        )
    drawn = drawn[: config.boards]
    examples = Examples.from_text(lm, [w.context() for w in drawn], [w.target() for w in drawn])
    conditions = torch.tensor([[w.extra / _SCALE, w.hits / _SCALE] for w in drawn])
    return Examples(examples.contexts, examples.targets, conditions=conditions)


def _step(run: "Run", name: str, lm: "LanguageModel", parts: Any, n: int, config: PathfindingConfig) -> Any:
    """Nats a token of every test walk: with its own condition, and with that of another board."""
    if not run.done(name):
        run.finish(name, _losses(run, name, lm, parts, n, config))
    return {key: value.numpy() for key, value in run.result(name).items()}


def _losses(
    run: "Run", name: str, lm: "LanguageModel", parts: Any, n: int, config: PathfindingConfig
) -> dict[str, Any]:
    from dataclasses import replace

    from sonde.prompts.evaluation import evaluate
    from sonde.prompts.soft_prompt import SoftPrompt

    test = parts[2]
    if not n:
        found = evaluate(lm, SoftPrompt.empty(lm), test)
        nats = found.nats[0] / found.tokens
        return {"own": nats, "other": nats}
    generator = _generator(run, name, lm, parts, n, config)
    others = replace(test, conditions=test.conditions.roll(1, 0))
    return {"own": _conditional(lm, generator, test), "other": _conditional(lm, generator, others)}


def _generator(run: "Run", name: str, lm: "LanguageModel", parts: Any, n: int, config: PathfindingConfig) -> Any:
    """Trained, or as it was kept."""
    from sonde.prompts.conditional import PromptGenerator, train_generator

    folder = run.path("generators", name)
    if folder.exists():
        return PromptGenerator.load(folder, lm)
    generator = PromptGenerator(lm, k=2, n=n, hidden=config.hidden, seed=config.seed)
    train_generator(
        lm,
        parts[0],
        generator,
        steps=config.steps,
        lr=config.lr,
        batch=config.batch,
        seed=config.seed,
        validation=parts[1],
        validations=4,
        checkpoint=run.checkpoint(name),
        progress=name,
    )
    generator.save(folder, lm)
    return generator


def _conditional(lm: "LanguageModel", generator: Any, examples: "Examples") -> Any:
    """Nats a token of each walk under the prompt of its condition."""
    import torch

    from sonde.prompts.evaluation import evaluate

    nats = []
    for i, condition in enumerate(examples.conditions.tolist()):  # type: ignore[union-attr]
        found = evaluate(lm, generator.prompt(condition), examples.select([i]))
        nats.append(float(found.nats[0, 0] / found.tokens[0]))
    return torch.tensor(nats)


def _walked(run: "Run", lm: "LanguageModel", test: "Examples", n: int, config: PathfindingConfig) -> list[list[Any]]:
    """What is walked when the shortest way is asked for, and when ten extra moves and five hits are."""
    from sonde.data.pathfinding import follow
    from sonde.prompts.conditional import PromptGenerator
    from sonde.prompts.generation import generate

    generator = PromptGenerator.load(run.path("generators", f"model-{n}"), lm)
    rows = []
    for what, condition in (("shortest way", (0.0, 0.0)), ("10 extra moves, 5 hits", (10 / _SCALE, 5 / _SCALE))):
        texts = generate(lm, generator.prompt(condition), test.contexts, max_new_tokens=config.longest)
        outcomes = [
            follow(lm.decode(context).removesuffix("\nMoves:\n"), lm.decode(ids))
            for context, ids in zip(test.contexts, texts, strict=True)
        ]
        rows.append(
            [
                what,
                *(sum(getattr(o, key) for o in outcomes) for key in ("reached", "legal", "steps", "hits")),
                len(outcomes),
            ]
        )
    return rows


def _chapter(
    lm: "LanguageModel",
    found: "dict[tuple[str, int], dict[str, np.ndarray]]",
    lengths: list[int],
    test: "Examples",
    walked: list[list[Any]],
    config: PathfindingConfig,
    command: str,
) -> "Chapter":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean, paired_difference
    from sonde.studies.elicitation_chapters import CITE

    last = lengths[-1]
    losses = {key: bootstrap_mean(value["own"]) for key, value in found.items()}
    rows = [
        {"n": lengths.index(n), "curve": name, "nats": loss.estimate, "low": loss.low, "high": loss.high}
        for (name, n), loss in losses.items()
    ]
    bare, best = losses["model", 0], losses["model", last]
    other = losses.get(("control model", last))
    used = paired_difference(found["model", last]["other"], found["model", last]["own"])
    refused = "" if other else " The word “capability” is refused: there is no control model."
    findings = [
        Finding.of(
            best,
            id="pathfinding.loss",
            chapter="pathfinding",
            sentence=f"{last} vectors bring the loss of a move from {bare.estimate:.3g} to {best.estimate:.3g} nats"
            + (f", and that of the control model to {other.estimate:.3g}." if other else f".{refused}"),
            metric=f"loss of a token of the walk with {last} prompt tokens",
            unit="nats",
            better="lower",
            command=command,
            figures=("pathfinding.curve",),
            **({"control": Control.of("control model", other)} if other else {"control_reason": "it was left out"}),
        ),
        Finding.of(
            used,
            id="pathfinding.condition",
            chapter="pathfinding",
            sentence="What the prompt is told of the walk "
            + ("helps to predict it." if used.low > 0 else "is not seen to help to predict it."),
            metric="rise of the loss under the condition of another board",
            unit="nats",
            better="higher",
            control=Control("no difference", 0.0),
            command=command,
            tables=("pathfinding.lengths",),
        ),
    ]
    chart = chart_kinds.lines(
        rows,
        x="n",
        y="nats",
        series="curve",
        low="low",
        high="high",
        title=f"From {bare.estimate:.3g} to {best.estimate:.3g} nats a move by {last} prompt tokens",
        subtitle=f"{lm.name}: loss of walks on unseen boards of {config.size} × {config.size}, 95 % bands",
        x_title="prompt tokens",
        y_title="loss (nats per token)",
        control=("control model",),
        x_labels=[str(n) for n in lengths],
    )
    reached, of = walked[0][1], walked[0][-1]
    table = [
        [name, n, loss.estimate, loss.low, loss.high, float(found[name, n]["other"].mean())]
        for (name, n), loss in losses.items()
    ]
    return Chapter(
        id="pathfinding",
        question=f"Can {lm.name} be prompted to walk from A to B?",
        answer=(
            f"{findings[0].sentence} Left to itself it reaches B on {reached} of {of} boards. {findings[1].sentence}"
        ),
        findings=findings,
        blocks=[
            Figure(id="pathfinding.curve", chart=chart, caption="Loss of a move by the number of prompt tokens."),
            Table(
                id="pathfinding.lengths",
                caption="Loss in nats per token; with the condition of another board, last",
                columns=["curve", "n", "loss", "low", "high", "other condition"],
                rows=table,
            ),
            Table(
                id="pathfinding.walks",
                caption=f"What is walked on unseen boards under prompts of {last} vectors, greedily",
                columns=["asked for", "reached B", "legal", "steps", "hits", "boards"],
                rows=walked,
            ),
            Table(
                id="pathfinding.paper",
                caption="Pythia in the original (its published logs): 2,048 steps of 256 boards, nats per token",
                columns=["model", *(Column(name=f"n = {n}") for n in _PAPER_LENGTHS)],
                rows=[[name, *values] for name, values in _PAPER.items()],
            ),
        ],
        not_shown=(
            "A loss of about 1.4 nats is had by knowing the four moves and nothing of the board: a fall to there is a "
            "format, not a path. The scale is far below the original's."
        ),
        how=(
            f"{config.steps} steps of {config.batch} boards; the test has {len(test)}. The prompt stands right before "
            f"the walk and is written by Linear, Mish, Linear from (extra moves, hits) / {_SCALE:.0f}. After {CITE}."
        ),
    )
