"""The command line. `sonde --help` shows the commands, `sonde COMMAND --help` teaches one of them.

Options are the fields of a dataclass, parsed by tyro: those of a study live with the study, those of a recipe with the
recipe. What a user can act on is one line on standard error: bad input ends with exit code 2, an interruption with 130.
Only what the command needs is imported.
"""

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from sonde import __version__
from sonde.errors import SondeError

Config = TypeVar("Config")

HELP = """\
sonde looks inside trained networks.

usage: sonde COMMAND [...]

  audit MODEL        examine a language model and write a report
                       sonde audit organism:pebble
                       sonde audit path/to/model --text book.txt --out runs/book
  studies            list the studies: a paper's question, with our figure beside the paper's
  run STUDY ...      run one of them
                       sonde run tuned-lens organism:pebble
  sweep STUDY ...    run one at many settings: lists and ranges make every combination
                       sonde sweep tuned-lens organism:pebble --seed 0..2 --trainer ridge,adam
  features show      what each latent of a sparse dictionary responds to, as a page; by default of a bundled one
                       sonde features show organism:pebble 12
  organism list      networks with known truth; `info NAME` shows one, `train NAME` makes it again
                       sonde organism info pebble

  sonde COMMAND --help   all options of a command, with an example
  sonde --version        the version

MODEL is a local folder in Hugging Face format, a name on the hub such as gpt2, or organism:NAME. An interrupted run
says how to go on. Errors are one line on standard error and exit code 2."""

ORGANISM_HELP = """\
usage: sonde organism list | info NAME | train NAME [...]

  list             the organisms, and which of them have weights in the package
                     sonde organism list
  info NAME        the card: what is known to be true of it, its data, its numbers, sample text
                     sonde organism info pebble
  train NAME ...   make it again from text of your own; `--help` after the name shows the options
                     sonde organism train pebble --text books/ --out my-pebble"""

FEATURES_HELP = """\
usage: sonde features show [DICTIONARY_OR_RUN] [LATENT] [...]

  show             write a page that shows what each latent of a dictionary responds to, or one of them in full, and
                   print where it is; of a dictionary's folder, a run of auto-interp, or organism:pebble (the default)
                     sonde features show
                     sonde features show organism:pebble 12 --out my-pages

  sonde features show --help   all options"""

RUN_HELP = """\
usage: sonde run STUDY [...]

  runs a study and prints where its report is: `sonde studies` lists them, `sonde run STUDY --help` shows one's options
                     sonde run tuned-lens organism:pebble"""

SWEEP_HELP = """\
usage: sonde sweep STUDY [...] [--workers N] [--retries N] [--ray ADDRESS] [--out FOLDER] [--resume]

  runs a study at many settings: options of the study that list values as a,b or 0..9 make every combination, each a
  run of its own; failed trials are tried again, and one tidy table holds all findings
                     sonde sweep static-reading organism:pebble --seed 0..4 --directions 4,8

  --workers N        processes at once on this machine; by default one for each core
  --retries N        how often a trial that fails is tried again (2); bad input is not
  --ray ADDRESS      run on a Ray cluster instead; `auto` is the one that this machine belongs to
  --out FOLDER       the sweep's folder; by default a new one under runs/
  --resume           go on with the sweep in that folder: finished trials are kept"""

STUDIES_HELP = """\
usage: sonde studies

  lists the studies with the paper that each follows; run one with
                     sonde run tuned-lens organism:pebble"""


@dataclass(frozen=True)
class UsageError(Exception):
    """A command line that cannot be understood: what is wrong, and the command whose help says more."""

    message: str
    command: str


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `argv` (default: this process's) and exit: 0, 2 for bad input, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        sys.exit(_dispatch(argv))
    except UsageError as error:
        _fail(f"{error.message}; see `{error.command} --help`", 2)
    except SondeError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:
        # A run that had begun says in the exception how to go on; before that there is nothing to go on with.
        _fail(str(stop) or f"interrupted; start again with: {shlex.join(['sonde', *argv])}", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _fail(message: str, code: int) -> NoReturn:
    print("sonde: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], None]] = {
        "audit": _audit,
        "run": _run,
        "sweep": _sweep,
        "studies": _studies,
        "features": _features,
        "organism": _organism,
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
    elif argv[0] in ("-V", "--version"):
        print("sonde", __version__)
    elif argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        raise _unknown("command", argv[0], [*commands, "--help", "--version"], "sonde")
    return 0


def _unknown(what: str, given: str, known: Sequence[str], command: str) -> UsageError:
    import difflib

    close = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return UsageError(f"there is no {what} {given!r}: {hint}", command)


def _audit(argv: list[str]) -> None:
    from sonde.studies import audit

    config = parse(audit.AuditConfig, argv, command="sonde audit")
    print("report:", audit.audit(config))


def _run(argv: list[str]) -> None:
    from sonde.studies.registry import STUDIES

    if not argv or argv[0] in ("-h", "--help"):
        print(RUN_HELP, "\n\nstudies: ", ", ".join(STUDIES.entries), sep="")
        return
    if argv[0].startswith("-"):
        raise UsageError(f"the study comes first, then its options, not {argv[0]!r}", "sonde run")
    found = STUDIES.get(argv[0])
    print("report:", found.run(parse(found.config, argv[1:], command=f"sonde run {found.name}")))


def _sweep(argv: list[str]) -> None:
    from sonde.studies.registry import STUDIES
    from sonde.studies.sweep import SweepConfig, sweep

    if not argv or argv[0] in ("-h", "--help") or argv[1:] in (["-h"], ["--help"]):
        print(SWEEP_HELP, "\n\nstudies: ", ", ".join(STUDIES.entries), sep="")
        return
    if argv[0].startswith("-"):
        raise UsageError(f"the study comes first, then its options, not {argv[0]!r}", "sonde sweep")
    found = STUDIES.get(argv[0])
    own, words = _split(argv[1:], with_value=("--workers", "--retries", "--ray", "--out"), alone=("--resume",))
    config = parse(SweepConfig, own, command="sonde sweep")

    def check(trial: Sequence[str]) -> None:
        parse(found.config, trial, command=f"sonde run {found.name}")

    print("report:", sweep(found.name, words, config, check=check))


def _split(argv: Sequence[str], *, with_value: Sequence[str], alone: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of the command itself, and everything else, in order."""
    own: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word in with_value:
            own += [word, *itertools.islice(words, 1)]
        elif word in alone or word.partition("=")[0] in with_value:
            own.append(word)
        else:
            rest.append(word)
    return own, rest


def _studies(argv: list[str]) -> None:
    from sonde.studies.registry import STUDIES

    if argv and argv[0] in ("-h", "--help"):
        print(STUDIES_HELP)
        return
    if argv:
        raise UsageError(f"it takes no options, not {argv[0]!r}", "sonde studies")
    wide = max(map(len, STUDIES.entries))
    for entry in STUDIES.entries.values():
        print(f"{entry.name:{wide}}  {entry.summary}" + (f"\n{'':{wide}}  {entry.paper}" if entry.paper else ""))


def _features(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(FEATURES_HELP)
        return
    if argv[0] != "show":
        raise _unknown("features command", argv[0], ["show"], "sonde features")
    from sonde.studies.feature_pages import FeaturesShowConfig, features_show

    config = parse(FeaturesShowConfig, argv[1:], command="sonde features show")
    print("page:", features_show(config))


def _organism(argv: list[str]) -> None:
    from sonde.organisms.registry import ORGANISMS, has_weights

    if not argv or argv[0] in ("-h", "--help") or argv[1:] in (["-h"], ["--help"]):
        print(ORGANISM_HELP)
        return
    verb, rest = argv[0], argv[1:]
    if verb not in ("list", "info", "train"):
        raise _unknown("organism command", verb, ["list", "info", "train"], "sonde organism")
    if verb == "list":
        if rest:
            raise UsageError(f"list takes no options, not {rest[0]!r}", "sonde organism")
        wide = max(map(len, ORGANISMS.entries))
        for entry in ORGANISMS.entries.values():
            print(f"{entry.name:{wide}}  {entry.summary}{'' if has_weights(entry.name) else ' (train it first)'}")
        return
    if not rest or rest[0].startswith("-"):
        raise UsageError(f"{verb} needs the name of an organism ({', '.join(ORGANISMS.entries)})", "sonde organism")
    if verb == "train":
        recipe = ORGANISMS.get(rest[0])
        config = parse(recipe.config, rest[1:], command=f"sonde organism train {recipe.name}")
        print("organism:", recipe.run(config))
        return
    if rest[1:]:
        raise UsageError(f"info takes one name, not also {rest[1]!r}", "sonde organism")
    from sonde.organisms.card import read_card, render

    print(render(read_card(rest[0])))


def parse(config: type[Config], argv: Sequence[str], *, command: str) -> Config:
    """The dataclass `config` from command-line arguments; required fields are positional, flags have no `--no-` form.

    Prints the help and exits on `--help`. Raises `UsageError` with tyro's complaint in one line.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config,
                args=list(argv),
                prog=command,
                config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UsageError(_first_sentence(complaint.getvalue()), command) from None


def _first_sentence(box: str) -> str:
    """What tyro's framed message says between its title and its second rule, and the option that it suggests."""
    parts: list[list[str]] = [[]]
    for row in box.splitlines():
        text = row.strip("│╭╮╰╯─- \t") if set(row) & set("╭╰") else row.strip("│ \t")
        if text and not set(text) <= set("─-"):
            parts[-1].append(text)
        if set(row) & set("╭") or (text and set(text) <= set("─-")):
            parts.append([])
    said = " ".join(parts[1])
    suggested = re.search(r"you meant:?\s+(--[\w-]+)", " ".join(row for part in parts[2:] for row in part))
    return said + (f"; did you mean {suggested.group(1)}?" if suggested else "")
