"""What does every latent respond to, and how far can that be trusted? Explain, score, write down; go on after a kill.

Latents pass through in a window of a few at a time, so that a model always has questions to answer, and are written in
their order. Every answer is kept when it comes, under what was asked: a run that was killed asks only what has no
answer, and writes the same files as one that was left alone. Files in the folder, all UTF-8, one JSON object a line:

    latents.jsonl         hookpoint, latent, count (tokens at which it fires), active (windows), largest (activation),
                          status ("scored", "too rare", "too dense", "failed", "not asked"), reason, explanation,
                          promoted, windows ([{tokens, activations, quantile}], strongest first), measures ({scorer:
                          {main, values: {measure: {estimate, low, high, n, chance} or {estimate: null, reason}}}})
    explanations.jsonl    hookpoint, latent, explainer, explanation (or null), failed (the reason), answer
    scores/SCORER.jsonl   hookpoint, latent, example ("sequence:token"), kind, quantile, distance, label, answer,
                          probability, parsed
    summary.json          latents by status, and by scorer and hookpoint: mean of the latents' scores with its interval,
                          chance, examples, unparsed; weighted_f1 = sum count F1 / sum count; the bill
    calls.sqlite          answers, calls that were lost, results computed here
"""

import asyncio
import gc
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from sonde.errors import SondeError
from sonde.features.cases import Subject, Words
from sonde.features.explainers import Explanation
from sonde.features.latent_cache import LatentCache
from sonde.features.lexical import lexical_explanation
from sonde.features.readers import sentence
from sonde.features.samplers import LatentExamples, Sampling, TooDense, TooRare, examples
from sonde.features.scorers.scorer import Scored, Scorer
from sonde.files import replacing, write_json
from sonde.lm.asking.client import Client
from sonde.lm.asking.ledger import BudgetSpent
from sonde.stats.intervals import bootstrap_mean

AHEAD = 64
SHOWN = 10
_FEWEST = 2


class Explains(Protocol):
    """Whatever gives a latent a sentence: an `Explainer`, `Lexical`, `Given`."""

    @property
    def kind(self) -> str:
        """What it is called."""
        ...

    async def explain(self, subject: Subject, client: Client) -> Explanation:
        """The sentence, or why there is none."""
        ...


@dataclass(frozen=True)
class Lexical:
    """The token set that best tells the train windows apart, as a sentence; no model is asked."""

    words: Words
    kind: str = "lexical"

    async def explain(self, subject: Subject, client: Client) -> Explanation:
        """The tokens in quotes, strongest first."""
        found = lexical_explanation(subject.examples)
        if not found.ids:
            return Explanation(None, failed="no token tells its windows from others")
        return Explanation(sentence(self.words(found.ids)))


@dataclass(frozen=True)
class Given:
    """Sentences by (hookpoint, latent) that are there already, to be scored."""

    sentences: Mapping[tuple[str, int], str]
    kind: str = "given"

    async def explain(self, subject: Subject, client: Client) -> Explanation:
        """What was given."""
        text = self.sentences.get((subject.hookpoint, subject.latent), "").strip()
        return Explanation(text) if text else Explanation(None, failed="no explanation was given")


def read_explanations(path: str | Path) -> dict[tuple[str, int], str]:
    """Sentences by (hookpoint, latent) from an explanations.jsonl; those that failed are left out.

    Raises `SondeError` for a file that is missing or has other lines.
    """
    found: dict[tuple[str, int], str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SondeError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            if one["explanation"] is not None:
                found[one["hookpoint"], int(one["latent"])] = str(one["explanation"])
        except (ValueError, KeyError, TypeError) as error:
            raise SondeError(
                f"{path}, line {number}: expected an object with hookpoint, latent and explanation"
            ) from error
    return found


@dataclass(frozen=True)
class Candidate:
    """A latent, in how many tokens it fires, and its windows or why there are none."""

    hookpoint: str
    latent: int
    count: int
    found: LatentExamples | TooRare | TooDense
    promoted: Sequence[str] = ()


def candidates(
    cache: LatentCache,
    latents: Mapping[str, Iterable[int]],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    neighbours: Callable[[str, int], Sequence[tuple[int, float]]] | None = None,
    pool: Any = None,
    promoted: Callable[[str, int], Sequence[str]] | None = None,
) -> Iterator[Candidate]:
    """The latents of some hookpoints with their windows, one by one as they are asked for."""
    for hookpoint, chosen in latents.items():
        counts = cache.counts(hookpoint)
        for latent in chosen:
            near = () if neighbours is None else neighbours(hookpoint, latent)
            found = examples(cache, hookpoint, latent, config=sampling, seed=seed, neighbours=near, pool=pool)
            likelier = () if promoted is None else promoted(hookpoint, latent)
            yield Candidate(hookpoint, latent, int(counts[latent]), found, likelier)


@dataclass
class Summary:
    """What came out over all latents. `stopped` says why some were not asked about."""

    statuses: Counter[str] = field(default_factory=Counter)
    stopped: str = ""
    too_rare: list[tuple[str, int]] = field(default_factory=list)
    too_dense: list[tuple[str, int]] = field(default_factory=list)
    failed: list[tuple[str, int]] = field(default_factory=list)
    scores: dict[tuple[str, str], "Scores"] = field(default_factory=dict)
    bill: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As summary.json has it."""
        by_scorer: dict[str, dict[str, Any]] = {}
        for (scorer, hookpoint), scores in self.scores.items():
            by_scorer.setdefault(scorer, {})[hookpoint] = scores.to_json()
        return {
            "statuses": dict(sorted(self.statuses.items())),
            "stopped": self.stopped,
            "too_rare": [list(one) for one in self.too_rare],
            "too_dense": [list(one) for one in self.too_dense],
            "failed": [list(one) for one in self.failed],
            "scores": by_scorer,
            "bill": self.bill,
        }


@dataclass
class Scores:
    """The scores of one scorer at one hookpoint."""

    main: str = ""
    chance: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    undefined: Counter[str] = field(default_factory=Counter)
    examples: int = 0
    unparsed: int = 0
    weighted: list[tuple[int, float]] = field(default_factory=list)

    def add(self, count: int, scored: Scored) -> None:
        """Count one latent in."""
        score = scored.score
        self.main = scored.main
        self.examples += len(scored.records)
        self.unparsed += sum(not one["parsed"] for one in scored.records)
        if score.chance is not None:
            self.chance.append(score.chance)
        if score.interval is None:
            self.undefined[score.reason] += 1
        else:
            self.values.append(score.interval.estimate)
        f1 = scored.measures.get("f1")
        if f1 is not None and f1.interval is not None:
            self.weighted.append((count, f1.interval.estimate))

    def to_json(self) -> dict[str, Any]:
        """Mean with its interval over latents, chance, and what could not be had."""
        mean: dict[str, Any] = {"estimate": None, "reason": f"{len(self.values)} latent(s) have a score"}
        if len(self.values) >= _FEWEST:
            found = bootstrap_mean(self.values)
            mean = {"estimate": found.estimate, "low": found.low, "high": found.high, "n": found.n}
        elif self.values:
            mean = {"estimate": self.values[0], "reason": "one latent has no interval", "n": 1}
        total = sum(count for count, _ in self.weighted)
        return {
            "measure": self.main,
            "mean": mean,
            "chance": sum(self.chance) / len(self.chance) if self.chance else None,
            "undefined": dict(self.undefined),
            "examples": self.examples,
            "unparsed": self.unparsed,
            "unparsed_rate": self.unparsed / self.examples if self.examples else None,
            "weighted_f1": sum(count * f1 for count, f1 in self.weighted) / total if total else None,
        }


def interpret(
    found: Iterable[Candidate],
    *,
    explainer: Explains,
    scorers: Sequence[Scorer],
    client: Client,
    words: Words,
    folder: str | Path,
    total: int | None = None,
    ahead: int = AHEAD,
    progress: str | None = None,
) -> Summary:
    """Explain latents, score the explanations, and write the files of this module's head into `folder`.

    Args:
        found: latents with their windows.
        explainer: what gives a latent a sentence.
        scorers: tests of the sentence, by different names.
        client: who is asked.
        words: the text of tokens.
        folder: where the files go.
        total: number of latents, for the progress bar.
        ahead: latents that are worked on at a time.
        progress: label of a progress bar; None for no bar.

    Returns what came out. Where a budget ends, what was finished is written and the rest has the status "not asked".

    Raises:
        SondeError: for scorers of one name or none, before the first call where log-probabilities or context are
            lacking, and where the model refuses.

    """
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise SondeError(f"scorers are one or more of different names, not {names}")
    folder = Path(folder)
    work = _Work(explainer, scorers, client, words)

    async def run() -> Summary:
        if any(scorer.logprobs for scorer in scorers):
            await client.require_logprobs()
        with (
            ExitStack() as open_files,
            tqdm(total=total, desc=progress, disable=progress is None, unit="latent") as bar,
        ):
            files = _Files(folder, names, open_files)
            await work.through(found, files, ahead, bar)
        return work.summary

    # Without this, collections go through all objects of torch and transformers again and again: a third of the time.
    gc.freeze()
    try:
        summary = client.run(run)
    finally:
        gc.unfreeze()
    summary.bill = client.totals()
    write_json(folder / "summary.json", summary.to_json())
    return summary


class _Files:
    """The files that grow line by line and appear whole."""

    def __init__(self, folder: Path, scorers: Sequence[str], stack: ExitStack) -> None:
        def opened(path: Path) -> TextIO:
            for left in path.parent.glob(f".{path.name}.*.part"):  # by a process that was killed
                left.unlink(missing_ok=True)
            beside = stack.enter_context(replacing(path))
            return stack.enter_context(beside.open("w", encoding="utf-8", newline="\n"))

        self._latents = opened(folder / "latents.jsonl")
        self._explanations = opened(folder / "explanations.jsonl")
        self._scores = {name: opened(folder / "scores" / f"{name}.jsonl") for name in scorers}

    def write(self, one: "_Outcome", explainer: str) -> None:
        """The lines of one latent."""
        where = {"hookpoint": one.candidate.hookpoint, "latent": one.candidate.latent}
        _line(self._latents, where | one.to_json())
        if one.explanation is not None:
            text = {"explanation": one.explanation.text, "failed": one.explanation.failed}
            _line(self._explanations, where | {"explainer": explainer} | text | {"answer": one.explanation.answer})
        for name, scored in one.scored.items():
            for record in scored.records:
                _line(self._scores[name], where | dict(record))


@dataclass
class _Outcome:
    candidate: Candidate
    status: str
    reason: str = ""
    subject: Subject | None = None
    explanation: Explanation | None = None
    scored: dict[str, Scored] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        found = self.candidate.found
        shown = [] if self.subject is None else sorted(self.subject.train, key=lambda case: -case.window.max)[:SHOWN]
        return {
            "count": self.candidate.count,
            "active": found.active,
            "largest": found.largest if isinstance(found, LatentExamples) else None,
            "status": self.status,
            "reason": self.reason,
            "explanation": None if self.explanation is None else self.explanation.text,
            "promoted": list(self.candidate.promoted),
            "windows": [
                {
                    "tokens": list(case.tokens),
                    "activations": [round(float(a), 4) for a in case.window.activations],
                    "quantile": case.window.quantile,
                }
                for case in shown
            ],
            "measures": {
                name: {
                    "main": scored.main,
                    "values": {measure: value.to_json() for measure, value in scored.measures.items()},
                }
                for name, scored in self.scored.items()
            },
        }


@dataclass
class _Work:
    explainer: Explains
    scorers: Sequence[Scorer]
    client: Client
    words: Words
    summary: Summary = field(default_factory=Summary)

    async def through(self, found: Iterable[Candidate], files: _Files, ahead: int, bar: Any) -> None:
        """Start latents in their order, `ahead` at a time, and write them in their order."""
        waiting: deque[asyncio.Task[_Outcome]] = deque()
        source, checked = iter(found), False
        try:
            for candidate in source:
                if not checked and isinstance(candidate.found, LatentExamples):
                    self._check(candidate)
                    checked = True
                waiting.append(asyncio.create_task(self._one(candidate)))
                # Lets what was started ask before the next windows are cut.
                await asyncio.sleep(0)
                if len(waiting) >= ahead:
                    self._write(await waiting.popleft(), files, bar)
            while waiting:
                self._write(await waiting.popleft(), files, bar)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _check(self, candidate: Candidate) -> None:
        """What a scorer can tell from the first latent, before anybody is asked."""
        assert isinstance(candidate.found, LatentExamples)
        for scorer in self.scorers:
            check = getattr(scorer, "check", None)
            if check is not None:
                check(Subject.of(candidate.found, self.words), self.client)

    async def _one(self, candidate: Candidate) -> _Outcome:
        if isinstance(candidate.found, TooRare | TooDense):
            status = "too rare" if isinstance(candidate.found, TooRare) else "too dense"
            return _Outcome(candidate, status, candidate.found.reason)
        subject = Subject.of(candidate.found, self.words, candidate.promoted)
        try:
            if self.summary.stopped:
                raise BudgetSpent(self.summary.stopped)
            explanation = await self.explainer.explain(subject, self.client)
            text = explanation.text or ""
            asked = [scorer for scorer in self.scorers if text or not scorer.explained]
            scored = await asyncio.gather(*(scorer.score(subject, text, self.client) for scorer in asked))
        except BudgetSpent as error:
            # Nobody starts anything more; what is in flight comes home and is kept.
            self.summary.stopped = self.summary.stopped or str(error)
            return _Outcome(candidate, "not asked", self.summary.stopped, subject)
        by_name = {scorer.name: one for scorer, one in zip(asked, scored, strict=True)}
        status = "scored" if text else "failed"
        return _Outcome(candidate, status, explanation.failed, subject, explanation, by_name)

    def _write(self, one: _Outcome, files: _Files, bar: Any) -> None:
        files.write(one, self.explainer.kind)
        bar.update()
        name = (one.candidate.hookpoint, one.candidate.latent)
        self.summary.statuses[one.status] += 1
        for status, names in (
            ("too rare", self.summary.too_rare),
            ("too dense", self.summary.too_dense),
            ("failed", self.summary.failed),
        ):
            if one.status == status:
                names.append(name)
        for scorer, scored in one.scored.items():
            key = (scorer, one.candidate.hookpoint)
            self.summary.scores.setdefault(key, Scores()).add(one.candidate.count, scored)


def _line(file: TextIO, value: Mapping[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
