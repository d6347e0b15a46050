"""A language model that learns from bought labels: a classifier head on its last token, with adapters or all weights.

    p(class | text) = softmax(W norm(h_last))        W: float32, initial weights x 0.01
    stage           W and adapters of rank 8 on all maps of the blocks (or every weight), soft-target cross-entropy

It is a `Backend`: any method of `sonde.knowledge.label_methods` goes with it, and any loss of
`sonde.knowledge.label_losses`; how a stage is trained is `sonde.knowledge.label_training`. The language model is lent:
between calls it is what it was, and the learner keeps the adapters (or the changed weights) to itself. After Mallen &
Belrose 2024 (arXiv:2410.13215), section 3.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.knowledge.label_losses import CrossEntropy, Loss
from sonde.knowledge.label_problem import Problem
from sonde.knowledge.label_training import StageSettings, train_stage
from sonde.knowledge.text_rows import TextRows
from sonde.lm.lora import attach, fast_training
from sonde.lm.model import LanguageModel

Parts = Literal["all", "head", "body"]

_SMALL = 0.01  # of the usual initial weights
_RATES = ((3e10, 4e-5), (6e9, 8e-5), (2e9, 2e-4), (1e8, 5e-4), (0, 2e-3))  # parameters from, learning rate
_SMALL_MODEL = 1e8  # parameters below which a stage is scaled down for a CPU
_CPU_PASSES = 3_000


def stage_settings(lm: LanguageModel) -> StageSettings:
    """The paper's for a model of this size: 4e-5 at 70B parameters, 8e-5 at 8B, 2e-4 at 4B, 5e-4 at 0.5B.

    Below 100M parameters 2e-3, and at most 3,000 row passes a stage in place of 30,000.
    """
    lr = next(rate for least, rate in _RATES if lm.n_parameters >= least)
    passes = _CPU_PASSES if lm.n_parameters < _SMALL_MODEL else StageSettings().passes
    return StageSettings(lr=lr, passes=passes)


@dataclass(frozen=True, eq=False)
class FineTuned:
    """The backend; see the module.

    rank: of the adapters; None trains all weights. stage: by default `stage_settings(lm)`. least_steps: without a gain
    before a stage stops; where an epoch has few steps, 4 checks would end it within the warm-up. train: which parts
    each stage trains, the last entry for all further stages. new_head: start every stage with an untrained head.
    keep_optimiser: its moments go on from stage to stage, where the same parts are trained. template: how a text is
    asked about. prefix: a prompt before every text, as `sonde.knowledge.few_shot.Prompted` makes it.
    """

    lm: LanguageModel
    rank: int | None = 8
    loss: Loss = field(default_factory=CrossEntropy)
    stage: StageSettings | None = None
    least_steps: int = 100
    train: tuple[Parts, ...] = ("all",)
    new_head: bool = False
    keep_optimiser: bool = False
    template: str = "{text}"
    prefix: str = ""

    @property
    def name(self) -> str:
        """Such as "adapters of rank 8"."""
        return "all weights" if self.rank is None else f"adapters of rank {self.rank}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model, the loss and how a stage is trained."""
        return {
            "model": self.lm.name,
            "rank": self.rank,
            "loss": asdict(self.loss),  # type: ignore[call-overload]
            **asdict(self.stage or stage_settings(self.lm)),
            "least_steps": self.least_steps,
            "train": list(self.train),
            "new_head": self.new_head,
            "keep_optimiser": self.keep_optimiser,
            "template": self.template,
            "prefix": self.prefix,
        }

    def prompted(self, prefix: str) -> "FineTuned":
        """The same with a prompt before every text."""
        return replace(self, prefix=prefix)

    def learner(self, problem: Problem, *, seed: int) -> "FineTunedLearner":
        """An untrained classifier. Raises `SondeError` for a problem without texts and for texts that do not fit."""
        return FineTunedLearner(self, problem, seed)


class FineTunedLearner:
    """The classifier. `head` is its head; the rest is put on the language model while it is used."""

    def __init__(self, backend: FineTuned, problem: Problem, seed: int) -> None:
        if problem.texts is None or problem.test_texts is None:
            raise SondeError(f"{problem.name} has features but no texts: a language model is fine-tuned on texts")
        if not backend.train or not set(backend.train) <= {"all", "head", "body"}:
            raise SondeError(f"train is {backend.train}: expected all, head or body for each stage")
        self._backend, self._seed, self._lm = backend, seed, backend.lm
        self._settings = backend.stage or stage_settings(backend.lm)
        self._pool = self._rows(problem.texts)
        self._test = self._rows(problem.test_texts)
        self._columns = 1 if len(problem.classes) == 2 else len(problem.classes)
        self.head = self._fresh_head()
        self._body: list[Tensor] | None = None
        self._moments: tuple[Parts, dict[str, Any]] | None = None
        self._stages = 0

    def fit(self, rows: Int[np.ndarray, " n"], labels: Float[Tensor, "n C"]) -> Sequence[str]:
        """One stage."""
        backend, stage = self._backend, self._settings
        part = backend.train[min(self._stages, len(backend.train) - 1)]
        if backend.new_head and self._stages:
            self.head = self._fresh_head()
        self._stages += 1
        with self._installed() as body:
            trained = nn.ModuleDict({"head": self.head, "body": body})
            self.head.requires_grad_(part != "body")
            body.requires_grad_(part != "head")
            frozen = self._pool.all_last(rows.tolist(), batch=stage.batch) if part == "head" else None

            def logits_of(places: Int[np.ndarray, " b"]) -> Float[Tensor, "b K"]:
                if frozen is not None:
                    return self.head(frozen[torch.from_numpy(places)].to(self._lm.device))
                return self.head(self._pool.last(rows[places].tolist()).float())

            optimiser = torch.optim.AdamW(
                [p for p in trained.parameters() if p.requires_grad],
                lr=stage.lr,
                betas=(0.9, 0.95),
                weight_decay=stage.weight_decay,
            )
            if backend.keep_optimiser and self._moments is not None and self._moments[0] == part:
                optimiser.load_state_dict(self._moments[1])
            with fast_training(self._lm):
                notes = train_stage(
                    trained,
                    logits_of,
                    labels,
                    loss=backend.loss,
                    settings=self._patient(len(rows)),
                    optimizer=optimiser,
                    seed=self._seed,
                )
            if backend.keep_optimiser:
                self._moments = part, optimiser.state_dict()
        return notes

    def pool_scores(self, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n K"]:
        """Log-odds or logits of rows of the pool."""
        return self._scores(self._pool, rows.tolist())

    def test_scores(self) -> Float[np.ndarray, "test *C"]:
        """Log-odds `[test]`, or logits `[test C]`."""
        scores = self._scores(self._test, None).numpy()
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def _scores(self, texts: TextRows, rows: list[int] | None) -> Float[Tensor, "n K"]:
        with self._installed(), torch.no_grad():
            hidden = texts.all_last(rows, batch=4 * self._settings.batch)
            return self.head(hidden.to(self._lm.device)).double().cpu()

    def _patient(self, n: int) -> StageSettings:
        """The settings of a stage of `n` rows, which waits for `least_steps` steps at least."""
        stage = self._settings
        kept = n - max(2, round(stage.held_out * n))
        every = min(50, max(1, kept // max(1, stage.batch_of(max(1, kept)))))
        return replace(stage, patience=max(stage.patience, -(-self._backend.least_steps // every)))

    def _rows(self, texts: Sequence[str]) -> TextRows:
        template = self._backend.template
        if "{text}" not in template:
            raise SondeError(f"the template {template!r} has no {{text}} in it")
        questions = [template.replace("{text}", text) for text in texts]
        return TextRows(self._lm, questions, prefix=self._backend.prefix)

    def _fresh_head(self) -> nn.Linear:
        width = self._lm.unembedding.weight.shape[1]
        head = nn.Linear(width, self._columns, bias=False, dtype=torch.float32)
        generator = torch.Generator().manual_seed(self._seed)
        bound = _SMALL / width**0.5
        with torch.no_grad():
            head.weight.uniform_(-bound, bound, generator=generator)
        return head.to(self._lm.device)

    @contextmanager
    def _installed(self) -> Iterator[nn.ParameterList]:
        """The language model as this learner has trained it; afterwards it is what it was."""
        if self._backend.rank is None:
            body, put_back = self._all_weights()
        else:
            body = attach(self._lm, rank=self._backend.rank, seed=self._seed)
            put_back = body.remove
        try:
            if self._body is not None:
                _copy(self._body, body)
            yield body
            self._body = [p.detach().clone() for p in body]
        finally:
            put_back()

    def _all_weights(self) -> tuple[nn.ParameterList, Any]:
        model = self._lm.model
        body = nn.ParameterList(model.parameters())
        before = [p.detach().clone() for p in body]

        def put_back() -> None:
            _copy(before, body)
            model.requires_grad_(False)
            vars(self._lm).pop("hash", None)

        return body, put_back


def _copy(values: Sequence[Tensor], onto: nn.ParameterList) -> None:
    with torch.no_grad():
        for parameter, value in zip(onto, values, strict=True):
            parameter.copy_(value)
