"""Models of transformers on chunked scans, behind a gate.

Where no CUDA kernel is at hand, transformers' own code for Mamba and RWKV-4 is a loop over time, and for Mamba-2 it is
several tensors of (chunk, chunk) for every head. `chunked_scans(model)` puts the scans of `sonde.lm.scan` in their
place, for training and for reading, after a measurement: on the model's own activations output, final state and every
gradient must equal the library's to 1e-5 of the largest value, or it is refused with the measured error.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sonde.errors import SondeError
from sonde.lm.continuation import call, random_tokens, unhooked
from sonde.lm.scan import causal_convolution, selective_scan, ssd_scan, wkv_scan

TOLERANCE = 1e-5
_CONVOLUTION = "causal_conv1d_fn"
_PROBE = 133
"""Tokens of the measurement: several chunks of every scan, and a multiple of none."""


@dataclass(frozen=True)
class Gate:
    """The largest difference from the library's scans over the largest value, over all layers of a model."""

    output: float
    state: float
    gradient: float

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.output, self.state, self.gradient)


@contextmanager
def chunked_scans(model: PreTrainedModel, *, tolerance: float = TOLERANCE) -> Iterator[Gate]:
    """Run the recurrent mixers of `model` on the chunked scans for the duration of the context.

    Before, each layer's scan is compared with the library's on random tokens: output, last state, and the gradient of
    every input. The context's value is the `Gate` of these errors.

    Raises:
        SondeError: for a model without a scan that is known here, one that runs on chunked scans already, and one whose
            layers differ from the library by more than `tolerance`.

    """
    found = _mixers(model)
    if not found:
        raise SondeError(
            f"{type(model).__name__} has no mixer with a scan that is known here: this is for Mamba, Mamba-2 and RWKV-4"
        )
    if any("forward" in vars(mixer) for mixer in found):
        raise SondeError(f"{type(model).__name__} runs on replaced scans already: leave that context first")
    gate = _measure(model, found)
    if not gate.worst <= tolerance:
        raise SondeError(
            f"{type(model).__name__} keeps the library's scans: the chunked ones differ by {gate.output:.1e} in the"
            f" output, {gate.state:.1e} in the last state and {gate.gradient:.1e} in a gradient (allowed:"
            f" {tolerance:.0e} of the largest value)"
        )
    with _replaced(found, lambda _, chunked: chunked):
        yield gate


@contextmanager
def faster_scans(model: PreTrainedModel) -> Iterator[Gate | None]:
    """Chunked scans where the model has some and they pass the gate; otherwise, with the value None, the library's."""
    with ExitStack() as stack:
        gate = None
        if _mixers(model):
            with suppress(SondeError):
                gate = stack.enter_context(chunked_scans(model))
        yield gate


def _float32(scan: Callable) -> Callable:
    """The scan outside of autocast, which would round its matrix products."""

    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        with torch.autocast(device, enabled=False):
            return scan(*args, **kwargs)

    return run


def _mamba(
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    **_: Any,
) -> Any:
    """`mamba_selective_scan` of transformers; all sequences are (batch, channels, pos)."""
    x, dt = hidden_states.float(), dt.float()
    dt = dt if delta_bias is None else dt + delta_bias.float()[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    y, state = selective_scan(x.mT, dt.mT, A, B.mT, C.mT)
    y = y.mT
    y = y if D is None else torch.addcmul(y, x, D.float()[:, None])
    y = (y if z is None else y * F.silu(z.float())).to(hidden_states.dtype)
    return (y, state) if return_last_state else y


def _mamba2(
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
    **_: Any,
) -> Any:
    """`mamba2_chunk_scan` of transformers."""
    dt = dt.float()
    dt = dt if dt_bias is None else dt + dt_bias.float()
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    y, state = ssd_scan(hidden_states, dt, A, B, C, skip=D, initial=initial_states)
    return (y.contiguous(), state) if return_final_states else y.contiguous()


def _rwkv(time_decay, time_first, key, value, state=None, return_state=False) -> Any:
    """`rwkv_linear_attention` of transformers."""
    out, last = wkv_scan(time_decay.float().exp(), time_first, key, value, initial=state)
    return out.to(key.dtype), list(last) if return_state or state is not None else None


def _convolution(hidden_states, weight, bias=None, activation=None, **_: Any) -> Tensor:
    """`causal_conv1d_fn` of transformers, of (batch, channels, pos)."""
    y = causal_convolution(hidden_states.mT, weight, bias)
    y = y if activation is None else ACT2FN[activation](y)
    return y.to(hidden_states.dtype).mT


# By the name of the library's function that a mixer's forward calls, in whichever family.
_KNOWN: dict[str, Callable] = {
    "mamba_selective_scan": _float32(_mamba),
    "mamba2_chunk_scan": _float32(_mamba2),
    "rwkv_linear_attention": _float32(_rwkv),
    _CONVOLUTION: _float32(_convolution),
}


def _mixers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The mixers whose forward calls a scan that is known here, with the names of all its calls that are."""
    found = {}
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        names = [name for name in _KNOWN if code is not None and name in code.co_names]
        if set(names) - {_CONVOLUTION}:
            found[module] = names
    return found


@contextmanager
def _replaced(
    mixers: Mapping[nn.Module, list[str]], choose: Callable[[Callable, Callable], Callable]
) -> Iterator[None]:
    """Let each mixer's own forward see `choose(the library's function, ours)` under the library's names."""
    try:
        for mixer, names in mixers.items():
            forward = inspect.unwrap(type(mixer).forward)
            seen = forward.__globals__
            known = {**seen, **{name: choose(seen[name], _KNOWN[name]) for name in names}}
            copy = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
            copy.__kwdefaults__ = forward.__kwdefaults__
            mixer.forward = MethodType(copy, mixer)  # type: ignore[assignment]
        yield
    finally:
        for mixer in mixers:
            vars(mixer).pop("forward", None)


def _measure(model: PreTrainedModel, mixers: Mapping[nn.Module, list[str]]) -> Gate:
    errors: list[tuple[float, float, float]] = []

    def beside(library: Callable, chunked: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            errors.append(_compare(library, chunked, args, kwargs))
            return library(*args, **kwargs)

        return run

    with torch.no_grad(), unhooked(model), _replaced(mixers, beside):
        call(model, random_tokens(model, _PROBE))
    return Gate(*(max(column) for column in zip(*errors, strict=True)))


def _compare(library: Callable, chunked: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[float, float, float]:
    """Errors of output, state and gradients, of one call's inputs in float32."""
    results = []
    for scan in (library, chunked):
        leaves: list[Tensor] = []

        def leaf(value: Any, leaves: list[Tensor] = leaves) -> Any:
            if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
                return tuple(leaf(part) for part in value)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves.append(value.detach().float().clone().requires_grad_())
            return leaves[-1]

        device = next(t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            result = scan(*(leaf(a) for a in args), **{key: leaf(value) for key, value in kwargs.items()})
            output, state = (result, ()) if isinstance(result, Tensor) else result
            states = [state] if isinstance(state, Tensor) else _without_scale(*state) if state else []
            generator = torch.Generator().manual_seed(0)
            parts = [(torch.randn(t.shape, generator=generator).to(t.device) * t).sum() for t in (output, *states)]
            loss = torch.stack(parts).sum()
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        results.append(([output], states, gradients))
    pairs = zip(*results, strict=True)
    worst = [max((_error(new, old) for old, new in zip(*pair, strict=True)), default=0.0) for pair in pairs]
    return worst[0], worst[1], worst[2]


def _without_scale(num: Tensor, den: Tensor, peak: Tensor) -> list[Tensor]:
    """RWKV-4's state whatever its max: the library sums that one up over time, and num and den inherit its rounding."""
    return [num / den, den.log() + peak]


def _error(found: Tensor, true: Tensor) -> float:
    if found.shape != true.shape:
        return math.inf
    worst = (found - true).abs().max().nan_to_num(nan=math.inf)
    return float(worst / true.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
