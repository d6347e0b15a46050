"""One pass of a model over a text that serves everybody who wants to see its activations.

Each batch runs through the model once, without gradients, as far as the deepest site that anybody reads. Nothing is
kept: a consumer takes what it needs in `update` and forgets the rest. Under torchrun each process reads its own share
of the batches; at the end the consumers' states are added up in the order of ranks, so that all processes hold the same
result. States travel as safetensors bytes, never pickled.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.lm.batches import TokenBatch, TokenBatches, rank_and_world
from sonde.lm.model import LanguageModel

_CONTEXT = 512


@dataclass(frozen=True)
class Batch(TokenBatch):
    """A token batch and what the model did with it; tokens, mask and activations are on the model's device."""

    acts: dict[str, Tensor]
    """Float[Tensor, "batch pos d_model"] by site; "logits" is "batch pos vocab". What stands at pads means nothing."""


class Consumer(Protocol):
    """Somebody who wants to see activations."""

    @property
    def sites(self) -> Sequence[str]:
        """Sites to be read: names, globs or slices. A batch may hold more, for others."""
        ...

    def update(self, batch: Batch) -> None:
        """Take a batch in."""
        ...


@runtime_checkable
class SharedConsumer(Consumer, Protocol):
    """A consumer that several processes can feed. States are trees that `sonde.files.save_bundle` takes."""

    def state(self) -> Any:
        """All that was taken in so far."""
        ...

    def load(self, state: Any) -> None:
        """Forget what was taken in, and hold what `state` says."""
        ...

    def merge_state(self, state: Any) -> None:
        """Add what another process has taken in."""
        ...


class Estimator(Protocol):
    """A mergeable statistic, such as `sonde.stats.moments.Moments`."""

    def state(self) -> Any:
        """All that was taken in so far."""
        ...

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """Make one from what `state` returned."""
        ...

    def merge(self, other: Any) -> Any:
        """Add what another one has taken in."""
        ...


E = TypeVar("E", bound=Estimator)


def stream(
    lm: LanguageModel, source: Any = None, *, sites: Sequence[str] = (), start: int = 0, **layout: Any
) -> Iterator[Batch]:
    """Run `lm` over a text and yield batches with the activations at `sites`, from batch number `start` on.

    `source` is a `TokenBatches` or anything it takes; `layout` goes to `TokenBatches` (`context` is 512 or the longest
    that the model takes, where not given). Without sites the model is not run. Raises `SondeError` before the first
    batch for unknown sites, a tokenizer of another model, and a context that is too long.
    """
    if isinstance(source, TokenBatches):
        if layout:
            raise TypeError(f"these token batches have their layout already: {', '.join(layout)} cannot be given")
        batches = source
    else:
        if lm.tokenizer is None:
            raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text; give TokenBatches")
        layout.setdefault("context", min(_CONTEXT, lm.context))
        batches = TokenBatches(source, lm.tokenizer, **layout)
    return _run(lm, batches, _checked(lm, batches, sites), start)


def feed(
    lm: LanguageModel,
    batches: TokenBatches,
    consumers: Sequence[Consumer],
    *,
    progress: str | None = None,
    start: int = 0,
    after: Callable[[int], None] | None = None,
) -> int:
    """Run `lm` once over `batches` and show every batch to every consumer, in order. Returns the number of batches.

    Args:
        lm: the model.
        batches: the text; under torchrun, each process takes its share.
        consumers: who wants to see it. With several processes each must be a `SharedConsumer`, fresh or resumed from a
            state of its own process: in the end each holds what all have seen.
        progress: label of a progress bar; None for no bar.
        start: number of the first batch, to go on after an interruption.
        after: called with the number of each batch that all consumers have seen, to save checkpoints.

    Raises:
        SondeError: before the first batch, for the same reasons as `stream`, and for consumers that cannot be shared.

    """
    shared = batches.world > 1 and batches.world == rank_and_world()[1]
    sites = _checked(lm, batches, [site for consumer in consumers for site in consumer.sites])
    for consumer in consumers:
        if shared and not isinstance(consumer, SharedConsumer):
            raise SondeError(
                f"{type(consumer).__name__} cannot be fed by {batches.world} processes: it lacks state, load or "
                "merge_state; start it without torchrun"
            )
    seen = 0
    total = len(range(start + (batches.rank - start) % batches.world, batches.n_batches, batches.world))
    with tqdm(total=total, desc=progress, unit="batch", disable=progress is None or batches.rank > 0) as bar:
        for batch in _run(lm, batches, sites, start):
            for consumer in consumers:
                consumer.update(batch)
            if after is not None:
                after(batch.index)
            seen += 1
            bar.update()
    if shared:
        for consumer in consumers:
            assert isinstance(consumer, SharedConsumer)
            first, *others = gather_states(consumer.state())
            consumer.load(first)
            for state in others:
                consumer.merge_state(state)
    return seen


def all_merge(estimator: E) -> E:
    """One estimator that holds what those of all processes have taken in, the same in each; alone, the one given."""
    if rank_and_world()[1] == 1:
        return estimator
    first, *others = gather_states(estimator.state())
    merged = type(estimator).from_state(first)
    for state in others:
        merged.merge(type(estimator).from_state(state))
    return merged


def gather_states(state: Any) -> list[Any]:
    """The states of all processes in the order of ranks: trees of numbers, strings and tensors.

    Starts a gloo process group where torchrun has started processes and no group exists.
    """
    if rank_and_world()[1] == 1:
        return [state]
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine"
        save_bundle(path, state)
        mine = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(device)
        size = torch.tensor([len(mine)], device=device)
        sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, size)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        states = []
        for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            path = Path(folder) / str(rank)  # one file each: loaded tensors may be views of it
            path.write_bytes(part[: int(size)].cpu().numpy().tobytes())
            states.append(load_bundle(path))
    return states


def _checked(lm: LanguageModel, batches: TokenBatches, patterns: Sequence[str]) -> tuple[str, ...]:
    sites = lm.match(*patterns)
    if batches.max_id >= lm.vocab_size:
        raise SondeError(
            f"the tokens go up to {batches.max_id:,} and {lm.name} knows {lm.vocab_size:,}: "
            "the tokenizer belongs to another model"
        )
    if lm.max_positions is not None and batches.context > lm.max_positions:
        raise SondeError(f"rows of {batches.context:,} tokens are longer than {lm.name} takes ({lm.max_positions:,})")
    return sites


def _run(lm: LanguageModel, batches: TokenBatches, sites: tuple[str, ...], start: int) -> Iterator[Batch]:
    for batch in batches.from_(start):
        tokens, mask = batch.tokens.to(lm.device), batch.mask.to(lm.device)
        acts: dict[str, Tensor] = {}
        if sites:
            # neither context is open while the batch is with the caller, who may run the model, with gradients even
            with torch.no_grad(), lm.reading(*sites) as read:
                lm(tokens, mask)
            acts = dict(read)
        yield Batch(tokens, mask, batch.index, batch.documents, batch.chunks, batch.n_bytes, acts=acts)
