"""Activations as rows: one pass of a model over a text, and of every batch the tokens that a dictionary is to learn.

Each batch runs once, as far as the deepest site; of all its sites the same tokens are taken, so that row i of one site
and row i of another are the same token. Left out are pads, the tokens that open a text (their activations are unlike
all others in most models), tokens that the user lists, and, where asked, rows whose norm is more than `outliers` times
the median of their batch at any site (2605.31518: a few huge rows kill latents).
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch, stream

Rows = dict[str, Float[Tensor, "n d"]]
_NEAREST = 5


@dataclass(frozen=True)
class Selection:
    """Which tokens are taken.

    skip: ids that are left out. keep_opening: whether the tokenizer's beginning-of-text token is taken too.
    outliers: rows with a norm of more than so many medians of their batch are left out; None takes them.
    """

    skip: tuple[int, ...] = ()
    keep_opening: bool = False
    outliers: float | None = None

    def __post_init__(self) -> None:
        if self.outliers is not None and not self.outliers > 1:
            raise SondeError(f"outliers is {self.outliers}: give a number of medians above 1, such as 10, or none")

    def ids(self, lm: LanguageModel) -> Int[Tensor, " ids"]:
        """The ids that are left out. Raises `SondeError` for ones that `lm` does not know."""
        ids = set(self.skip)
        if not self.keep_opening and lm.tokenizer is not None and lm.tokenizer.bos_token_id is not None:
            ids.add(int(lm.tokenizer.bos_token_id))  # type: ignore[arg-type]
        unknown = [i for i in sorted(ids) if not 0 <= i < lm.vocab_size]
        if unknown:
            raise SondeError(f"token {unknown[0]} cannot be skipped: {lm.name} knows the ids 0 to {lm.vocab_size - 1}")
        return torch.tensor(sorted(ids), dtype=torch.long, device=lm.device)

    def taken(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], skipped: Int[Tensor, " ids"]
    ) -> Bool[Tensor, "batch pos"]:
        """True at the tokens that are taken, as far as ids tell."""
        return mask & ~torch.isin(tokens, skipped) if len(skipped) else mask


def matched(lm: LanguageModel, *patterns: str) -> tuple[str, ...]:
    """The sites that patterns name; an error of `lm.match` that also lists the names nearest to the pattern."""
    found: list[str] = []
    for pattern in patterns:
        try:
            found += lm.match(pattern)
        except SondeError as error:
            near = difflib.get_close_matches(pattern, lm.sites, n=_NEAREST, cutoff=0.4)
            raise SondeError(f"{error}; nearest: {', '.join(near)}" if near else str(error)) from None
    beside = [site for site in found if site.startswith("state.")]
    if beside:
        raise SondeError(
            f"{beside[0]} is a memory and has no row for each token: a dictionary reads tensors of (batch, pos, width)"
        )
    return tuple(site for site in lm.sites if site in found)


def rows_of(
    batch: Batch, sites: Sequence[str], selection: Selection, skipped: Int[Tensor, " ids"], *, device: Any = None
) -> Rows:
    """The rows of a batch by site; see `selected`, which also says of which tokens they are."""
    return selected(batch, sites, selection, skipped, device=device)[0]


def selected(
    batch: Batch, sites: Sequence[str], selection: Selection, skipped: Int[Tensor, " ids"], *, device: Any = None
) -> tuple[Rows, Bool[Tensor, "batch pos"]]:
    """The rows of a batch by site, in float32, the same tokens at every site, in the order of the text; and which.

    Raises `SondeError` where an activation that is taken is not finite (site, batch and token are named), or where a
    site gives something other than one vector for each token.
    """
    taken = selection.taken(batch.tokens, batch.mask, skipped)
    found: Rows = {}
    for site in sites:
        acts = batch.acts[site]
        if not isinstance(acts, Tensor) or acts.ndim != 3:
            got = tuple(acts.shape) if isinstance(acts, Tensor) else type(acts).__name__
            raise SondeError(f"{site} gives {got}: a dictionary reads tensors of shape (batch, pos, width)")
        found[site] = acts[taken].to(device=device, dtype=torch.float32)
    for site, rows in found.items():
        # the sum of finite numbers overflows in nobody's model; only where it is not finite the rows are looked at
        if not rows.sum().isfinite():
            _refuse(site, batch, taken, rows)
    if selection.outliers is None:
        return found, taken
    small = torch.ones(len(next(iter(found.values()))), dtype=torch.bool, device=device)
    for rows in found.values():
        if len(rows):
            norms = rows.norm(dim=1)
            small &= norms <= selection.outliers * norms.median()
    if bool(small.all()):
        return found, taken
    return {site: rows[small] for site, rows in found.items()}, taken.masked_scatter(taken, small.to(taken.device))


def _refuse(site: str, batch: Batch, taken: Bool[Tensor, "batch pos"], rows: Float[Tensor, "n d"]) -> None:
    bad = (~rows.isfinite()).any(1)
    if not bool(bad.any()):
        return
    row, position = (int(i) for i in taken.nonzero()[int(bad.nonzero()[0])])
    raise SondeError(
        f"{site} holds nan or infinity in batch {batch.index}, row {row}, position {position} (token "
        f"{int(batch.tokens[row, position])}): load the model in float32 or bfloat16, or skip that token"
    )


class Passes:
    """A model's passes over a text, taken up batch by batch: `next_rows` gives the rows of one batch.

    Args:
        lm: the model.
        batches: the text; under torchrun each process takes its share.
        sites: names of sites.
        selection: which tokens are taken.
        epochs: how often the text is read.
        device: where rows are put; by default they stay with the model.
        also: sites that are read beside these, for whoever looks at `batch`.

    """

    def __init__(
        self,
        lm: LanguageModel,
        batches: TokenBatches,
        sites: Sequence[str],
        selection: Selection | None = None,
        *,
        epochs: int = 1,
        device: Any = None,
        also: Sequence[str] = (),
    ) -> None:
        self.lm, self.batches, self.sites = lm, batches, tuple(sites)
        self.selection = selection or Selection()
        self.epochs = epochs
        self.tokens = 0
        """Tokens that were taken."""
        self.batch: Batch | None = None
        """The batch of the last rows, and its tokens that were taken."""
        self.taken: Tensor | None = None
        self._also = tuple(also)
        self.device = lm.device if device is None else torch.device(device)
        """Where rows are put."""
        self._skipped = self.selection.ids(lm)
        self._epoch, self._next = 0, 0
        self._stream = None

    def next_rows(self) -> Rows | None:
        """The rows of the next batch that has any, or None at the end of the text.

        Raises `SondeError` at the end of a text of which no token was taken.
        """
        while self._epoch < self.epochs:
            if self._stream is None:
                self._stream = stream(self.lm, self.batches, sites=(*self.sites, *self._also), start=self._next)
            batch = next(self._stream, None)
            if batch is None:
                self._stream, self._epoch, self._next = None, self._epoch + 1, 0
                if not self.tokens:
                    raise SondeError(
                        f"every token of {self.batches} is left out (pads, opening tokens, listed tokens, outliers): "
                        "nothing is there to learn from"
                    )
                continue
            self._next = batch.index + 1
            rows, taken = selected(batch, self.sites, self.selection, self._skipped, device=self.device)
            n = len(next(iter(rows.values())))
            self.batch, self.taken = batch, taken
            if n:
                self.tokens += n
                return rows
        return None

    def available(self) -> int:
        """Tokens of the whole share that ids do not leave out, in all epochs; without running the model."""
        skipped = self._skipped.cpu()
        counts = (int(self.selection.taken(batch.tokens, batch.mask, skipped).sum()) for batch in self.batches)
        return self.epochs * sum(counts)

    def placed(self, rows: Rows) -> Rows:
        """Rows that were saved, put where new ones are put."""
        return {site: part.to(self.device) for site, part in rows.items()}

    def identity(self) -> dict[str, Any]:
        """What decides the rows."""
        return {
            "model": self.lm.hash,
            "text": self.batches.hash,
            "share": [self.batches.rank, self.batches.world],
            "sites": list(self.sites),
            "skipped": self._skipped.tolist(),
            "outliers": self.selection.outliers,
            "epochs": self.epochs,
        }

    def state(self) -> dict[str, Any]:
        """Where in the text it is."""
        return {"epoch": self._epoch, "next": self._next, "tokens": self.tokens}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._epoch, self._next, self.tokens = state["epoch"], state["next"], state["tokens"]
        self._stream = None
