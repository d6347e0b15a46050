"""What every chapter of the audit is, and what the chapters share."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch
from sonde.runs.blocks import Chapter
from sonde.runs.run import Run
from sonde.stats.ngram import NgramModel

if TYPE_CHECKING:
    from sonde.lens.tuned import TunedLens
    from sonde.studies.audit import AuditConfig

NGRAM_ORDER = 5


class Audit:
    """One audit under way: the model, the two halves of its text, the run, and what several chapters need.

    `fit` is the half on which lenses and n-gram counts are fitted, `held` the half that every number comes from.
    """

    def __init__(
        self, config: "AuditConfig", lm: LanguageModel, fit: TokenBatches, held: TokenBatches, run: Run
    ) -> None:
        self.config, self.lm, self.fit, self.held, self.run = config, lm, fit, held, run
        self.timings: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time that a step takes to `timings`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[step] = self.timings.get(step, 0.0) + time.perf_counter() - start

    def command(self, chapter: str) -> str:
        """The command that makes the numbers of one chapter again."""
        return shlex.join([*self.config.command("chapters"), "--chapters", chapter])

    @cached_property
    def ngram(self) -> NgramModel:
        """A 5-gram model of the fitting half."""
        with self.timed("n-gram counts"):
            windows = torch.cat([batch.tokens for batch in self.fit])
            return NgramModel.fit(windows, order=NGRAM_ORDER, vocab_size=self.lm.vocab_size)

    @cached_property
    def lens(self) -> "TunedLens":
        """A tuned lens on the input of every block, fitted on the fitting half; resumed where it stood."""
        from sonde.lens.tuned import TunedLens

        kept = self.run.path("lens")
        if kept.exists():
            return TunedLens.load(kept, self.lm)
        with self.timed("tuned lens"):
            checkpoint = self.run.checkpoint("lens")
            lens = TunedLens.fit(self.lm, self.fit, checkpoint=checkpoint, seed=self.config.seed, progress="tuned lens")
            lens.save(kept)
            checkpoint.unlink(missing_ok=True)
            return lens


class Part:
    """A chapter in the making. Subclasses set `name` and `sites`, and override what they need.

    The order of calls: `prepare`, then `update` for every batch of the held half with activations at `sites`, then
    `write`. `state` and `load` carry what `update` gathered through an interruption.
    """

    name: ClassVar[str]

    def __init__(self, audit: Audit) -> None:
        self.audit = audit

    @classmethod
    def check(cls, config: "AuditConfig") -> None:
        """Raise `SondeError` for options of this chapter that cannot be used; called before the run begins."""

    @property
    def sites(self) -> tuple[str, ...]:
        """What this chapter reads in the shared pass; nothing by default."""
        return ()

    def prepare(self) -> None:
        """Fit what is needed before the shared pass."""

    def update(self, batch: Batch) -> None:
        """Watch one batch of the shared pass."""

    def state(self) -> Any:
        """What `update` has gathered, as a tree for `sonde.files.save_bundle`."""
        return None

    def load(self, state: Any) -> None:
        """Take up what `state` returned."""

    def write(self) -> Chapter:
        """The finished chapter."""
        raise NotImplementedError


class Gathered:
    """Arrays over the held rows that grow batch by batch: `add(name, values)`, then `gathered[name]` of all rows."""

    def __init__(self) -> None:
        self._parts: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Append rows, shape (batch, ...)."""
        self._parts.setdefault(name, []).append(values.detach().cpu())

    def __getitem__(self, name: str) -> np.ndarray:
        return torch.cat(self._parts[name]).numpy()

    def state(self) -> dict[str, torch.Tensor]:
        """All arrays by name."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `state` returned."""
        self._parts = {name: [values] for name, values in state.items()}
