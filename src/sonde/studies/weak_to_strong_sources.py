"""Tasks of a study of weak to strong: planted features, or statements that a language model reads.

With a language model the supervisor is a linear classifier of the first block's output at the last token, taught the
truth on rows of its own and stopped when it is good enough; the student reads the middle of the model, or is the model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.label_problem import LabelSource, Problem
from sonde.knowledge.planted_labels import planted_task
from sonde.knowledge.weak_labels import stopped_at
from sonde.lm.model import LanguageModel

if TYPE_CHECKING:
    from sonde.studies.weak_to_strong import WeakToStrongConfig

_LEAST = 30  # rows of a part


@dataclass(frozen=True, eq=False)
class Statements:
    """Texts with their truth, read once: `strong` and `weak` are the features of student and supervisor `[n d]`."""

    texts: tuple[str, ...]
    truth: Bool[np.ndarray, " n"]
    strong: Float[Tensor, "n d"]
    weak: Float[Tensor, "n d"]


@dataclass(frozen=True, eq=False)
class Source:
    """Makes the task of a seed."""

    config: "WeakToStrongConfig"
    name: str
    statements: Statements | None = None

    @classmethod
    def of(cls, config: "WeakToStrongConfig", lm: LanguageModel | None) -> "Source":
        """Read the statements with the model, where there is one.

        Raises `SondeError` for files that cannot be read and statements that are too few or too long.
        """
        if lm is None:
            return cls(config, "a planted task")
        name, texts, truth = _material(config)
        need = config.supervisor_rows + 2 * _LEAST
        if len(texts) < need:
            raise SondeError(
                f"{name} has {len(texts)} different statements: {config.supervisor_rows} are the supervisor's, so at "
                f"least {need} are needed; lower --supervisor-rows"
            )
        strong, weak = _read(lm, texts, (config.site or f"resid_post.{lm.n_layers // 2}", config.weak_site))
        return cls(config, name, Statements(tuple(texts), truth, strong, weak))

    def problem(self, seed: int) -> Problem:
        """The task of one seed: rows of the supervisor, of the pool and of the test are dealt anew."""
        config, given = self.config, self.statements
        if given is None:
            return planted_task(pool=config.rows, test=config.test, seed=seed)
        order = np.random.default_rng(seed).permutation(len(given.texts))
        own, rest = order[: config.supervisor_rows], order[config.supervisor_rows :]
        held = min(config.test, len(rest) // 3)
        test, pool = rest[:held], rest[held:]
        said = self._supervisor(given.weak[torch.from_numpy(own)], given.truth[own], given.weak, seed)
        truth = given.truth.astype(np.int64)
        return Problem(
            features=given.strong[torch.from_numpy(pool)],
            test_features=given.strong[torch.from_numpy(test)],
            texts=[given.texts[i] for i in pool],
            test_texts=[given.texts[i] for i in test],
            test_truth=truth[test],
            sources=[
                LabelSource.of("weak", said[pool], price="1/10", test_labels=said[test]),
                LabelSource.of("oracle", truth[pool], price=1, test_labels=truth[test]),
            ],
            name=self.name,
        )

    def _supervisor(
        self, x: Float[Tensor, "k d"], truth: Bool[np.ndarray, " k"], every: Float[Tensor, "n d"], seed: int
    ) -> Float[Tensor, "n 2"]:
        """Soft labels of all rows by a linear classifier taught on `x`."""
        if len(np.unique(truth)) < 2:
            raise SondeError(f"the supervisor's {len(truth)} rows are of one class: raise --supervisor-rows")
        labeller = stopped_at(self.config.weak_accuracy, x, truth.astype(np.int64), seed=seed)
        return labeller.label(every)


def _material(config: "WeakToStrongConfig") -> tuple[str, list[str], Bool[np.ndarray, " n"]]:
    """A name, different statements, and their truth."""
    from sonde.data.statements import comparisons, read_statements

    if config.statements is not None:
        read = read_statements(config.statements)
        name, texts, truth = read.name, list(read.texts), read.labels
    elif "quirky-comparison" in str(config.model):
        from sonde.organisms.quirky_comparison import comparison_sets

        asked = comparison_sets().test.where(character="Alice")
        name, texts, truth = "comparison, asked as Alice", asked.prompts, asked.truth
    else:
        read = comparisons(n=3000, seed=config.seed)
        name, texts, truth = "comparisons of numbers", list(read.texts), read.labels
    first = np.sort(np.unique(texts, return_index=True)[1])
    return name, [texts[i] for i in first], truth[first]


def _read(lm: LanguageModel, texts: list[str], sites: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """The residual stream at the last token, at both sites."""
    from sonde.lm.prompt_rows import at_position, prompt_ids

    ids = prompt_ids(lm, texts)
    longest = max(map(len, ids))
    if longest > lm.context:
        raise SondeError(f"a text has {longest} tokens, but {lm.name} reads {lm.context}: shorten it, nothing is cut")
    found: dict[str, Tensor] = {}
    for numbers, values in at_position(lm, ids, list(dict.fromkeys(sites))):
        for site, part in values.items():
            if site not in found:
                found[site] = torch.empty(len(ids), part.shape[1])
            found[site][torch.tensor(numbers)] = part.float().cpu()
    return found[sites[0]], found[sites[1]]
