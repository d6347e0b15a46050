"""Is a prompt token worth more where a token is more text?

Two small models of the same text, one in tokens of one character and one in tokens of four: bits a character of a span
under prompts of growing length, by the characters of context that the prompts stand in place of, and after the text
itself.
"""

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.information_curve import Numbers
from sonde.studies.options import Count, Folder
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.prompts.granularity import CharacterCurves
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run


@dataclass(frozen=True)
class TokenGranularityConfig(Runnable):
    """Compare prompts of a model of 1-character tokens with prompts of a model of 4-character tokens, by the character.

    Example: sonde run token-granularity --training 6000
    """

    words = ("sonde", "run", "token-granularity")

    sizes: Numbers = (1, 4)
    """Characters a token of each model: 1, 2 or 4."""
    training: Count = 1500
    """Training steps of each model, of 16 rows."""
    lengths: Numbers = (1, 4, 16)
    """Numbers of prompt tokens, besides none."""
    contexts: Numbers = (0, 4, 8, 16, 32, 64)
    """Characters of real text to compare with."""
    rows: Count = 256
    """Rows that prompts are trained on, and as many that they are tested on."""
    restarts: Count = 2
    """Prompts trained at each length."""
    lr: Annotated[float, arg(metavar="LR")] = 0.3
    """Learning rate in units of the embedding's RMS."""
    steps: Count = 150
    """Training steps of each prompt."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "token-granularity",
    summary="prompts of models with 1-character and with 4-character tokens, compared by the character",
    paper="Nordby 2025, Soft Prompts for Evaluation: Measuring Conditional Distance of Capabilities (arXiv:2505.14943)",
)
def token_granularity(config: TokenGranularityConfig) -> Path:
    """Train the models and the prompts of `config` and write the report. Returns its path.

    Raises `SondeError` for anything wrong with the options or the folder, before any training.
    """
    from sonde.prompts.granularity import CONTEXT, SPAN, Spelling

    check_options(config)
    sizes, contexts = sorted(set(config.sizes)), sorted({0, *config.contexts})
    if len(sizes) < 2:
        raise SondeError(f"--sizes takes two or more different ones of 1, 2 and 4, not {' '.join(map(str, sizes))}")
    spellings = [Spelling(k) for k in sizes]
    if any(m % sizes[-1] or m > CONTEXT for m in contexts) or len(contexts) < 2:
        raise SondeError(f"--contexts are multiples of {sizes[-1]} up to {CONTEXT}, not {' '.join(map(str, contexts))}")
    if not config.lengths or min(*config.lengths, config.training, config.restarts, config.steps) < 1:
        raise SondeError("--lengths, --training, --restarts and --steps are numbers above 0")
    if config.rows < 8 or not config.lr > 0:
        raise SondeError(f"--rows is {config.rows} and --lr {config.lr}: give 8 rows or more and a rate above 0")
    subject = Named(" and ".join(f"{k}-character" for k in sizes) + " tokens")
    with open_run("token-granularity", config, subject) as run:
        found = [_step(run, spelling, contexts, config) for spelling in spellings]
        return publish(
            run,
            subject,
            Read(config.training * 16 * (CONTEXT + SPAN)),
            [_chapter(found, config, shlex.join(config.command()))],
            title="Is a prompt token worth more where a token is more text?",
            source="four languages of 35 words (sonde.data.markov_language), generated",
            timings=dict(run.timings),
        )


def _step(run: "Run", spelling: Any, contexts: list[int], config: TokenGranularityConfig) -> "CharacterCurves":
    import torch

    from sonde.prompts.granularity import CharacterCurves, character_curves, train_speller

    name = f"tokens-{spelling.k}"
    if not run.done(name):
        lm = train_speller(spelling, steps=config.training, seed=config.seed, checkpoint=run.checkpoint(name))
        curves = character_curves(
            lm,
            spelling,
            lengths=sorted(set(config.lengths)),
            contexts=contexts,
            rows=config.rows,
            restarts=config.restarts,
            steps=config.steps,
            lr=config.lr,
            seed=config.seed,
        )
        tree = {key: value if key == "k" else torch.as_tensor(value) for key, value in asdict(curves).items()}
        run.finish(name, tree)
    kept = run.result(name)
    return CharacterCurves(
        kept["k"],
        tuple(kept["lengths"].tolist()),
        kept["prompted"].numpy(),
        tuple(kept["contexts"].tolist()),
        kept["read"].numpy(),
    )


def _chapter(found: "list[CharacterCurves]", config: TokenGranularityConfig, command: str) -> "Chapter":
    from sonde.prompts.granularity import CONTEXT, LANGUAGES, SPAN, entropy
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import paired_difference

    common: dict[str, Any] = {"chapter": "granularity", "command": command}
    common |= {"figures": ("granularity.curves",), "tables": ("granularity.lengths",)}
    findings, told = [], math.log2(LANGUAGES)
    for one in found:
        gains = (one.prompted[0] - one.prompted[1:]) * SPAN
        best = int(gains.mean(1).argmax())
        gain = paired_difference(gains[best], 0 * gains[best])
        findings.append(
            Finding.of(
                gain,
                id=f"granularity.delivered-{one.k}",
                sentence=f"Before {one.k}-character tokens, prompts of {one.lengths[best + 1]} help most; to be told"
                f" which of {LANGUAGES} languages is spoken saves an ideal reader {told:g} bits at most.",
                metric=f"bits of the span with no prompt less those with {one.lengths[best + 1]} vectors",
                unit="bits",
                better="higher",
                control=Control("no prompt", 0.0),
                **common,
            )
        )
    small, large = found[0], found[-1]
    shared = sorted(set(small.replaced[1:]) & set(large.replaced[1:]))
    for characters in shared:
        ours, theirs = (
            (one.prompted[0] - one.prompted[one.replaced.index(characters)]) * SPAN for one in (large, small)
        )
        gap = paired_difference(ours, theirs)
        which = "more" if gap.low > 0 else "less" if gap.high < 0 else "neither clearly more nor less"
        findings.append(
            Finding.of(
                gap,
                id=f"granularity.same-{characters}",
                sentence=f"In place of {characters} characters, prompts of {characters // large.k} before"
                f" {large.k}-character tokens deliver {which} than {characters // small.k} before {small.k}-character"
                " ones.",
                metric=f"bits delivered before {large.k}-character tokens less those before {small.k}-character ones",
                unit="bits",
                control=Control("no difference", 0.0),
                **common,
            )
        )
    rows, table = [], []
    for one in found:
        for n, characters in zip(one.lengths, one.replaced, strict=True):
            bits, worth = one.bits(n), one.worth(n)
            rows.append(_point(f"prompt, {one.k}-character", characters, bits))
            worth_text = f"over {one.contexts[-1]}" if math.isinf(worth) else f"{worth:.1f}"
            table.append([one.k, "prompt", n, characters, bits.estimate, bits.low, bits.high, worth_text])
        for m in one.contexts:
            bits = one.after(m)
            rows.append(_point(f"text, {one.k}-character", m, bits))
            table.append([one.k, "text", m // one.k, m, bits.estimate, bits.low, bits.high, str(m)])
    chart = chart_kinds.lines(
        rows,
        x="x",
        y="y",
        series="series",
        low="low",
        high="high",
        control=[f"text, {one.k}-character" for one in found],
        title="Prompts by the characters of context that they replace",
        subtitle=f"{SPAN} characters of {len(small.prompted[0])} unseen rows, 95 % bands; entropy of the language"
        f" {entropy():.2f}",
        x_title="characters of context (text), or in whose place vectors stand",
        y_title="bits per character",
    )
    return Chapter(
        id="granularity",
        question="Is a prompt token worth more where a token is more text?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(id="granularity.curves", chart=chart, caption="Bits a character after text and under prompts."),
            Table(
                id="granularity.lengths",
                caption="Bits a character; worth: characters of real text that help as much",
                columns=[
                    "characters a token",
                    "before the span",
                    "tokens",
                    "characters",
                    "bits",
                    "low",
                    "high",
                    "worth",
                ],
                rows=table,
            ),
        ],
        not_shown="Natural text, larger models, tokens of varying length. A prompt for a set of texts can say what"
        " they have in common, here the language, and not what stood right before each span.",
        how=(
            f"GPT-NeoX of width 64 and two layers, {config.training} steps of 16 rows of {CONTEXT + SPAN} characters,"
            f" the same rows for each size of token; rows are of {LANGUAGES} languages of the same words, prompts are"
            f" trained on rows of one. The last {SPAN} characters of a row are scored: after nothing, vectors, or text."
        ),
    )


def _point(series: str, x: int, bits: Any) -> dict[str, Any]:
    return {"series": series, "x": x, "y": bits.estimate, "low": bits.low, "high": bits.high}
