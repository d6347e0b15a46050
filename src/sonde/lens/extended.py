"""The extended lens: translate the state of layer l, run the model's last k blocks on it, then unembed.

It asks what the model would predict if the blocks between l and its last k were skipped (Belrose et al. 2303.08112,
appendix). Translators lead to the input of block L - k; the ridge regression aims there, and gradients pass through the
blocks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lens.descent import Descent, LensTraining, ridge_translators
from sonde.lens.fused import Readout, Target
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatch, TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import run_from
from sonde.stats.moments import Moments


class ExtendedLens:
    """A tuned lens before the last `blocks` blocks of a model.

    Made by `ExtendedLens.fit`, or with translators at zero by `ExtendedLens(lm, blocks=k)`: the logit lens's
    counterpart.

    Attributes:
        lens: the translators, of the inputs of blocks 0 to L - k - 1.
        blocks: how many blocks are kept, k.

    """

    def __init__(self, lm: LanguageModel, *, blocks: int = 1) -> None:
        if not 1 <= blocks < lm.n_layers:
            raise SondeError(f"an extended lens keeps 1 to {lm.n_layers - 1} blocks of {lm.name}, not {blocks}")
        self.lm, self.blocks = lm, blocks
        self.first = lm.n_layers - blocks
        self.lens = TunedLens.zeros(lm, sites=[f"resid_pre.{i}" for i in range(self.first)])
        self._read = (*self.lens.sites, f"resid_post.{lm.n_layers - 1}")

    @staticmethod
    def fit(
        lm: LanguageModel,
        batches: TokenBatches,
        settings: LensTraining | None = None,
        *,
        blocks: int = 1,
        **changes: Any,
    ) -> "ExtendedLens":
        """Train the translators: a regression on `ridge_tokens` tokens, then one step a batch.

        `changes` are fields of `LensTraining`; the learning rate is a quarter of the plain lens's unless given, as in
        the paper. Raises `SondeError` as `sonde.lens.training.fit` does.
        """
        settings = settings or LensTraining(**changes)
        if settings.kind != "tuned" or settings.loss != "kl" or settings.shift:
            raise SondeError("an extended lens is trained on the model's own prediction, with full translators")
        extended = ExtendedLens(lm, blocks=blocks)
        descent = Descent(extended.lens, Readout(lm.unembedding), settings, slow_down=1.0 if settings.lr else 0.25)
        moments: list[Moments] | None = None
        if settings.trainer.startswith("ridge"):
            moments = [Moments(lm.d_model, lm.d_model) for _ in extended.lens.sites]
        wanted = settings.ridge_tokens or 32 * lm.d_model
        held: list[TokenBatch] = []
        for batch in batches:
            if sum(int(b.mask.sum()) for b in held) < settings.held_out:
                held.append(batch)
                continue
            if not descent.evaluations:
                descent.evaluate(extended._held_out_loss(held, descent))
            if moments is not None:
                extended._regress(batch, moments)
                if moments[0].n < wanted:
                    continue
                descent.start(*ridge_translators(moments, settings.ridge))
                moments = None
                descent.evaluate(extended._held_out_loss(held, descent))
            if descent.done:
                break
            with extended._pass(batch) as (hidden, target, decode):
                descent.descend(hidden, target, decode, evaluate=lambda: extended._held_out_loss(held, descent))
        if not descent.evaluations or moments is not None:
            raise SondeError(f"{batches} are too few for an extended lens: held out {settings.held_out}, then {wanted}")
        descent.settle()
        extended.lens.facts = {"held_out_loss": descent.best.tolist(), "steps": descent.step, "blocks": blocks}
        return extended

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "batch pos"], layer: int | str, mask: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """What the model predicts when it jumps from `layer` to its last blocks."""
        site = self.lens.sites[self.lens.layer(layer)]
        with self.lm.reading(site) as acts:
            self.lm(tokens, mask)
        start = self.lens.translate(acts[site], layer)
        return self.lm.unembed(run_from(self.lm, self.first, start, tokens, mask))

    @contextmanager
    def _pass(self, batch: TokenBatch) -> Iterator[tuple[Tensor, Target, Any]]:
        """States of all layers (layers, n, d), the target, and the way from translated states to the head."""
        lm, readout = self.lm, Readout(self.lm.unembedding)
        with torch.no_grad(), lm.reading(*self._read) as acts:
            lm(batch.tokens, batch.mask)
        mask = batch.mask.to(lm.device)
        shape = mask.shape

        def decode(translated: Float[Tensor, "layers n d"]) -> Float[Tensor, "layers n d_head"]:
            # every token goes through the blocks, pads too; only real ones go on to the head
            whole = (states.view(*shape, -1).to(lm.dtype) for states in translated)
            ends = (run_from(lm, self.first, states, batch.tokens, batch.mask)[mask] for states in whole)
            return torch.stack([readout.normed(end.to(readout.dtype)) for end in ends])

        hidden = torch.stack([acts[site].flatten(0, 1) for site in self.lens.sites])
        yield hidden, Target.model(readout, acts[self._read[-1]][mask]), decode

    @torch.no_grad()
    def _held_out_loss(self, held: Iterable[TokenBatch], descent: Descent) -> Float[Tensor, " layers"]:
        total, count = torch.zeros(len(self.lens), dtype=torch.float64), 0
        for batch in held:
            with self._pass(batch) as (hidden, target, decode):
                total += descent.loss(hidden, target, decode).double().cpu() * len(target)
                count += len(target)
        return total / count

    @torch.no_grad()
    def _regress(self, batch: TokenBatch, moments: list[Moments]) -> None:
        sites = (*self.lens.sites, f"resid_pre.{self.first}")
        with self.lm.reading(*sites) as acts:
            self.lm(batch.tokens, batch.mask)
        mask = batch.mask.to(self.lm.device)
        aim = acts[sites[-1]][mask].float()
        for moment, site in zip(moments, self.lens.sites, strict=True):
            hidden = acts[site][mask].float()
            moment.update(hidden, aim - hidden)
