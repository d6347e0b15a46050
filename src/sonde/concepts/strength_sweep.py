"""All strengths of an edit on all prompts at once: strengths are rows of the batch, and what they share runs once.

Each row of a batch has its own strength. Where only replies are edited, the prompt up to the token before its last is
the same for every strength and every sample: it runs once, and its memory is repeated. Samples of one prompt and
strength share the pass over the prompt in any case. Rows that have ended leave the batch.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.concepts.judges import probability
from sonde.concepts.site_edits import SiteEdits
from sonde.errors import SondeError
from sonde.lm.continuation import continuation
from sonde.lm.generation import left_padded
from sonde.lm.model import LanguageModel, Past
from sonde.lm.prompt_rows import Prompts, like_lengths, prompt_ids

_ROWS = 256
_LOGITS = 1 << 26  # numbers of logits at once


@torch.no_grad()
def first_token_sweep(
    lm: LanguageModel,
    edits: SiteEdits | None,
    prompts: Prompts,
    strengths: Sequence[float],
    tokens: Int[Tensor, " n"],
    *,
    rows: int = _ROWS,
    progress: str | None = None,
) -> Float[Tensor, "strengths prompts"]:
    """Mass of `tokens` as the first token of the reply, in float64, for every strength and prompt.

    Without edits there is one row, whatever the strengths. Raises `SondeError` for no strengths or prompts.
    """
    ids, levels = _asked(lm, edits, prompts, strengths)
    found = torch.empty(len(levels), len(ids), dtype=torch.float64)
    with tqdm(total=len(ids), desc=progress, disable=progress is None, unit="prompt") as bar:
        for numbers in _groups(lm, ids, max(1, rows // len(levels))):
            logits, _ = _begun(lm, edits, [ids[i] for i in numbers], levels, keep=False)
            found[:, numbers] = probability(logits, tokens).cpu()
            bar.update(len(numbers))
    return found


@torch.no_grad()
def reply_sweep(
    lm: LanguageModel,
    edits: SiteEdits | None,
    prompts: Prompts,
    strengths: Sequence[float],
    *,
    samples: int = 1,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = _ROWS,
    progress: str | None = None,
) -> list[list[list[list[int]]]]:
    """Replies by strength, prompt and sample, as token ids without the prompt and the end.

    `temperature` 0 takes the most likely token, and then one sample says it all. `rows` bounds the batch. Raises
    `SondeError` as `first_token_sweep` does and for settings out of range.
    """
    if samples < 1 or max_new_tokens < 1 or temperature < 0:
        raise SondeError(f"{samples} samples of {max_new_tokens} tokens at temperature {temperature} cannot be drawn")
    if temperature == 0 and samples > 1:
        raise SondeError("at temperature 0 all samples are the same: give samples=1 or a temperature")
    ids, levels = _asked(lm, edits, prompts, strengths)
    generator = torch.Generator(device=lm.device).manual_seed(seed)
    replies: list[list[list[list[int]]]] = [[[] for _ in ids] for _ in levels]
    with tqdm(total=len(ids), desc=progress, disable=progress is None, unit="prompt") as bar:
        for numbers in _groups(lm, ids, max(1, rows // (len(levels) * samples))):
            prompt = [ids[i] for i in numbers]
            drawn = _replies(lm, edits, prompt, levels, samples, max_new_tokens, temperature, generator)
            for s in range(len(levels)):
                for place, number in enumerate(numbers):
                    first = (s * len(numbers) + place) * samples
                    replies[s][number] = drawn[first : first + samples]
            bar.update(len(numbers))
    return replies


@torch.no_grad()
def neutral_sweep(
    lm: LanguageModel,
    edits: SiteEdits,
    windows: Int[Tensor, "n pos"],
    strengths: Sequence[float],
    *,
    progress: str | None = None,
) -> tuple[Float[Tensor, "strengths n"], Float[Tensor, "strengths n"]]:
    """What an edit at all tokens does to plain text, by strength and window, in nats per token.

    Returns KL(plain || edited) of next-token distributions and the rise of the loss. Raises `SondeError` for windows of
    fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise SondeError(f"neutral text is windows of at least 2 tokens, not of shape {tuple(windows.shape)}")
    everywhere = edits.acting("all")
    levels = [float(strength) for strength in strengths]
    kl, rise = (torch.empty(len(levels), len(windows), dtype=torch.float64) for _ in range(2))
    one = len(levels) * windows.shape[1] * lm.vocab_size
    size = max(1, min(_ROWS // len(levels), _LOGITS // one))
    with tqdm(total=len(windows), desc=progress, disable=progress is None, unit="window") as bar:
        for start in range(0, len(windows), size):
            part = windows[start : start + size].to(lm.device)
            plain = _log_probs(lm, part)
            with everywhere.at(_per_row(lm, levels, len(part))).on(lm):
                edited = _log_probs(lm, part.repeat(len(levels), 1)).view(len(levels), *plain.shape)
            kl[:, start : start + size] = (plain.exp() * (plain - edited)).sum(-1).mean(-1).double().cpu()
            target = part[None, :, 1:, None]
            before = plain[None, :, :-1].gather(-1, target)
            after = edited[:, :, :-1].gather(-1, target.expand(len(levels), -1, -1, -1))
            rise[:, start : start + size] = (before - after).squeeze(-1).mean(-1).double().cpu()
            bar.update(len(part))
    return kl, rise


def _log_probs(lm: LanguageModel, tokens: Tensor) -> Tensor:
    logits = lm(tokens).logits
    assert logits is not None
    return logits.float().log_softmax(-1)


def _asked(
    lm: LanguageModel, edits: SiteEdits | None, prompts: Prompts, strengths: Sequence[float]
) -> tuple[list[list[int]], list[float]]:
    levels = [0.0] if edits is None else [float(strength) for strength in strengths]
    if not levels or not all(math.isfinite(level) for level in levels):
        raise SondeError(f"strengths are finite numbers, at least one, not {list(strengths)}")
    ids = prompt_ids(lm, prompts)
    if not ids:
        raise SondeError("there are no prompts")
    return ids, levels


def _groups(lm: LanguageModel, ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Prompts that go together: of one length where the family looks at pads."""
    return like_lengths([len(row) for row in ids], size, equal=continuation(lm.model).ignores_mask)


def _per_row(lm: LanguageModel, levels: Sequence[float], each: int) -> Float[Tensor, " rows"]:
    return torch.tensor(levels, device=lm.device).repeat_interleave(each)


def _begun(
    lm: LanguageModel, edits: SiteEdits | None, prompts: Sequence[Sequence[int]], levels: Sequence[float], *, keep: bool
) -> tuple[Float[Tensor, "strengths prompts vocab"], Past | None]:
    """Logits of the first token of the reply, and (with `keep`) the memory; rows are strengths, then prompts."""
    tokens, mask = left_padded(prompts, lm.device)
    times = len(levels)
    repeated = torch.arange(len(prompts)).repeat(times)
    how = continuation(lm.model)
    shared = edits is not None and edits.where == "reply" and how.mode != "none" and min(map(len, prompts)) > 1
    active = nullcontext() if edits is None else edits.at(_per_row(lm, levels, len(prompts))).on(lm)
    if shared and times > 1:
        past = lm(tokens[:, :-1], mask[:, :-1], use_cache=True).past
        assert past is not None
        past = past.select(repeated)
        with active:
            out = lm(tokens[repeated, -1:], mask[repeated, -1:], past=past)
    else:
        with active:
            out = lm(tokens[repeated], mask[repeated], use_cache=keep)
    assert out.logits is not None
    return out.logits[:, -1].view(times, len(prompts), -1), out.past


def _replies(
    lm: LanguageModel,
    edits: SiteEdits | None,
    prompts: Sequence[Sequence[int]],
    levels: Sequence[float],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Replies in rows of strengths, then prompts, then samples."""
    logits, past = _begun(lm, edits, prompts, levels, keep=True)
    assert past is not None
    flat = logits.flatten(0, 1).repeat_interleave(samples, 0)
    past = past.select(torch.arange(len(past.mask)).repeat_interleave(samples)) if samples > 1 else past
    strengths = _per_row(lm, levels, len(prompts) * samples)
    replies: list[list[int]] = [[] for _ in range(len(flat))]
    here = torch.arange(len(flat), device=lm.device)
    ends = _ends(lm)
    longest = max(len(prompt) for prompt in prompts)
    room = max_new_tokens if lm.max_positions is None else min(max_new_tokens, lm.max_positions - longest)
    for step in range(room):
        drawn = _draw(flat, temperature, generator)
        open_rows = ~torch.isin(drawn, ends)
        for row, token in zip(here[open_rows].tolist(), drawn[open_rows].tolist(), strict=True):
            replies[row].append(token)
        if step + 1 == room or not open_rows.any():
            break
        if not open_rows.all():
            kept = open_rows.nonzero()[:, 0]
            past, here, drawn = past.select(kept), here[kept], drawn[kept]
        with nullcontext() if edits is None else edits.at(strengths[here]).on(lm):
            out = lm(drawn[:, None], past=past)
        assert out.logits is not None and out.past is not None
        flat, past = out.logits[:, -1], out.past
    return replies


def _draw(logits: Float[Tensor, "rows vocab"], temperature: float, generator: torch.Generator) -> Int[Tensor, " rows"]:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _ends(lm: LanguageModel) -> Int[Tensor, " n"]:
    stated = getattr(lm.model.generation_config, "eos_token_id", None)
    ids = set(stated if isinstance(stated, list) else [stated])
    ids |= {getattr(lm.tokenizer, "eos_token_id", None)}
    return torch.tensor(sorted(i for i in ids if i is not None), device=lm.device, dtype=torch.long)


def texts(lm: LanguageModel, replies: Sequence[Sequence[int]]) -> Iterator[str]:
    """Replies as text."""
    return (lm.decode(ids) for ids in replies)
