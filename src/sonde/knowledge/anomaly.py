"""Does a model come to this answer as it comes to those that are trusted? An alarm that knows trusted inputs only.

Features of an input (a trusted probe's log-odds at every layer, activations, effects of ablations) are held against
those of trusted inputs by a detector of `sonde.stats.novelty`. Where features come as a matrix for each layer, the
scores of each layer are standardised by trusted rows that the detector was not fitted on, and their mean or maximum
over layers is the score. The same held-out rows say what a score is worth: p = (1 + number of them at least as
strange) / (1 + number of them), the conformal p-value, which is uniform on inputs that are like the trusted ones.
After Mallen et al. 2023 (arXiv:2312.01037, section 5) and the study of detectors for quirky models (arXiv:2504.08812).
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle, write_json
from sonde.stats.layered_rows import Novelty, layered
from sonde.stats.local_outliers import Topological
from sonde.stats.novelty import DETECTORS

Aggregate = Literal["mean", "max"]
_FORMAT = "sonde alarm 1"
_LEAST_HELD = 2


class Alarm:
    """A detector over all layers: `Alarm().fit(trusted).score(rows)`, larger is stranger.

    Rows are `[n, d]`, such as a probe's log-odds (`d` layers), or `[layers, n, d]`. Detectors that compare with
    untrusted rows take them in `score`; "topological" takes the model's answers beside the rows.

    Args:
        detector: a name of `sonde.stats.novelty.DETECTORS`; the default is the one of the paper.
        aggregate: of the layers' standardised scores.
        held_out: share of the trusted rows that the detector is not fitted on, for standardisation and p-values.
        seed: of which rows these are.

    Raises:
        SondeError: for another detector or aggregate, and a share outside 0 to 1.

    """

    def __init__(
        self,
        detector: str = "mahalanobis",
        *,
        aggregate: Aggregate = "mean",
        held_out: float = 0.25,
        seed: int = 0,
    ) -> None:
        if detector not in DETECTORS:
            raise SondeError(f"detector {detector!r} is unknown: use {', '.join(DETECTORS)}")
        if aggregate not in get_args(Aggregate):
            raise SondeError(f"aggregate {aggregate!r} is unknown: use {', '.join(get_args(Aggregate))}")
        if not 0 < held_out < 1:
            raise SondeError(f"held_out is {held_out}: expected a share between 0 and 1, such as 0.25")
        self.detector, self.aggregate, self.held_out, self.seed = detector, aggregate, held_out, seed
        self._novelty: Novelty = DETECTORS[detector]()
        self._held: Tensor | None = None

    @property
    def untrusted(self) -> Literal["no", "may", "must"]:
        """Whether untrusted rows are not looked at, may be, or have to be."""
        return self._novelty.untrusted

    def fit(self, trusted: ArrayLike | Tensor, *, answers: ArrayLike | None = None) -> "Alarm":
        """Learn what is normal from trusted rows, `answers [n]` beside them where the detector asks for them.

        Raises `SondeError` for rows that are not finite (with row and layer) and for too few.
        """
        rows = layered(trusted)
        order = np.random.default_rng(self.seed).permutation(rows.shape[1])
        n_held = round(self.held_out * len(order))
        if n_held < _LEAST_HELD or len(order) - n_held < _LEAST_HELD:
            raise SondeError(
                f"{len(order)} trusted rows are too few to fit an alarm and hold {self.held_out:g} of them out: give "
                f"at least {_LEAST_HELD} of each"
            )
        held, fitted = order[:n_held], order[n_held:]
        self._trusted, self._answers = rows, None if answers is None else np.asarray(answers)
        self._held, self._held_answers = rows[:, held], None if self._answers is None else self._answers[held]
        if isinstance(self._novelty, Topological):
            self._novelty.fit(rows[:, fitted], None if self._answers is None else self._answers[fitted])
        else:
            self._novelty.fit(rows[:, fitted])
        return self

    def score(
        self,
        rows: ArrayLike | Tensor,
        untrusted: ArrayLike | Tensor | None = None,
        *,
        answers: ArrayLike | None = None,
    ) -> Float[np.ndarray, " n"]:
        """Strangeness of each row: 0 is the mean of held-out trusted rows, in their standard deviations."""
        return self._over_layers(self._standardised(rows, untrusted, answers)[0])

    def by_layer(
        self,
        rows: ArrayLike | Tensor,
        untrusted: ArrayLike | Tensor | None = None,
        *,
        answers: ArrayLike | None = None,
    ) -> Float[np.ndarray, "layers n"]:
        """Standardised strangeness of each row in each layer; one layer for rows `[n, d]`."""
        return self._standardised(rows, untrusted, answers)[0]

    def p_values(
        self,
        rows: ArrayLike | Tensor,
        untrusted: ArrayLike | Tensor | None = None,
        *,
        answers: ArrayLike | None = None,
    ) -> Float[np.ndarray, " n"]:
        """Share of trusted rows that are at least as strange; below 0.05 is an alarm that 5 % of trusted rows raise."""
        found, held = (self._over_layers(scores) for scores in self._standardised(rows, untrusted, answers))
        stranger = len(held) - np.searchsorted(np.sort(held), found)
        return (1 + stranger) / (1 + len(held))

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and the trusted rows as `trusted.safetensors`; `load` fits the same alarm again."""
        if self._held is None:
            raise SondeError("this alarm has seen no trusted rows: call fit first")
        settings = {
            "format": _FORMAT,
            "detector": self.detector,
            "aggregate": self.aggregate,
            "held_out": self.held_out,
            "seed": self.seed,
        }
        write_json(Path(folder) / "config.json", settings)
        answers = None if self._answers is None else torch.from_numpy(self._answers.astype(np.int64))
        save_bundle(Path(folder) / "trusted.safetensors", {"trusted": self._trusted, "answers": answers})

    @staticmethod
    def load(folder: str | Path) -> "Alarm":
        """Read what `save` wrote. Raises `SondeError` for a folder that is not an alarm's."""
        try:
            config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            if config.pop("format") != _FORMAT:
                raise ValueError("another format")
            made = Alarm(config.pop("detector"), **config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SondeError(f"{folder} is not the folder of an alarm: {error}") from error
        kept = load_bundle(Path(folder) / "trusted.safetensors")
        answers = kept["answers"]
        return made.fit(kept["trusted"], answers=None if answers is None else answers.numpy())

    def _standardised(
        self, rows: ArrayLike | Tensor, untrusted: ArrayLike | Tensor | None, answers: ArrayLike | None
    ) -> tuple[Float[np.ndarray, "layers n"], Float[np.ndarray, "layers held"]]:
        if self._held is None:
            raise SondeError("this alarm has seen no trusted rows: call fit first")
        given = layered(rows)
        batch = given if untrusted is rows else (None if untrusted is None else layered(untrusted))
        found, held = (
            np.atleast_2d(self._raw(part, batch, labels))
            for part, labels in ((given, answers), (self._held, self._held_answers))
        )
        mean, deviation = held.mean(-1, keepdims=True), held.std(-1, keepdims=True)
        # a layer whose trusted scores are all equal (no code newly on) counts as it is
        scale = np.where(deviation > 0, deviation, 1.0)
        return (found - mean) / scale, (held - mean) / scale

    def _over_layers(self, scores: Float[np.ndarray, "layers n"]) -> Float[np.ndarray, " n"]:
        return scores.mean(0) if self.aggregate == "mean" else scores.max(0)

    def _raw(self, rows: Tensor, untrusted: Tensor | None, answers: ArrayLike | None) -> Float[np.ndarray, "*layers n"]:
        if isinstance(self._novelty, Topological):
            return self._novelty.score(rows, untrusted, answers=answers)
        return self._novelty.score(rows, untrusted)
