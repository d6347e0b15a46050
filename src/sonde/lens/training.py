"""Training of tuned lenses on a stream of text: what is held out, what is cached, and exact resuming.

Held out are rows spread evenly over the text. Where the other hidden states fit into memory they are kept, regressed
on, and descended on in a random order that is a function of the step; otherwise the first of them are regressed on and
each further batch is one step. How the steps are made is in `sonde.lens.descent`.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.lens.descent import Descent, LensTraining, ridge_translators, shuffled
from sonde.lens.fused import Readout
from sonde.lens.rows import LensRows
from sonde.lens.tuned import DEFAULT_SITES, TunedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch, stream
from sonde.stats.moments import Moments


def fit(
    lm: LanguageModel,
    batches: TokenBatches | Iterable[str] | str | Path | None,
    settings: LensTraining | None = None,
    *,
    sites: Iterable[str] = DEFAULT_SITES,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 25,
    progress: str | None = None,
) -> TunedLens:
    """Train a lens for `lm` in one pass over a text.

    Where the hidden states fit into `settings.cache_bytes` they are kept, regressed on and descended on in random
    order, as often as the steps need; otherwise each batch is used once and forgotten. About `held_out` tokens,
    in rows spread evenly over the text, decide when to stop and which parameters to keep.

    Args:
        lm: the model.
        batches: `TokenBatches`, or anything that they read.
        settings: how to train.
        sites: what the lens reads; any sites of width d_model.
        checkpoint: a file to continue from when it exists, written every `checkpoint_every` steps.
        checkpoint_every: steps between two checkpoints.
        progress: label of a progress bar.

    Raises:
        SondeError: for too little text, a checkpoint of another training, and losses that are not finite.

    """
    settings = settings or LensTraining()
    if not isinstance(batches, TokenBatches):
        if lm.tokenizer is None:
            raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text; give TokenBatches")
        batches = TokenBatches(batches, lm.tokenizer, context=min(512, lm.context))
    if batches.world > 1:
        raise SondeError(f"a lens is trained by one process, not {batches.world}: start it without torchrun")
    rest, held = batches.split(min(0.5, settings.held_out / (batches.n_tokens + batches.n_chunks)))
    trainer = LensTrainer(lm, settings, sites=sites, expected_tokens=rest.n_tokens + rest.n_chunks)
    identity = {
        "settings": asdict(settings),
        "sites": list(trainer.lens.sites),
        "unembedding": lm.unembedding.hash,
        "text": batches.hash,
    }
    seen = -1
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        tree = load_bundle(path)
        if tree["identity"] != identity:
            raise SondeError(f"{path} is a checkpoint of another lens training: delete it or give another file")
        trainer.load(tree["trainer"])
        seen = tree["batch"]

    def save() -> None:
        if path is not None:
            save_bundle(path, {"identity": identity, "trainer": trainer.state(), "batch": seen})

    with tqdm(
        total=settings.n_steps, initial=trainer.step, desc=progress, unit="step", disable=progress is None
    ) as bar:

        def after_step() -> None:
            bar.update(trainer.step - bar.n)
            if trainer.step % checkpoint_every == 0:
                save()

        if not trainer.done:
            # Cached states are not part of a checkpoint: the same batches give the same states again.
            if not trainer.holding:
                for batch in stream(lm, held, sites=trainer.sites):
                    trainer.hold_out(batch)
            for batch in stream(lm, rest, sites=trainer.sites, start=0 if trainer.caching else seen + 1):
                before = trainer.step
                trainer.update(batch)
                seen = batch.index
                if trainer.step > before:
                    after_step()
                if trainer.done or trainer.full:
                    break
        lens = trainer.finish(after=after_step)
    save()
    return lens


class LensTrainer:
    """A lens in training: a consumer of a stream.

    `update` takes batches: first the held-out tokens (unless `hold_out` was given some), then those that the ridge
    regression needs, then one gradient step a batch; or, when `caching`, all states into memory until it is `full`,
    and `finish` does the rest. `done` says that further batches are not needed.

    Args:
        lm: the model.
        settings: how to train.
        sites: what the lens reads.
        expected_tokens: how many will come at most; decides, with `settings.cache_bytes`, whether to cache.

    """

    def __init__(
        self,
        lm: LanguageModel,
        settings: LensTraining | None = None,
        *,
        sites: Iterable[str] = DEFAULT_SITES,
        expected_tokens: int | None = None,
    ) -> None:
        self.settings = settings = settings or LensTraining()
        self.lens = TunedLens.zeros(lm, settings.kind, sites=sites)
        self._last = f"resid_post.{lm.n_layers - 1}"
        self.sites = (*self.lens.sites, self._last)
        self._facts = {"family": lm.family, "unembedding_hash": lm.unembedding.hash, "training": asdict(settings)}
        self._descent = Descent(self.lens, Readout(lm.unembedding), settings)
        most = settings.tokens if expected_tokens is None else min(settings.tokens, expected_tokens)
        self.caching = most * (len(self.lens) + 1) * lm.d_model * 4 <= settings.cache_bytes
        self._capacity = most
        self._cache: LensRows | None = None
        self._cached = 0
        self._held: LensRows | None = None
        self._chosen = False
        self._moments: list[Moments] | None = None
        self._solved = not settings.trainer.startswith("ridge")
        self._ridge_tokens = settings.ridge_tokens or 32 * lm.d_model
        self._tokens = 0

    @property
    def step(self) -> int:
        """Gradient steps done."""
        return self._descent.step

    @property
    def full(self) -> bool:
        """Whether the cache holds all that it may."""
        return self.caching and self._cached >= self._capacity

    @property
    def done(self) -> bool:
        """Whether training has ended: all steps done, or no more progress."""
        return self._descent.done and self._solved

    @property
    def history(self) -> list[dict[str, Any]]:
        """Held-out loss in nats by layer: {"step": …, "loss": [layers]}; step -1 is the logit lens, 0 the start."""
        return self._descent.history

    @property
    def holding(self) -> bool:
        """Whether there are held-out tokens."""
        return self._held is not None

    def hold_out(self, batch: Batch) -> None:
        """Hold out a whole batch, before the first `update`: instead of the first tokens that come."""
        rows = self._rows(batch)
        self._held = rows if self._held is None else LensRows.cat([self._held, rows])
        self._chosen = True

    def update(self, batch: Batch) -> None:
        """Take in a batch: its states are kept, or learned from, or held out."""
        if self.done or self.full:
            return
        rows = self._rows(batch)
        held = 0 if self._held is None else len(self._held)
        if held < self.settings.held_out and not self._chosen:
            taken = rows[: self.settings.held_out - held]
            self._held = taken if self._held is None else LensRows.cat([self._held, taken])
            # what is left of the batch is of the same documents, and dropped
            return
        self._tokens += len(rows)
        if self.caching:
            self._keep(rows)
            return
        self._begin()
        if not self._solved:
            self._regress(rows)
            if self._moments is not None and self._moments[0].n >= self._ridge_tokens and self.settings.n_steps:
                self._solve()
            return
        self._descent.descend(rows.hidden, rows.target(self._descent.readout, self.settings.loss))

    def finish(self, *, after: Callable[[], None] | None = None) -> TunedLens:
        """The lens with the best parameters of every layer. `after` is called after each step that is done here.

        Raises `SondeError` when the text ended before the first token that is not held out.
        """
        if not self.done or self._descent.evaluations == 0:
            self._begin()
            if self.caching:
                self._descend_on_cache(after)
            elif not self._solved:
                self._solve()
        self._descent.settle()
        self.lens.facts = {
            **self._facts,
            "held_out_loss": self._descent.best.tolist(),
            "steps": self.step,
            "tokens": self._tokens,
        }
        return self.lens

    def state(self) -> dict[str, Any]:
        """Everything but cached states, for `load`."""
        held = None if self._held is None else [self._held.hidden, self._held.final, self._held.labels]
        return {
            "descent": self._descent.state(),
            "held": None if self.caching else held,
            "moments": None if self.caching or self._moments is None else [m.state() for m in self._moments],
            "chosen": self._chosen,
            "solved": self._solved,
            "tokens": self._tokens,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state. A caching trainer is then fed the same batches again."""
        self._descent.load(state["descent"])
        device = self.lens.bias.device if self.lens.bias is not None else None
        if state["held"] is not None:
            self._held = LensRows(*(part.to(device) for part in state["held"]))
        if state["moments"] is not None:
            self._moments = [Moments.from_state(moments) for moments in state["moments"]]
        self._solved, self._chosen = state["solved"], state["chosen"]
        self._tokens = 0 if self.caching and not self.done else state["tokens"]

    def _rows(self, batch: Batch) -> LensRows:
        shift, kl = self.settings.shift, self.settings.loss == "kl"
        return LensRows.of(
            batch, self.lens.sites, self._last, token_shift=shift if kl else 0, labels_shift=0 if kl else shift
        )

    def _begin(self) -> None:
        """Once the held-out tokens are there: measure the logit lens on them."""
        if self._held is None:
            raise SondeError("the text is too short to train a lens: not one token was read")
        if self._descent.held is None:
            self._descent.hold_out(self._held.hidden, self._held.target(self._descent.readout, self.settings.loss))
        if self._descent.evaluations == 0:
            self._descent.evaluate()

    def _regress(self, rows: LensRows) -> None:
        if self._moments is None:
            self._moments = [Moments(self.lens.d_model, self.lens.d_model) for _ in self.lens.sites]
        for moments, hidden in zip(self._moments, rows.hidden, strict=True):
            moments.update(hidden, rows.final.float() - hidden.float())

    def _solve(self) -> None:
        if self._moments is None:
            raise self._too_short()
        self._descent.start(*ridge_translators(self._moments, self.settings.ridge, kind=self.settings.kind))
        self._solved, self._moments = True, None
        self._descent.evaluate()

    def _keep(self, rows: LensRows) -> None:
        """Put rows into the cache, whose memory is taken once."""
        if self._cache is None:
            layers, _, d_model = rows.hidden.shape
            size = self._capacity
            self._cache = LensRows(
                rows.hidden.new_empty(layers, size, d_model),
                rows.final.new_empty(size, d_model),
                rows.labels.new_empty(size),
            )
        rows = rows[: self._capacity - self._cached]
        place = slice(self._cached, self._cached + len(rows))
        self._cache.hidden[:, place] = rows.hidden
        self._cache.final[place] = rows.final
        self._cache.labels[place] = rows.labels
        self._cached += len(rows)

    def _too_short(self) -> SondeError:
        return SondeError(
            "the text has no token beyond those that are held out to compare parameters: give more text, or a smaller "
            f"held_out than {self.settings.held_out}"
        )

    def _descend_on_cache(self, after: Callable[[], None] | None) -> None:
        if self._cache is None:
            raise self._too_short()
        rows = self._cache[: self._cached]
        if not self._solved:
            self._regress(rows)
            self._solve()
        if self._descent.done:
            return
        target = rows.target(self._descent.readout, self.settings.loss)
        size = min(self.settings.tokens_per_step, len(rows))
        while not self._descent.done:
            index = shuffled(len(rows), size, self._descent.step, self.settings.seed).to(rows.final.device)
            self._descent.descend(rows.hidden[:, index], target[index])
            if after is not None:
                after()
