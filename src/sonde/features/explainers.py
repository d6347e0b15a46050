"""One sentence for what a latent responds to, asked of a language model that sees where it fires.

Variants: plain; chain of thought (three steps before the answer); logits (with the tokens that the latent makes
likelier); single token (tokens and strengths, no text); contrastive (with passages to which it does not respond). After
Paulo et al. 2024, arXiv:2410.13928; prompts and examples are our own. Temperature 0.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from sonde.errors import SondeError
from sonde.features import questions
from sonde.features.cases import Case, Subject
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Completion, Message, Params, Unanswered

Kind = Literal["plain", "chain-of-thought", "logits", "single-token", "contrastive"]
CONTRASTED = (15, 5)
_PAIRS = 10


@dataclass(frozen=True)
class Explanation:
    """A sentence, or the reason why there is none. `answer` is all that the explainer wrote."""

    text: str | None
    answer: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Explainer:
    """Asks for explanations.

    kind: one of the variants. strengths: a line of up to ten (token, 0 to 10) under each passage. max_tokens: of the
    answer. seed: of the question, so that several explanations of one latent can be asked for at a temperature.
    """

    kind: Kind = "plain"
    strengths: bool = False
    max_tokens: int = 400
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SondeError(f"there is no explainer {self.kind!r}: use one of {', '.join(get_args(Kind))}")

    def prompt(self, subject: Subject) -> tuple[Message, ...]:
        """What is asked about a latent."""
        train = subject.train
        if self.kind == "single-token":
            return questions.explain_tokens([_pairs(case, subject.examples.largest) for case in train])
        others: tuple[Case, ...] = ()
        if self.kind == "contrastive":
            shown, silent = CONTRASTED
            train, others = train[:: max(1, len(train) // shown)][:shown], subject.train_negatives[:silent]
            if not others:
                raise SondeError("a contrastive explanation needs windows in which the latent is silent")
        return questions.explain(
            [case.marked() for case in train],
            strengths=[_pairs(case, subject.examples.largest) for case in train] if self.strengths else (),
            promoted=subject.promoted if self.kind == "logits" else (),
            others=[case.text for case in others],
            reasoned=self.kind == "chain-of-thought",
        )

    async def explain(self, subject: Subject, client: Client) -> Explanation:
        """An explanation; one that is empty, cannot be found in the answer or never came is stored as failed."""
        params = Params(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed)
        try:
            text, answer = await client.parsed(self.prompt(subject), params, _read, questions.AGAIN_EXPLANATION)
        except Unanswered as error:
            return Explanation(None, failed=str(error))
        if text is None:
            cut = ", which was cut off" * answer.truncated
            return Explanation(None, answer.text, f"no {questions.EXPLANATION} with a sentence in the answer{cut}")
        return Explanation(text, answer.text)


def _read(answer: Completion) -> str | None:
    return questions.read_explanation(answer.text)


def _pairs(case: Case, largest: float) -> str:
    """Up to ten tokens of a window and their strengths, strongest first."""
    strengths = case.window.normalised(largest)
    order = [int(i) for i in (-case.window.activations).argsort(kind="stable")[:_PAIRS] if strengths[i] > 0]
    return ", ".join(f"({case.tokens[i]!r}, {strengths[i]})" for i in order)
