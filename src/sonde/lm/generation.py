"""Generation: continue prompts one token at a time from the cache, with whatever edits are active.

Our own loop instead of the models' `generate`, because it goes through `LanguageModel`: edits know which column is
which token, and every family continues in the way that was measured to be right for it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.continuation import continuation

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel, Past


@torch.no_grad()
def generate(
    lm: "LanguageModel",
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Any]:
    """See `LanguageModel.generate`."""
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of prompts, not one string")
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens must be positive and temperature not negative, not {max_new_tokens}, {temperature}"
        )
    rows = [lm.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if not rows or not all(rows):
        raise SondeError("every prompt needs at least one token")
    new: list[list[int]] = [[] for _ in rows]
    options = (max_new_tokens, temperature, seed)
    if continuation(lm.model).ignores_mask:
        # These families look at pads: prompts of one length go together, no row is padded.
        for length in sorted({len(row) for row in rows}):
            same = [i for i, row in enumerate(rows) if len(row) == length]
            for i, ids in zip(same, continue_rows(lm, [rows[i] for i in same], *options), strict=True):
                new[i] = ids
    else:
        new = continue_rows(lm, rows, *options)
    return [lm.decode(ids) if isinstance(prompt, str) else ids for prompt, ids in zip(prompts, new, strict=True)]


@torch.no_grad()
def continue_rows(
    lm: "LanguageModel",
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    *,
    past: "Past | None" = None,
    watch: "Callable[[Float[Tensor, 'batch vocab'], Int[Tensor, ' batch']], None] | None" = None,
) -> list[list[int]]:
    """New ids of rows that may share a batch, after `past` where there is one, which is used up.

    `watch` sees, for every step, the logits and the tokens drawn from them, also in rows that have ended.
    """
    generator = torch.Generator(device=lm.device).manual_seed(seed)
    tokens, mask = left_padded(rows, lm.device)
    ends = _end_ids(lm)
    open_rows = torch.ones(len(rows), dtype=torch.bool, device=lm.device)
    drawn: list[Tensor] = []
    before = 0 if past is None else past.mask.shape[1]
    limit = max_new_tokens
    if lm.max_positions is not None:
        limit = min(limit, lm.max_positions - before - tokens.shape[1])
    for _ in range(limit):
        out = lm(tokens, mask, past=past, use_cache=True)
        assert out.logits is not None
        past = out.past
        tokens = _draw(out.logits[:, -1], temperature, generator)[:, None]
        if watch is not None:
            watch(out.logits[:, -1], tokens[:, 0])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        drawn.append(tokens[:, 0])
        open_rows = open_rows & ~torch.isin(tokens[:, 0], ends)
        if not open_rows.any():
            break
    if not drawn:
        return [[] for _ in rows]
    return [_until_end(row, set(ends.tolist())) for row in torch.stack(drawn, 1).tolist()]


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows of different lengths as one batch with pads (id 0) on the left, and its mask."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return tokens, mask


def _draw(
    logits: Float[Tensor, "batch vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _end_ids(lm: "LanguageModel") -> Int[Tensor, " n"]:
    stated = getattr(lm.model.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    if lm.tokenizer is not None:
        ids = [*ids, lm.tokenizer.eos_token_id]
    return torch.tensor(sorted({i for i in ids if i is not None}), device=lm.device, dtype=torch.long)


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)
