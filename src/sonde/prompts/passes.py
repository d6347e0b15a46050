"""One forward pass over many rows with prompts of different lengths at different places, unembedded where it is scored.

    spliced row    context[:p], n vectors, context[p:], target, pads

A batch is the product of prompts and examples. Placeholder tokens stand where the vectors go and their rows at the site
`embed` are replaced, so that every family puts its own scale, norm and positions on them. Pads stand to the right,
where no causal model looks. Logits are computed of the columns before target tokens alone. What stands before the
prompt (all of the context, for a suffix) does not depend on it: its keys, values and states are computed once, without
gradient, in families whose gradient through the cache was measured to be that of the whole pass.
"""

import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sonde.errors import SondeError
from sonde.lm.continuation import continuation, difference, random_tokens
from sonde.lm.generation import left_padded
from sonde.lm.model import LanguageModel, Past
from sonde.prompts.examples import Examples
from sonde.prompts.soft_prompt import Position, check_position, embedded

_KEPT_BYTES = 1 << 30  # of contexts' keys, values and states
_EXACT = 1e-5


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: which example each is, which vectors it takes and where they go.

    Attributes:
        batch: the examples of the batch.
        member: place in `batch` of each row's example.
        owner: the prompt of each row.
        offset: row of the bank of vectors at which the row's prompt begins; `n` its length, `place` its first slot.
        text: context and target without the prompt, padded to the right; `context` and `target` their lengths.
        weights: of the target tokens; 0 on pads.
        fixed: the position, where it is the same for all rows and what stands before it can be kept.
        samples: rows in sequence that are one prompt and example, with targets that were drawn.

    """

    batch: tuple[int, ...]
    member: Int[Tensor, " rows"]
    owner: Int[Tensor, " rows"]
    offset: Int[Tensor, " rows"]
    n: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]
    text: Int[Tensor, "rows length"]
    context: Int[Tensor, " rows"]
    target: Int[Tensor, " rows"]
    weights: Float[Tensor, "rows scored"]
    fixed: Position | None = None
    samples: int = 1

    def __len__(self) -> int:
        return len(self.owner)

    def select(self, rows: Int[Tensor, " k"] | slice) -> "Rows":
        """Some of the rows."""
        names = ("member", "owner", "offset", "n", "place", "text", "context", "target", "weights")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def repeat(self, k: int) -> "Rows":
        """Every row k times, the copies side by side."""
        return replace(self.select(torch.arange(len(self)).repeat_interleave(k)), samples=k * self.samples)

    def with_targets(self, targets: Sequence[Sequence[int]]) -> "Rows":
        """The same contexts and prompts before other targets, of weight 1. An empty target has no scored token."""
        contexts = [row[:n] for row, n in zip(self.text.tolist(), self.context.tolist(), strict=True)]
        lengths = torch.tensor([len(target) for target in targets])
        text = _padded([[*c, *t] for c, t in zip(contexts, targets, strict=True)])
        weights = (torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None]).float()
        return replace(self, text=text, target=lengths, weights=weights)

    def with_prompts(self, *, offset: int, n: int) -> "Rows":
        """The same rows with another prompt; with n = 0, none."""
        return replace(
            self,
            offset=torch.full_like(self.offset, offset),
            n=torch.full_like(self.n, n),
            fixed=None if not n else self.fixed,
        )


@dataclass(frozen=True)
class Scored:
    """What an objective is given: logits where target tokens are predicted.

    Attributes:
        logits: [rows, scored, vocab].
        labels: the target tokens; 0 on pads.
        weights: of each label; 0 on pads.
        columns: place of each label in its spliced row.
        slots: first slot and number of slots of each row.
        rows: the rows without the prompt, for objectives that need the text.
        index: place in the target of each scored column.
        passes: what the rows were scored by.
        bank: the vectors that `rows.offset` points into, for objectives that look at the prompt itself.

    """

    logits: Float[Tensor, "rows scored vocab"]
    labels: Int[Tensor, "rows scored"]
    weights: Float[Tensor, "rows scored"]
    columns: Int[Tensor, "rows scored"]
    slots: Int[Tensor, "rows 2"]
    rows: Rows
    index: Int[Tensor, " scored"]
    passes: "Passes"
    bank: Float[Tensor, "m width"]

    @property
    def nats(self) -> Float[Tensor, "rows scored"]:
        """-log p of each label, unweighted; 0 on pads."""
        logits = self.logits.float()
        chosen = logits.gather(-1, self.labels[..., None])[..., 0]
        real = self.index[None] < self.rows.target[:, None]
        return torch.where(real.to(logits.device), logits.logsumexp(-1) - chosen, 0.0)


class Passes:
    """Passes of one model over one set of examples, tokenised once.

    Args:
        lm: a model; its weights stay as they are, and gradients reach the vectors alone.
        examples: contexts and targets.
        cached: keep what stands before prompts of a fixed position. Switch it off where the weights change.

    Raises:
        SondeError: for a model that cannot take vectors in the place of tokens.

    """

    def __init__(self, lm: LanguageModel, examples: Examples, *, cached: bool = True) -> None:
        require_splicing(lm)
        self.lm = lm
        self.examples = examples
        self.cached = cached
        self._contexts = torch.tensor([len(context) for context in examples.contexts])
        self._targets = torch.tensor([len(target) for target in examples.targets])
        self._text = _padded([[*c, *t] for c, t in zip(examples.contexts, examples.targets, strict=True)])
        size = int(self._targets.max())
        self._weights = (torch.arange(size)[None] < self._targets[:, None]).float()
        if examples.weights is not None:
            self._weights = torch.tensor([[*row, *[0.0] * (size - len(row))] for row in examples.weights])
        self._slots = None if examples.slots is None else torch.tensor(examples.slots)
        self._pasts: OrderedDict[tuple[Position, tuple[int, ...]], tuple[Past, int]] = OrderedDict()

    def keeps(self, position: Position) -> bool:
        """Whether what stands before prompts of this position is computed once."""
        if not self.cached or position in ("prefix", "random", 0):
            return False
        if position == "slot" and (self._slots is None or not int(self._slots.min())):
            return False
        return _gradient_through_cache(self.lm)

    def rows(
        self,
        batch: Sequence[int],
        lengths: Sequence[int],
        positions: Sequence[Position],
        *,
        generator: torch.Generator | None = None,
        offsets: Sequence[int] | None = None,
    ) -> Rows:
        """The product of prompts (their lengths and positions) and the examples of a batch, prompt after prompt.

        `offsets` says where each prompt begins in the bank of vectors; by default they lie one after another.
        `generator` draws the places of position "random", in [0, context - 4]. Raises `SondeError` when a row is longer
        than the model's context, or has no such place.
        """
        chosen = torch.tensor(list(batch))
        size, context = len(chosen), self._contexts[chosen]
        if offsets is None:
            offsets = [sum(lengths[:i]) for i in range(len(lengths))]
        fixed = positions[0] if len(set(positions)) == 1 and min(lengths) > 0 and self.keeps(positions[0]) else None
        member = torch.arange(size).repeat(len(lengths))
        longest = int((context + self._targets[chosen]).max())
        limit = self.lm.max_positions
        if limit is not None and max(lengths) + longest > limit:
            raise SondeError(
                f"a prompt of {max(lengths)} and {longest} tokens of text are {max(lengths) + longest}, more than the"
                f" {limit} positions of {self.lm.name}"
            )
        return Rows(
            batch=tuple(batch),
            member=member,
            owner=torch.arange(len(lengths)).repeat_interleave(size),
            offset=torch.tensor(list(offsets)).repeat_interleave(size),
            n=torch.tensor(list(lengths)).repeat_interleave(size),
            place=torch.cat([self._places(position, chosen, generator) for position in positions]),
            text=self._text[chosen][member],
            context=context[member],
            target=self._targets[chosen][member],
            weights=self._weights[chosen][member],
            fixed=fixed,
        )

    def grouped(
        self,
        batch: Sequence[int],
        lengths: Sequence[int],
        positions: Sequence[Position],
        *,
        generator: torch.Generator | None = None,
    ) -> list[Rows]:
        """As `rows`, in groups: one for each position whose context is kept, and one for all others."""
        groups: dict[Position | None, list[int]] = {}
        for i, (n, position) in enumerate(zip(lengths, positions, strict=True)):
            groups.setdefault(position if n and self.keeps(position) else None, []).append(i)
        offsets = [sum(lengths[:i]) for i in range(len(lengths))]
        found = []
        for members in groups.values():
            rows = self.rows(
                batch,
                [lengths[i] for i in members],
                [positions[i] for i in members],
                generator=generator,
                offsets=[offsets[i] for i in members],
            )
            found.append(replace(rows, owner=torch.tensor(members)[rows.owner]))
        return found

    def _places(self, position: Position, chosen: Tensor, generator: torch.Generator | None) -> Tensor:
        check_position(position)
        context = self._contexts[chosen]
        if position == "prefix":
            return torch.zeros_like(context)
        if position == "suffix":
            return context
        if position == "random":
            room = (context - 4).clamp(min=0) + 1
            return (torch.rand(len(chosen), generator=generator) * room).long()
        if position == "slot":
            if self._slots is None:
                raise SondeError("position 'slot' needs examples that say where: Examples.from_chat, or slots=")
            return self._slots[chosen]
        assert isinstance(position, int)
        if position > int(context.min()):
            raise SondeError(f"index {position} is outside a context of {int(context.min())} tokens")
        return torch.full_like(context, position)

    def score(
        self, bank: Float[Tensor, "m width"], rows: Rows, *, wanted: Bool[Tensor, " scored"] | None = None
    ) -> Scored:
        """Run rows under the current grad mode. `bank` holds the vectors that `rows.offset` points into.

        `wanted` limits the target tokens that are scored (`Scored.index` says which they are).
        """
        lm, total = self.lm, rows.context + rows.n + rows.target
        begins = rows.place if rows.fixed is not None else torch.zeros_like(rows.place)
        size = int((total - begins).max())
        past = None
        if rows.fixed is not None and (lm.max_positions is None or int(begins.max()) + size <= lm.max_positions):
            past = self._before(rows)
        else:
            begins, size = torch.zeros_like(begins), int(total.max())
        columns = torch.arange(size)[None] + begins[:, None]
        inside = columns - rows.place[:, None]
        slot = (inside >= 0) & (inside < rows.n[:, None])
        source = torch.where(inside < 0, columns, columns - rows.n[:, None]).clamp(0, rows.text.shape[1] - 1)
        tokens = rows.text.gather(1, source)
        tokens = tokens.masked_fill(slot | (columns >= total[:, None]), 0)
        vectors = bank[(rows.offset[:, None] + inside)[slot].to(bank.device)]
        where = tuple(index.to(lm.device) for index in slot.nonzero(as_tuple=True))

        def splice(value: Tensor) -> Tensor:
            return value.index_put(where, vectors.to(value.dtype))

        last = f"resid_post.{lm.n_layers - 1}"
        with lm.editing({"embed": splice} if len(vectors) else {}), lm.reading(last) as acts:
            if past is None:
                lm(tokens)
            else:
                with _without_logits(lm):
                    lm(tokens, past=past)
        index = torch.arange(rows.weights.shape[1])
        if wanted is not None:
            index = index[wanted]
        labels_at = rows.context[:, None] + index[None]
        predicting = (labels_at + rows.n[:, None] - 1 - begins[:, None]).clamp(0, size - 1).to(lm.device)
        hidden = acts[last].gather(1, predicting[..., None].expand(-1, -1, acts[last].shape[-1]))
        labels = rows.text.gather(1, labels_at.clamp(max=rows.text.shape[1] - 1))
        weights = rows.weights[:, index]
        real = index[None] < rows.target[:, None]
        return Scored(
            logits=lm.unembed(hidden),
            labels=labels.masked_fill(~real, 0).to(lm.device),
            weights=weights.to(lm.device),
            columns=(labels_at + rows.n[:, None]).to(lm.device),
            slots=torch.stack([rows.place, rows.n], 1).to(lm.device),
            rows=rows,
            index=index,
            passes=self,
            bank=bank,
        )

    def _before(self, rows: Rows) -> Past:
        """What the model remembers of the tokens before the prompts, for each row."""
        assert rows.fixed is not None
        key = (rows.fixed, rows.batch)
        if key not in self._pasts:
            contexts = [self.examples.contexts[i] for i in rows.batch]
            places = self._places(rows.fixed, torch.tensor(rows.batch), None).tolist()
            tokens, mask = left_padded([c[:p] for c, p in zip(contexts, places, strict=True)], self.lm.device)
            with torch.no_grad(), _without_logits(self.lm):
                past = self.lm(tokens, mask, use_cache=True).past
            assert past is not None
            self._pasts[key] = (past, _bytes(past))
            while sum(size for _, size in self._pasts.values()) > _KEPT_BYTES and len(self._pasts) > 1:
                self._pasts.popitem(last=False)
        return self._pasts[key][0].select(rows.member)

    def batches(self, size: int, *, seed: int | None = None) -> list[list[int]]:
        """The examples in batches: the same ones every time, so that what stands before a prompt is kept for them.

        Rows of different length share a batch only where the model can take pads to the left.
        """
        order = list(range(len(self.examples)))
        if seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
        if not (self.cached and continuation(self.lm.model).ignores_mask and _gradient_through_cache(self.lm)):
            return [order[i : i + size] for i in range(0, len(order), size)]
        groups: dict[tuple[int, int], list[int]] = {}
        for i in order:
            slot = 0 if self.examples.slots is None else self.examples.slots[i]
            groups.setdefault((len(self.examples.contexts[i]), slot), []).append(i)
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _bytes(past: Past) -> int:
    layers = range(past.cache.n_layers)
    return sum(t.numel() * t.element_size() for layer in layers for t in past.cache.read(layer).values())


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "rows length"]:
    size = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (size - len(row))] for row in rows])


@contextmanager
def _without_logits(lm: LanguageModel) -> Iterator[None]:
    """Let the head see one column: a pass that leaves a cache cannot stop before it, and its logits are not wanted."""
    handle = lm.structure.head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:],))
    try:
        yield
    finally:
        handle.remove()


_splices: "weakref.WeakKeyDictionary[PreTrainedModel, float]" = weakref.WeakKeyDictionary()
_through_cache: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def require_splicing(lm: LanguageModel) -> None:
    """Raise `SondeError` unless rows of E in the place of tokens give the logits of those tokens; measured once."""
    if lm.model not in _splices:
        tokens = random_tokens(lm.model, 8)
        vectors = embedded(lm, tokens[:, 2:5])

        def splice(value: Tensor) -> Tensor:
            return torch.cat([value[:, :2], vectors.to(value.dtype), value[:, 5:]], 1)

        others = tokens.clone()
        others[:, 2:5] = 0
        whole = lm(tokens).logits
        with lm.editing({"embed": splice}):
            spliced = lm(others).logits
        assert whole is not None
        _splices[lm.model] = difference(spliced, whole)
    error = _splices[lm.model]
    if not error <= max(_EXACT, 8 * torch.finfo(lm.dtype).eps * (lm.dtype.itemsize < 4)):
        raise SondeError(
            f"{type(lm.model).__name__} cannot take vectors in the place of tokens, as by inputs_embeds: rows of its"
            f" embedding give logits that differ from their tokens' by {error:.1e} of the logits' scale"
        )


def _gradient_through_cache(lm: LanguageModel) -> bool:
    """Whether a prompt's gradient from the cache is that of the whole pass; measured once, on random tokens."""
    if lm.model not in _through_cache:
        how = continuation(lm.model)
        _through_cache[lm.model] = how.mode == "chunk" and _measured(lm)
    return _through_cache[lm.model]


def _measured(lm: LanguageModel) -> bool:
    tokens = random_tokens(lm.model, 10)
    contexts, targets = tokens[:, :6].tolist(), tokens[:, 6:].tolist()
    passes = Passes(lm, Examples(contexts, targets), cached=False)
    bank = embedded(lm, tokens[0, :2]).requires_grad_()
    rows = passes.rows([0, 1], [2], ["suffix"])
    try:
        found = [
            torch.autograd.grad(passes.score(bank, each).nats.sum(), bank)[0]
            for each in (rows, replace(rows, fixed="suffix"))
        ]
    except Exception:  # whatever the code of a family raises, its cache gives no gradient
        return False
    whole, cached = found
    return bool((cached - whole).abs().max() <= 1e-3 * whole.abs().max())


_FLOATS = 1 << 27  # of logits in a pass
_MOST_TOKENS = 8192  # in a pass
_FULL_TOKENS = 1024  # a pass of so many is worth no pads
_WASTE = 1.2


def pieces(rows: Rows, lm: LanguageModel) -> Iterator[Rows]:
    """Rows in parts that one pass has memory for, rows of like length together; drawn targets stay side by side."""
    sizes = (rows.context * (rows.fixed is None) + rows.n + rows.target).view(-1, rows.samples).amax(1)
    order = sizes.argsort(stable=True)
    logits = rows.weights.shape[1] * lm.vocab_size * rows.samples
    part: list[int] = []
    for block, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        tokens = len(part) * size * rows.samples
        wasted = part and tokens > _FULL_TOKENS and size > _WASTE * int(sizes[part[0]])
        if part and (wasted or tokens + size * rows.samples > _MOST_TOKENS or (len(part) + 1) * logits > _FLOATS):
            yield rows.select(_rows_of(part, rows.samples))
            part = []
        part.append(block)
    yield rows.select(_rows_of(part, rows.samples))


def _rows_of(blocks: Sequence[int], samples: int) -> Int[Tensor, " rows"]:
    return (torch.tensor(blocks)[:, None] * samples + torch.arange(samples)[None]).flatten()
