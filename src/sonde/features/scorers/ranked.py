"""Scorers that ask nobody: they give every held-out window a number here, and are scored by its AUC.

Embedding, example-embedding and surprisal are of this kind. What was computed is kept beside the answers, so that a
resumed run does not compute it again.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from sonde.errors import SondeError
from sonde.features.cases import Subject
from sonde.features.local_scores import Ranking
from sonde.features.samplers import LatentExamples
from sonde.features.scorers.measures import of_scores
from sonde.features.scorers.scorer import Scored, alone, record
from sonde.lm.asking.client import Client


@dataclass(frozen=True)
class Ranked:
    """The scorer `name`, which gives the windows of a latent their numbers by `rank(explanation, examples)`."""

    name: str
    rank: Callable[[str, LatentExamples], Ranking]
    explained: bool = True
    logprobs: bool = False

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Rank all held-out windows, in a thread and one latent at a time."""
        cases = [*subject.test, *subject.negatives]
        content = [[case.tokens, case.window.activations.tolist()] for case in (*subject.train, *cases)]
        digest = hashlib.sha256(json.dumps([explanation, content]).encode()).hexdigest()
        key = f"{self.name}/{subject.hookpoint}/{subject.latent}/{digest}"
        kept = client.answers.result(key)
        if kept is None:
            kept = json.dumps(await alone(lambda: self._values(subject, explanation)))
            client.answers.keep(key, kept)
        values = json.loads(kept)
        records = [
            record(case, label=case.window.positive) | {"answer": value, "parsed": value is not None}
            for case, value in zip(cases, values, strict=True)
        ]
        read = [(one["answer"], one["label"]) for one in records if one["parsed"]]
        return Scored(records, {"auc": of_scores([v for v, _ in read], [label for _, label in read])}, "auc")

    def _values(self, subject: Subject, explanation: str) -> list[float | None]:
        found = self.rank(explanation, subject.examples)
        if len(found.values) != len(subject.test) + len(subject.negatives):
            raise SondeError(f"{self.name} gave {len(found.values)} numbers for another number of windows")
        return [float(value) if value == value and abs(value) != float("inf") else None for value in found.values]
