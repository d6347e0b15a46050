"""Does a recurrent network's memory know what its residual stream does? States of contrast pairs read from the memory.

A state is the canonical recurrent memory of a layer (`sonde.lm.state_algebra`) after the last prompt token, and after
each of the two answers, as a vector: its mean over the state dimension, or a seeded Gaussian projection to the width of
the residual stream. The result is `States`, so every probe, transfer and table works on it; `beside` puts memory and
residual stream next to each other (Paulo et al. 2404.05971, section on latent knowledge).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.knowledge.states import Answer, States, answer_tokens
from sonde.lm.continuation import continuation
from sonde.lm.model import LanguageModel, Past
from sonde.lm.prompt_rows import Prompts, like_lengths, prompt_ids
from sonde.lm.state_algebra import states
from sonde.lm.state_positions import Features, Projection, pooled


@torch.no_grad()
def extract_memory(
    lm: LanguageModel,
    prompts: Prompts,
    answers: Sequence[tuple[Answer, Answer]] | tuple[Answer, Answer],
    *,
    form: Literal["pooled", "projected"] = "projected",
    batch: int = 64,
    seed: int = 0,
    progress: str | None = None,
) -> States:
    """States of every prompt in the memory of all layers that have a recurrence.

    Args:
        lm: a model with a recurrence.
        prompts: strings, or token ids.
        answers: the negative and the positive answer, of all prompts or of each, each one token.
        form: "pooled", the mean over the state dimension, or "projected" to the width of the residual stream.
        batch: most prompts of a forward pass; those of one length go together.
        seed: of the projection.
        progress: what a progress bar is called; None shows none.

    Raises:
        SondeError: for a model without a recurrent memory or one that continues wrongly, an empty prompt, and answers
            that are not one token or share the first.

    """
    rows = prompt_ids(lm, prompts)
    if not rows:
        raise SondeError("no prompts: there is nothing to read")
    tokens = answer_tokens(lm, prompts, rows, answers)
    continuation(lm.model).require(lm.name)
    features: Features = pooled if form == "pooled" else Projection(lm.d_model, seed=seed)
    layers: list[int] = []
    last = pair = torch.empty(0)
    log_odds = torch.empty(len(rows))
    with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
        for chosen in like_lengths([len(ids) for ids in rows], batch, equal=True):
            out = lm(torch.tensor([rows[i] for i in chosen]), use_cache=True)
            assert out.past is not None and out.logits is not None
            layers = layers or _recurring(lm, out.past)
            forked = out.past.select(torch.arange(len(chosen)).repeat_interleave(2))
            here = _read(out.past, layers, features)
            after = lm(tokens[chosen].reshape(-1, 1), past=forked, use_cache=True).past
            assert after is not None
            there = _read(after, layers, features)
            if not last.numel():
                last, pair = (torch.empty(len(rows), len(layers), *size, here.shape[-1]) for size in ((), (2,)))
            last[chosen] = here
            pair[chosen] = there.view(len(chosen), 2, len(layers), -1).transpose(1, 2)
            given = out.logits[:, -1].float().cpu().gather(1, tokens[chosen])
            log_odds[chosen] = given[:, 1] - given[:, 0]
            bar.update(len(chosen))
    return States(last, pair, log_odds, tuple(f"state.{layer}" for layer in layers), lm.name, lm.hash)


def beside(memory: States, stream: States) -> States:
    """Memory and residual stream of the same prompts next to each other, layer by layer.

    `stream` is that of the layers that `memory` has. Raises `SondeError` for other prompts, models or layers.
    """
    numbers = [[site.rpartition(".")[2] for site in part.sites] for part in (memory, stream)]
    if numbers[0] != numbers[1] or len(memory) != len(stream) or memory.model_hash != stream.model_hash:
        raise SondeError(
            f"{len(memory)} states at {', '.join(memory.sites)} and {len(stream)} at {', '.join(stream.sites)}: give "
            "the same prompts and layers of one model"
        )
    return States(
        torch.cat([memory.last, stream.last], -1),
        torch.cat([memory.pair, stream.pair], -1),
        stream.lm_log_odds,
        memory.sites,
        memory.model_name,
        memory.model_hash,
    )


def _recurring(lm: LanguageModel, past: Past) -> list[int]:
    found = [layer for layer in range(past.cache.n_layers) if "recurrent" in past.cache.parts(layer)]
    if not found:
        raise SondeError(f"{lm.name} ({lm.family}) has no recurrent memory: read its residual stream with extract()")
    return found


def _read(past: Past, layers: Sequence[int], features: Features) -> Tensor:
    """Features of the memory, (batch, layers, width)."""
    read = [next(iter(states(past.cache, layer, "recurrent").values())) for layer in layers]
    return torch.stack([features(state).float().cpu() for state in read], 1)
