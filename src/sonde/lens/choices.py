"""How likely is each answer of a multiple-choice question, at every layer? Summed log-probabilities through lenses.

For the tokens a_1 … a_m of a choice that follows a prompt x, layer l gives sum_i log q_l(a_i | x a_1 … a_{i-1}); the
model's own output gives the same with p. Rows are padded on the right, where no token of a causal model looks, and
only the positions that predict a token of a choice are ever read: a pad enters nothing. Choices that share all but
their last token share a row, so that a question with answers of one token costs one row. (Belrose et al. 2303.08112,
anomaly detection; Halawi et al. 2307.09476 for the calibrated answer.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.data.multiple_choice import Prompt
from sonde.errors import SondeError
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel

_CHUNK_ELEMENTS = 1 << 21
_TOKENS = 4096


@dataclass(frozen=True)
class ChoiceScores:
    """Log-probabilities in nats of the choices of n questions; leading axis: the lens's sites, then the model's output.

    Attributes:
        sites: what the lens reads.
        log_probs: summed over the tokens of a choice. A question with fewer choices than k has -inf in their place.
        counts: number of choices of each question.
        correct: number of the right choice.
        states: mean over the prompt's tokens of the hidden states at the sites and after the last block, where they
            were asked for.

    """

    sites: tuple[str, ...]
    log_probs: Float[Tensor, "layers n k"]
    counts: Int[Tensor, " n"]
    correct: Int[Tensor, " n"]
    states: Float[Tensor, "layers n d_model"] | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the leading axis: sites, then "output"."""
        return (*self.sites, "output")

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: slice | Tensor) -> "ChoiceScores":
        """Some of the questions."""
        states = None if self.states is None else self.states[:, index]
        return ChoiceScores(self.sites, self.log_probs[:, index], self.counts[index], self.correct[index], states)

    @property
    def table(self) -> Float[Tensor, "layers n k"]:
        """The log-probabilities where every question has k choices. Raises `SondeError` where they do not."""
        few, most = int(self.counts.min()), int(self.counts.max())
        if few != most:
            raise SondeError(
                f"the questions have {few} to {most} choices, and a matrix takes as many of each: split them by number"
            )
        return self.log_probs

    @property
    def answers(self) -> Int[Tensor, "layers n"]:
        """The most likely choice."""
        return self.log_probs.argmax(-1)

    def state(self) -> dict[str, Any]:
        """All of it as a tree that `sonde.files.save_bundle` takes."""
        return {
            "sites": list(self.sites),
            "log_probs": self.log_probs,
            "counts": self.counts,
            "correct": self.correct,
            "states": self.states,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ChoiceScores":
        """Make one from what `state` returned."""
        return cls(**{**state, "sites": tuple(state["sites"])})


@torch.no_grad()
def choice_scores(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    lenses: Mapping[str, TunedLens] | TunedLens | None = None,
    *,
    keep_states: bool = False,
    tokens_per_batch: int = _TOKENS,
    progress: str | None = None,
) -> dict[str, ChoiceScores]:
    """Score the choices of every prompt through one or several lenses in one pass over the model.

    Args:
        lm: the model, with its tokenizer.
        prompts: texts with the continuations to score, as `sonde.data.multiple_choice.prompts` makes them.
        lenses: by name, all with the same sites; one alone is called "lens", and none stands for the logit lens.
        keep_states: keep the mean hidden states of each prompt, for `sonde.lens.anomaly.SRM`.
        tokens_per_batch: most tokens in a batch, pads included (a batch has at least one row).
        progress: label of a progress bar.

    Returns:
        Scores by name of the lens.

    Raises:
        SondeError: for no prompt, a prompt longer than the model's context, a continuation without a token, lenses of
            different sites or of another model, and log-probabilities that are not finite.

    """
    if lenses is None:
        lenses = TunedLens.logit(lm)
    named = {"lens": lenses} if isinstance(lenses, TunedLens) else dict(lenses)
    sites = next(iter(named.values())).sites if named else ()
    if not named or any(lens.sites != sites for lens in named.values()):
        raise SondeError("lenses that are compared must read the same sites, and there must be one at least")
    for name, lens in named.items():
        lens.check_fits(lm, f"the lens {name!r}")
    layout = _lay_out(lm, prompts)
    layers, most = len(sites) + 1, max(len(prompt.choices) for prompt in prompts)
    counts = torch.tensor([len(prompt.choices) for prompt in prompts])
    absent = torch.arange(most) >= counts[:, None]
    empty = torch.zeros(layers, len(prompts), most, dtype=torch.float64).masked_fill(absent, -torch.inf)
    sums = {name: empty.clone() for name in named}
    states = torch.zeros(layers, len(prompts), lm.d_model) if keep_states else None
    last = f"resid_post.{lm.n_layers - 1}"
    with tqdm(total=len(layout.rows), desc=progress, unit="row", disable=progress is None) as bar:
        for rows in layout.batches(tokens_per_batch):
            tokens, mask = layout.padded(rows)
            with lm.reading(*sites, last) as acts:
                lm(tokens, mask)
            hidden = [acts[site] for site in (*sites, last)]
            asked = layout.asked(rows, tokens.shape[1])
            for layer, states_here in enumerate(hidden):
                flat = states_here.flatten(0, 1)
                own = None
                for name, lens in named.items():
                    if layer == len(sites):
                        own = _picked(lm.unembed, flat, asked, lm.vocab_size) if own is None else own
                        found = own
                    else:
                        found = _picked(partial(lens, layer=layer), flat, asked, lm.vocab_size)
                    sums[name][layer].view(-1).index_add_(0, asked.slots, found)
            if states is not None:
                _keep_means(states, hidden, rows, layout)
            bar.update(len(rows))
    for name, scored in sums.items():
        if not scored[:, ~absent].isfinite().all():
            raise SondeError(
                f"log-probabilities through the lens {name!r} are not finite: load the model in float32 or bfloat16"
            )
    correct = torch.tensor([prompt.answer for prompt in prompts])
    return {name: ChoiceScores(sites, scored.float(), counts, correct, states) for name, scored in sums.items()}


def check_prompts(lm: LanguageModel, prompts: Sequence[Prompt]) -> None:
    """Raise `SondeError` for prompts that `choice_scores` would refuse, before anything is run."""
    _lay_out(lm, prompts)


@dataclass(frozen=True)
class _Asked:
    """Tokens whose log-probability is wanted: where they are predicted, which they are, which sum they go into."""

    places: Int[Tensor, " places"]  # in the flattened batch, each once
    which: Int[Tensor, " n"]  # place of each token
    tokens: Int[Tensor, " n"]
    slots: Int[Tensor, " n"]


@dataclass
class _Layout:
    """Rows to run, and what is wanted of each."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    wanted: list[list[tuple[int, int, int]]] = field(default_factory=list)  # (position, token, slot)
    prompts: list[list[tuple[int, int]]] = field(default_factory=list)  # (prompt, its length), one row for each prompt

    def batches(self, tokens: int) -> list[list[int]]:
        """Numbers of rows, like lengths together."""
        made: list[list[int]] = []
        for row in sorted(range(len(self.rows)), key=lambda row: -len(self.rows[row])):
            if not made or (len(made[-1]) + 1) * len(self.rows[made[-1][0]]) > tokens:
                made.append([])
            made[-1].append(row)
        return made

    def padded(self, rows: list[int]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        length = len(self.rows[rows[0]])
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for place, row in enumerate(rows):
            ids = self.rows[row]
            tokens[place, : len(ids)] = torch.tensor(ids)
            mask[place, : len(ids)] = True
        return tokens, mask

    def asked(self, rows: list[int], length: int) -> _Asked:
        flat = [
            (place * length + position, token, slot)
            for place, row in enumerate(rows)
            for position, token, slot in self.wanted[row]
        ]
        where, tokens, slots = torch.tensor(flat).unbind(1)
        places, which = where.unique(return_inverse=True)
        return _Asked(places, which, tokens, slots)


def _lay_out(lm: LanguageModel, prompts: Sequence[Prompt]) -> _Layout:
    if not len(prompts):
        raise SondeError("there is no prompt to score")
    layout = _Layout()
    known: dict[tuple[int, ...], int] = {}
    most = max(len(prompt.choices) for prompt in prompts)
    for number, prompt in enumerate(prompts):
        before = lm.encode(prompt.text)
        for choice, continuation in enumerate(prompt.choices):
            ids = lm.encode(prompt.text + continuation)
            # where the tokenizer joins the end of the prompt with the choice, the choice begins with that token
            shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            if not 0 < shared < len(ids):
                what = "nothing before its choices" if not shared else f"no token for the choice {continuation!r}"
                raise SondeError(f"prompt {number} has {what}, so that there is nothing to score")
            if lm.max_positions is not None and len(ids) - 1 > lm.max_positions:
                raise SondeError(
                    f"prompt {number} takes {len(ids) - 1} tokens, more than the {lm.max_positions} positions of "
                    f"{lm.name}: give fewer shots or shorter questions"
                )
            row = known.setdefault(tuple(ids[:-1]), len(layout.rows))
            if row == len(layout.rows):
                layout.rows.append(tuple(ids[:-1]))
                layout.wanted.append([])
                layout.prompts.append([])
            slot = number * most + choice
            layout.wanted[row] += [(place - 1, ids[place], slot) for place in range(shared, len(ids))]
            if choice == 0:
                layout.prompts[row].append((number, shared))
    return layout


def _picked(
    read: Callable[[Float[Tensor, "m d_model"]], Float[Tensor, "m vocab"]],
    hidden: Float[Tensor, "tokens d_model"],
    asked: _Asked,
    vocab: int,
) -> Float[Tensor, " n"]:
    """Log-probabilities of the wanted tokens; logits exist for one chunk of places at a time."""
    found = torch.empty(len(asked.tokens), dtype=torch.float64)
    size = max(16, _CHUNK_ELEMENTS // vocab)
    for start in range(0, len(asked.places), size):
        places = asked.places[start : start + size]
        logits = read(hidden[places.to(hidden.device)]).float()
        here = (asked.which >= start) & (asked.which < start + len(places))
        logq = logits - logits.logsumexp(-1, keepdim=True)
        found[here] = logq[asked.which[here].to(logq.device) - start, asked.tokens[here].to(logq.device)].cpu().double()
    return found


def _keep_means(
    states: Float[Tensor, "layers n d_model"], hidden: Sequence[Tensor], rows: list[int], layout: _Layout
) -> None:
    for place, row in enumerate(rows):
        for number, length in layout.prompts[row]:
            states[:, number] = torch.stack([layer[place, :length].float().mean(0) for layer in hidden]).cpu()
