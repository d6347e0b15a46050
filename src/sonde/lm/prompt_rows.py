"""Prompts as rows of token ids, batches of rows of nearly one length, and what one token of each row holds."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

_PADDING = 0.1  # rows of a batch are no more than this share shorter than its longest

Prompts = Sequence[str] | Sequence[Sequence[int]]


def prompt_ids(lm: LanguageModel, prompts: Prompts) -> list[list[int]]:
    """Token ids of prompts that are given as strings or as ids. Raises `SondeError` for one that is empty."""
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of prompts, not one string")
    rows = [lm.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    empty = [i for i, ids in enumerate(rows) if not ids]
    if empty:
        raise SondeError(f"prompt {empty[0]} is empty: every prompt needs at least one token")
    return rows


def like_lengths(lengths: Sequence[int], batch: int, *, equal: bool = False) -> list[list[int]]:
    """Numbers of rows in batches of at most `batch`, of nearly one length, or of exactly one where `equal`."""
    if batch < 1:
        raise ValueError(f"batch is {batch}: expected at least 1")
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and len(groups[-1]) < batch:
            longest = lengths[groups[-1][0]]
            if lengths[i] == longest or (not equal and lengths[i] >= (1 - _PADDING) * longest):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def at_position(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], sites: Sequence[str], *, position: int = -1, batch: int = 32
) -> Iterator[tuple[list[int], dict[str, Float[Tensor, "batch d"]]]]:
    """Activations at one token of every prompt, in batches of like length: (numbers of the prompts, values by site).

    Pads stand to the right, where no causal model sees them. Raises `SondeError` for prompts
    without the position, sites that have no vector at a token, and activations that are not finite.
    """
    wrong = [site for site in sites if site == "logits" or site.startswith("state.")]
    if wrong:
        raise SondeError(f"{wrong[0]} has no vector at a token: give sites such as resid_post.* or mlp_out.*")
    reach = position + 1 if position >= 0 else -position
    short = [i for i, ids in enumerate(prompts) if len(ids) < reach]
    if short:
        raise SondeError(f"prompt {short[0]} has {len(prompts[short[0]])} tokens: it has no token {position}")
    for numbers in like_lengths([len(ids) for ids in prompts], batch):
        lengths = [len(prompts[i]) for i in numbers]
        width = max(lengths)
        tokens = torch.tensor([list(prompts[i]) + [0] * (width - n) for i, n in zip(numbers, lengths, strict=True)])
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        with lm.reading(*sites) as acts, torch.no_grad():
            lm(tokens, mask)
        place = torch.tensor([position if position >= 0 else n + position for n in lengths], device=lm.device)
        found = {site: acts[site][torch.arange(len(numbers)), place].float() for site in sites}
        for site, values in found.items():
            if not bool(values.isfinite().all()):
                bad = int((~values.isfinite()).any(-1).nonzero()[0])
                raise SondeError(f"{site} of {lm.name} is not finite on prompt {numbers[bad]}")
        yield numbers, found
