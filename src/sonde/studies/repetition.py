"""Does it take more prompting to make a model repeat a longer string?

Prompts before a text make the model say one string over and over in place of the text's own tokens: loss by prompt
length for strings of one, two and six words, with a control model and random strings of as many tokens.
"""

import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.information_curve import Numbers
from sonde.studies.options import Count, Folder, Name, Text
from sonde.studies.registry import study
from sonde.studies.running import Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.prompts.claims import Elicited
    from sonde.prompts.curve import Curve, Threshold
    from sonde.runs.blocks import Chapter

# Final test losses (nats a token) at n = 0, 1, 4, 16, 64 of strings of 1, 2 and 6 words, Pythia 70M.
_PAPER = {
    1: (19.15, 1.81, 0.0004, 0.0002, 0.0),
    2: (14.65, 5.22, 1.69, 1.00, 0.32),
    6: (13.27, 6.42, 2.37, 1.16, 0.005),
}
_PAPER_LENGTHS = (0, 1, 4, 16, 64)


@dataclass(frozen=True)
class RepetitionConfig(Runnable):
    """Make a model repeat strings of different length, and see what that takes.

    Example: sonde run repetition --model organism:pebble --strings " river" " river stone"
    """

    words = ("sonde", "run", "repetition")

    model: Name = "organism:pebble"
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    strings: Annotated[tuple[str, ...], arg(metavar="STRING ...")] = (
        " river",
        " river stone",
        " the old and quiet river stone",
    )
    """What is repeated, from short to long."""
    text: Text = None
    """The text that prompts stand before. By default the help texts of Python."""
    rows: Count = 60
    """Pieces of text."""
    scored: Count = 18
    """Tokens of each piece at which the string is wanted."""
    lengths: Numbers = (1, 4, 16, 64)
    """Numbers of prompt tokens, besides none."""
    restarts: Count = 2
    """Prompts trained at each length."""
    lrs: Annotated[tuple[float, ...], arg(metavar="LR ...")] = (0.3,)
    """Learning rates in units of the embedding's RMS. Several are searched over."""
    steps: Count = 80
    """Training steps of each prompt."""
    batch: Count = 8
    """Pieces of text a step."""
    nats: float = 1.0
    """A prompt works when the mean loss of a token is at most this."""
    skip_controls: bool = False
    """Leave out the control model and the random strings."""
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
    "repetition",
    summary="how many prompt tokens make a model repeat a string, by the length of the string",
    paper="Nordby 2025, Soft Prompts for Evaluation: Measuring Conditional Distance of Capabilities (arXiv:2505.14943)",
)
def repetition(config: RepetitionConfig) -> Path:
    """Measure every string of `config` and write the report. Returns its path.

    Raises `SondeError` for anything wrong with the strings, the text, the model or the folder, before any training.
    """
    from sonde.lm.batches import TokenBatches
    from sonde.organisms.loading import load
    from sonde.prompts.curve import Threshold
    from sonde.prompts.elicitation import Budget, require_room
    from sonde.prompts.examples import Examples

    check_options(config)
    if not config.strings or not all(config.strings) or len(set(config.strings)) < len(config.strings):
        raise SondeError("--strings takes one or more different strings that are not empty")
    if config.scored < 2 or config.rows < 5:
        raise SondeError(f"--scored is {config.scored} and --rows {config.rows}: give at least 2 and 5")
    budget = Budget(config.lengths, config.restarts, ("prefix",), config.lrs, config.steps, config.batch)
    threshold = Threshold(nats=config.nats * config.scored)
    lm = load(config.model or "", dtype=config.dtype, device=config.device)
    strings = {text: _ids(lm, text) for text in config.strings}
    size = config.scored + 1
    text = TokenBatches(config.text, lm.tokenizer, context=size, limit_tokens=config.rows * size)  # type: ignore[arg-type]
    rows = [row for batch in text for row in batch.tokens.tolist() if len(row) == size]
    if len(rows) < config.rows:
        raise SondeError(f"the text has {len(rows)} pieces of {size} tokens, --rows is {config.rows}: give more text")
    examples = Examples.from_rows(rows)
    require_room(lm, examples, budget)
    command = shlex.join(config.command())
    with open_run("repetition", config, lm) as run:
        found = [_measured(lm, one, ids, examples, budget, config, run.path("curves")) for one, ids in strings.items()]
        return publish(
            run,
            lm,
            Read.of(rows),
            [_chapter(found, [len(ids) for ids in strings.values()], config, threshold, command)],
            title=f"What does it take to make {lm.name} repeat a string?",
            source=config.text or "help texts of Python",
            timings=dict(run.timings),
        )


def _ids(lm: "LanguageModel", text: str) -> tuple[int, ...]:
    assert lm.tokenizer is not None
    return tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _measured(
    lm: "LanguageModel", text: str, ids: tuple[int, ...], examples: Any, budget: Any, config: Any, folder: Path
) -> "Elicited":
    """The curve of one string, of the control model on it, and of random tokens, as many, on the model."""
    from sonde.prompts.claims import Elicited
    from sonde.prompts.control_model import SHUFFLED, shuffled
    from sonde.prompts.elicitation import information_curve, parts_of
    from sonde.prompts.examples import Examples
    from sonde.prompts.repetition import Repetition

    parts, label = parts_of(examples, seed=config.seed), repr(text.strip())

    def curve(model: "LanguageModel", wanted: tuple[int, ...], what: str) -> "Curve":
        return information_curve(
            model,
            parts,
            budget,
            objective=Repetition(wanted),
            folder=folder,
            seed=config.seed,
            progress=f"{label}, {what}",
        )

    own = curve(lm, ids, "behaviour")
    control = strings = None
    if not config.skip_controls:
        control = curve(shuffled(lm, seed=config.seed), ids, "control model")
        random = Examples([[0]], [list(ids)]).random_targets(lm, seed=config.seed).targets[0]
        strings = curve(lm, tuple(random), "random string")
    return Elicited(lm.name, f"repeat “{text.strip()}”", own, control, strings, True, SHUFFLED if control else "")


def _chapter(
    found: "list[Elicited]", sizes: list[int], config: RepetitionConfig, threshold: "Threshold", command: str
) -> "Chapter":
    import numpy as np

    from sonde.prompts.claims import claim
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean
    from sonde.studies.elicitation_chapters import distance_text, how, tokens

    lengths = found[0].curve.lengths
    names = [f"{size} token{'s' * (size > 1)}" for size in sizes]
    rows, table, findings = [], [], []
    for one, name in zip(found, names, strict=True):
        for label, curve in one.curves.items():
            for i, n in enumerate(lengths):
                loss = curve.loss(n, per_token=True)
                if label == "behaviour":
                    rows.append({"n": i, "string": name, "nats": loss.estimate, "low": loss.low, "high": loss.high})
                table.append([one.behaviour, label, n, loss.estimate, loss.low, loss.high])
        curve = one.curve
        drops = [
            (curve.nats[i, curve.best(a)] - curve.nats[i + 1, curve.best(b)]) / curve.tokens
            for i, (a, b) in enumerate(pairwise(lengths))
        ]
        least = int(np.argmin([drop.mean() for drop in drops]))
        falls = bootstrap_mean(drops[least], curve.groups)
        strictly = (
            "at every step" if falls.estimate > 0 else f"but not from {lengths[least]} to {lengths[least + 1]} tokens"
        )
        findings.append(
            Finding.of(
                falls,
                id=f"repetition.falls-{name.split()[0]}",
                chapter="repetition",
                sentence=f"To {one.behaviour}, the loss falls with the number of prompt tokens {strictly}.",
                metric="smallest fall of the loss from one prompt length to the next",
                unit="nats per token",
                better="higher",
                control=Control("no change", 0.0),
                command=command,
                figures=("repetition.curves",),
                tables=("repetition.lengths",),
            )
        )
    distances = [one.curve.conditional_distance(threshold) for one in found]
    ordered = all(a <= b for a, b in pairwise(distances)) and distances[0] < distances[-1]
    gap = _gap(found)
    findings.insert(
        0,
        Finding.of(
            gap,
            id="repetition.order",
            chapter="repetition",
            sentence=(
                f"At {config.nats:g} nats a token the strings take "
                + ", ".join(f"{tokens(d)} ({name})" for d, name in zip(distances, names, strict=True))
                + (
                    " prompt tokens: the longer the string, the more."
                    if ordered
                    else " prompt tokens, not in order of length."
                )
            ),
            metric="loss of the longest string less that of the shortest, mean over prompt lengths",
            unit="nats per token",
            better="higher",
            control=Control("no difference", 0.0),
            command=command,
            figures=("repetition.curves",),
            tables=("repetition.lengths",),
        ),
    )
    chart = chart_kinds.lines(
        rows,
        x="n",
        y="nats",
        series="string",
        low="low",
        high="high",
        title="C = " + ", ".join(f"{tokens(d)} for {name}" for d, name in zip(distances, names, strict=True)),
        subtitle=f"{found[0].model}: loss of a repeated string under the best prompt, unseen texts, 95 % bands",
        x_title="prompt tokens",
        y_title="loss (nats per token)",
        x_labels=[str(n) for n in lengths],
    )
    claims = [claim(one, threshold) for one in found]
    paper = [[f"{words} words", *losses] for words, losses in _PAPER.items()]
    return Chapter(
        id="repetition",
        question="Does a longer string take more prompting?",
        answer=" ".join([findings[0].sentence, *(f"{told.sentence} {told.reason}".strip() for told in claims)]),
        findings=findings,
        blocks=[
            Figure(
                id="repetition.curves", chart=chart, caption="Loss by prompt tokens for strings of different length."
            ),
            Table(
                id="repetition.lengths",
                caption="Loss in nats per token. "
                + "; ".join(f"{one.behaviour}: {distance_text(one.curve, threshold)}" for one in found),
                columns=["string", "curve", "n", "loss", "low", "high"],
                rows=table,
            ),
            Table(
                id="repetition.paper",
                caption="Pythia 70M, other strings, 2,048 steps (from the original's published logs), nats per token",
                columns=["string", *(Column(name=f"n = {n}") for n in _PAPER_LENGTHS)],
                rows=paper,
            ),
        ],
        not_shown=(
            "A string that is forced says little about a model: see what the control model and random strings take. "
            "Short training, so that the losses of long strings are upper bounds."
        ),
        how=how(found[0], threshold),
    )


def _gap(found: "list[Elicited]") -> Any:
    """Loss of the last string less that of the first, paired by text, over all prompt lengths but 0."""
    import numpy as np

    from sonde.stats.intervals import bootstrap_mean

    def rows(curve: "Curve") -> Any:
        best = [curve.nats[i, curve.best(n)] / curve.tokens for i, n in enumerate(curve.lengths) if n]
        return np.mean(best, axis=0)

    first, last = found[0].curve, found[-1].curve
    return bootstrap_mean(rows(last) - rows(first), first.groups)
