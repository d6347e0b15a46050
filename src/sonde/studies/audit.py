"""What is this language model, how well does it predict, and at which depth? The chapters of `sonde audit`.

The text is cut into windows; every other one goes to a fitting half, on which lenses and n-gram counts are fitted, and
the rest to a held half, which all chapters watch in one shared pass and from which every number comes. An audit that
was killed goes on from its last checkpoint and ends with the numbers of an audit that was not.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text

if TYPE_CHECKING:
    from sonde.studies.chapters.part import Audit, Part

_CONTEXT = 512
_SECONDS_BETWEEN_CHECKPOINTS = 10.0


@dataclass(frozen=True)
class AuditConfig:
    """Examine a language model and write a report.

    Example: sonde audit organism:pebble --text book.txt --chapters loss depth --out runs/book
    """

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What is read: a .txt, .jsonl, .json or .parquet file, a folder of them, or hub/NAME[:SPLIT[:COLUMN]]. By default
    the help texts of Python."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    chapters: Names = None
    """The chapters to write, by name (card, loss, depth, passage, cost). By default all."""
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

    def settings(self) -> dict[str, Any]:
        """What decides the numbers: all but where the run is kept."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("out", "resume")}

    def command(self) -> list[str]:
        """The words of the command line that gives these settings, without --chapters, --out and --resume."""
        words = ["sonde", "audit", self.model]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("model", "out", "chapters", "resume") and value != field.default:
                words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words


def audit(config: AuditConfig) -> Path:
    """Audit a model and return the path of report.html, in a run folder that also holds its numbers and pictures.

    Raises `SondeError` for anything wrong with the model, the text, the chapters or the folder, before any work.
    """
    import shlex

    from sonde.lm.batches import TokenBatches
    from sonde.organisms.loading import load
    from sonde.runs.run import Run, new_folder
    from sonde.studies.chapters import chosen
    from sonde.studies.chapters.part import Audit

    kinds = chosen(config.chapters)
    if config.resume and config.out is None:
        raise SondeError("--resume needs --out FOLDER, the folder of the run to go on with")
    lm = load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    if lm.tokenizer is None:
        raise SondeError(f"{config.model} has no tokenizer, so it reads no text: save one beside the weights")
    context = min(_CONTEXT, lm.context)
    text = TokenBatches(config.text, lm.tokenizer, context=context, limit_tokens=config.tokens)
    fit, held = text.split(0.5)
    folder = config.out or new_folder("runs", f"audit-{lm.name}")
    words = [*config.command(), *(["--chapters", *config.chapters] if config.chapters else []), "--out", str(folder)]
    again = shlex.join([*words, "--resume"])
    if config.resume:
        opened = Run.resume(folder, study="audit", config=config.settings(), resume_command=again)
    else:
        opened = Run.start(
            folder,
            study="audit",
            config=config.settings(),
            seed=config.seed,
            command=shlex.join(words),
            device=str(lm.device),
            resume_command=again,
        )
    with opened as run:
        under_way = Audit(config, lm, fit, held, run)
        parts, failures = _prepared(kinds, under_way)
        _read(under_way, parts)
        return _report(under_way, text, parts, failures)


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


def _report(audit: "Audit", text: Any, parts: "list[Part]", failures: dict[str, str]) -> Path:
    """Write chapters, tables, charts and the page."""
    import sonde
    from sonde.data.text import describe
    from sonde.runs.blocks import Appendix, Chapter, Figure, Header, Table
    from sonde.runs.report import write_report

    run, lm = audit.run, audit.lm
    chapters: list[Chapter] = []
    for part in parts:
        with _excused(failures, part.name), audit.timed("writing"):
            chapters.append(part.write())
    chapters += [Chapter(id=name, question=f"Chapter “{name}”", failed=reason) for name, reason in failures.items()]
    for chapter in chapters:
        for block in chapter.blocks:
            if isinstance(block, Figure):
                run.chart(block.id, block.chart)
            elif isinstance(block, Table) and block.rows:
                run.table(block.id, _columns(block))
    header = Header(
        id=run.id,
        title=f"Audit of {lm.name}",
        study="audit",
        model=lm.name,
        command=run.command,
        created=run.created,
        model_hash=lm.hash,
        params=lm.n_parameters,
        text=describe(audit.config.text),
        tokens=text.n_tokens,
        text_hash=text.hash,
        seed=run.seed,
        sonde=sonde.__version__,
        seconds=run.seconds,
        status="finished",
        config_sha256=run.config_sha256,
    )
    return write_report(
        run.path("report.html"),
        header=header,
        findings=[finding for chapter in chapters for finding in chapter.findings],
        chapters=chapters,
        appendix=Appendix(
            config=run.config,
            environment=run.environment,
            timings=list(audit.timings.items()),
            skipped=list(failures.items()),
            files=run.files(),
        ),
    )


def _columns(table: Any) -> list[dict[str, Any]]:
    names = [column if isinstance(column, str) else column.name for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


@contextlib.contextmanager
def _excused(failures: dict[str, str], name: str) -> Iterator[None]:
    """A chapter that cannot be written is a line in the report, not the end of the audit."""
    try:
        yield
    except SondeError as error:
        failures[name] = str(error)
