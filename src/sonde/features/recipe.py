"""A dictionary of a small model in minutes: the settings that the study and the bundled dictionary share.

Small models are given few tokens, so that everything is quicker than the published settings: a higher rate than
2e-4/√(M/2¹⁴), steps of a thousand rows mixed over sixteen steps, latents that are dead after a tenth of the training,
rows scaled to norm √d. Thresholds of JumpReLU start at 0.5 under a window of 2: with the published 0.001 they do not
move in a thousand steps. The threshold of BatchTopK is the average of ten steps and no more: a longer one lags behind
weights that still change, and keeps fewer than k.
"""

from collections.abc import Sequence
from pathlib import Path

from sonde.data.python_docs import comments
from sonde.errors import SondeError
from sonde.features.activation_buffer import Order
from sonde.features.design import Kind
from sonde.features.dictionary import Dictionary
from sonde.features.plan import Plan, grid
from sonde.features.step_config import StepConfig
from sonde.features.training import train_dictionaries
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel

RATE = 5e-3
BATCH = 1024
MIXED = 16  # batches in the buffer
CONTEXT = 256
SPARSITY = {"jumprelu": 10.0, "relu": 2.0, "gated": 2.0}  # for about 30 active latents of 1,024 on pebble


def settings(tokens: int, *, lr: float = RATE) -> StepConfig:
    """Steps of a training of so many tokens."""
    return StepConfig(lr=lr, dead_after=max(1, tokens // 10), threshold_decay=0.9)


def small_plans(
    lm: LanguageModel,
    sites: Sequence[str],
    kind: Kind,
    *,
    latents: int,
    k: int,
    tokens: int,
    sparsity: float | None = None,
    lr: float = RATE,
    seeds: Sequence[int] = (0,),
) -> list[Plan]:
    """Autoencoders of one kind at all `sites`, for so many tokens. Raises as `grid` does."""
    weight = SPARSITY.get(kind) if sparsity is None else sparsity
    return grid(
        lm,
        sites,
        kinds=[kind],
        latents=[latents],
        ks=[k],
        sparsities=[weight],
        seeds=seeds,
        config=settings(tokens, lr=lr),
        scale="norm",
        threshold=0.5,
        bandwidth=2.0,
    )


def documentation(lm: LanguageModel, tokens: int, *, seed: int = 0) -> TokenBatches:
    """Docstrings and comments of Python's library, in rows of 256 tokens in random order: somewhat more than `tokens`.

    Raises `SondeError` for a model without a tokenizer.
    """
    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text: save one beside the weights")
    context = min(CONTEXT, lm.context)
    limit = tokens + tokens // 8
    return TokenBatches(comments(), lm.tokenizer, context=context, limit_tokens=limit, shuffle=True, seed=seed)


def small_dictionary(
    lm: LanguageModel,
    site: str,
    *,
    kind: Kind = "topk",
    latents: int = 1024,
    k: int = 32,
    tokens: int = 1_000_000,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: str | None = None,
) -> Dictionary:
    """Train one dictionary on the docstrings and comments of Python's library, which every machine has.

    About two minutes of one core for `organism:pebble`. `checkpoint` is a file to go on from when it exists. The same
    as `sonde run sae MODEL --sites SITE --seeds 1`, without what that measures. Raises `SondeError` as
    `train_dictionaries` does.
    """
    plans = grid(
        lm, [site], kinds=[kind], latents=[latents], ks=[k], seeds=[seed], config=settings(tokens), scale="norm"
    )
    order = Order("buffer", batch=BATCH, size=MIXED * BATCH, seed=seed)
    (made,) = train_dictionaries(
        lm, comments(), plans, tokens=tokens, order=order, checkpoint=checkpoint, progress=progress
    )
    return made
