"""Does a probe that learned where answers are right say what the model knows where its answers are wrong?

A quirky model is right for Alice and, by a rule, wrong for Bob. Probes learn the truth from Alice's records and are
read on Bob's: at which layer, how far above what the model says, against random directions and shuffled labels; whether
the model uses what they read; and whether an alarm that knows Alice's records only goes off on Bob's.
"""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name
from sonde.studies.registry import study
from sonde.studies.running import Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.data.quirky import Splits
    from sonde.lm.model import LanguageModel

ORGANISM = "organism:quirky-comparison"
PROBES = ("logr", "logr-pair", "lda", "diff-in-means", "diff-in-means-pair", "crc", "ccs", "vinc")
_LEAST = 64


@dataclass(frozen=True)
class QuirkyElkConfig(Runnable):
    """Train probes on Alice's records of a quirky model and read them on Bob's.

    Example: sonde run quirky-elk --seeds 3
    """

    words = ("sonde", "run", "quirky-elk")

    model: Model = ORGANISM
    """A quirky model: an organism, a local folder in Hugging Face format, or a name on the hub."""
    quirk: Name = None
    """The quirky set that it was trained on, such as addition or sentiment (`sonde.data.quirky_catalogue`). By default
    that of an organism."""
    source: Name = None
    """A .csv, .json or .jsonl file of rows, for the sets that are made from text."""
    mode: Literal["single", "mixture", "standardised"] = "single"
    """One template, all of them, or one fixed question after a random context."""
    train: Count = 2000
    """Records that probes are trained on. A quarter as many more choose the layer."""
    test: Count = 2000
    """Records of other base rows that they are read on."""
    probes: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = PROBES
    """Which probes, by name; the first makes the findings."""
    seeds: Count = 1
    """Models. The second and later ones are organism:quirky-comparison trained again, a minute each."""
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
    "quirky-elk",
    summary="probes for the truth, trained where a quirky model is right and read where it is wrong",
    paper="Mallen et al. 2023, Eliciting Latent Knowledge from Quirky Language Models (arXiv:2312.01037)",
)
def quirky_elk(config: QuirkyElkConfig) -> Path:
    """Extract states, fit and transfer probes, check them and write the report. Returns its path.

    Raises `SondeError` for options that do not fit and anything wrong with model, set, source or folder.
    """
    from sonde.lm.prompt_rows import prompt_ids
    from sonde.organisms.loading import load
    from sonde.studies.quirky_elk_chapters import chapters
    from sonde.studies.quirky_elk_measures import measured

    _check(config)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    splits = [_splits(config, number) for number in range(config.seeds)]
    with open_run("quirky-elk", config, lm) as run:
        found = [
            measured(run, partial(_model, lm, number), given, config, number) for number, given in enumerate(splits)
        ]
        written = chapters(found, run, config, shlex.join(config.command()))
        return publish(
            run,
            lm,
            Read.of(prompt_ids(lm, splits[0].test.prompts)),
            written,
            title=f"What {lm.name} knows and what it says",
            source=f"quirky set {splits[0].test.name}",
            timings=dict(run.timings),
        )


def _check(config: QuirkyElkConfig) -> None:
    from sonde.knowledge.probes import PROBES as KNOWN
    from sonde.studies.quirky_organisms import has_own_set

    check_options(config)
    for name, value in (("--train", config.train), ("--test", config.test)):
        if value < _LEAST:
            raise SondeError(f"{name} is {value}: give {_LEAST} or more")
    if config.seeds < 1:
        raise SondeError(f"--seeds is {config.seeds}: give at least 1")
    if config.seeds > 1 and config.model != ORGANISM:
        raise SondeError(f"--seeds is {config.seeds}: only {ORGANISM} is trained again, not {config.model}")
    own = has_own_set(config.model)
    if own and (config.quirk, config.source, config.mode) != (None, None, "single"):
        raise SondeError(f"{config.model} knows its own set only: leave --quirk, --source and --mode out")
    if not own and config.quirk is None:
        raise SondeError(f"--quirk names the set that {config.model} was trained on, such as addition")
    unknown = [name for name in config.probes if name not in KNOWN]
    if unknown or not config.probes:
        raise SondeError(f"--probes takes some of {', '.join(KNOWN)}, not {' '.join(unknown) or 'none'}")


def _splits(config: QuirkyElkConfig, number: int) -> "Splits":
    """The records of one model: those of its own seed where it is trained here, so that none of the test was read."""
    from sonde.data.quirky import quirky_sets
    from sonde.studies.quirky_organisms import organism_sets

    own = organism_sets(config.model, number)
    return own or quirky_sets(str(config.quirk), mode=config.mode, seed=config.seed, source=config.source)


def _model(lm: "LanguageModel", number: int) -> "LanguageModel":
    """The model of the run, or the organism trained again."""
    from sonde.organisms.quirky_comparison import quirky_comparison

    return quirky_comparison(number, progress=f"model {number}") if number else lm
