"""What is this language model, how well does it predict, and at which depth? The chapters of `sonde audit`.

The text is cut into windows; the first half of them is for fitting lenses and n-gram counts, the second is held: it
is what all chapters watch in one shared pass and what every number comes from. An audit that was killed goes on from
its last checkpoint and ends with the numbers of an audit that was not.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text
from sonde.studies.running import Runnable, check_options, halves, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.runs.blocks import Chapter
    from sonde.studies.chapters.part import Audit, Part

_SECONDS_BETWEEN_CHECKPOINTS = 10.0


@dataclass(frozen=True)
class AuditConfig(Runnable):
    """Examine a language model and write a report.

    Example: sonde audit organism:pebble --text book.txt --chapters loss depth --out runs/book
    """

    words = ("sonde", "audit")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What is read: a .txt, .jsonl, .json or .parquet file, a folder of them, or hub/NAME[:SPLIT[:COLUMN]]. By default
    the help texts of Python."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    chapters: Names = None
    """The chapters to write, by name (card, loss, statistics, depth, passage, concepts, control, features,
    knowledge, elicitation, cost). By default all."""
    labels: Name = None
    """A file of labelled text for the chapter on concepts: CoNLL-U (.conllu), or .jsonl with text and spans or label.
    By default the text is labelled by rules."""
    contrast: Name = None
    """A JSON file for the chapter on control: `positive` and `negative`, lists of texts that belong together in pairs.
    By default sentences about the sea and about a forest."""
    dictionary: Name = None
    """The folder of a sparse dictionary of this model, for the chapter on features. organism:pebble brings its own."""
    statements: Name = None
    """A .csv, .json or .jsonl file with `statement` and `label`, true or false, for the chapter on knowledge. By
    default comparisons of numbers."""
    behaviours: Name = None
    """A .jsonl, .json or .csv file of rows with `prompt`, `target` and, for several, `behaviour`, for the chapter on
    elicitation; or FILE.py:FUNCTION, a function of a list of texts that gives their scores. By default a fixed phrase
    and a format."""
    tokens: Count = 65536
    """How many tokens of the text are read."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    revision: Name = None
    """Branch, tag or commit on the hub."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    allow_pickle: bool = False
    """Read a pickle checkpoint, which can execute code, where there is no safetensors file."""


def audit(config: AuditConfig) -> Path:
    """Audit a model and return the path of report.html, in a run folder that also holds its numbers and pictures.

    Raises `SondeError` for anything wrong with the model, the text, the chapters or the folder, before any work.
    """
    from sonde.data.text import describe
    from sonde.organisms.loading import load
    from sonde.studies.chapters import chosen
    from sonde.studies.chapters.part import Audit

    kinds = chosen(config.chapters)
    check_options(config)
    for kind in kinds:
        kind.check(config)
    lm = load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    text = read_text(config, lm)
    fit, held = halves(text, describe(config.text))
    with open_run("audit", config, lm) as run:
        under_way = Audit(config, lm, fit, held, run)
        parts, failures = _prepared(kinds, under_way)
        _read(under_way, parts)
        chapters = _written(under_way, parts, failures)
        return publish(
            run,
            lm,
            text,
            chapters,
            title=f"Audit of {lm.name}",
            source=describe(config.text),
            timings=under_way.timings,
            skipped=failures,
        )


def _prepared(kinds: "list[type[Part]]", audit: "Audit") -> "tuple[list[Part], dict[str, str]]":
    """The chapters, each prepared; those that could not be are left out, with the reason."""
    parts, failures = [], {}
    for kind in kinds:
        part = kind(audit)
        with _excused(failures, part.name):
            part.prepare()
        parts.append(part)
    return [part for part in parts if part.name not in failures], failures


def _read(audit: "Audit", parts: "list[Part]") -> None:
    """One pass over the held half for all chapters, from where an earlier process left it."""
    from sonde.files import load_bundle, save_bundle
    from sonde.lm.stream import feed

    run, watching = audit.run, [part for part in parts if part.sites]
    if not watching:
        return
    checkpoint = run.checkpoint("pass")
    start = 0
    if run.done("pass") or checkpoint.exists():
        kept = run.result("pass") if run.done("pass") else load_bundle(checkpoint)
        start = kept["next"]
        for part in watching:
            part.load(kept["states"][part.name])
    if run.done("pass"):
        return

    def states(index: int) -> dict[str, Any]:
        return {"next": index + 1, "states": {part.name: part.state() for part in watching}}

    saved = time.monotonic()

    def after(index: int) -> None:
        nonlocal saved
        run.progress("reading", done=index + 1, total=audit.held.n_batches)
        if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            save_bundle(checkpoint, states(index))
            saved = time.monotonic()

    with audit.timed("reading"):
        feed(audit.lm, audit.held, watching, progress="reading", start=start, after=after)
    run.finish("pass", states(audit.held.n_batches - 1))


def _written(audit: "Audit", parts: "list[Part]", failures: dict[str, str]) -> "list[Chapter]":
    """The chapters in the report's order; those that failed say why."""
    from sonde.runs.blocks import Chapter

    chapters = []
    for part in parts:
        with _excused(failures, part.name), audit.timed("writing"):
            chapters.append(part.write())
    failed = [Chapter(id=name, question=f"Chapter “{name}”", failed=reason) for name, reason in failures.items()]
    return [*chapters, *failed]


@contextlib.contextmanager
def _excused(failures: dict[str, str], name: str) -> Iterator[None]:
    """A chapter that cannot be written is a line in the report, not the end of the audit."""
    try:
        yield
    except SondeError as error:
        failures[name] = str(error)
