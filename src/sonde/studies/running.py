"""What every study does around its question: open the run, keep its files, write the report.

A config is a dataclass whose required fields are positional on the command line. `out` and `resume` say where the run
is kept; everything else decides the numbers and is what the reproducing command repeats.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sonde.errors import SondeError

if TYPE_CHECKING:
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run

_LEAST_ROWS = 4
_CONTEXT = 512
_TOKENS = 4096  # in a batch, if its logits are
_LOGITS = 1 << 27  # no more than these


@dataclass(frozen=True)
class Named:
    """A subject that is no language model: a set of models, a network of our own, another study."""

    name: str
    hash: str = ""
    n_parameters: int | None = None
    device: str = "cpu"

    @staticmethod
    def of(models: "Sequence[LanguageModel]") -> "Named":
        """Several language models together; of one, its own hash."""
        return Named(
            ", ".join(lm.name for lm in models),
            models[0].hash if len(models) == 1 else "",
            sum(lm.n_parameters for lm in models),
            str(models[0].device),
        )


@dataclass(frozen=True)
class Read:
    """Material that is no text in windows: so many items, and their hash."""

    n_tokens: int | None = None
    hash: str = ""

    @staticmethod
    def of(rows: "Sequence[Sequence[int]]") -> "Read":
        """Rows of token ids."""
        import hashlib

        ids = [list(row) for row in rows]
        return Read(sum(map(len, ids)), hashlib.sha256(repr(ids).encode()).hexdigest())


class Runnable:
    """What the config dataclasses of studies share; they have fields `out`, `resume` and `seed`."""

    words: ClassVar[tuple[str, ...]]
    """The command, such as ("sonde", "audit")."""

    def settings(self) -> dict[str, Any]:
        """What decides the numbers: all fields but where the run is kept."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {key: value for key, value in fields.items() if key not in ("out", "resume")}

    def command(self, *left_out: str) -> list[str]:
        """The words of the command line that gives these settings, without the fields `left_out`."""
        positional, options = [], []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in ("out", "resume", *left_out) or value == field.default:
                continue
            given = [] if value is True else [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
            if field.default is dataclasses.MISSING:
                positional += given
            else:
                options += [f"--{field.name.replace('_', '-')}", *given]
        return [*self.words, *positional, *options]


def open_run(study: str, config: Any, lm: "LanguageModel | Named") -> "Run":
    """Start a run in `config.out` (by default a new folder under runs/), or resume the one there.

    Raises `SondeError` as `Run.start` and `Run.resume` do, and for --resume without a folder.
    """
    from sonde.runs.run import Run, new_folder

    check_options(config)
    folder = config.out or new_folder("runs", f"{study}-{lm.name}")
    command = [*config.command(), "--out", str(folder)]
    again = shlex.join([*command, "--resume"])
    if config.resume:
        return Run.resume(folder, study=study, config=config.settings(), resume_command=again)
    return Run.start(
        folder,
        study=study,
        config=config.settings(),
        seed=config.seed,
        command=shlex.join(command),
        device=str(lm.device),
        resume_command=again,
    )


def check_options(config: Any) -> None:
    """Raise `SondeError` for what is wrong with the options themselves, before anything is loaded."""
    if config.resume and config.out is None:
        raise SondeError("--resume needs --out FOLDER, the folder of the run to go on with")
    if getattr(config, "tokens", 2) < 2:
        raise SondeError(f"--tokens is {config.tokens}: give the number of tokens to read, such as 65536")
    if not 0 <= config.seed < 2**63:
        raise SondeError(f"--seed is {config.seed}: give a number from 0 to {2**63 - 1}")


def read_text(config: Any, lm: "LanguageModel") -> "TokenBatches":
    """The text of `config` as windows for `lm`, in batches whose logits take half a gigabyte at most."""
    from sonde.lm.batches import TokenBatches

    if lm.tokenizer is None:
        raise SondeError(f"{config.model} has no tokenizer, so it reads no text: save one beside the weights")
    return TokenBatches(
        config.text,
        lm.tokenizer,
        context=min(_CONTEXT, lm.context),
        tokens_per_batch=min(_TOKENS, _LOGITS // lm.vocab_size),
        limit_tokens=config.tokens,
    )


def halves(text: "TokenBatches", source: str) -> "tuple[TokenBatches, TokenBatches]":
    """The first half of a text's rows, for fitting, and the second, held.

    Raises `SondeError` for fewer than two rows in each: with one held there is no interval.
    """
    if text.n_chunks < _LEAST_ROWS:
        raise SondeError(
            f"{text.n_chunks * text.context} tokens of {source} are too few: at least {_LEAST_ROWS * text.context} are "
            f"needed ({_LEAST_ROWS} windows of {text.context}); give more text or a larger --tokens"
        )
    return text.split(0.5)


def publish(
    run: "Run",
    lm: "LanguageModel | Named",
    text: "TokenBatches | Read",
    chapters: "Sequence[Chapter]",
    *,
    title: str,
    source: str,
    timings: Mapping[str, float],
    skipped: Mapping[str, str] | None = None,
) -> Path:
    """Write the chapters' charts and tables as files and all of them as report.html; returns its path."""
    import sonde
    from sonde.runs.blocks import Appendix, Figure, Header, Table
    from sonde.runs.report import write_report

    for chapter in chapters:
        for block in chapter.blocks:
            if isinstance(block, Figure):
                run.chart(block.id, block.chart)
            elif isinstance(block, Table) and block.rows:
                names = [column if isinstance(column, str) else column.name for column in block.columns]
                run.table(block.id, [dict(zip(names, row, strict=True)) for row in block.rows])
    header = Header(
        id=run.id,
        title=title,
        study=run.study,
        model=lm.name,
        command=run.command,
        created=run.created,
        model_hash=lm.hash,
        params=lm.n_parameters,
        text=source,
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
            timings=list(timings.items()),
            skipped=list((skipped or {}).items()),
            files=run.files(),
        ),
    )
