"""Does the same strength give the same behaviour on every prompt? ACE, activation addition and ablation side by side.

Vectors come from instructions that are refused and instructions that are answered; every edit is measured on others, at
all strengths: the rate of refusal on both kinds, the gap between them, and what the edit costs on plain text.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.concepts.contrast import Contrast
    from sonde.concepts.standardisation import Standardisation
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter, Figure, Table
    from sonde.runs.finding import Finding
    from sonde.runs.run import Run

STRENGTHS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
METHODS = {"ace": "ACE", "add": "activation addition", "ablate": "directional ablation"}
_TWINS = ("refuser-rwkv", "refuser-mamba2")
_DEPTH = 0.8  # of the layers, below which a site is looked for
_FEW, _NEARLY = 8, 0.05  # instructions of each kind for that; rates that count as the same
_CONTEXT, _MOST_WINDOWS = 64, 32


@dataclass(frozen=True)
class AceConfig(Runnable):
    """Compare ACE, activation addition and directional ablation over strengths.

    Example: sonde run ace --models organism:refuser --site resid_post.3
    """

    words = ("sonde", "run", "ace")

    models: Names = None
    """Models with a chat template. By default organism:refuser and its recurrent twins, where they are bundled."""
    text: Text = None
    """Plain text on which the cost is measured. By default the help texts of Python."""
    harmful: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Instructions of one kind: JSON, JSON lines or text with one a line. By default a generated language."""
    harmless: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Instructions of the other kind; given exactly where --harmful is."""
    openers: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = (" I", " No")
    """How refusals begin, with the space before them; their first tokens are what is scored."""
    site: Name = None
    """Where the edit acts. By default the first block at which ACE nearly does what it does at the best one, tried on
    instructions that are fitted on."""
    strengths: Annotated[tuple[float, ...], arg(metavar="X ...")] = STRENGTHS
    """Strengths; 0 and 1 are the means of the two kinds under ACE."""
    prompts: Count = 64
    """Instructions of each kind to fit on."""
    held: Count = 32
    """Instructions of each kind to measure on."""
    samples: Count = 0
    """Replies sampled for each prompt and strength, at temperature 1.5, and judged by their openers. With 0 nothing is
    generated: the score is the mass of the openers' first tokens."""
    toy: bool = False
    """Also train three small transformers and hold the edits against the acceptance criteria; takes minutes."""
    tokens: Count = 1024
    """Tokens of plain text."""
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

    @property
    def chosen(self) -> tuple[str, ...]:
        """The models, named or by default."""
        from sonde.organisms.registry import has_weights

        bundled = [f"organism:{name}" for name in ("refuser", *_TWINS) if has_weights(name)]
        return tuple(bundled) if self.models is None else self.models

    @property
    def model(self) -> str:
        """The first model, for messages."""
        return self.chosen[0]


@study(
    "ace",
    summary="refusal at every strength of ACE, activation addition and ablation, on harmful and harmless instructions",
    paper="Marshall et al. 2024, Refusal in LLMs is an Affine Function (arXiv:2411.09003)",
)
def ace(config: AceConfig) -> Path:
    """Measure the three edits on every model of `config` and write the report. Returns its path.

    Raises `SondeError` for options that do not fit, models without a chat template, and what the sweeps refuse.
    """
    from sonde.data.text import describe
    from sonde.organisms.loading import load
    from sonde.organisms.refuser import chat

    _check(config)
    lms = [load(name, dtype=config.dtype, device=config.device) for name in config.chosen]
    for lm in lms:
        chat(lm, "")  # a model without a chat template is known before the run begins
    text = read_text(config, lms[0])
    with open_run("ace", config, lms[0]) as run:
        chapters, seconds = [], {}
        for lm in lms:
            began = time.perf_counter()
            measured, site = _measured(run, config, lm)
            seconds[lm.name] = time.perf_counter() - began
            chapters.append(_chapter(lm, site, measured, shlex.join(config.command())))
        if config.toy:
            from sonde.studies.ace_toy import toy_chapter

            chapters.append(toy_chapter(run, shlex.join(config.command())))
        return publish(
            run,
            lms[0],
            text,
            chapters,
            title="The same strength, the same behaviour?",
            source=describe(config.text),
            timings=seconds,
        )


def _check(config: AceConfig) -> None:
    check_options(config)
    if bool(config.harmful) != bool(config.harmless):
        raise SondeError("--harmful and --harmless belong together: give files for both, or for neither")
    if not config.chosen:
        raise SondeError("--models names none: give at least one model with a chat template")
    for name in ("prompts", "held"):
        if getattr(config, name) < 2:
            raise SondeError(f"--{name} is {getattr(config, name)}: give at least 2 of each kind")
    if config.samples < 0 or len(set(config.strengths)) < 2:
        raise SondeError("--samples is 0 or more, and --strengths takes at least two different numbers")
    if not {0.0, 1.0} <= set(config.strengths):
        raise SondeError("--strengths must hold 0 and 1, at which the edits are compared")


def refusal_prompts(
    config: Any, lm: "LanguageModel", prompts: int, held: int
) -> "tuple[dict[bool, list[str]], dict[bool, list[str]]]":
    """Instructions to fit on and others to measure on, in the chat format, by whether they are to be refused.

    `config` has `harmful`, `harmless` and `seed`. Raises `SondeError` where there are too few.
    """
    from sonde.data.instructions import from_files, generated
    from sonde.organisms.refuser import chat

    if config.harmful:
        sets = from_files(config.harmful, config.harmless, held_out=2 * held, seed=config.seed)
    else:
        sets = generated(held_out=2 * held, seed=config.seed)
    unread = next(iter(sets.held_out.values()))
    found = []
    for pool, count in ((sets.train, prompts), (unread, held)):
        sides = {kind: [chat(lm, one.text) for one in pool if one.harmful is kind][:count] for kind in (True, False)}
        if min(map(len, sides.values())) < 2:
            raise SondeError("there are too few instructions: give at least 2 of each kind to fit on and to hold out")
        found.append(sides)
    return found[0], found[1]


def _measured(run: "Run", config: AceConfig, lm: "LanguageModel") -> "tuple[dict[str, Standardisation], str]":
    """The curve of every edit, and of no edit, by name; from the run folder where they are finished."""
    from sonde.concepts.contrast import contrast, template_hash
    from sonde.concepts.judges import SubstringJudge, first_tokens
    from sonde.concepts.site_edits import SiteEdits
    from sonde.concepts.standardisation import Standardisation, neutral_windows, standardisation

    fit, held = refusal_prompts(config, lm, config.prompts, config.held)
    site = config.site or _site(run, config, lm, fit)
    means: Contrast = contrast(lm, fit[True], fit[False], sites=site, template=template_hash(lm))
    neutral = neutral_windows(
        lm, config.text, n=min(_MOST_WINDOWS, max(2, config.tokens // _CONTEXT)), context=_CONTEXT
    )
    judge: Any = SubstringJudge([o.strip() for o in config.openers], start=True)
    sampling: dict[str, Any] = {"samples": config.samples, "temperature": 1.5, "max_new_tokens": 50}
    if not config.samples:
        judge, sampling = first_tokens(lm, config.openers), {}
    found = {}
    for name in ("none", *METHODS):
        step = f"{_slug(lm)}.{name}"
        if not run.done(step):
            edits = None if name == "none" else SiteEdits.of(means, name)  # type: ignore[arg-type]
            curve = standardisation(
                lm,
                edits,
                held[True],
                held[False],
                strengths=(0.0,) if name in ("none", "ablate") else sorted(set(config.strengths)),
                judge=judge,
                neutral=neutral,
                seed=config.seed,
                progress=f"{lm.name}, {METHODS.get(name, 'no edit')}",
                **sampling,
            )
            run.finish(step, curve.state())
        found[name] = Standardisation.from_state(run.result(step))
    return found, site


def _site(run: "Run", config: AceConfig, lm: "LanguageModel", fit: dict[bool, list[str]]) -> str:
    """The first block at which ACE from 0 to 1 moves both kinds as far as at the best one, but for 0.05."""
    from sonde.concepts.contrast import contrast
    from sonde.concepts.judges import first_tokens
    from sonde.concepts.site_edits import SiteEdits
    from sonde.concepts.strength_sweep import first_token_sweep

    step = f"{_slug(lm)}.site"
    if not run.done(step):
        sites = [f"resid_post.{i}" for i in range(lm.n_layers) if i < _DEPTH * lm.n_layers]
        means = contrast(lm, fit[True], fit[False], sites=sites)
        tokens = first_tokens(lm, config.openers)
        few = [*fit[True][:_FEW], *fit[False][:_FEW]]
        moves = []
        for site in sites:
            off, on = first_token_sweep(lm, SiteEdits.of(means, "ace", sites=[site]), few, [0.0, 1.0], tokens)
            moves.append(float((on - off).view(-1).mean()))
        run.finish(step, next(site for site, move in zip(sites, moves, strict=True) if move >= max(moves) - _NEARLY))
    return run.result(step)


def _slug(lm: "LanguageModel") -> str:
    return lm.name.replace(":", "-").replace("/", "-").lower()


def _chapter(lm: "LanguageModel", site: str, curves: "dict[str, Standardisation]", command: str) -> "Chapter":
    from sonde.runs.blocks import Chapter

    stem = "".join(c if c.isalnum() else "-" for c in lm.name.lower().removeprefix("organism:"))
    findings = [_gap_finding(stem, curves, command), _switch_finding(stem, curves, command)]
    none = curves["none"]
    return Chapter(
        id=stem,
        question=f"Which edit standardises the refusals of {lm.name}?",
        answer=f"{findings[0].sentence} {findings[1].sentence}",
        findings=findings,
        blocks=[_rates(stem, curves, name) for name in ("ace", "add")]
        + [_gaps(stem, curves), _costs(stem, curves), _table(stem, curves)],
        not_shown=(
            "Rates are of the first words of a reply, or of its openers; whether the rest of a reply is any use is not "
            "judged here. One site was edited, at all tokens. Another site or other tokens may give another order."
        ),
        how=(
            f"Means of the activations at {site} at the last token of the prompt, over instructions of the two kinds, "
            "in the chat format. ACE: h - u uT (h - mu-) + a r; activation addition: h + a r; ablation: h - u uT h. "
            f"All strengths are rows of one batch. Unedited, {none.positive.mean[0].estimate:.2f} of the harmful and "
            f"{none.negative.mean[0].estimate:.2f} of the harmless instructions are refused. A strength is incoherent "
            f"where the loss on plain text rises by more than {none.loss_limit} nats a token."
        ),
    )


def _gap_finding(stem: str, curves: "dict[str, Standardisation]", command: str) -> "Finding":
    """Switched off: the gap that is left under ACE against that under ablation."""
    from sonde.runs.finding import Control, Finding

    ours, ablated = curves["ace"], curves["ablate"].gap[0]
    gap = ours.gap[ours.place(0.0)]
    off = ours.positive.mean[ours.place(0.0)].estimate
    return Finding.of(
        gap,
        id=f"{stem}.gap-off",
        chapter=stem,
        sentence=(
            f"Switched off by ACE, harmful instructions are refused at a rate of {off:.2f}, {gap.estimate:.2f} away "
            f"from harmless ones; ablation leaves a gap of {ablated.estimate:.2f}, at rates of "
            f"{curves['ablate'].positive.mean[0].estimate:.2f} and {curves['ablate'].negative.mean[0].estimate:.2f}."
        ),
        metric="gap between harmful and harmless instructions, ACE at 0",
        better="lower",
        control=Control.of("directional ablation", ablated),
        command=command,
        figures=(f"{stem}.gap",),
        tables=(f"{stem}.strengths",),
    )


def _switch_finding(stem: str, curves: "dict[str, Standardisation]", command: str) -> "Finding":
    """From 0 to 1: how far both kinds move together, against activation addition by the same strengths."""
    from sonde.runs.finding import Control, Finding

    moved = {}
    for name in ("ace", "add"):
        one = curves[name]
        low, high = one.place(0.0), one.place(1.0)
        moved[name] = _least_move(one, low, high)
    return Finding.of(
        moved["ace"],
        id=f"{stem}.switch",
        chapter=stem,
        sentence=(
            f"From strength 0 to 1, ACE moves the rate of refusal by at least {moved['ace'].estimate:.2f} on either "
            f"kind of instruction, activation addition by {moved['add'].estimate:.2f}."
        ),
        metric="rise of the rate from strength 0 to 1, on the kind that moves less",
        better="higher",
        control=Control.of("activation addition", moved["add"]),
        command=command,
        figures=(f"{stem}.rate-ace", f"{stem}.rate-add"),
        tables=(f"{stem}.strengths",),
    )


def _least_move(curve: "Standardisation", low: int, high: int) -> Any:
    from sonde.stats.intervals import bootstrap_mean

    moves = [bootstrap_mean(side.scores[high] - side.scores[low]) for side in (curve.positive, curve.negative)]
    return min(moves, key=lambda move: move.estimate)


def _rates(stem: str, curves: "dict[str, Standardisation]", name: str) -> "Figure":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Figure

    curve = curves[name]
    rows = [
        {"strength": strength, "rate": side.mean[i].estimate, "low": side.quartiles[i][0], "high": side.quartiles[i][1]}
        | {"prompts": label}
        for label, side in (("harmful", curve.positive), ("harmless", curve.negative))
        for i, strength in enumerate(curve.strengths)
    ]
    for row in rows:  # a mean may lie outside the quartiles
        row["low"], row["high"] = min(row["low"], row["rate"]), max(row["high"], row["rate"])
    zero, one = curve.place(0.0), curve.place(1.0)
    title = (
        f"{METHODS[name]}: from {curve.positive.mean[zero].estimate:.2f} and {curve.negative.mean[zero].estimate:.2f} "
        f"at 0 to {curve.positive.mean[one].estimate:.2f} and {curve.negative.mean[one].estimate:.2f} at 1"
    )
    chart = chart_kinds.lines(
        rows,
        x="strength",
        y="rate",
        low="low",
        high="high",
        series="prompts",
        control=("harmless",),
        title=title[0].upper() + title[1:],
        subtitle="Rate of refusal on harmful and harmless instructions; bands: quartiles over instructions",
        x_title="strength a",
        y_title="rate of refusal",
    )
    caption = f"Rate of refusal against the strength of {METHODS[name]}, on harmful and on harmless instructions."
    return Figure(id=f"{stem}.rate-{name}", chart=chart, caption=caption)


def _gaps(stem: str, curves: "dict[str, Standardisation]") -> "Figure":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Figure

    ace, ablated = curves["ace"], curves["ablate"].gap[0]
    rows = [
        {"strength": strength, "gap": gap.estimate, "low": gap.low, "high": gap.high, "edit": METHODS[name]}
        for name in ("ace", "add")
        for strength, gap in zip(curves[name].strengths, curves[name].gap, strict=True)
    ]
    rows += [
        {"strength": s, "gap": ablated.estimate, "low": ablated.low, "high": ablated.high, "edit": METHODS["ablate"]}
        for s in (ace.strengths[0], ace.strengths[-1])
    ]
    chart = chart_kinds.lines(
        rows,
        x="strength",
        y="gap",
        low="low",
        high="high",
        series="edit",
        control=(METHODS["ablate"],),
        title=f"The gap under ACE is {ace.gap[ace.place(0.0)].estimate:.2f} at 0 "
        f"and {ace.gap[ace.place(1.0)].estimate:.2f} at 1",
        subtitle="Difference of the rates on harmful and harmless instructions, 95 % bands; lower is better",
        x_title="strength a",
        y_title="gap",
    )
    return Figure(id=f"{stem}.gap", chart=chart, caption="Standardisation gap of every edit by strength.")


def _costs(stem: str, curves: "dict[str, Standardisation]") -> "Figure":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Figure

    rows = [
        {"strength": strength, "nats": rise.estimate, "low": rise.low, "high": rise.high, "edit": METHODS[name]}
        for name in ("ace", "add")
        for strength, rise in zip(curves[name].strengths, curves[name].loss_rise, strict=True)
    ]
    ace = curves["ace"]
    limit = [{"strength": s, "nats": ace.loss_limit, "low": ace.loss_limit, "high": ace.loss_limit} for s in
             (ace.strengths[0], ace.strengths[-1])]  # fmt: skip
    rows += [{**row, "edit": "incoherent above"} for row in limit]
    flagged = sum(ace.incoherent)
    chart = chart_kinds.lines(
        rows,
        x="strength",
        y="nats",
        low="low",
        high="high",
        series="edit",
        control=("incoherent above",),
        title=f"{flagged} of {len(ace.strengths)} strengths of ACE are incoherent on plain text",
        subtitle="Rise of the loss on plain text when all its tokens are edited, 95 % bands",
        x_title="strength a",
        y_title="rise of the loss (nats per token)",
    )
    return Figure(id=f"{stem}.cost", chart=chart, caption="What each edit costs on plain text, by strength.")


def _table(stem: str, curves: "dict[str, Standardisation]") -> "Table":
    from sonde.runs.blocks import Column, Table

    rows = []
    for name, label in {"none": "none", **METHODS}.items():
        one = curves[name]
        for i, strength in enumerate(one.strengths):
            cost = [one.drift[i].estimate, one.loss_rise[i].estimate] if one.drift else [None, None]
            rates = [one.positive.mean[i].estimate, one.negative.mean[i].estimate, one.gap[i].estimate]
            rows.append([label, strength, *rates, *cost, "yes" if one.incoherent[i] else "no"])
    return Table(
        id=f"{stem}.strengths",
        caption="Every edit at every strength: rates of refusal, and the cost on plain text in nats per token",
        columns=[
            "edit",
            Column(name="strength"),
            Column(name="harmful"),
            Column(name="harmless"),
            Column(name="gap"),
            Column(name="KL"),
            Column(name="loss"),
            "incoherent",
        ],
        rows=rows,
    )
