"""A study at many settings: `sonde sweep STUDY --seed 0..9 --option a,b`, in processes here or on a Ray cluster.

Every combination of the listed values is a trial, which is an ordinary run in `trials/` of the sweep's folder. Their
findings become one tidy table, a row for each finding of each trial, and their means over seeds one report.
"""

import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder
from sonde.studies.running import Named, Read, check_options, publish

if TYPE_CHECKING:
    from sonde.runs.blocks import Chapter, Figure
    from sonde.runs.finding import Finding
    from sonde.runs.run import Run
    from sonde.runs.trials import Outcome, Pool

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MOST = 10_000
_TRIALS = "trials"
_SHOWN, _CHARTS = 24, 6


@dataclass(frozen=True)
class SweepConfig:
    """Run a study at many settings: lists as a,b and ranges as 0..9 make every combination.

    Example: sonde sweep static-reading organism:pebble --seed 0..4 --directions 4,8
    """

    workers: Count = 0
    """Processes at once on this machine; by default one for each core."""
    retries: Count = 2
    """How often a trial that fails is tried again. Bad input is not."""
    ray: Annotated[str | None, arg(metavar="ADDRESS")] = None
    """Run on the Ray cluster at this address instead; `auto` is the one that this machine belongs to."""
    out: Folder = None
    """The sweep's folder. By default a new one under runs/."""
    resume: bool = False
    """Go on with the sweep in the folder given as --out: finished trials are kept."""
    seed: Count = 0
    """Of the intervals over trials; the seeds of the trials are options of the study."""


@dataclass(frozen=True)
class Setting:
    """One trial: the study's words, and the value of every option that is varied."""

    words: tuple[str, ...]
    varied: Mapping[str, str]

    @property
    def name(self) -> str:
        """A folder name: what is varied, such as `seed=3,kind=a`."""
        text = ",".join(f"{key}={value}" for key, value in self.varied.items()) or "only"
        return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)[:120]


def settings(words: Sequence[str]) -> list[Setting]:
    """Every combination of the values that the words of a study's command line list as `a,b` or `0..9`.

    Raises `SondeError` for a range that runs backwards, more than 10,000 trials, and trials of one name.
    """
    pieces: list[list[str]] = []
    names: list[str | None] = []
    option = None
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("--") and not equals:
            option = word[2:]
            pieces.append([word])
            names.append(None)
            continue
        own = key[2:] if word.startswith("--") else option or f"argument {1 + sum(n is not None for n in names)}"
        values = _values(value if word.startswith("--") else word)
        pieces.append([f"{key}={one}" for one in values] if word.startswith("--") else values)
        names.append(own if len(values) > 1 else None)
    total = 1
    for piece in pieces:
        total *= len(piece)
    if total > _MOST:
        raise SondeError(f"these lists make {total} trials, more than {_MOST}: sweep fewer values at once")
    found = []
    for chosen in itertools.product(*pieces):
        varied = {
            name: word.partition("=")[2] if word.startswith("--") else word
            for name, word in zip(names, chosen, strict=True)
            if name
        }
        found.append(Setting(tuple(chosen), varied))
    twice = {setting.name for setting in found}
    if len(twice) < len(found):
        raise SondeError("two trials of this sweep would have one name: list every value once")
    return found


def _values(word: str) -> list[str]:
    """The values that a word lists."""
    values: list[str] = []
    for part in word.split(","):
        ends = _RANGE.fullmatch(part)
        if ends is None:
            values.append(part)
            continue
        first, last = int(ends[1]), int(ends[2])
        if last < first:
            raise SondeError(f"the range {part} runs backwards: write {last}..{first}")
        values += [str(value) for value in range(first, last + 1)]
    return [word] if any(not value for value in values) else values


def sweep(study: str, words: Sequence[str], config: SweepConfig, *, check: Callable[[Sequence[str]], Any]) -> Path:
    """Run a study at all settings and return the path of the sweep's report.

    `check` parses one trial's words and raises for wrong ones: all are checked before the first is run. Raises
    `SondeError` for lists that cannot be swept, as `Run.start` does, and when no trial finished.
    """
    from tqdm import tqdm

    from sonde.runs.run import Run, new_folder
    from sonde.runs.trials import Trial, run_trials

    check_options(config)
    if config.retries < 0:
        raise SondeError(f"--retries is {config.retries}: give 0 or more")
    given = settings(words)
    for setting in given:
        check(setting.words)
    folder = config.out or new_folder("runs", f"sweep-{study}")
    command = ["sonde", "sweep", study, *words, "--out", str(folder)]
    again = shlex.join([*command, "--resume"])
    decided = {"study": study, "words": list(words), "seed": config.seed}
    pool = _pool(folder, config)
    try:
        if config.resume:
            run = Run.resume(folder, study="sweep", config=decided, resume_command=again)
        else:
            run = Run.start(
                folder,
                study="sweep",
                config=decided,
                seed=config.seed,
                command=shlex.join(command),
                resume_command=again,
            )
    except BaseException:
        pool.close()
        raise
    with run:
        trials = {Trial(one.name, ("run", study, *one.words)): one for one in given}
        outcomes: dict[str, Outcome] = {}
        with tqdm(total=len(trials), desc=f"sweep of {study}", unit="trial") as bar:
            for outcome in run_trials(list(trials), pool, folder / _TRIALS, retries=config.retries):
                outcomes[outcome.trial.name] = outcome
                run.progress("trials", done=len(outcomes), total=len(trials), message=outcome.reason)
                bar.update()
        return _report(run, study, [(trials[trial], outcomes[trial.name]) for trial in trials], config.seed)


def _pool(folder: Path, config: SweepConfig) -> "Pool":
    if config.ray is not None:
        from sonde.runs.cluster import Cluster

        return Cluster(folder / _TRIALS, address=config.ray)
    from sonde.runs.trials import Processes

    return Processes(folder / _TRIALS, workers=config.workers or os.cpu_count() or 1)


def tidy(folder: Path, results: "Iterable[tuple[Setting, Outcome]]") -> list[dict[str, Any]]:
    """A row for each finding of each finished trial: what is varied, then the finding's number and interval."""
    from sonde.runs.folder import read_json

    rows = []
    for setting, outcome in results:
        if not outcome.finished:
            continue
        for finding in read_json(folder / _TRIALS / setting.name / "findings.json")["findings"]:
            low, high = finding["interval"] or (None, None)
            control = finding["control"] or {}
            rows.append(
                {
                    "trial": setting.name,
                    **setting.varied,
                    "finding": finding["id"],
                    "metric": finding["metric"],
                    "unit": finding["unit"],
                    "estimate": finding["estimate"],
                    "low": low,
                    "high": high,
                    "n": finding["n"],
                    "control": control.get("estimate"),
                    "status": finding["status"],
                    "sentence": finding["sentence"],
                }
            )
    return rows


def _report(run: "Run", study: str, results: "Sequence[tuple[Setting, Outcome]]", seed: int) -> Path:
    """The tidy table as a file, and the report of means over seeds and of how the trials ended."""
    rows = tidy(run.folder, results)
    run.table("trials", [_ended(setting, outcome) for setting, outcome in results])
    if not rows:
        reason = next((outcome.reason for _, outcome in results if outcome.reason), "no trial has findings")
        raise SondeError(f"no trial of this sweep has results: {reason}")
    run.table("results", rows)
    chapters = [_means_chapter(run, study, rows, seed), _trials_chapter(results)]
    return publish(
        run,
        Named(study),
        Read(),
        chapters,
        title=f"Sweep of {study}: {len(results)} trials",
        source=f"{len(results)} runs of {study}",
        timings=dict(run.timings),
        skipped={setting.name: outcome.reason for setting, outcome in results if outcome.reason},
    )


def _ended(setting: Setting, outcome: "Outcome") -> dict[str, Any]:
    state = "finished" if outcome.finished else "failed"
    return {"trial": setting.name, "status": state, "attempts": outcome.attempts, "reason": outcome.reason}


def _means_chapter(run: "Run", study: str, rows: Sequence[dict[str, Any]], seed: int) -> "Chapter":
    """The mean of every finding at every setting, over whatever else than the setting was drawn: the seeds."""
    from sonde.runs.blocks import Chapter, Table

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["estimate"] is not None:
            groups.setdefault((row["finding"], _where(row)), []).append(row)
    findings, table = [], []
    for number, ((name, where), group) in enumerate(groups.items()):
        values = [row["estimate"] for row in group]
        found = None
        if len(values) > 1:
            found = _mean_finding(f"sweep.{number}.{name}"[:80], where, group, run.command, seed)
            findings.append(found)
        low, high = (None, None) if found is None or found.interval is None else found.interval
        mean = sum(values) / len(values)
        states = [row["status"] for row in group]
        share = f"{states.count('found')} of {len(states)}"
        table.append([name, where, mean, low, high, len(values), min(values), max(values), share])
    columns = ["finding", "setting", "mean", "low", "high", "trials", "least", "most", "found in"]
    trials = len({row["trial"] for row in rows})
    return Chapter(
        id="sweep",
        question=f"What does {study} find over {trials} trials?",
        answer=(
            f"{len(groups)} mean{'s' if len(groups) > 1 else ''} over the trials of a setting; the intervals are what "
            "varies from trial to trial."
        ),
        findings=findings[:_SHOWN],
        blocks=[*_charts(groups), Table(id="sweep.means", columns=columns, rows=table, caption="Means over trials.")],
        not_shown="Intervals are over trials alone: what all trials share, such as model and text, is not drawn anew.",
        how=(
            "Every trial is a run of its own under trials/, with a report of its own. Means over the trials of one "
            "setting, with a bootstrap of the trials; the tidy table of all findings is tables/results.parquet."
        ),
    )


def _where(row: Mapping[str, Any]) -> str:
    """What a row's trial was set to, without its seed."""
    varied = list(row)[1 : list(row).index("finding")]
    return ", ".join(f"{key} {row[key]}" for key in varied if key != "seed") or "as given"


def _mean_finding(name: str, where: str, group: Sequence[Mapping[str, Any]], command: str, seed: int) -> "Finding":
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean

    controls = [row["control"] for row in group if row["control"] is not None]
    held = {"control": Control("mean of the trials' controls", sum(controls) / len(controls))} if controls else {}
    at = "" if where == "as given" else f" at {where}"
    return Finding.of(
        bootstrap_mean([row["estimate"] for row in group], seed=seed),
        id=re.sub(r"[^a-z0-9._-]+", "-", name.lower()),
        chapter="sweep",
        sentence=f"Over {len(group)} trials{at}: {group[0]['metric']}, on average.",
        metric=group[0]["metric"],
        unit=group[0]["unit"],
        command=command,
        **(held or {"control_reason": "the study holds this number against none"}),
    )


def _charts(groups: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> "list[Figure]":
    """For each of the first findings its trials, one by one."""
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Figure

    figures = []
    for number, name in enumerate(dict.fromkeys(name for name, _ in groups)):
        mine = {where: group for (finding, where), group in groups.items() if finding == name}
        each = [row for group in mine.values() for row in group]
        shown = [
            {key: row[key] for key in ("trial", "estimate", "low", "high", "control")}
            for row in each
            if row["low"] is not None and row["high"] is not None
        ][:_SHOWN]
        if number == _CHARTS:
            break
        if not shown:
            continue
        metric, unit = each[0]["metric"], each[0]["unit"]
        held = all(row["control"] is not None for row in shown)
        chart = chart_kinds.intervals(
            shown,
            label="trial",
            value="estimate",
            low="low",
            high="high",
            control="control" if held else None,
            title=f"{name}: {min(row['estimate'] for row in shown):.3g} to {max(row['estimate'] for row in shown):.3g}",
            subtitle="each trial with its own interval" + ("; the grey tick is its control" if held else ""),
            x_title=f"{metric} ({unit})" if unit else metric,
            y_title="trial",
        )
        figures.append(Figure(id=f"sweep.{number}", chart=chart, caption=f"{metric}, by trial."))
    return figures


def _trials_chapter(results: "Sequence[tuple[Setting, Outcome]]") -> "Chapter":
    from sonde.runs.blocks import Chapter, Table

    failed = sum(not outcome.finished for _, outcome in results)
    again = sum(outcome.attempts > 1 for _, outcome in results)
    return Chapter(
        id="trials",
        question="Did all trials finish?",
        answer=f"{len(results) - failed} of {len(results)} finished; {again} needed more than one attempt.",
        blocks=[
            Table(
                id="trials.list",
                columns=["trial", "status", "attempts", "reason"],
                rows=[list(_ended(setting, outcome).values()) for setting, outcome in results],
                caption="0 attempts: it was finished by an earlier process.",
            )
        ],
        not_shown="Why a trial failed beyond its last line: see its log beside its folder.",
        how="Every trial is a process of its own; a failed one is tried again, unless its input was bad.",
    )
