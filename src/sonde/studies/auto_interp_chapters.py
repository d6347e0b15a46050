"""Chapters of the study of explanations: the scores and their chance, the latents one by one, and the bill."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonde.features.latent_cache import LatentCache
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.feature_cards import FeatureView
    from sonde.runs.finding import Finding
    from sonde.studies.auto_interp import AutoInterpConfig

_CITE = "Paulo et al. 2024, arXiv:2410.13928"
_HALF = 0.5
_SPREAD = ("detection", "fuzzing", "surprisal", "embedding")  # tests of the explanation with this chance
_SPEED = ("concurrency", "requests_per_minute", "tokens_per_minute", "timeout")  # of no number
# Scorer: (what better than chance says, what it is otherwise, the metric).
_CLAIMS = {
    "detection": (
        "Who knows the explanation tells windows in which the latent fires from others.",
        "The explanation does not help to find the windows in which the latent fires.",
    ),
    "fuzzing": (
        "Who knows the explanation tells right marks from wrong ones.",
        "The explanation does not help to tell right marks from wrong ones.",
    ),
    "simulation": (
        "Activations predicted from the explanation go with the true ones.",
        "Activations predicted from the explanation have nothing to do with the true ones.",
    ),
    "surprisal": (
        "Windows in which the latent fires surprise the model less after the explanation than others do.",
        "The explanation does not make the latent's windows less surprising than others.",
    ),
    "embedding": (
        "Explanations are nearer to windows of their latent than to others.",
        "Explanations are no nearer to windows of their latent than to others.",
    ),
    "example-embedding": (
        "Windows of a latent are nearer to one another than to others.",
        "Windows of a latent are no nearer to one another than to others.",
    ),
    "intruder": (
        "The odd window among those of a latent can be told.",
        "The odd window among those of a latent cannot be told.",
    ),
    "generation": (
        "Texts written from the explanation make the latent fire more often than windows of the corpus do.",
        "Texts written from the explanation make the latent fire no more often than any window of the corpus.",
    ),
    "intervention": (
        "What the latent makes the model write fits its explanation better than what a random direction does.",
        "What the latent makes the model write fits its explanation no better than what a random direction does.",
    ),
}
_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "all": "Pearson correlation over tokens",
    "auc": "area under the ROC curve",
    "accuracy": "share of odd ones found",
    "fired": "share of texts that make it fire",
    "gain": "gain in log p(explanation)",
}


def chapters(
    folder: Path,
    summary: Mapping[str, Any],
    rare: Mapping[str, int],
    config: "AutoInterpConfig",
    cards: "Sequence[FeatureView]" = (),
) -> "list[Chapter]":
    """All chapters of a finished run in `folder`."""
    latents = [json.loads(line) for line in (folder / "latents.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        _scores_chapter(latents, summary, rare, config),
        _latents_chapter(latents, summary, cards),
        cost_chapter(summary, config),
    ]


def _scores_chapter(
    latents: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    rare: Mapping[str, int],
    config: "AutoInterpConfig",
) -> "Chapter":
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Block, Chapter, Column, Figure, Table

    rows = [
        {"scorer": scorer, "hookpoint": hookpoint, **scores, "name": _name(scorer, hookpoint, summary)}
        for scorer, points in summary["scores"].items()
        for hookpoint, scores in points.items()
    ]
    known = [row for row in rows if "low" in row["mean"]]
    blocks: list[Block] = []
    shares = [
        {
            "name": row["name"],
            "value": row["mean"]["estimate"],
            "low": row["mean"]["low"],
            "high": row["mean"]["high"],
            "chance": row["chance"],
        }
        for row in known
        if row["scorer"] != "intervention" and row["chance"] is not None
    ]
    better = sum(row["low"] > row["chance"] for row in shares)
    if shares:
        chart = chart_kinds.intervals(
            shares,
            label="name",
            value="value",
            low="low",
            high="high",
            control="chance",
            title=f"{better} of {len(shares)} scores are better than chance",
            subtitle="Mean over latents with its 95 % interval; grey: what an empty explanation would get",
            x_title="score",
            y_title="test",
        )
        blocks.append(Figure(id="scores.means", chart=chart, caption="The mean score of every test, and its chance."))
    spread = _spread(latents, [row["scorer"] for row in known if row["scorer"] in _SPREAD])
    if spread:
        first = spread[0]["scorer"]
        own = [row["score"] for row in spread if row["scorer"] == first]
        chart = chart_kinds.lines(
            spread,
            x="share",
            y="score",
            series="scorer",
            title=f"Half of the latents score {own[len(own) // 2]:.2f} or more in {first}",
            subtitle="Latents from the worst to the best explained",
            x_title="share of latents with a lower score",
            y_title="score",
            control=("chance",),
        )
        blocks.append(Figure(id="scores.spread", chart=chart, caption="The scores of all latents, in their order."))
    columns = ["test", "measure", *(Column(name=name) for name in (
        "mean", "low", "high", "chance", "latents", "answers", "unread share", "weighted F1"))]  # fmt: skip
    blocks.append(
        Table(
            id="scores.table",
            caption="Every test, and the answers that could not be read",
            columns=columns,
            rows=[
                [
                    row["name"], _NAMES.get(row["measure"], row["measure"]), row["mean"]["estimate"],
                    row["mean"].get("low"), row["mean"].get("high"), row["chance"], row["mean"].get("n"),
                    row["examples"], row["unparsed_rate"], row["weighted_f1"],
                ]
                for row in rows
            ],
        )
    )  # fmt: skip
    findings = [_finding(row, config) for row in rows]
    undefined = [
        f"{row['name']}: {count} latent(s) without a score ({reason})."
        for row in rows
        for reason, count in row["undefined"].items()
    ]
    statuses = ", ".join(f"{count} {status}" for status, count in summary["statuses"].items())
    return Chapter(
        id="scores",
        question="How far can the explanations be trusted?",
        answer=f"{better} of {len(shares)} scores are better than chance. Latents: {statuses}.",
        findings=findings,
        blocks=blocks,
        not_shown=" ".join(
            [
                *undefined,
                "A token set that is right about many windows need not say what the latent is for."
                if config.explainer == "lexical"
                else "A reader that is a language model can be wrong about a right explanation.",
                *(f"{count} latents of {hookpoint} fire too rarely." for hookpoint, count in rare.items() if count),
            ]
        ),
        how=(
            f"Explanations: {config.explainer}; asked: {config.ask}. Train and test windows are disjoint: "
            f"{config.examples} test windows by quantile and as many silent ones ({config.negatives}), "
            f"{config.window} tokens each. Unread answers are counted and left out. After {_CITE}."
        ),
    )


def views(
    folder: Path, lm: "LanguageModel", encoders: Mapping[str, Any], cache: "LatentCache", config: "AutoInterpConfig"
) -> "list[FeatureView]":
    """Cards of all latents of every hookpoint, in full for those that were to be explained."""
    from sonde.features.cards import MOST
    from sonde.organisms.pebble_features import read_records
    from sonde.studies.auto_interp_sources import written
    from sonde.studies.feature_blocks import chosen_latents, feature_view

    records, writes = read_records(folder), written(lm, encoders)
    made = []
    for hookpoint in cache.hookpoints:
        known = records.get(hookpoint, {})
        scored = [latent for latent, one in known.items() if one["status"] == "scored"]
        most = MOST // len(cache.hookpoints)
        view, _ = feature_view(
            f"latents.{hookpoint.lower().replace('/', '-')}",
            lm,
            cache,
            hookpoint,
            title=f"Latents of {hookpoint}",
            command=shlex.join(["sonde", "features", "show", str(folder), "--hookpoint", hookpoint]),
            directions=writes[hookpoint][1],
            records=known,
            shown=chosen_latents(cache, hookpoint, first=scored, most=most, seed=config.seed)
            if not config.latents
            else list(known)[:most],
            seed=config.seed,
            progress="cards",
        )
        made.append(view)
    return made


def _latents_chapter(
    latents: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], cards: "Sequence[FeatureView]"
) -> "Chapter":
    from sonde.features.marking import SHARE, marked
    from sonde.runs.blocks import Chapter, Column, Table

    scorers = list(summary["scores"])
    sentences, scores = [], []
    for one in latents:
        shown = ""
        if one["windows"]:
            window = one["windows"][0]
            top = max(window["activations"])
            shown = marked(window["tokens"], [a > SHARE * top for a in window["activations"]])
        name = f"{one['hookpoint']} {one['latent']}"
        text = one["explanation"] or f"({one['status']}: {one['reason']})"
        sentences.append([name, one["count"], text, shown])
        measured = [one["measures"].get(scorer) for scorer in scorers]
        scores.append([name, *(None if m is None else m["values"][m["main"]]["estimate"] for m in measured)])
    scored = summary["statuses"].get("scored", 0)
    return Chapter(
        id="latents",
        question="What does each latent respond to?",
        answer=f"{scored} of {len(latents)} latents have an explanation that was scored.",
        blocks=[
            *cards,
            Table(
                id="latents.table",
                caption="Explanations, and where each latent fires most",
                columns=[
                    "latent",
                    Column(name="tokens", unit="fires at"),
                    "explanation",
                    Column(name="strongest window", code=True),
                ],
                rows=sentences,
            ),
            Table(
                id="latents.scores",
                caption="Scores of each latent",
                columns=["latent", *(Column(name=name) for name in scorers)],
                rows=scores,
            ),
        ],
        not_shown="Latents that were not drawn have no windows here; the command under the index shows them all.",
        how="The scores are those of the first chapter, one latent at a time.",
    )


def cost_chapter(summary: Mapping[str, Any], config: "AutoInterpConfig") -> "Chapter":
    """What was asked and what it cost; of a dry run, what it would."""
    from sonde.runs.blocks import Chapter, Column, Table

    bill = summary["bill"]
    dollars = bill["dollars"]
    price = "no price was given" if dollars is None else f"${dollars:.4f}"
    would = "would take about" if config.dry_run else "took"
    return Chapter(
        id="cost",
        question="What does it cost?" if config.dry_run else "What did it cost?",
        answer=(
            f"{bill['answers']} questions to {config.ask} {would} {bill['prompt_tokens']} tokens of prompts and "
            f"{bill['completion_tokens']} of answers: {price}."
        ),
        blocks=[
            Table(
                id="cost.table",
                caption="What was asked" if not config.dry_run else "What would be asked, at four characters a token",
                columns=["what", Column(name="amount", digits=7)],
                rows=[[name.replace("_", " "), value] for name, value in bill.items()],
            )
        ],
        not_shown="Tokens of explanations that turn out longer than 25 words, and questions that are asked twice."
        if config.dry_run
        else "Calls that broke may have been charged all the same: they are counted at their most.",
        how="Answers are kept in calls.sqlite under what was asked, and are never paid for twice.",
    )


def _finding(row: Mapping[str, Any], config: "AutoInterpConfig") -> "Finding":
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import Interval

    metric = f"{_NAMES.get(row['measure'], row['measure'])}, mean over latents"
    fields: dict[str, Any] = {
        "id": "scores." + row["name"].replace(" ", "-").lower(),
        "chapter": "scores",
        "metric": metric,
        "better": "higher",
        "unit": "nats" if row["scorer"] == "intervention" else "",
        "command": shlex.join(config.command(*_SPEED)),
        "tables": ("scores.table",),
    }
    mean, (better, otherwise) = row["mean"], _CLAIMS[row["scorer"]]
    if "low" not in mean:
        reasons = "; ".join(row["undefined"]) or mean["reason"]
        return Finding(sentence=f"There is no mean score of {row['name']}.", refused=reasons, **fields)
    found = Interval(mean["estimate"], mean["low"], mean["high"], mean["n"])
    control = Control("a random direction" if row["scorer"] == "intervention" else "chance", row["chance"])
    return Finding.of(found, sentence=better if found.low > row["chance"] else otherwise, control=control, **fields)


def _name(scorer: str, hookpoint: str, summary: Mapping[str, Any]) -> str:
    """The scorer, with the hookpoint where there are several."""
    return scorer if len(summary["scores"][scorer]) == 1 else f"{scorer} {hookpoint.replace('/', '-')}"


def _spread(latents: Sequence[Mapping[str, Any]], scorers: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every latent and scorer whose chance is one half, in the order of the scores; and chance."""
    rows: list[dict[str, Any]] = []
    for scorer in dict.fromkeys(scorers):
        measured = [one["measures"][scorer] for one in latents if scorer in one["measures"]]
        values = sorted(v for one in measured if (v := one["values"][one["main"]]["estimate"]) is not None)
        last = max(1, len(values) - 1)
        rows += [{"scorer": scorer, "share": i / last, "score": value} for i, value in enumerate(values)]
    if not rows:
        return []
    return rows + [{"scorer": "chance", "share": float(x), "score": _HALF} for x in (0, 1)]
