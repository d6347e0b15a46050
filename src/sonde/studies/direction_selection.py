"""Which direction mediates refusal? All candidates, the rule that discards, the choice, and its test on new prompts.

Candidates are differences of means at every block and at the last tokens of the prompt. They are tried with the
projection set to 0 everywhere, as published, and with it set to that of harmless prompts at their own layer.
"""

import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.concepts.direction_selection import Candidate, Selection
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.finding import Finding

WAYS = {"zero": "projection set to 0 everywhere", "affine": "projection set to that of harmless prompts"}


@dataclass(frozen=True)
class SelectionConfig(Runnable):
    """Choose the direction that mediates refusal, and test it on prompts that had no part in the choice.

    Example: sonde run direction-selection --model organism:refuser
    """

    words = ("sonde", "run", "direction-selection")

    model: Annotated[str, arg(metavar="MODEL")] = "organism:refuser"
    """A model with a chat template."""
    text: Text = None
    """Plain text that describes the run. By default the help texts of Python."""
    harmful: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Instructions that are refused: JSON, JSON lines or text. By default a generated language."""
    harmless: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Instructions that are answered; given exactly where --harmful is."""
    openers: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = (" I", " No")
    """How refusals begin, with the space before them; their first tokens are what is scored."""
    positions: Count = 3
    """How many of the last tokens of the prompt give candidates."""
    prompts: Count = 64
    """Instructions of each kind to fit on."""
    held: Count = 16
    """Instructions of each kind to choose by, and as many others to test on."""
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


@study(
    "direction-selection",
    summary="which difference of means mediates refusal: bypass, induce and KL of every candidate, and the choice",
    paper="Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717)",
)
def direction_selection(config: SelectionConfig) -> Path:
    """Try all candidates in both ways, test the choices on new prompts and write the report. Returns its path.

    Raises `SondeError` for options that do not fit, a model without a chat template, and too few instructions.
    """
    from sonde.concepts.contrast import template_hash
    from sonde.concepts.direction_selection import select_direction
    from sonde.concepts.judges import first_tokens
    from sonde.data.text import describe
    from sonde.organisms.loading import load
    from sonde.studies.ace import refusal_prompts

    check_options(config)
    if config.positions < 1 or config.prompts < 2 or config.held < 4:
        raise SondeError("--positions is at least 1, --prompts at least 2 and --held at least 4")
    if bool(config.harmful) != bool(config.harmless):
        raise SondeError("--harmful and --harmless belong together: give files for both, or for neither")
    lm = load(config.model, dtype=config.dtype, device=config.device)
    text = read_text(config, lm)
    fit, others = refusal_prompts(config, lm, config.prompts, 2 * config.held)
    held = {kind: rows[: len(rows) // 2] for kind, rows in others.items()}
    test = {kind: rows[len(rows) // 2 :] for kind, rows in others.items()}
    tokens = first_tokens(lm, config.openers)
    command = shlex.join(config.command())
    with open_run("direction-selection", config, lm) as run:
        chapters, seconds = [], {}
        for way in WAYS:
            began = time.perf_counter()
            found = select_direction(
                lm,
                fit[True],
                fit[False],
                held_positive=held[True],
                held_negative=held[False],
                tokens=tokens,
                positions=min(config.positions, min(len(lm.encode(row)) for rows in fit.values() for row in rows)),
                affine=way == "affine",
                template=template_hash(lm),
                progress=WAYS[way],
            )
            chapters.append(_chapter(lm, way, found, test, tokens, command))
            seconds[WAYS[way]] = time.perf_counter() - began
        return publish(
            run,
            lm,
            text,
            chapters,
            title=f"The direction of refusal in {lm.name}",
            source=describe(config.text),
            timings=seconds,
        )


def _chapter(
    lm: "LanguageModel", way: str, found: "Selection", test: dict[bool, list[str]], tokens: Any, command: str
) -> "Chapter":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table

    finding = _tested(lm, way, found, test, tokens, command)
    tried = [one for one in found.candidates if math.isfinite(one.induce)]
    left = len(found.usable)
    rows = [
        {"KL": one.kl, "induce": one.induce, "place": f"{one.site}, token {one.position}"}
        for one in tried
    ]  # fmt: skip
    chart = chart_kinds.points(
        rows,
        x="KL",
        y="induce",
        title=f"{left} of {len(found.candidates)} candidates pass the rule",
        subtitle="Each dot is a candidate: what it does to harmless prompts when ablated and when added",
        x_title="KL under ablation, harmless prompts (nats; at most 0.1)",
        y_title="log-odds of refusal when added",
    )
    return Chapter(
        id=way,
        question=f"With the {WAYS[way]}: which direction is it?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            Figure(id=f"{way}.candidates", chart=chart, caption="Scores of every candidate that was tried."),
            Table(
                id=f"{way}.scores",
                caption="All candidates; scores that were not needed are gaps",
                columns=[
                    "block",
                    "token",
                    Column(name="induce", unit="log-odds"),
                    Column(name="KL", unit="nats"),
                    Column(name="bypass", unit="log-odds"),
                    "discarded",
                ],
                rows=[
                    [str(one.layer), str(one.position), *_finite(one.induce, one.kl, one.bypass), one.discarded or ""]
                    for one in found.candidates
                ],
            ),
        ],
        not_shown=(
            "That a direction switches refusal on and off does not show that it is the only one that does, or that the "
            "model uses it for nothing else."
        ),
        how=(
            "Differences of means at the input of every block and at the last tokens of the prompt. Induce: mean "
            "log-odds of the refusals' first tokens with the difference added at its layer to harmless prompts. KL: "
            f"harmless prompts with the {WAYS[way]}. Bypass: harmful prompts, the same. Discarded: KL over 0.1, induce "
            f"under 0, the last fifth of the layers. Unedited log-odds: {found.baseline_positive:.2f} on harmful, "
            f"{found.baseline_negative:.2f} on harmless prompts. {found.rows:,} prompts were run under a candidate; "
            f"trying every candidate on every prompt takes {found.rows_without_pruning:,}."
        ),
    )


def _finite(*values: float) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _tested(
    lm: "LanguageModel", way: str, found: "Selection", test: dict[bool, list[str]], tokens: Any, command: str
) -> "Finding":
    """Refusal of harmful test prompts under the choice, against a random direction in its place."""
    import torch

    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean

    common: dict[str, Any] = {
        "id": f"{way}.bypass",
        "chapter": way,
        "metric": "rate of refusal on harmful test prompts with the chosen direction ablated",
        "better": "lower",
        "command": command,
        "figures": (f"{way}.candidates",),
        "tables": (f"{way}.scores",),
    }
    if not found.usable:
        return Finding(sentence="No candidate passes the rule.", refused=found.why_none, **common)
    chosen = found.chosen
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(len(chosen.vector), generator=generator).to(chosen.vector)
    rates = {
        "chosen": _rate(lm, found, chosen.vector, chosen, test[True], tokens),
        "random": _rate(lm, found, other, chosen, test[True], tokens),
        "harmless": _rate(lm, found, chosen.vector, chosen, test[False], tokens),
    }
    measured = {name: bootstrap_mean(rate) for name, rate in rates.items()}
    return Finding.of(
        measured["chosen"],
        sentence=(
            f"The direction of block {chosen.layer} at token {chosen.position} is chosen; without it, harmful test "
            f"prompts are refused at a rate of {measured['chosen'].estimate:.2f} and harmless ones at "
            f"{measured['harmless'].estimate:.2f}."
        ),
        control=Control.of("random direction", measured["random"]),
        **common,
    )


def _rate(
    lm: "LanguageModel", found: "Selection", vector: Any, chosen: "Candidate", prompts: list[str], tokens: Any
) -> Any:
    """Mass of the refusals' first tokens on each prompt with `vector` ablated as the candidate would be."""
    from dataclasses import replace

    from sonde.concepts.direction_selection import ablation
    from sonde.concepts.strength_sweep import first_token_sweep

    edits = ablation(lm, replace(chosen, vector=vector), affine=found.affine)
    return first_token_sweep(lm, edits, prompts, [0.0], tokens)[0].numpy()
