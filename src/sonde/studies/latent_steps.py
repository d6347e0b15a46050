"""What studies of latents do first: train dictionaries on a text, and cache where encoders fire on it."""

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonde.features.dictionary import Dictionary
    from sonde.features.latent_cache import LatentCache
    from sonde.features.plan import Plan
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.run import Run

CONTEXT = 256
_BATCH = 1024


def text_rows(config: Any, lm: "LanguageModel") -> "TokenBatches":
    """The text of `config` as rows of the length that latents are cached in."""
    from sonde.lm.batches import TokenBatches

    return TokenBatches(config.text, lm.tokenizer, context=min(CONTEXT, lm.context), limit_tokens=config.tokens)  # type: ignore[arg-type]


def trained(
    run: "Run", lm: "LanguageModel", text: "TokenBatches", plans: "Sequence[Plan]", *, epochs: int, seed: int
) -> "list[Dictionary]":
    """A dictionary for each plan, from the run folder where they are there. Rows are kept on disk meanwhile."""
    from sonde.features.activation_buffer import Order
    from sonde.features.dictionary import Dictionary
    from sonde.features.training import train_dictionaries

    folders = [run.path("dictionaries", plan.name) for plan in plans]
    if not run.done("dictionaries"):
        rows = run.path("rows")
        order = Order("disk", batch=_BATCH, folder=rows, epochs=epochs, seed=seed)
        made = train_dictionaries(
            lm, text, plans, order=order, checkpoint=run.checkpoint("dictionaries"), progress="dictionaries"
        )
        for folder, dictionary in zip(folders, made, strict=True):
            dictionary.save(folder)
        run.finish("dictionaries")
        shutil.rmtree(rows, ignore_errors=True)
    return [Dictionary.load(folder) for folder in folders]


def cached(
    run: "Run", lm: "LanguageModel", encoders: Mapping[str, Any], text: "TokenBatches", *, seed: int
) -> "LatentCache":
    """Where the encoders fire on the text, in the run folder's `cache`."""
    from sonde.features.latent_cache import LatentCache

    found = LatentCache.build(lm, encoders, text, run.path("cache"), seed=seed, progress="caching")
    if not run.done("cache"):
        run.finish("cache")
    return found
