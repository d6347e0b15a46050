"""The text of a latent cache as one matrix of tokens on disk: sequences of one length, in an order drawn from a seed.

Text is tokenised a block at a time and passes through a file, so that memory does not grow with it. Where the tokenizer
opens every text with a token, the matrix leaves it out and the model is given it before every sequence.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from sonde.data.text import documents
from sonde.errors import SondeError
from sonde.features.latent_files import ArrayFile
from sonde.files import replacing
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel

_BLOCK = 1 << 22  # characters tokenised at once
_ROWS = 256


def write_tokens(
    lm: LanguageModel, text: Any, path: Path, *, context: int, limit: int | None, seed: int
) -> tuple[int | None, tuple[int, int], str]:
    """Write the sequences in their order; returns the token that goes before each, their shape and their hash.

    Tokens pass through a file in the order of the text, so that no more than a block of text is in memory.
    """
    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text")
    raw = path.with_suffix(".raw")
    count, lead, width, left = 0, None, context, None if limit is None else max(1, limit // context)
    with raw.open("wb") as file:
        for rows, opening in _rows(text, lm.tokenizer, context, limit):
            rows = rows[:left]
            lead, width = opening, rows.shape[1]
            file.write(np.ascontiguousarray(rows, dtype="<i4").data)
            count += len(rows)
            if left is not None and (left := left - len(rows)) <= 0:
                break
    order = np.random.default_rng(seed).permutation(count)
    with raw.open("rb") as file:
        size = 4 * width
        pieces = (
            np.stack([np.frombuffer(os.pread(file.fileno(), size, int(row) * size), "<i4") for row in rows])
            for rows in np.split(order, range(_ROWS, count, _ROWS))
        )
        digest = save_tokens(path, (count, width), pieces)
    raw.unlink()
    return lead, (count, width), digest


def save_tokens(path: Path, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> str:
    """Write a token matrix piece by piece and return its hash."""
    digest, first = hashlib.sha256(repr(tuple(shape)).encode()), 0
    with replacing(path) as beside:
        file = ArrayFile(beside, {"tokens": ("I32", list(shape))}, {})
        for piece in pieces:
            piece = np.ascontiguousarray(piece, dtype="<i4")
            digest.update(piece.data)
            file.put("tokens", first, piece)
            first += piece.size
        file.close()
    return digest.hexdigest()


def _rows(
    text: Any, tokenizer: PreTrainedTokenizerBase, context: int, limit: int | None
) -> Iterator[tuple[Int[np.ndarray, "rows context"], int | None]]:
    """Rows of tokens and the token that goes before each, block by block of a text."""
    if isinstance(text, TokenBatches):
        yield from _rows_of(text)
        return
    # a tokenizer that opens every text takes a place of each row
    probe = TokenBatches(["one two three four"], tokenizer, context=2, rank=0, world=1)
    extra = 1 if int(probe.places(0)[0, 0]) < 0 else 0
    found = False
    for block in _blocks(documents(text)):
        try:
            batches = TokenBatches(
                block, tokenizer, context=context + extra, limit_tokens=limit, rows=_ROWS, rank=0, world=1
            )
        except SondeError:  # the last block may be shorter than one row
            if not found:
                raise
            continue
        found = True
        yield from _rows_of(batches)


def _rows_of(batches: TokenBatches) -> Iterator[tuple[Int[np.ndarray, "rows context"], int | None]]:
    for number in range(batches.n_batches):
        batch = batches[number]
        if not bool(batch.mask.all()):
            raise SondeError("a latent cache holds rows of one length: give TokenBatches with join=True")
        tokens = batch.tokens.numpy()
        if int(batches.places(number)[0, 0]) < 0:
            yield tokens[:, 1:], int(tokens[0, 0])
        else:
            yield tokens, None


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block, size = [], 0
    for text in texts:
        for start in range(0, len(text), _BLOCK):
            block.append(text[start : start + _BLOCK])
            size += len(block[-1])
            if size >= _BLOCK:
                yield block
                block, size = [], 0
    if block:
        yield block


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """SHA-256 (hex) over the ids of all tokens; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number} {token}\n".encode())
    return digest.hexdigest()


def mapped(path: Path, shape: Sequence[int]) -> Int[np.ndarray, "sequences context"]:
    """The token matrix in a file, mapped from the disk."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    return np.memmap(path, dtype="<i4", mode="r", offset=8 + size, shape=tuple(shape))
