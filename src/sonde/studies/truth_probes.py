"""At which depth does a model tell true statements from false ones, and does that hold for statements of another kind?

Probes are fitted on files of statements with labels and read on held-out statements of the same and of the other files,
against probes of shuffled labels and random directions.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name
from sonde.studies.registry import study
from sonde.studies.running import Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.data.statements import Statements

PROBES = ("logr", "diff-in-means", "lda", "logr-pair", "crc", "ccs")
_LEAST = 40


@dataclass(frozen=True)
class TruthProbesConfig(Runnable):
    """Fit truth probes on statements at every layer and read them on other statements.

    Example: sonde run truth-probes gpt2 --statements cities.csv neg_cities.csv --base city
    """

    words = ("sonde", "run", "truth-probes")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    statements: Annotated[tuple[str, ...], arg(metavar="FILE ...")] = ()
    """.csv, .json or .jsonl files with `statement` and `label`. By default made-up comparisons of numbers."""
    base: Name = None
    """A column whose value belongs together, such as city: it is never split, in no file, and counts once."""
    answers: Annotated[tuple[str, ...], arg(metavar="NO YES")] = ()
    """What a statement is answered with, each one token with its space. By default " False" " True", or what fits."""
    rows: Count = 1000
    """Statements of each file that are used, at most."""
    probes: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = PROBES
    """Which probes, by name; the first makes the findings."""
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
    "truth-probes",
    summary="at which layer true and false statements come apart, and whether that holds for other statements",
    paper="Marks & Tegmark 2023, The Geometry of Truth (arXiv:2310.06824)",
)
def truth_probes(config: TruthProbesConfig) -> Path:
    """Extract states, fit and transfer probes and write the report. Returns its path.

    Raises `SondeError` for options that do not fit and anything wrong with model, files or folder.
    """
    from sonde.data.statements import split_by_base
    from sonde.knowledge.states import States
    from sonde.lm.prompt_rows import prompt_ids
    from sonde.organisms.loading import load
    from sonde.studies.truth_chapters import chapters
    from sonde.studies.truth_measures import Truth, answers_of, measure, statement_states

    _check(config)
    sets = _sets(config)
    split_by_base(sets, seed=config.seed)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    answers = answers_of(lm, config.answers)
    with open_run("truth-probes", config, lm) as run:
        if not run.done("truth"):
            states = {}
            for number, one in enumerate(sets):
                path = run.path("states", f"set-{number}.safetensors")
                if not path.exists():
                    statement_states(lm, one, answers, progress=f"states, {one.name}").save(path)
                states[one.name] = States.load(path)
            run.finish("truth", measure(sets, states, probes=config.probes, seed=config.seed).state())
        found = Truth.from_state(run.result("truth"))
        return publish(
            run,
            lm,
            Read.of(prompt_ids(lm, [text for one in sets for text in one.texts])),
            chapters(found, sets, run, config, shlex.join(config.command())),
            title=f"Where {lm.name} tells true from false",
            source=", ".join(one.name for one in sets),
            timings=dict(run.timings),
        )


def _check(config: TruthProbesConfig) -> None:
    from sonde.knowledge.probes import PROBES as KNOWN

    check_options(config)
    if config.rows < _LEAST:
        raise SondeError(f"--rows is {config.rows}: give {_LEAST} or more")
    unknown = [name for name in config.probes if name not in KNOWN]
    if unknown or not config.probes:
        raise SondeError(f"--probes takes some of {', '.join(KNOWN)}, not {' '.join(unknown) or 'none'}")
    if config.base is not None and not config.statements:
        raise SondeError("--base names a column of --statements, which are not given")


def _sets(config: TruthProbesConfig) -> "list[Statements]":
    """The files, each cut to `rows` statements; or comparisons of numbers."""
    import numpy as np

    from sonde.data.statements import comparisons, read_statements

    if not config.statements:
        n = min(config.rows, 3000)
        return [comparisons(relation, n=n, seed=config.seed) for relation in ("larger", "smaller")]
    found = []
    for name in config.statements:
        one = read_statements(name, base=config.base)
        if len(one) > config.rows:
            # whole bases first, so that what belongs together stays, and equal bases in all files
            order = np.argsort([_rank(base, config.seed) for base in one.bases], kind="stable")
            one = one.take(np.sort(order[: config.rows]))
        found.append(one)
    return found


def _rank(base: str, seed: int) -> str:
    """A random place for a base, the same in every file."""
    import hashlib

    return hashlib.sha256(f"{seed} {base}".encode()).hexdigest()
