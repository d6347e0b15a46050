"""Continue a forward pass from a cache, in the way that is right for the family at hand.

A run that is split by the cache must give the logits of the whole run. In transformers it does not everywhere: Mamba,
FalconMamba and Jamba forget their recurrent state, and RecurrentGemma its convolution window, when more than one token
follows; RWKV mixes the rows of a batch when exactly one does; Bamba counts positions from 0 again. The error can hide
below rounding (5e-6 for Jamba at random weights), so the mode is measured with a cache whose states have been replaced
by large random ones:

    chunk  all tokens in one call, where that equals stepping and the whole run
    step   one token a call, where only that is right
    none   refused, with the measured error

The measurement takes about ten passes over eight tokens, once for each model.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sonde.errors import SondeError
from sonde.lm.state import Cache, HeldCache, RwkvCache, cache_of, held_cache

Mode = Literal["chunk", "step", "none"]
PREFIX, SUFFIX, PADS = 4, 4, 3
DEAF = 0.3


@dataclass(frozen=True)
class Continuation:
    """How a model continues from its cache, with the measured errors relative to the logits' scale.

    `one`, `step` and `chunk` compare a split run with the whole run: one token after the prefix, four in turn, four in
    one call. `states` compares one call with stepping after states were replaced, over what replacing them changes: 0
    where it reacts as stepping does, 1 where it does not see them, None where there are only keys and values. `padding`
    compares rows with masked pads to the left with rows without. `tolerance` is what rounding explains: 1e-4 in
    float32; in half precision up to eight units, but no more than three times what stepping shows. `failure` is the
    first exception that the model raised on the way.
    """

    mode: Mode
    one: float
    step: float
    chunk: float
    states: float | None
    padding: float
    tolerance: float
    failure: str = ""

    @property
    def ignores_mask(self) -> bool:
        """Whether pads leak into real tokens, so that only rows of equal length can share a batch."""
        return not self.padding <= self.tolerance

    def columns(self, n: int) -> list[slice]:
        """The calls that `n` tokens after a cache take, each as a slice of the tokens."""
        return [slice(i, i + 1) for i in range(n)] if self.mode == "step" else [slice(0, n)]

    def require(self, name: str) -> None:
        """Raise `SondeError` where the model cannot be continued rightly."""
        if self.mode == "none":
            raise SondeError(
                f"{name} cannot continue from its cache: a run split by the cache differs from the whole run by"
                f" {max(self.one, self.step):.1e} of the logits' scale (allowed: {self.tolerance:.0e})"
                + f"; {self.failure}"
                * bool(self.failure)
            )

    def require_mask(self, name: str) -> None:
        """Raise `SondeError` where pads would leak into real tokens."""
        if self.ignores_mask:
            raise SondeError(
                f"{name} lets pads leak into real tokens (error {self.padding:.1e} of the logits' scale, allowed:"
                f" {self.tolerance:.0e}): put rows of equal length into a batch"
            )


def continue_from(
    model: PreTrainedModel,
    cache: Cache,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch past_and_pos"] | None = None,
) -> tuple[Float[Tensor, "batch pos vocab"], Cache]:
    """Logits of `tokens` after the prefix in `cache`, and the cache after them. The given cache is used up.

    `mask` covers the prefix and the tokens; it is needed where the prefix has pads.

    Raises:
        SondeError: for rows that do not match, pads that this model cannot take, and models that were measured to
            continue wrongly.

    """
    how = continuation(model)
    how.require(type(model).__name__)
    if mask is not None and not bool(mask.all()):
        how.require_mask(type(model).__name__)
    past = cache.length
    pieces = []
    for columns in how.columns(tokens.shape[1]):
        until = None if mask is None else mask[:, : past + columns.stop]
        logits, cache = call(model, tokens[:, columns], cache=cache, mask=until)
        pieces.append(logits)
    return torch.cat(pieces, 1), cache


def call(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    cache: Cache | None = None,
    mask: Bool[Tensor, "batch past_and_pos"] | None = None,
) -> tuple[Float[Tensor, "batch pos vocab"], Cache]:
    """One forward pass that leaves a cache: of a prefix, or of the tokens after `cache` as the model itself does it.

    Raises `SondeError` for pads to the right of tokens, which stay in the memory, and for rows that do not match.
    """
    if cache is not None and cache.batch != len(tokens):
        raise SondeError(
            f"the cache holds {cache.batch} rows, the tokens {len(tokens)}: select() the rows that are meant"
        )
    past = 0 if cache is None else cache.length
    if mask is not None and mask.shape != (len(tokens), past + tokens.shape[1]):
        raise SondeError(
            f"the mask has shape {tuple(mask.shape)}, prefix and tokens {(len(tokens), past + tokens.shape[1])}"
        )
    takes = _parameters(type(model))
    kwargs: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
    if cache is not None and "position_ids" in takes:
        # Bamba would count from 0 again.
        kwargs["position_ids"] = torch.arange(past, past + tokens.shape[1], device=tokens.device).expand_as(tokens)
    if mask is not None and not bool(mask.all()):
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise SondeError("pads to the right of tokens stay in the cache: put the pads to the left")
        attends = cache is None or any("kv" in cache.parts(layer) for layer in range(cache.n_layers))
        new = mask if attends else mask[:, -tokens.shape[1] :]
        if "attention_mask" in takes and not bool(new.all()):
            kwargs["attention_mask"] = new.long()
        if "position_ids" in takes:
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    logits, cache = _native(model, kwargs, cache, takes)
    cache.length = past + tokens.shape[1]
    return logits, cache


def _native(
    model: PreTrainedModel, kwargs: dict[str, Any], cache: Cache | None, takes: frozenset[str]
) -> tuple[Tensor, Cache]:
    held = cache if cache is not None else held_cache(model)
    if isinstance(held, HeldCache):
        held.install()
        try:
            return model(**kwargs, past_key_values=held.native).logits, held
        finally:
            held.collect()
    if "state" in takes and kwargs["input_ids"].shape[1] == 1:
        return _one_rwkv_token(model, kwargs, cache)
    if cache is not None:
        name = next((name for name in ("past_key_values", "cache_params", "state") if name in takes), "past_key_values")
        kwargs[name] = cache.native
    out = model(**kwargs)
    return out.logits, cache_of(out)


def _one_rwkv_token(model: PreTrainedModel, kwargs: dict[str, Any], cache: Cache | None) -> tuple[Tensor, Cache]:
    """RWKV adds its shift (batch, d) to a stream (batch, 1, d), which mixes the rows: give it one of (batch, 1, d)."""
    if cache is None:
        tokens, embedding = kwargs["input_ids"], model.get_input_embeddings().weight
        zeros = embedding.new_zeros(len(tokens), embedding.shape[1], model.config.num_hidden_layers)  # type: ignore[operator]
        sums = [torch.full_like(zeros, fill, dtype=torch.float32) for fill in (0.0, 0.0, -1e30)]
        native = [zeros, zeros.clone(), *sums]
    else:
        native = list(cache.native)
    out = model(**kwargs, state=[*(_Shift(state) for state in native[:2]), *native[2:]])
    return out.logits, RwkvCache([*(shift.state for shift in out.state[:2]), *out.state[2:]])


class _Shift:
    def __init__(self, state: Tensor) -> None:
        self.state = state

    def __getitem__(self, index: Any) -> Tensor:
        return self.state[index][:, None]

    def __setitem__(self, index: Any, value: Tensor) -> None:
        self.state[index] = value


_measured: "weakref.WeakKeyDictionary[PreTrainedModel, Continuation]" = weakref.WeakKeyDictionary()


def continuation(model: PreTrainedModel) -> Continuation:
    """How `model` continues; measured on the first call."""
    if model not in _measured:
        _measured[model] = measure(model)
    return _measured[model]


@torch.no_grad()
def measure(model: PreTrainedModel) -> Continuation:
    """Measure on random tokens which ways of continuing are right. See the module's docstring for what is compared."""
    tokens = random_tokens(model, PREFIX + SUFFIX)
    prefix, suffix = tokens[:, :PREFIX], tokens[:, PREFIX:]
    padded, mask = _left_padded(model, tokens)
    failures: list[str] = []
    states = None
    with unhooked(model):
        plain = {"use_cache": False} if "use_cache" in _parameters(type(model)) else {}
        whole = model(input_ids=tokens, **plain).logits
        after = whole[:, PREFIX:]
        try:
            cache = call(model, prefix)[1]
            stepped = _stepped(model, suffix, cache.clone())
            split = _attempt(lambda: call(model, suffix, cache=cache.clone())[0], failures)
            one, step = difference(stepped[:, :1], after[:, :1]), difference(stepped, after)
            chunk = difference(split, after)
            states = max((_deafness(model, suffix[:, :2], cache, part) for part in _recurring(cache)), default=None)
        except Exception as error:  # whatever the code of a family raises, it cannot be continued
            failures.append(f"{type(error).__name__}: {error}")
            one = step = chunk = math.inf
        padding = difference(_attempt(lambda: call(model, padded, mask=mask)[0][:, PADS:], failures), whole)
    eps = torch.finfo(model.dtype).eps
    allowed = max(1e-4, 2 * eps, min(3 * max(one, step), 8 * eps))
    chunks = max(one, chunk) <= allowed and (states is None or states <= DEAF)
    mode: Mode = "chunk" if chunks else "step" if max(one, step) <= allowed else "none"
    return Continuation(mode, one, step, chunk, states, padding, allowed, failures[0] if failures else "")


def _deafness(model: PreTrainedModel, tokens: Tensor, cache: Cache, part: str) -> float:
    """How far one call for `tokens` is from stepping after `part` was replaced, over what replacing it changes.

    A call that takes the part as zero is off by about 1, however little the part matters at these weights.
    """
    other = disturbed(cache, part)
    before, after = _stepped(model, tokens, cache.clone()), _stepped(model, tokens, other.clone())
    error = difference(_attempt(lambda: call(model, tokens, cache=other)[0], []), after)
    change = difference(before, after)
    return error / change if change else math.inf if error else 0.0


def _recurring(cache: Cache) -> list[str]:
    return sorted({part for layer in range(cache.n_layers) for part in cache.parts(layer)} - {"kv"})


def _attempt(run: Callable[[], Tensor], failures: list[str]) -> Tensor | None:
    try:
        return run()
    except Exception as error:  # a family's own failure is a measurement too
        failures.append(f"{type(error).__name__}: {error}")
        return None


def random_tokens(model: PreTrainedModel, n: int, *, rows: int = 2) -> Int[Tensor, "rows n"]:
    """The same ids at every call, spread over the vocabulary."""
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, embedding.shape[0], (rows, n), generator=generator).to(embedding.device)  # type: ignore[arg-type]


def disturbed(cache: Cache, *parts: str) -> Cache:
    """A copy whose states (of `parts`, by default all but keys and values) are far from zero and from what they were.

    Of each part one tensor changes: denominators and stabilisers stay, which would change the scale of everything.
    """
    generator = torch.Generator().manual_seed(1)
    new = cache.clone()
    for layer in range(cache.n_layers):
        for part in cache.parts(layer):
            if part not in (parts or ("recurrent", "conv", "shift")):
                continue
            name = "kv.values" if part == "kv" else next(iter(new.read(layer, part)))
            state = new.read(layer, name)[name]
            noise = torch.randn(state.shape, generator=generator).to(state.device)
            size = state.float().std().nan_to_num().clamp(min=0.1)
            new.write(layer, {name: state + 3 * size * noise})
    return new


def difference(found: Float[Tensor, "batch pos d"] | None, true: Float[Tensor, "batch pos d"]) -> float:
    """The largest difference of any token over the largest of `true`; infinite where shapes differ or numbers are NaN.

    In half precision it is the median token's: there rounding sends single tokens to other experts.
    """
    if found is None or found.shape != true.shape:
        return math.inf
    scale = true.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    worst = (found.float() - true.float()).abs().amax(-1).nan_to_num(nan=math.inf) / scale
    return float(worst.max() if true.dtype.itemsize > 2 else worst.median())


def _stepped(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    pieces = []
    for i in range(tokens.shape[1]):
        logits, cache = call(model, tokens[:, i : i + 1], cache=cache)
        pieces.append(logits)
    return torch.cat(pieces, 1)


def _left_padded(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    padded = torch.cat([random_tokens(model, PADS).flip(0), tokens], 1)
    return padded, torch.arange(padded.shape[1], device=padded.device).expand_as(padded) >= PADS


@lru_cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@contextmanager
def unhooked(model: PreTrainedModel) -> Iterator[None]:
    """Run the model without anybody's hooks: measurements are of the model as it is, also inside an edit."""
    kept = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    for module, _, _ in kept:
        module._forward_hooks, module._forward_pre_hooks = (
            type(module._forward_hooks)(),
            type(module._forward_pre_hooks)(),
        )
    try:
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks
