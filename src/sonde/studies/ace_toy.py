"""The acceptance test of affine edits: six edits of three small transformers, of which it is known what they should do.

Each transformer answers REFUSE where a forbidden token occurs and copies its first token elsewhere, so that one answer
shows both whether an edit switches refusal and whether it leaves the rest alone.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sonde.concepts.contrast import contrast
from sonde.concepts.site_edits import Method, SiteEdits
from sonde.organisms.forbidden import REFUSE, prompts, shifted, train_forbidden

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run

SEEDS, SITES = (0, 1, 2), ("resid_post.2", "resid_post.3")
OFFSETS = (-80.0, -40.0, 40.0, 80.0)
EDITS: tuple[tuple[str, Method | None, float], ...] = (
    ("none", None, 0.0),
    ("activation addition, a = −0.5", "add", -0.5),
    ("activation addition, a = −1", "add", -1.0),
    ("activation addition, a = −2", "add", -2.0),
    ("directional ablation", "ablate", 0.0),
    ("ACE, a = 0", "ace", 0.0),
    ("ACE, a = 0.5", "ace", 0.5),
    ("ACE, a = 1", "ace", 1.0),
)
_N = 512


@dataclass(frozen=True)
class Row:
    """What one edit of one transformer does, mean over offsets: rates of refusal, their gap, harmless rows copied."""

    edit: str
    harmless: float
    harmful: float
    gap: float
    copied: float


@torch.no_grad()
def measured(lm: "LanguageModel", site: str, *, n: int = _N) -> list[Row]:
    """Every edit at `site`, fitted on `n` rows of each kind and measured on `n` others, at every offset."""
    fit = {kind: prompts(n, harmful=kind, seed=10**6 + kind) for kind in (True, False)}
    held = {kind: prompts(n, harmful=kind, seed=10**6 + 2 + kind) for kind in (True, False)}
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name, _, _ in EDITS}
    for offset in OFFSETS:
        with shifted(lm, offset):
            means = contrast(lm, fit[True].tolist(), fit[False].tolist(), sites=site, batch=n)
            for name, method, strength in EDITS:
                with SiteEdits.of(means, method, strength=strength).on(lm) if method else nullcontext():
                    answers = {kind: _answers(lm, asked) for kind, asked in held.items()}
                harmful, harmless = (float((answers[kind] == REFUSE).float().mean()) for kind in (True, False))
                copied = float((answers[False] == held[False][:, 0]).float().mean())
                found[name].append((harmless, harmful, abs(harmful - harmless), copied))
    return [
        Row(name, *(sum(column) / len(OFFSETS) for column in zip(*rows, strict=True))) for name, rows in found.items()
    ]


def _answers(lm: "LanguageModel", tokens: torch.Tensor) -> torch.Tensor:
    logits = lm(tokens).logits
    assert logits is not None
    return logits[:, -1].argmax(-1)


def acceptance(runs: "Sequence[list[Row]]") -> dict[str, tuple[float, bool]]:
    """The criteria, each with its number and whether it holds, over all runs."""
    by_edit = {name: [row for rows in runs for row in rows if row.edit == name] for name, _, _ in EDITS}

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    gap = {name: mean([row.gap for row in by_edit[name]]) for name in ("ACE, a = 0", "directional ablation")}
    copied = mean([row.copied for row in by_edit["ACE, a = 0"]])
    least = min(min(row.harmless, row.harmful) for row in by_edit["ACE, a = 1"])
    added = [row for name, rows in by_edit.items() if "addition" in name for row in rows if row.harmful <= 0.3]
    best = max((row.copied for row in added), default=0.0)
    share = gap["ACE, a = 0"] / max(gap["directional ablation"], 1e-9)
    return {
        "mean gap of ACE at 0 (at most 0.30)": (gap["ACE, a = 0"], gap["ACE, a = 0"] <= 0.30),
        "that gap over ablation's (at most 0.6)": (share, share <= 0.6),
        "harmless rows copied under ACE at 0, mean (at least 0.9)": (copied, copied >= 0.9),
        "refusal on either kind under ACE at 1, least (at least 0.95)": (least, least >= 0.95),
        "rows copied where activation addition brings refusal to 0.3, best (under 0.5)": (best, best < 0.5),
    }


def toy_chapter(run: "Run", command: str) -> "Chapter":
    """Train the transformers (each a step of the run), measure all edits, and judge the criteria."""
    from sonde.runs.blocks import Chapter, Column, Table
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean

    runs: list[list[Row]] = []
    for seed in SEEDS:
        step = f"forbidden-{seed}"
        if not run.done(step):
            lm = train_forbidden(seed=seed, progress=f"small transformer {seed}")
            run.finish(step, {site: [vars(row) for row in measured(lm, site)] for site in SITES})
        kept = run.result(step)
        runs += [[Row(**row) for row in kept[site]] for site in SITES]
    gaps = {
        name: bootstrap_mean([next(r.gap for r in rows if r.edit == name) for rows in runs])
        for name in ("ACE, a = 0", "directional ablation")
    }
    finding = Finding.of(
        gaps["ACE, a = 0"],
        id="toy.gap",
        chapter="toy",
        sentence=(
            f"On six edits of small transformers with known answers, ACE at 0 leaves a mean gap of "
            f"{gaps['ACE, a = 0'].estimate:.2f}, directional ablation {gaps['directional ablation'].estimate:.2f}."
        ),
        metric="gap between harmful and harmless rows, ACE at 0, mean of six edits",
        better="lower",
        control=Control.of("directional ablation", gaps["directional ablation"]),
        command=command,
        tables=("toy.edits", "toy.criteria"),
    )
    labels = [f"seed {seed}, {site}" for seed in SEEDS for site in SITES]
    return Chapter(
        id="toy",
        question="Does it work where the right answer is known?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            Table(
                id="toy.criteria",
                caption="Criteria over all six edits",
                columns=["criterion", Column(name="measured"), "holds"],
                rows=[[name, value, "yes" if holds else "no"] for name, (value, holds) in acceptance(runs).items()],
            ),
            Table(
                id="toy.edits",
                caption="Every edit of every transformer",
                columns=[
                    "transformer",
                    "edit",
                    Column(name="harmless refused"),
                    Column(name="harmful refused"),
                    Column(name="gap"),
                    Column(name="harmless copied"),
                ],
                rows=[
                    [label, row.edit, row.harmless, row.harmful, row.gap, row.copied]
                    for label, rows in zip(labels, runs, strict=True)
                    for row in rows
                ],
            ),
        ],
        not_shown="The offset of these transformers is put in by hand; how large it is in a model is another question.",
        how=(
            "Four layers of width 64, 600 steps, answers at the last token: REFUSE where one of 8 tokens occurs, else "
            f"the first token. Mean over offsets of {', '.join(f'{o:g}' for o in OFFSETS)} of all coordinates of the "
            "stream, which layer norms remove, so that the unedited answers are the same. Means from 512 "
            "rows of each kind at the last token, edits at all tokens after the third and the fourth block, "
            "measured on 512 other rows of each kind."
        ),
    )
