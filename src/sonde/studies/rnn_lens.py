"""Do lenses read recurrent networks as they read transformers?

The same text through models of different architecture, and a logit lens, a bias-only lens (the control: all that it
knows is the mean) and a tuned lens at the input of every block. Models have different numbers of blocks, so layers are
compared by fraction of depth, and bits per byte do not depend on the tokenizer. Paulo, Marshall and Belrose (2024,
arXiv:2404.05971) found that the tuned lens transfers to Mamba and RWKV, where the logit lens fails in the early layers.
"""

import math
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Text
from sonde.studies.registry import study
from sonde.studies.running import Named, Runnable, check_options, halves, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.lens.evaluation import LensScores
    from sonde.lens.tuned import TunedLens
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter, Figure, Table
    from sonde.runs.finding import Finding, Paper
    from sonde.runs.run import Run
    from sonde.stats.intervals import Interval

KINDS = ("tuned", "logit", "bias")
_BITS = 1 / math.log(2)
# Bits per byte of the tuned lens at the middle block, read off the figures of the paper.
_PAPER = {"mamba": (2.4, "Mamba 1.4B"), "rwkv": (2.1, "RWKV-4 1.5B"), "gpt_neox": (1.7, "Pythia 1.4B")}


@dataclass(frozen=True)
class RnnLensConfig(Runnable):
    """Read transformers and recurrent networks through the same lenses, by fraction of depth.

    Example: sonde run rnn-lens --models organism:pebble organism:pebble-rwkv --tokens 32768
    """

    words = ("sonde", "run", "rnn-lens")

    models: Annotated[tuple[str, ...], arg(metavar="MODEL ...")] = (
        "organism:pebble",
        "organism:pebble-rwkv",
        "organism:pebble-mamba2",
    )
    """Local folders in Hugging Face format, names on the hub, or organism:NAME."""
    text: Text = None
    """What is read. By default the help texts of Python."""
    tokens: Count = 65536
    """How many tokens of the text each model reads: half to train its lenses, half to score them."""
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


@dataclass(frozen=True)
class _Read:
    """What was measured of one model."""

    name: str
    family: str
    recurs: bool
    scores: "dict[str, LensScores]"
    closer: "list[Interval]"
    seconds: float

    @property
    def fractions(self) -> list[float]:
        """Depth of each site, and 1 for the model's own output."""
        layers = len(self.scores["tuned"].sites)
        return [layer / layers for layer in range(layers + 1)]

    def bits_per_byte(self, kind: str) -> "list[Interval]":
        """Cross entropy of the next token at each site, and of the model's own output."""
        scores = self.scores[kind]
        return [nats.scaled(scores.bits_per_byte(1.0)) for nats in scores.cross_entropy]

    @property
    def middle(self) -> int:
        """The site at half of the depth."""
        return len(self.scores["tuned"].sites) // 2


@study(
    "rnn-lens",
    summary="lenses on transformers and recurrent networks: bits per byte by fraction of depth",
    paper="Paulo, Marshall & Belrose 2024, Does Transformer Interpretability Transfer to RNNs? (arXiv:2404.05971)",
)
def rnn_lens(config: RnnLensConfig) -> Path:
    """Train and score lenses on every model of `config` and write the report. Returns its path.

    Raises `SondeError` for no or repeated models, and anything wrong with a model, the text or the folder.
    """
    from sonde.data.text import describe
    from sonde.organisms.loading import load

    if not config.models or len(set(config.models)) < len(config.models):
        raise SondeError(f"--models takes one or more different models, not {' '.join(config.models) or 'none'}")
    check_options(config)
    loaded = [load(name, dtype=config.dtype, device=config.device) for name in config.models]
    for lm, name in zip(loaded, _labels(config.models), strict=True):
        lm.name = name
    texts = [read_text(SimpleNamespace(**vars(config), model=lm.name), lm) for lm in loaded]
    parts = [halves(text, describe(config.text)) for text in texts]
    with open_run("rnn-lens", config, Named("lenses", device=str(loaded[0].device))) as run:
        read = [_read(run, lm, *part, config.seed) for lm, part in zip(loaded, parts, strict=True)]
        return publish(
            run,
            Named.of(loaded),
            texts[0],
            [_chapter(read, shlex.join(config.command()))],
            title="Lenses by depth, in transformers and recurrent networks",
            source=describe(config.text),
            timings={one.name: one.seconds for one in read},
        )


def _read(run: "Run", lm: "LanguageModel", fit: "TokenBatches", held: "TokenBatches", seed: int) -> _Read:
    """Lenses of one model, from the run folder where they are trained, scored on the second half of the text."""
    from sonde.lens.evaluation import LensEvaluation
    from sonde.lens.tuned import TunedLens
    from sonde.lm.chunked import faster_scans
    from sonde.lm.stream import feed

    began = time.perf_counter()
    with faster_scans(lm.model):
        lenses = {kind: _lens(run, lm, fit, kind, seed) for kind in KINDS if kind != "logit"}
        evaluation = LensEvaluation(lm, {**lenses, "logit": TunedLens.logit(lm)})
        feed(lm, held, [evaluation], progress=f"scoring {lm.name}")
    return _Read(
        lm.name,
        lm.family,
        any(part in lm.check().states for part in ("recurrent", "conv", "shift")),
        evaluation.scores(),
        evaluation.difference("tuned", "logit"),
        time.perf_counter() - began,
    )


def _lens(run: "Run", lm: "LanguageModel", fit: "TokenBatches", kind: str, seed: int) -> "TunedLens":
    from sonde.lens.descent import LensTraining
    from sonde.lens.tuned import TunedLens

    step = f"{_slug(lm.name)}.{kind}"
    folder = run.path("lenses", step)
    if run.done(step):
        return TunedLens.load(folder, lm)
    if kind == "bias":
        settings = LensTraining(kind="bias", trainer="adam", steps=60, seed=seed)
    else:
        settings = LensTraining(seed=seed)
    lens = TunedLens.fit(lm, fit, settings, checkpoint=run.checkpoint(step), progress=f"{kind} lens of {lm.name}")
    lens.save(folder)
    run.finish(step, {})
    return lens


def _chapter(read: list[_Read], command: str) -> "Chapter":
    from sonde.runs.blocks import Chapter

    findings = [finding for one in read for finding in (_closer(one, command), _middle(one, command))]
    everywhere = [one.name for one in read if all(gap.high < 0 for gap in one.closer)]
    answer = (
        "Yes: the tuned lens is closer to the prediction than the logit lens at every site of every model."
        if len(everywhere) == len(read)
        else f"The tuned lens is closer than the logit lens at every site of {', '.join(everywhere) or 'no model'}."
    )
    return Chapter(
        id="depth",
        question="Do lenses read recurrent networks as they read transformers?",
        answer=answer,
        findings=findings,
        blocks=[_together(read), *(_alone(one) for one in read), _table(read)],
        not_shown=(
            "Small models of one size and one text. What a lens can read from a layer is not what the later layers "
            "use. The lenses read the residual stream; what only the recurrent state holds is not in it."
        ),
        how=(
            "Each lens reads the input of every block; lenses are trained on the first half of the text to give the "
            "model's own final distribution and scored on the second by the cross entropy of the next token, in bits "
            "per byte of text. The logit lens is untrained; the bias-only lens, the control, can shift the mean and "
            "nothing else. Depth 0 is the embedding, depth 1 the model's own output. Intervals: bootstrap over "
            "windows of text."
        ),
    )


def _closer(one: _Read, command: str) -> "Finding":
    from sonde.runs.finding import Control, Finding

    gaps = [gap.scaled(_BITS) for gap in one.closer]
    nearer = sum(gap.high < 0 for gap in gaps)
    where = f"at all {len(gaps)} sites" if nearer == len(gaps) else f"at {nearer} of {len(gaps)} sites"
    return Finding.of(
        max(gaps, key=lambda gap: gap.estimate),
        id=f"depth.closer.{_slug(one.name)}",
        chapter="depth",
        sentence=f"The tuned lens is closer to the prediction of {one.name} than the logit lens {where}.",
        metric="change of KL against the logit lens, at the site where it is least",
        unit="bits",
        better="lower",
        control=Control("logit lens", 0.0),
        command=command,
        figures=(f"depth.{_slug(one.name)}",),
        tables=("depth.table",),
    )


def _middle(one: _Read, command: str) -> "Finding":
    from sonde.runs.finding import Control, Finding
    from sonde.runs.report.numbers import number

    tuned, logit, bias = (one.bits_per_byte(kind)[one.middle] for kind in KINDS)
    final = one.bits_per_byte("tuned")[-1]
    return Finding.of(
        tuned,
        id=f"depth.middle.{_slug(one.name)}",
        chapter="depth",
        sentence=(
            f"Half-way through {one.name} ({'recurrent' if one.recurs else 'attention'}) the tuned lens reads "
            f"{number(tuned.estimate, 2)} bits per byte where the logit lens reads {number(logit.estimate, 2)}; the "
            f"model ends at {number(final.estimate, 2)}."
        ),
        metric=f"bits per byte of the tuned lens at the input of block {one.middle}",
        unit="bits/byte",
        better="lower",
        control=Control.of("bias-only lens", bias),
        paper=_paper(one.family),
        command=command,
        figures=("depth.together", f"depth.{_slug(one.name)}"),
        tables=("depth.table",),
    )


def _paper(family: str) -> "Paper | None":
    from sonde.runs.finding import Paper

    known = _PAPER.get("mamba" if family == "mamba2" else family)
    return None if known is None else Paper(*known, "Paulo et al. 2024, arXiv:2404.05971, figures")


def _together(read: list[_Read]) -> "Figure":
    """The tuned lens of all models over depth."""
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Figure

    rows = [
        {"depth": at, "model": one.name, "bits": bits.estimate, "low": bits.low, "high": bits.high}
        for one in read
        for at, bits in zip(one.fractions, one.bits_per_byte("tuned"), strict=True)
    ]
    middles = sorted(one.bits_per_byte("tuned")[one.middle].estimate for one in read)
    spread = f"{middles[0]:.2f} to {middles[-1]:.2f}" if len(read) > 1 else f"{middles[0]:.2f}"
    return Figure(
        id="depth.together",
        chart=chart_kinds.lines(
            rows,
            x="depth",
            y="bits",
            low="low",
            high="high",
            series="model",
            title=f"Half-way, the tuned lens reads {spread} bits per byte",
            subtitle="Cross entropy of the next token through the tuned lens; bands are 95 % intervals",
            x_title="fraction of depth",
            y_title="bits per byte",
        ),
        caption="Bits per byte of the tuned lens from the embedding (0) to the model's own output (1), by model.",
    )


def _alone(one: _Read) -> "Figure":
    """All lenses of one model over depth."""
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Figure

    rows = [
        {"depth": at, "lens": f"{kind} lens", "bits": bits.estimate, "low": bits.low, "high": bits.high}
        for kind in KINDS
        for at, bits in zip(one.fractions, one.bits_per_byte(kind), strict=True)
    ]
    first, final = one.bits_per_byte("logit")[0].estimate, one.bits_per_byte("logit")[-1].estimate
    return Figure(
        id=f"depth.{_slug(one.name)}",
        chart=chart_kinds.lines(
            rows,
            x="depth",
            y="bits",
            low="low",
            high="high",
            series="lens",
            title=f"{one.name}: the logit lens begins {first - final:.1f} bits per byte above the output",
            subtitle="Cross entropy of the next token; grey: a lens that can only shift the mean",
            x_title="fraction of depth",
            y_title="bits per byte",
            control=["bias lens"],
            log=first > 4 * final,
        ),
        caption=f"Bits per byte of the lenses of {one.name} from the embedding (0) to its own output (1).",
    )


def _table(read: list[_Read]) -> "Table":
    from sonde.runs.blocks import Column, Table

    rows = []
    for one in read:
        bits = {kind: one.bits_per_byte(kind) for kind in KINDS}
        for site, name in enumerate((*one.scores["tuned"].sites, "output")):
            kl = [
                _BITS * one.scores[kind].kl[site].estimate if name != "output" else 0.0 for kind in ("tuned", "logit")
            ]
            values = [bits[kind][site].estimate for kind in KINDS]
            rows.append([one.name, name, one.fractions[site], *values, *kl])
    return Table(
        id="depth.table",
        caption="Cross entropy by site in bits per byte, and KL to the model's own prediction in bits per token",
        columns=[
            "model",
            "site",
            Column(name="depth"),
            *(Column(name=f"{kind} lens", unit="bits/byte") for kind in KINDS),
            Column(name="KL tuned", unit="bits"),
            Column(name="KL logit", unit="bits"),
        ],
        rows=rows,
    )


def _labels(models: tuple[str, ...]) -> list[str]:
    """Names that fit into a chart: folders by their own name, where that tells them apart."""
    short = [Path(name).name if Path(name).is_dir() else name for name in models]
    return short if len({_slug(name) for name in short}) == len(short) else list(models)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("organism:")).strip("-")
