"""How many prompt tokens, and how many bits, make a model do something, and what would a model take that never could?

For every model and behaviour: loss and success by prompt length on unseen contexts, the same on a control model and for
random strings, the conditional distance, and the information in the shortest prompt that works, by five rulers.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Names
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.data.behaviours import Behaviour
    from sonde.lm.model import LanguageModel
    from sonde.prompts.bits import Bits
    from sonde.prompts.claims import Elicited
    from sonde.prompts.curve import Threshold
    from sonde.prompts.elicitation import Budget
    from sonde.runs.run import Run

_PLACES = ("prefix", "suffix", "random")
Numbers = Annotated[tuple[int, ...], arg(metavar="N ...")]


@dataclass(frozen=True)
class InformationCurveConfig(Runnable):
    """Measure how much prompting a behaviour takes, with a control model, random targets and held-out contexts.

    Example: sonde run information-curve --models my-model --controls base-model --examples behaviour.jsonl
    """

    words = ("sonde", "run", "information-curve")

    models: Annotated[tuple[str, ...], arg(metavar="MODEL ...")] = ("organism:pebble",)
    """Local folders in Hugging Face format, names on the hub, or organism:NAME."""
    controls: Names = None
    """One control model for each model, which never had the behaviour; or shuffled. By default the network itself with
    the weights of its blocks shuffled."""
    behaviours: Names = ("phrase", "format")
    """Built-in behaviours: phrase, format, rule."""
    examples: Name = None
    """A file of rows with prompt, target and, for several, behaviour (.jsonl, .json, .csv), in place of the built-in
    ones."""
    rows: Count = 60
    """Contexts of each built-in behaviour."""
    lengths: Numbers = (1, 4, 16, 64)
    """Numbers of prompt tokens, besides none."""
    restarts: Count = 3
    """Prompts trained at each length."""
    positions: Annotated[tuple[str, ...], arg(metavar="PLACE ...")] = ("suffix",)
    """Where prompts go: prefix, suffix, random or an index. Several are searched over."""
    lrs: Annotated[tuple[float, ...], arg(metavar="LR ...")] = (0.3,)
    """Learning rates in units of the embedding's RMS. Several are searched over."""
    steps: Count = 60
    """Training steps of each prompt."""
    batch: Count = 8
    """Examples a step."""
    success: float = 0.5
    """A prompt works when it makes this share of targets exact."""
    nats: float | None = None
    """A prompt works when the mean loss of the whole target is at most this, in place of --success."""
    skip_control_model: bool = False
    """Leave the control model out. Nothing is then said of a capability."""
    skip_random_targets: bool = False
    """Leave out the random targets of equal length."""
    same_contexts: bool = False
    """Report on the contexts of training. Nothing is then said of a capability."""
    skip_bits: bool = False
    """Leave out the bits of the shortest prompt that works."""
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

    def budget(self) -> "Budget":
        """What each curve may spend."""
        from sonde.prompts.elicitation import Budget

        return Budget(
            self.lengths, self.restarts, tuple(place(p) for p in self.positions), self.lrs, self.steps, self.batch
        )

    def threshold(self) -> "Threshold":
        """When a prompt works."""
        from sonde.prompts.curve import Threshold

        return Threshold(success=self.success) if self.nats is None else Threshold(nats=self.nats)


def place(given: str) -> Any:
    """A position from the command line. Raises `SondeError` for what is none."""
    if given in _PLACES:
        return given
    if given.isdigit():
        return int(given)
    raise SondeError(f"{given!r} is no position: {', '.join(_PLACES)} or an index from 0")


@study(
    "information-curve",
    summary="how many prompt tokens and bits a behaviour takes, with a control model and random targets",
    paper="Nordby 2025, Soft Prompts for Evaluation: Measuring Conditional Distance of Capabilities (arXiv:2505.14943)",
)
def information_curve(config: InformationCurveConfig) -> Path:
    """Measure every behaviour on every model of `config` and write the report. Returns its path.

    Raises `SondeError` for anything wrong with options, models, behaviours or the folder, before any training.
    """
    from sonde.organisms.loading import load
    from sonde.prompts.elicitation import require_room
    from sonde.prompts.examples import Examples
    from sonde.studies.elicitation_chapters import curve_chapter, summary_chapter

    check_options(config)
    if not config.models or len(set(config.models)) < len(config.models):
        raise SondeError(f"--models takes one or more different models, not {' '.join(config.models) or 'none'}")
    if config.controls is not None and len(config.controls) != len(config.models):
        raise SondeError(f"{len(config.models)} models, but {len(config.controls)} --controls: give one for each")
    if not 0 < config.success <= 1:
        raise SondeError(f"--success is {config.success}: give a share above 0, up to 1")
    budget, threshold, wanted = config.budget(), config.threshold(), behaviours_of(config)
    loaded = [load(name, dtype=config.dtype, device=config.device) for name in config.models]
    controls: list[Any] = [None if config.skip_control_model else "shuffled"] * len(loaded)
    if config.controls is not None and not config.skip_control_model:
        controls = [
            name if name == "shuffled" else load(name, dtype=config.dtype, device=config.device)
            for name in config.controls
        ]
    sets = [[Examples.from_text(lm, one.contexts, one.targets) for one in wanted] for lm in loaded]
    for lm, of_model in zip(loaded, sets, strict=True):
        for examples in of_model:
            require_room(lm, examples, budget)
    command = shlex.join(config.command())
    named = Named(loaded[0].name if len(loaded) == 1 else "models", device=str(loaded[0].device))
    with open_run("information-curve", config, named) as run:
        chapters, found = [], []
        for number, (lm, control, of_model) in enumerate(zip(loaded, controls, sets, strict=True)):
            for one, examples in zip(wanted, of_model, strict=True):
                name = f"{one.name.lower().replace(' ', '-')}-{number}" if len(loaded) > 1 else one.name.lower()
                name = "".join(c if c.isalnum() or c in "-." else "-" for c in name).strip("-.") or "behaviour"
                elicited = _measured(run, lm, control, examples, one, budget, config)
                bits = _bits(run, lm, elicited, examples, name, threshold, config)
                found.append((elicited, bits))
                chapters.append(
                    curve_chapter(elicited, name=name, command=command, threshold=threshold, bits=bits)
                )  # fmt: skip
        chapters.insert(0, summary_chapter(found, command=command, threshold=threshold))
        return publish(
            run,
            Named.of(loaded),
            Read.of(
                [[*c, *t] for of_model in sets for e in of_model for c, t in zip(e.contexts, e.targets, strict=True)]
            ),
            chapters,
            title=f"How much prompting does it take? {Named.of(loaded).name}",
            source=config.examples or "built-in behaviours",
            timings=dict(run.timings),
        )


def behaviours_of(config: Any) -> "list[Behaviour]":
    """The behaviours that a config names, or those of its file. Raises `SondeError` as their readers do."""
    from sonde.data.behaviours import behaviour, read_behaviours

    if config.examples is not None:
        return read_behaviours(config.examples)
    if not config.behaviours:
        raise SondeError("--behaviours names none: give phrase, format or rule, or --examples FILE")
    return [behaviour(name, config.rows, seed=config.seed) for name in config.behaviours]


def _measured(
    run: "Run", lm: "LanguageModel", control: Any, examples: Any, one: "Behaviour", budget: "Budget", config: Any
) -> "Elicited":
    from sonde.prompts.elicitation import elicit

    return elicit(
        lm,
        examples,
        budget,
        behaviour=one.what,
        control=control,
        random_targets=not config.skip_random_targets,
        held_out=not config.same_contexts,
        folder=run.path("curves"),
        seed=config.seed,
        progress=f"{lm.name}, {one.name}",
    )


def _bits(
    run: "Run", lm: "LanguageModel", found: "Elicited", examples: Any, name: str, threshold: "Threshold", config: Any
) -> "Bits | None":
    """Bits of the shortest prompt that works; None where none does or none is needed."""
    from sonde.prompts.bits import Bits, measure_bits
    from sonde.prompts.elicitation import parts_of

    n = found.curve.conditional_distance(threshold)
    if config.skip_bits or math.isinf(n) or not n:
        return None
    step = f"bits-{name}"
    if not run.done(step):
        training, validation, _ = parts_of(examples, held_out=found.held_out, seed=config.seed)
        bits = measure_bits(
            lm,
            found.curve.prompt(int(n)),
            training,
            validation,
            threshold=threshold,
            steps=config.steps,
            seed=config.seed,
        )
        run.finish(step, dict(vars(bits)))
    kept = run.result(step)
    return Bits(**kept)
