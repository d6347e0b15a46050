"""Sums, means and differences of recurrent states, in the form in which they mean something: the canonical form.

| family                                                | canonical form of `recurrent`     | adding m d to it       |
|-------------------------------------------------------|-----------------------------------|------------------------|
| Mamba, Mamba-2, Jamba, Qwen3-Next, RecurrentGemma, …  | the state s                       | s + m d                |
| RWKV-4: num, den, max                                 | num / den                         | num + m d den          |
| xLSTM: c, n, m                                        | c / |n|, for each head            | c + m d |n|            |

The first are linear in their state. RWKV-4 keeps sums over exp(max), and the max differs between contexts: raw
numbers of two contexts have different units, and their differences had effects of the wrong sign. The mean of the
values seen so far, num / den, has one unit everywhere; den and max stay. xLSTM has the same stabiliser; its normaliser
is a vector of either sign, so its length takes the place of den. Windows of convolutions and last tokens (`conv`,
`shift`) are activations and are added as they are. Keys and values have the length of their context: there is no sum
of them.

Prefixes are in a `Cache` (`call` and `Past.cache` give them). Caches that come out are new, those that go in stay as
they were. Numbers are float32 and are rounded to the cache's type once, at the end.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.state import Cache

State = dict[str, Tensor]
Strength = float | Float[Tensor, " batch"]

_RECURRING = ("recurrent", "conv", "shift")


def states(cache: Cache, layer: int, *parts: str) -> State:
    """The memory of a layer in canonical form: float32 tensors by name, batch first.

    `parts` are recurrent, conv or shift, by default recurrent alone: `{"recurrent": [batch, ...]}` in every family with
    a recurrence. Raises `SondeError` for a layer without that part, and for keys and values.
    """
    return canonical(cache.read(layer), *parts, of=f"state.{layer}")


def canonical(tensors: Mapping[str, Tensor], *parts: str, of: str = "this layer") -> State:
    """The canonical form of a layer's tensors, named as `Cache.read` and the edits of `state.i` name them."""
    found: State = {}
    for part in parts or ("recurrent",):
        if part == "kv":
            raise SondeError(f"{of}: keys and values have the length of their context and cannot be added or averaged")
        names = [name for name in tensors if part in (name, name.partition(".")[0])]
        if not names:
            have = sorted({name.partition(".")[0] for name in tensors})
            raise SondeError(f"{of} has no {part} memory to edit: it has {', '.join(have) or 'none'}")
        scale = _scale(tensors) if part == "recurrent" else None
        if scale is not None:
            found["recurrent"] = tensors[_numerator(tensors)].float() / scale
        else:
            found |= {name: tensors[name].float() for name in names}
    return found


def moved(tensors: Mapping[str, Tensor], delta: Mapping[str, Tensor], strength: Strength = 1.0) -> State:
    """A layer's tensors after adding `strength * delta` to their canonical form; the others are as they were.

    `delta` is one state for all rows (without a batch axis) or one for each; `strength` a number or one for each row.
    This is what an edit of `state.i` returns: `lm.editing({"state.3": lambda s: moved(s, delta, 2.0)})`.
    """
    new = dict(tensors)
    for name, change in delta.items():
        scale = _scale(tensors) if name == "recurrent" else None
        target = _numerator(tensors) if scale is not None else name
        if target not in tensors:
            raise SondeError(f"the state has {', '.join(tensors)}, not {name!r}")
        old = tensors[target]
        if change.shape not in (old.shape, old.shape[1:]):
            raise SondeError(
                f"the difference of {name!r} has shape {tuple(change.shape)}; this state takes"
                f" {tuple(old.shape[1:])}, or {tuple(old.shape)} for each row"
            )
        if not bool(torch.isfinite(change).all()):
            raise SondeError(f"the difference of {name!r} has numbers that are not finite")
        step = _per_row(strength, old) * change.to(old.device, torch.float32)
        new[target] = (old.float() + step * (1.0 if scale is None else scale)).to(old.dtype)
    return new


def shifted(cache: Cache, layer: int, delta: Mapping[str, Tensor], strength: Strength = 1.0) -> Cache:
    """A copy of `cache` whose layer has `strength * delta` added to its canonical form; see `moved`.

    Rows differ where `strength` is one number for each: `shifted(cache.select(zeros), 2, delta, multipliers)` is a
    sweep in one batch.
    """
    tensors = cache.read(layer)
    new = moved(tensors, delta, strength)
    copy = cache.clone()
    copy.write(layer, {name: value for name, value in new.items() if value is not tensors[name]})
    return copy


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> State:
    """`one - other` of two canonical states of the same names and shapes (or of shapes that broadcast)."""
    if one.keys() != other.keys():
        raise SondeError(f"the states have different parts: {', '.join(one)} and {', '.join(other)}")
    return {name: one[name] - other[name] for name in one}


def mean(state: Mapping[str, Tensor]) -> State:
    """The mean over the batch."""
    return {name: tensor.mean(0) for name, tensor in state.items()}


def on_heads(delta: Mapping[str, Tensor], heads: Sequence[int]) -> State:
    """`delta` (without a batch axis) with zeros outside of `heads`, of the part `recurrent`: the first axis.

    In Mamba and RWKV-4, which have no heads, the first axis is that of the channels.
    """
    if "recurrent" not in delta:
        raise SondeError(f"heads are of the recurrent state; this difference has {', '.join(delta)}")
    recurrent = delta["recurrent"]
    count = len(recurrent)
    wrong = [head for head in heads if not 0 <= head < count]
    if wrong:
        raise SondeError(f"head {wrong[0]} does not exist: there are 0 … {count - 1}")
    kept = torch.zeros_like(recurrent)
    kept[list(heads)] = recurrent[list(heads)]
    return {"recurrent": kept}


def swapped(cache: Cache, other: Cache, layers: Sequence[int], *parts: str) -> Cache:
    """A copy of `cache` that has the memory of `other` in `layers`: of `parts`, by default all but keys and values."""
    copy = cache.clone()
    for layer in layers:
        copy.write(layer, _recurring(other, layer, parts))
    return copy


def interpolated(cache: Cache, other: Cache, t: Strength, layers: Sequence[int] | None = None) -> Cache:
    """A copy of `cache` whose memory lies between two contexts: `cache` at t = 0, `other` at t = 1.

    `t` is a number or one for each row; `layers` are by default all that have more than keys and values. Linear in the
    canonical form; in RWKV-4 and xLSTM the logarithm of the normaliser is linear too.
    """
    if layers is None:
        layers = [layer for layer in range(cache.n_layers) if set(cache.parts(layer)) & set(_RECURRING)]
    if not layers:
        raise SondeError("this model keeps keys and values alone: there is no state between two contexts")
    copy = cache.clone()
    for layer in layers:
        start, end = _recurring(cache, layer), _recurring(other, layer)
        copy.write(layer, _between(start, end, t))
    return copy


def _between(start: State, end: State, t: Strength) -> State:
    def line(a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise SondeError(f"the states have shapes {tuple(a.shape)} and {tuple(b.shape)}: use as many rows in both")
        return torch.lerp(a.float(), b.float(), torch.as_tensor(_per_row(t, a)).to(a.device, torch.float32))

    plain = {name: line(start[name], end[name]) for name in start if not name.startswith("recurrent.")}
    if _scale(start) is None:
        return plain | {name: line(start[name], end[name]) for name in start if name.startswith("recurrent.")}
    stabiliser = "recurrent.max" if "recurrent.max" in start else "recurrent.m"
    peaks = line(start[stabiliser], end[stabiliser])
    size = torch.exp(line(*(_log_scale(state, stabiliser) for state in (start, end))) - _as(peaks, start))
    new = {
        stabiliser: peaks,
        _numerator(start): size * line(canonical(start)["recurrent"], canonical(end)["recurrent"]),
    }
    if "recurrent.den" in start:
        return plain | new | {"recurrent.den": size}
    unit = line(*(s["recurrent.n"] / s["recurrent.n"].norm(dim=-1, keepdim=True) for s in (start, end)))
    return plain | new | {"recurrent.n": size[..., 0] * unit}


def _log_scale(state: State, stabiliser: str) -> Tensor:
    scale = _scale(state)
    assert scale is not None
    return scale.log() + _as(state[stabiliser].float(), state)


def _as(stabiliser: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The stabiliser in the shape of the scale: xLSTM has (batch, heads, 1) beside a scale of (batch, heads, 1, 1)."""
    return stabiliser if "recurrent.den" in state else stabiliser[..., None]


def _scale(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What the numerator of a stabilised state is divided by, or None where states are linear."""
    if "recurrent.den" in tensors:
        return tensors["recurrent.den"].float()
    if "recurrent.n" in tensors:
        return tensors["recurrent.n"].float().norm(dim=-1)[..., None, None]
    return None


def _numerator(tensors: Mapping[str, Tensor]) -> str:
    return "recurrent.num" if "recurrent.den" in tensors else "recurrent.c"


def _recurring(cache: Cache, layer: int, parts: Sequence[str] = ()) -> State:
    parts = parts or [part for part in cache.parts(layer) if part != "kv"]
    if not parts:
        raise SondeError(f"state.{layer} has {', '.join(cache.parts(layer)) or 'no memory'}: there is no state to edit")
    return cache.read(layer, *parts)


def _per_row(strength: Strength, state: Tensor) -> Tensor | float:
    if not isinstance(strength, Tensor):
        if not math.isfinite(strength):
            raise SondeError(f"the strength is {strength}: give a finite number")
        return float(strength)
    if strength.ndim == 0:
        return _per_row(float(strength), state)
    if strength.shape != state.shape[:1]:
        raise SondeError(f"there are {tuple(strength.shape)} strengths for {len(state)} rows: give one for each row")
    if not bool(torch.isfinite(strength).all()):
        raise SondeError("a strength is not finite: give finite numbers")
    return strength.to(state.device, torch.float32).reshape(-1, *([1] * (state.ndim - 1)))
