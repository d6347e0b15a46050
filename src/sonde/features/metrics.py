"""How good is a dictionary? What it gives back of its activations, and what the model loses when it stands for them.

Every number is defined where it is counted: `sonde.features.reconstruction` (FVU, L0, alive, density, L2 ratio, cosine,
relative bias) and `sonde.features.spliced_loss` (CE, Δ-CE, recovered shares). A first pass of the model takes the sums
of all dictionaries at once and the means of their targets; a second one, over the first part of the same text, runs the
model clean, once for each dictionary and twice for each target.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.features.activation_rows import Rows, Selection, selected
from sonde.features.dictionary import Dictionary
from sonde.features.reconstruction import Reconstruction, ReconstructionSums
from sonde.features.recorded import places, warn_of_another_model
from sonde.features.spliced_loss import Losses, LossSums, Share, Spliced
from sonde.files import write_json
from sonde.lm.batches import TokenBatch, TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch, stream
from sonde.stats.intervals import Interval

FORMAT = "sonde dictionary metrics 1"
TOKENS, LOSS_TOKENS = 131_072, 32_768
QUICK_TOKENS, QUICK_LOSS_TOKENS = 16_384, 4_096
_CONTEXT = 256
_DOCUMENTS = 20  # fewer than these are no units to resample
Units = Literal["documents", "rows"]


@dataclass(frozen=True)
class Metrics:
    """All numbers of one dictionary on one text.

    units: what the intervals resample: documents or, where these are few, rows of the text.
    truncated: fewer tokens came than were asked for.
    """

    dictionary: str
    model: str
    text: str
    site: str
    target: str
    units: Units
    truncated: bool
    reconstruction: Reconstruction
    losses: Losses | None
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a JSON file; a share that is NaN becomes null, beside its reason."""
        write_json(path, {"format": FORMAT, **_without_nan(asdict(self))})

    @staticmethod
    def load(path: str | Path) -> "Metrics":
        """Read what `save` wrote. Raises `SondeError` for another file."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            if tree.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            fields = {name: _restored(value) for name, value in tree["reconstruction"].items()}
            fields["density"] = tuple(fields["density"])
            tree["reconstruction"] = Reconstruction(**fields)
            if tree["losses"] is not None:
                tree["losses"] = Losses(**{name: _restored(value) for name, value in tree["losses"].items()})
            return Metrics(**tree)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SondeError(f"{path} does not hold the metrics of a dictionary: {error}") from error


def evaluate(lm: LanguageModel, dictionary: Dictionary, text: Any = None, **options: Any) -> Metrics:
    """Measure one dictionary; options and errors are those of `evaluate_all`."""
    return evaluate_all(lm, {"dictionary": dictionary}, text, **options)["dictionary"]


def evaluate_all(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    text: Any = None,
    *,
    site: str | None = None,
    target: str | None = None,
    tokens: int | None = None,
    loss_tokens: int | None = None,
    context: int = _CONTEXT,
    selection: Selection | None = None,
    quick: bool = False,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Metrics]:
    """Measure dictionaries by their names, all of them on the same tokens.

    Args:
        lm: the model.
        dictionaries: of any sites and kinds.
        text: what to read, or `TokenBatches`; None for the `help()` topics of Python.
        site: where dictionaries read that have not recorded it.
        target: what transcoders predict that have not recorded it.
        tokens: how many tokens to reconstruct: 131,072 where not given.
        loss_tokens: how many of them to predict with and without the dictionaries: 32,768 where not given, 0 for none.
        context: most tokens in a row of text.
        selection: tokens that are left out: they are not counted, and keep their activations where dictionaries stand.
        quick: 16,384 and 4,096 tokens where not given.
        draws: bootstrap resamples of each interval.
        seed: of the resamples.
        progress: show a bar.

    Raises:
        SondeError: for a transcoder without a target, other widths than the model's, activations that are not finite
            (with site, batch and token), and a text of which no token is left.

    Warns:
        UserWarning: where a dictionary was made for another model or tokenizer, with both names.

    """
    if not dictionaries:
        raise SondeError("no dictionary to evaluate: give one at least, by a name")
    spliced = {name: Spliced(d, *places(d, lm, site=site, target=target)) for name, d in dictionaries.items()}
    for one in spliced.values():
        warn_of_another_model(one.dictionary, lm)
    wanted = (QUICK_TOKENS if quick else TOKENS) if tokens is None else tokens
    for_loss = (QUICK_LOSS_TOKENS if quick else LOSS_TOKENS) if loss_tokens is None else loss_tokens
    if wanted < 1 or for_loss < 0:
        raise SondeError(f"tokens is {wanted} and loss_tokens {for_loss}: give at least 1 and 0")
    batches = text if isinstance(text, TokenBatches) else _batches(lm, text, max(wanted, for_loss), context)
    look = _Look(lm, batches, spliced, selection or Selection())
    sums = {name: ReconstructionSums(one.dictionary, one.site, one.target) for name, one in spliced.items()}
    seen = look.reconstruct(sums, wanted, progress)
    cluster, units = _clusters(seen)
    losses: LossSums | None = None
    loss_cluster = cluster
    if for_loss:
        losses = LossSums(spliced, {one.target: one.mean for one in sums.values()})
        loss_cluster, _ = _clusters(look.predict(losses, for_loss, progress))
    found = {}
    for name, one in sums.items():
        result = one.result(cluster, draws=draws, seed=seed)
        found[name] = Metrics(
            dictionary=repr(one.dictionary),
            model=lm.name,
            text=str(batches),
            site=one.site,
            target=one.target,
            units=units,
            truncated=result.tokens < wanted,
            reconstruction=result,
            losses=None if losses is None else losses.result(name, loss_cluster, draws=draws, seed=seed),
            facts={"model_hash": lm.hash, "text_hash": batches.hash, "draws": draws, "seed": seed},
        )
    return found


class _Look:
    """The two passes over the text."""

    def __init__(
        self, lm: LanguageModel, batches: TokenBatches, spliced: Mapping[str, Spliced], selection: Selection
    ) -> None:
        self._lm, self._batches = lm, batches
        self._sites = tuple(dict.fromkeys(site for one in spliced.values() for site in (one.site, one.target)))
        self._selection = selection
        self._skipped = selection.ids(lm)

    def reconstruct(self, sums: Mapping[str, ReconstructionSums], tokens: int, progress: bool) -> list[TokenBatch]:
        """Let all sums see the text. Raises `SondeError` where no token of it is left."""
        seen: list[TokenBatch] = []
        done = 0
        with self._bar(tokens, "reconstructing", progress) as bar:
            for batch in stream(self._lm, self._batches, sites=self._sites):
                rows, taken = self._taken(batch)
                unit = torch.arange(len(batch.tokens), device=taken.device)[:, None].expand_as(taken)[taken]
                seen.append(_bare(batch))
                for one in sums.values():
                    one.update(rows[one.site], rows[one.target], unit, len(batch.tokens))
                bar.update(len(unit))
                done += len(unit)
                if done >= tokens:
                    break
        if not done:
            left_out = "pads, opening tokens, listed tokens, outliers"
            raise SondeError(f"every token of {self._batches} is left out ({left_out}): nothing to measure")
        return seen

    def predict(self, sums: LossSums, tokens: int, progress: bool) -> list[TokenBatch]:
        """Let the losses see the first part of the text."""
        seen: list[TokenBatch] = []
        with self._bar(tokens, "predicting", progress) as bar:
            for batch in stream(self._lm, self._batches, sites=(*self._sites, "logits")):
                sums.update(self._lm, batch, batch.acts["logits"], self._taken(batch)[1])
                seen.append(_bare(batch))
                bar.update(int(batch.scored.sum()))
                if sums.tokens >= tokens:
                    break
        return seen

    def _bar(self, tokens: int, label: str, progress: bool) -> tqdm:
        return tqdm(total=min(tokens, self._batches.n_tokens), desc=label, unit="token", disable=not progress)

    def _taken(self, batch: Batch) -> tuple[Rows, Bool[Tensor, "batch pos"]]:
        return selected(batch, self._sites, self._selection, self._skipped)


def _batches(lm: LanguageModel, text: Any, tokens: int, context: int) -> TokenBatches:
    """Rows of a text that hold at least so many tokens, where it has them; every process reads all of it."""
    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text; give TokenBatches")
    context = min(context, lm.context)
    limit = tokens + tokens // 8 + 2 * context
    return TokenBatches(text, lm.tokenizer, context=context, limit_tokens=limit, rank=0, world=1)


def _bare(batch: Batch) -> TokenBatch:
    """A batch without its activations."""
    return TokenBatch(batch.tokens, batch.mask, batch.index, batch.documents, batch.chunks, batch.n_bytes)


def _clusters(seen: Sequence[TokenBatch]) -> tuple[Int[np.ndarray, " rows"], Units]:
    """The document in which each row begins or, where documents are few, the row itself."""
    documents = torch.cat([batch.documents for batch in seen]).numpy()
    if len(np.unique(documents)) >= _DOCUMENTS:
        return documents, "documents"
    return torch.cat([batch.chunks for batch in seen]).numpy(), "rows"


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _restored(value: Any) -> Any:
    """An interval, a share or a mapping of them from JSON; other values as they are."""
    if not isinstance(value, dict):
        return value
    if set(value) == set(Interval.__dataclass_fields__):
        return Interval(**value)
    if set(value) == set(Share.__dataclass_fields__):
        return Share(
            math.nan if value["value"] is None else value["value"], _restored(value["interval"]), value["reason"]
        )
    return {name: _restored(one) for name, one in value.items()}
