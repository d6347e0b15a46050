"""Are questions that the network settles late also those that it learned late?

The *prediction depth* of a question is the first layer from which the lens's answer equals the model's and stays so.
Its *iteration learned* is the first training checkpoint from which the model's answer equals its last one and stays so
(Baldock et al. 2106.09647; Belrose et al. 2303.08112 compare the two by Spearman's rank correlation, which the tuned
lens makes larger than the logit lens does). Both are one function of a table of answers: over layers, or over
checkpoints.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.data.multiple_choice import Prompt
from sonde.errors import SondeError
from sonde.lens.choices import ChoiceScores, choice_scores
from sonde.lens.trajectory import decided, prediction_depth
from sonde.lm.model import LanguageModel
from sonde.stats.intervals import Interval, bootstrap
from sonde.stats.ranks import spearman


def choice_depth(scores: ChoiceScores) -> Int[Tensor, " n"]:
    """Prediction depth of each question's answer: 0 at the lens's first site, the number of sites at the output."""
    return prediction_depth(scores.answers)


def decided_share(scores: ChoiceScores) -> Float[Tensor, " layers"]:
    """Share of questions whose answer is settled at each row of the scores; 1 at the output."""
    return decided(choice_depth(scores), len(scores.rows))


@dataclass(frozen=True)
class Learning:
    """What a model answered at each checkpoint of its training."""

    steps: tuple[int, ...]
    answers: Int[Tensor, "checkpoints n"]

    @property
    def iteration_learned(self) -> Int[Tensor, " n"]:
        """The step of the first checkpoint from which a question is answered as in the end."""
        return torch.tensor(self.steps)[prediction_depth(self.answers)]


def learning(checkpoints: Iterable[tuple[int, LanguageModel]], prompts: Sequence[Prompt]) -> Learning:
    """Answer the prompts with each checkpoint, given as (step, model) in order of training; one model at a time.

    Raises `SondeError` for fewer than two checkpoints and for steps that do not increase.
    """
    steps: list[int] = []
    answers = []
    for step, lm in checkpoints:
        if steps and step <= steps[-1]:
            raise SondeError(f"checkpoint {step} comes after checkpoint {steps[-1]}: give them in order of training")
        steps.append(step)
        answers.append(choice_scores(lm, prompts)["lens"].answers[-1])
    if len(steps) < 2:
        raise SondeError(f"{len(steps)} checkpoint: when a question was learned takes at least two")
    return Learning(tuple(steps), torch.stack(answers))


def depth_against_learning(
    depth: Int[Tensor, " n"], iteration: Int[Tensor, " n"], clusters: Sequence[str] | None = None
) -> Interval:
    """Spearman's correlation of prediction depth and iteration learned, with its bootstrap over questions.

    `clusters` says which questions ask the same thing, such as their text; they are drawn together.

    Raises `SondeError` for different lengths, and where all questions share a depth or an iteration.
    """
    if depth.shape != iteration.shape:
        raise SondeError(f"{len(depth)} depths and {len(iteration)} iterations: expected one of each for each question")
    if len(depth.unique()) < 2 or len(iteration.unique()) < 2:
        raise SondeError("all questions share one depth or one iteration, so that there is no order to compare")
    pair = depth.cpu().numpy(), iteration.cpu().numpy()
    return bootstrap(lambda a, b: float(spearman(a, b)), *pair, clusters=clusters)
