"""Push a model towards whatever a classifier calls the behaviour: scores of its own texts by prompt length.

There is no target: a prompt is trained by reward on texts that the model samples (`sonde.prompts.rewards`), and what
is reported are the scores of its greedy texts on contexts that were not trained on.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.elicitation import Budget, parts_of
from sonde.prompts.examples import Examples
from sonde.prompts.generation import generate
from sonde.prompts.rewards import Reward, on_text
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.prompts.training import train_prompts
from sonde.stats.intervals import Interval, bootstrap_mean

Score = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Scores:
    """Scores of greedy texts on test contexts under the best prompt of each length; lengths[0] is 0, no prompt."""

    lengths: tuple[int, ...]
    values: Float[np.ndarray, "lengths rows"]
    texts: tuple[str, ...]

    def mean(self, n: int) -> Interval:
        """Mean score at length `n`, with its interval over contexts."""
        return bootstrap_mean(self.values[self.lengths.index(n)])


def read_score(given: str) -> Score:
    """The function of `FILE.py:FUNCTION`, from a list of texts to as many numbers. The file is executed.

    Raises `SondeError` when the file or the function does not exist, or the file cannot be run.
    """
    path, _, name = given.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise SondeError(f"{path} does not exist: give FILE.py:FUNCTION, a function from texts to scores")
    spec = importlib.util.spec_from_file_location(f"score_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SondeError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise SondeError(f"{file} has no function {name!r}: it should take a list of texts and give as many numbers")
    return cast(Score, found)


def score_curve(
    lm: LanguageModel,
    contexts: Sequence[str],
    score: Score,
    budget: Budget,
    *,
    tokens: int = 12,
    samples: int = 4,
    seed: int = 0,
    progress: str | None = None,
) -> Scores:
    """Train prompts by reward on texts of `tokens`, `samples` of each context and prompt, and score greedy texts.

    Raises `SondeError` for scores that are not one number a text, and as `train_prompts` does.
    """
    ids = [lm.encode(context) for context in contexts]
    training, validation, test = parts_of(Examples(ids, [[0]] * len(ids)), seed=seed)
    trials = train_prompts(
        lm,
        training,
        lengths=budget.lengths,
        restarts=budget.restarts,
        positions=budget.positions,
        lrs=budget.lrs,
        steps=budget.steps,
        batch=min(budget.batch, len(training)),
        seed=seed,
        validation=validation,
        validations=2,
        objective=Reward(on_text(lm, score), tokens=tokens, samples=samples),
        init="grow" if budget.grow else "rows",
        progress=progress,
    )
    prompts = [SoftPrompt.empty(lm)] + [
        min((trial for trial in trials if trial.length == n), key=lambda trial: trial.validation).prompt
        for n in budget.lengths
    ]
    written = [
        [lm.decode(row) for row in generate(lm, prompt, test.contexts, max_new_tokens=tokens)] for prompt in prompts
    ]
    values = np.array([score(texts) for texts in written], dtype=float)
    if values.shape != (len(prompts), len(test)):
        raise SondeError(f"the scores of {len(test)} texts have shape {values.shape[1:]}: one number each")
    return Scores((0, *budget.lengths), values, tuple(written[-1]))
