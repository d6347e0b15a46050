"""Generation under a soft prompt, in every family: the prompt's vectors replace placeholder tokens in the first pass.

The loop is `LanguageModel.generate`; with rows of E it continues as the hard prompt of those tokens does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.continuation import continuation
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.passes import Passes, Rows, require_splicing
from sonde.prompts.soft_prompt import SoftPrompt

_UNUSED = 0


def generate(
    lm: LanguageModel,
    prompt: SoftPrompt,
    contexts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    slots: Sequence[int] | None = None,
) -> list[Any]:
    """Continue contexts with the prompt in them; strings give strings, ids give ids (without context and prompt).

    Contexts of different length share a batch. `slots` are the places of a prompt of position "slot";
    `seed` draws tokens at a temperature above 0, and the places of a prompt of position "random".

    Raises:
        SondeError: for empty contexts, a prompt of another width, and what does not fit into the model's context.

    """
    prompt.fits(lm)
    require_splicing(lm)
    ids = [lm.encode(context) if isinstance(context, str) else list(context) for context in contexts]
    examples = Examples(ids, [[_UNUSED]] * len(ids), None if slots is None else list(slots))
    passes = Passes(lm, examples, cached=False)
    generator = torch.Generator().manual_seed(seed)
    rows = passes.rows(range(len(ids)), [len(prompt)], [prompt.position], generator=generator)
    new = sampled(passes, prompt.vectors.to(lm.device), rows, max_new_tokens, temperature, seed=seed)
    return [lm.decode(row) if isinstance(context, str) else row for context, row in zip(contexts, new, strict=True)]


def sampled(
    passes: Passes, bank: Float[Tensor, "m width"], rows: Rows, tokens: int, temperature: float, *, seed: int
) -> list[list[int]]:
    """The model's continuation of each row's context under its prompt: up to `tokens` ids, 0 is the likeliest."""
    lm, new = passes.lm, [[] for _ in range(len(rows))]
    lengths = (rows.context + rows.n).tolist()
    if lm.max_positions is not None and max(lengths) + tokens > lm.max_positions:
        raise SondeError(
            f"prompt and context of {max(lengths)} and {tokens} new tokens are {max(lengths) + tokens}, more than the"
            f" {lm.max_positions} positions of {lm.name}"
        )
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    batches = [order]
    if continuation(lm.model).ignores_mask:  # rows of one length go together
        batches = [[i for i in order if lengths[i] == length] for length in sorted(set(lengths))]
    for members in batches:
        drawn = _batch(lm, bank, rows.select(torch.tensor(members)), tokens, temperature, seed)
        for i, row in zip(members, drawn, strict=True):
            new[i] = row
    return new


def _batch(lm: LanguageModel, bank: Tensor, rows: Rows, tokens: int, temperature: float, seed: int) -> list[list[int]]:
    text, spliced, where, sources = rows.text.tolist(), [], [], []
    size = int((rows.context + rows.n).max())
    for i, (context, n, place, offset) in enumerate(
        zip(rows.context.tolist(), rows.n.tolist(), rows.place.tolist(), rows.offset.tolist(), strict=True)
    ):
        spliced.append([*text[i][:place], *[_UNUSED] * n, *text[i][place:context]])
        pads = size - context - n
        where += [(i, pads + place + j) for j in range(n)]
        sources += range(offset, offset + n)
    options = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed}
    if not where:
        return lm.generate(spliced, **options)
    index = torch.tensor(where, device=lm.device)
    vectors = bank[torch.tensor(sources, device=bank.device)]

    def splice(value: Tensor) -> Tensor:
        if value.shape[1] != size:  # a step after the first pass
            return value
        return value.index_put((index[:, 0], index[:, 1]), vectors.to(value.dtype))

    with lm.editing({"embed": splice}):
        return lm.generate(spliced, **options)
