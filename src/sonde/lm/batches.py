"""Text as token batches: tokenised once, cut into rows, and given out batch by batch in an order that never changes.

Batch i is a pure function of the text, the tokenizer, the layout and i, so a pass resumes anywhere and ranks share it
without talking: rank r of w takes batches r, r + w, ... Rows come in two layouts. *Joined*: documents stand end to end
with the end-of-text token between them, are cut every `context` tokens, and the ragged tail is dropped. *Apart*: a row
holds one document (or one piece of a long one), padded on the right, with rows of like length in a batch.

The first token of a row has nothing to be predicted from, so a row of t tokens scores t - 1. Bits per byte are
`nats per token * (n_tokens / n_bytes) / ln 2`, where `n_bytes` counts the UTF-8 bytes of the text that the scored
tokens cover: a token covers what lies between the end of the token before it and its own end, a document separator
nothing.
"""

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sonde.data.text import describe, documents
from sonde.errors import SondeError

_BLOCK = 1 << 20  # characters given to the tokenizer at once
_PIECE = 1 << 17  # longer documents are tokenised in pieces, cut between words
_WINDOW = 512  # rows that are sorted by length together


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens. Pads stand at the end of rows; `mask` is False there."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    index: int  # place in the sequence of all batches
    documents: Int[Tensor, " batch"]  # the document in which a row begins
    chunks: Int[Tensor, " batch"]  # the row's number in the text: the unit to resample by where documents are few
    n_bytes: Int[Tensor, " batch"]  # bytes of text that the row's scored tokens cover

    @property
    def scored(self) -> Bool[Tensor, "batch pos"]:
        """True at tokens that have something to be predicted from: all real ones but the first of a row."""
        scored = self.mask.clone()
        scored[:, 0] = False
        return scored


class TokenBatches:
    """All token batches of a text. Iterating gives those of this rank.

    Args:
        source: whatever `sonde.data.text.documents` reads; None for the `help()` topics of Python.
        tokenizer: a Hugging Face tokenizer.
        context: tokens in a row, at least 2.
        tokens_per_batch: most tokens in a batch, pads included (a batch has at least one row).
        rows: rows in a batch, in place of `tokens_per_batch`.
        join: documents joined and cut, or kept apart and padded.
        limit_tokens: read no more text than this many tokens take; a streamed source is left there.
        column: field that holds the text where documents have fields.
        shuffle: take rows in a random order drawn from `seed`, instead of in that of the text.
        seed: of the order.
        rank: which share of the batches to give; by default what torch.distributed or torchrun says.
        world: number of shares.

    Raises:
        SondeError: for a text shorter than one row, and settings out of range.

    """

    n_tokens: int
    """Scored tokens in all batches of all ranks."""
    n_bytes: int
    """Bytes of text that the scored tokens cover."""

    def __init__(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        tokens_per_batch: int = 4096,
        rows: int | None = None,
        join: bool = True,
        limit_tokens: int | None = None,
        column: str = "text",
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        least = {"context": (context, 2), "tokens_per_batch": (tokens_per_batch, 1), "rows": (rows, 1)}
        least |= {"limit_tokens": (limit_tokens, 2)}
        for name, (value, low) in least.items():
            if value is not None and value < low:
                raise SondeError(f"{name} is {value}; it must be at least {low}")
        here, all_ranks = rank_and_world()
        self.rank = here if rank is None else rank
        self.world = all_ranks if world is None else world
        if not 0 <= self.rank < self.world:
            raise SondeError(f"rank {self.rank} does not exist among {self.world}")
        self.context, self.join = context, join
        self._per_batch, self._rows_per_batch = tokens_per_batch, rows
        self._seed = seed if shuffle else None
        self._source = describe(source)

        special = _Special.of(tokenizer)
        self._pad = special.pad
        # Where the tokenizer itself opens a text with a token (Llama, Gemma), each row must open with it; documents
        # kept apart always do, so that all of their tokens are scored.
        self._lead = special.first if special.adds_first or not join else None
        self._ids, self._bytes, self._starts = _tokenise(
            documents(source, column=column),
            tokenizer,
            opening=special.first if join and self._lead is None else None,
            between=special.between if join else None,
            limit=limit_tokens,
        )
        self._lay_out()

    @property
    def n_chunks(self) -> int:
        """Number of rows in all batches."""
        return len(self._chunk)

    @property
    def n_batches(self) -> int:
        """Number of batches of all ranks."""
        return len(self._cuts) - 1

    @property
    def max_id(self) -> int:
        """The largest token id."""
        return max(int(self._ids.max()), self._pad, self._lead or 0)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over all token ids and the layout; the same on every rank."""
        layout = (self.context, self.join, self._lead, self._pad)
        digest = hashlib.sha256(repr(layout).encode())
        for array in (self._ids, self._row_start, self._row_length, self._chunk, self._cuts):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        """Such as "65,536 tokens of pydoc topics"; counts all real tokens, scored or not."""
        lead = 0 if self._lead is None else self.n_chunks
        return f"{int(self._row_length.sum()) + lead:,} tokens of {self._source}"

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return len(range(self.rank, self.n_batches, self.world))

    def __iter__(self) -> Iterator[TokenBatch]:
        return self.from_(0)

    def from_(self, index: int) -> Iterator[TokenBatch]:
        """Give this rank's batches from number `index` of all batches on."""
        if index < 0:
            raise SondeError(f"batches are counted from 0; there is no batch {index}")
        first = index + (self.rank - index) % self.world
        return (self[i] for i in range(first, self.n_batches, self.world))

    def __getitem__(self, index: int) -> TokenBatch:
        """Batch number `index` of all batches, whichever rank's it is."""
        if not 0 <= index < self.n_batches:
            raise IndexError(f"batch {index} does not exist: there are {self.n_batches}")
        rows = slice(int(self._cuts[index]), int(self._cuts[index + 1]))
        starts, lengths = self._row_start[rows], self._row_length[rows]
        lead = 0 if self._lead is None else 1
        place = np.arange(int(lengths.max()))
        inside = place < lengths[:, None]
        tokens = np.full((len(starts), lead + len(place)), self._pad, dtype=np.int64)
        tokens[:, lead:][inside] = self._ids[(starts[:, None] + place)[inside]]
        mask = np.ones(tokens.shape, dtype=bool)
        mask[:, lead:] = inside
        if self._lead is not None:
            tokens[:, 0] = self._lead
        return TokenBatch(
            tokens=torch.from_numpy(tokens),
            mask=torch.from_numpy(mask),
            index=index,
            documents=torch.from_numpy(np.searchsorted(self._starts, starts, side="right") - 1),
            chunks=torch.from_numpy(self._chunk[rows].copy()),
            n_bytes=torch.from_numpy(self._row_bytes[rows].copy()),
        )

    def places(self, index: int) -> Int[Tensor, "batch pos"]:
        """Which token of the whole text stands where in batch `index`: a number for each, -1 at pads and leads.

        What is known of the text's tokens (labels, say) goes to a batch by `known[places]`; see `extents`.
        """
        rows = slice(int(self._cuts[index]), int(self._cuts[index + 1]))
        starts, lengths = self._row_start[rows], self._row_length[rows]
        lead = 0 if self._lead is None else 1
        place = np.arange(int(lengths.max()))
        found = np.full((len(starts), lead + len(place)), -1, dtype=np.int64)
        found[:, lead:] = np.where(place < lengths[:, None], starts[:, None] + place, -1)
        return torch.from_numpy(found)

    def extents(self) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, "tokens 2"]]:
        """Of every token of the text: its document, and the bytes of that document [start, end) that it covers.

        Separators cover nothing at the start of their document. Where a character takes several tokens, the first
        covers it and the others nothing, at its end.
        """
        document = np.searchsorted(self._starts, np.arange(len(self._ids)), side="right") - 1
        ends = np.cumsum(self._bytes, dtype=np.int64)
        before = np.concatenate([[0], ends])[self._starts][document]
        return document, np.stack([ends - self._bytes, ends], 1) - before[:, None]

    def split(self, fraction: float, *, start: float | None = None) -> tuple["TokenBatches", "TokenBatches"]:
        """Two sets of batches over disjoint rows: the rest, and the last `fraction` of the text's rows.

        Neighbouring rows come from one document and share phrases, so that rows spread over the text would hold out
        little. With `start` the held rows begin at that share of the text instead, and go on from its beginning when
        they reach its end. Raises `SondeError` when either part would be empty.
        """
        if not 0 < fraction < 1:
            raise SondeError(f"a fraction of {fraction} cannot be held out; give one between 0 and 1")
        count = int(self.n_chunks * fraction + 1e-9)
        first = self.n_chunks - count if start is None else round(start * self.n_chunks)
        held = (np.arange(self.n_chunks) - first) % self.n_chunks < count
        if held.all() or not held.any():
            raise SondeError(
                f"{self} make {self.n_chunks} rows, of which a fraction of {fraction} cannot be held out; "
                "give more text or a shorter context"
            )
        order = np.argsort(self._chunk)
        return self._only(order[~held]), self._only(order[held])

    def _only(self, rows: np.ndarray) -> "TokenBatches":
        part = copy.copy(self)
        part._row_start, part._row_length = self._row_start[rows], self._row_length[rows]
        part._chunk, part._row_bytes = self._chunk[rows], self._row_bytes[rows]
        part._order_rows()
        return part

    def _lay_out(self) -> None:
        """Cut the ids into rows."""
        lead = 0 if self._lead is None else 1
        body = self.context - lead
        if self.join:
            count = len(self._ids) // body
            self._row_start = np.arange(count, dtype=np.int64) * body
            self._row_length = np.full(count, body, dtype=np.int64)
        else:
            sizes = np.diff(np.append(self._starts, len(self._ids)))
            pieces = -(-sizes // body)
            within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            self._row_start = np.repeat(self._starts, pieces) + within * body
            self._row_length = np.minimum(np.repeat(sizes, pieces) - within * body, body)
            scorable = self._row_length + lead > 1
            self._row_start, self._row_length = self._row_start[scorable], self._row_length[scorable]
        if not len(self._row_start):
            tokens = len(self._ids)
            raise SondeError(
                f"{self._source}: {tokens:,} token{'' if tokens == 1 else 's'} of text, fewer than one chunk of "
                f"{self.context:,}: give more text, a shorter context, or keep documents apart"
                if self.join
                else f"{self._source}: no document has two tokens, so there is nothing to predict: give more text"
            )
        ends = np.concatenate([[0], np.cumsum(self._bytes, dtype=np.int64)])
        last = self._row_start + self._row_length
        self._row_bytes = ends[last] - ends[self._row_start + 1 - lead]
        self._chunk = np.arange(len(self._row_start), dtype=np.int64)
        self._order_rows()

    def _order_rows(self) -> None:
        """Order the rows and cut them into batches."""
        count = len(self._chunk)
        order = np.arange(count) if self._seed is None else np.random.default_rng(self._seed).permutation(count)
        if not self.join:
            window = np.arange(count) // _WINDOW
            order = order[np.lexsort((self._row_length[order], window))]
        for name in ("_row_start", "_row_length", "_chunk", "_row_bytes"):
            setattr(self, name, getattr(self, name)[order])
        lead = 0 if self._lead is None else 1
        self._cuts = self._cut((self._row_length + lead).tolist())
        self.n_tokens = int((self._row_length + lead - 1).sum())
        self.n_bytes = int(self._row_bytes.sum())

    def _cut(self, lengths: Sequence[int]) -> np.ndarray:
        """Where batches begin, and the end of the last."""
        cuts, longest = [0], 0
        for row, length in enumerate(lengths):
            inside = row - cuts[-1]
            longest = max(longest, length) if inside else length
            most = self._rows_per_batch or max(1, self._per_batch // longest)
            new_window = not self.join and row % _WINDOW == 0
            if inside and (inside >= most or new_window):
                cuts.append(row)
                longest = length
        return np.array([*cuts, len(lengths)], dtype=np.int64)


def rank_and_world() -> tuple[int, int]:
    """Number of the process and number of processes, of torch.distributed or as torchrun set them; (0, 1) alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


@dataclass(frozen=True)
class _Special:
    first: int | None  # opens a text
    between: int | None  # stands between documents
    pad: int
    adds_first: bool  # the tokenizer opens each text with `first` by itself

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> "_Special":
        ids: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        bos, eos = ids
        first = eos if bos is None else bos
        between = bos if eos is None else eos
        opened = tokenizer("a", verbose=False)["input_ids"][:1] == [bos] if bos is not None else False
        alone = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][:1] == [bos]
        # not the tokenizer's own pad, which in some models lies beyond the embedding; no model looks at it
        return _Special(first, between, 0 if between is None else between, opened and not alone)


def _tokenise(
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    opening: int | None,
    between: int | None,
    limit: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids (int32), bytes that each covers (uint16) and where each document starts, its separator included."""
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    starts: list[int] = []
    total, more = 0, True
    pieces = _pieces(texts)
    while more and (limit is None or total < limit):
        # a token is rarely under two characters; with a limit, take little more than can be needed
        room = _BLOCK if limit is None else min(_BLOCK, 4096 + 4 * (limit - total))
        block: list[tuple[bool, str]] = []
        more = False
        for begins, text in pieces:
            block.append((begins, text))
            room -= len(text)
            if room <= 0:
                more = True
                break
        if not block:
            break
        encoded = _encode(tokenizer, [text for _, text in block])
        for (begins, _), (piece_ids, piece_bytes) in zip(block, encoded, strict=True):
            separator = opening if begins and not starts else between
            if begins:
                starts.append(total)
                if separator is not None:
                    ids.append(np.array([separator], dtype=np.int32))
                    sizes.append(np.zeros(1, dtype=np.uint16))
                    total += 1
            ids.append(piece_ids)
            sizes.append(piece_bytes)
            total += len(piece_ids)
    all_ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    all_sizes = np.concatenate(sizes) if sizes else np.zeros(0, np.uint16)
    at = np.array(starts, dtype=np.int64)
    if limit is not None:
        all_ids, all_sizes = all_ids[:limit], all_sizes[:limit]
        at = at[at < len(all_ids)]
    return all_ids, all_sizes, at


def _pieces(texts: Iterator[str]) -> Iterator[tuple[bool, str]]:
    """Documents in pieces that a tokenizer takes without trouble, and whether a piece begins a document.

    A cut falls before a single space between letters, where byte-level tokenizers split anyway: the ids stay the same.
    """
    for text in texts:
        start = 0
        while len(text) - start > _PIECE:
            end = start + _PIECE
            place = text.rfind(" ", start + 1, end)
            while place > start and not (text[place - 1].isalpha() and text[place + 1].isalpha()):
                place = text.rfind(" ", start + 1, place)
            cut = place if place > start else end
            yield start == 0, text[start:cut]
            start = cut
        yield start == 0, text[start:]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids of each text and the bytes that each token covers. They add up to the text's bytes."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=bool(tokenizer.is_fast),
        verbose=False,  # no warning about texts longer than the model's context: rows are cut to it
    )
    found = []
    for number, text in enumerate(texts):
        ids = np.asarray(encoded["input_ids"][number], dtype=np.int32)
        if not len(ids):
            found.append((ids, np.zeros(0, np.uint16)))
            continue
        if tokenizer.is_fast:
            ends = np.maximum.accumulate(np.asarray(encoded["offset_mapping"][number], dtype=np.int64)[:, 1])
            ends[-1] = len(text)
        else:  # slow tokenizers do not say where tokens are: an even share each
            ends = np.arange(1, len(ids) + 1) * len(text) // len(ids)
        covered = np.diff(_byte_position(text)[ends] if not text.isascii() else ends, prepend=0)
        found.append((ids, np.minimum(covered, np.iinfo(np.uint16).max).astype(np.uint16)))
    return found


def _byte_position(text: str) -> np.ndarray:
    """Byte at which each character starts in UTF-8, and the number of bytes last."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
