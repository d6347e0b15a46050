"""Generation: do texts that somebody writes from the explanation make the latent fire?

The scorer writes a number of texts; the score is the share in which the latent fires at some token. Chance is how often
it fires in as many tokens of the corpus: with q the share of windows of w tokens in which it does, 1 - (1 - q)^(n / w)
for a text of n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sonde.features import questions
from sonde.features.cases import Subject
from sonde.features.scorers.measures import Measure, share
from sonde.features.scorers.scorer import Scored, alone
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Completion, Params, Unanswered

Fires = Callable[[str, int, Sequence[str]], list[tuple[float, int]]]
"""(hookpoint, latent, texts) -> the latent's largest activation in each text, and how many tokens the text has."""


@dataclass(frozen=True)
class Generation:
    """Do `texts` texts written from the explanation make the latent fire?

    fires: what a text makes the latent do. windows: number of windows of the corpus. window: tokens in one.
    """

    fires: Fires
    windows: int
    window: int = 32
    texts: int = 10
    name: str = "generation"
    explained: bool = True
    logprobs: bool = False

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Ask for the texts in one question and run them through the model. Fewer texts than asked for are unread."""
        params = Params(max_tokens=60 * self.texts)
        again = f"{questions.AGAIN} with {self.texts} texts on numbered lines, and nothing else."
        try:
            found, _ = await client.parsed(questions.generate(explanation, self.texts), params, _read, again)
        except Unanswered:
            found = None
        texts = (found or [])[: self.texts]
        ran = await alone(lambda: self.fires(subject.hookpoint, subject.latent, texts)) if texts else []
        silent = 1 - subject.examples.active / self.windows
        chance = sum(1 - silent ** (tokens / self.window) for _, tokens in ran) / len(ran) if ran else None
        largest = [value for value, _ in ran]
        records = [_record(text, value) for text, value in zip(texts, largest, strict=True)]
        records += [_record(None, None) for _ in range(self.texts - len(texts))]
        fired = sum(value > 0 for value in largest)
        measures: dict[str, Measure] = {
            "fired": share(fired, len(texts), chance, "no text could be read"),
            "parsed": share(len(texts), self.texts),
        }
        return Scored(records, measures, "fired")


def _record(text: str | None, value: float | None) -> dict[str, object]:
    return {
        "example": text, "kind": "written", "quantile": None, "distance": None, "label": True,
        "answer": None if value is None else float(value), "probability": None, "parsed": text is not None,
    }  # fmt: skip


def _read(answer: Completion) -> list[str] | None:
    return [text.strip() for text in questions.read_numbered(answer.text) if text.strip()] or None
