"""What a model remembers between two calls, under the same names in every family: `state.i`.

Layer i has up to four parts: `recurrent` (the state of its recurrence), `conv` (the window of a causal convolution),
`shift` (the last token's stream, RWKV) and `kv` (keys and values of attention). A part is one tensor, or several named
`part.name`; the batch is always the first axis.

| family                                      | tensors of a layer                                          |
|---------------------------------------------|-------------------------------------------------------------|
| attention                                   | kv.keys, kv.values (batch, heads, pos, d_head)              |
| Mamba, Mamba-2, Jamba, Bamba, Qwen3-Next, … | recurrent (batch, …, d_state), conv (batch, channels, k)    |
| LFM2                                        | conv                                                        |
| RecurrentGemma                              | recurrent (batch, width) in float32, conv                   |
| RWKV-4                                      | recurrent.num, .den, .max, shift.mixer, shift.mlp (batch, d)|
| xLSTM                                       | recurrent.c, .n, .m                                         |

Models write into their caches in place, so a cache that is continued from is used up: `clone` before branching.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sonde.errors import SondeError

PARTS = ("recurrent", "conv", "shift", "kv")


class Cache(ABC):
    """One model's memory of a batch of prefixes.

    `native` is the object that the model itself takes and returns, `length` the number of columns that it has seen.
    """

    native: Any
    length: int = 0

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Number of layers, with or without memory."""

    @abstractmethod
    def _tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer themselves."""

    @abstractmethod
    def _put(self, layer: int, name: str, value: Tensor) -> None:
        """Replace one tensor of a layer."""

    @abstractmethod
    def _map(self, change: Callable[[Tensor], Tensor]) -> "Cache":
        """A cache with every tensor, batch first, replaced by `change` of it; nothing is shared with this one."""

    @property
    def batch(self) -> int:
        """Number of rows."""
        return next(len(tensor) for layer in range(self.n_layers) for tensor in self._tensors(layer).values())

    def parts(self, layer: int) -> tuple[str, ...]:
        """Which of recurrent, conv, shift and kv layer `layer` has."""
        present = {name.partition(".")[0] for name in self._tensors(self._layer(layer))}
        return tuple(part for part in PARTS if part in present)

    @property
    def recurs(self) -> bool:
        """Whether any layer keeps more than keys and values: a memory that pads would corrupt."""
        return any(set(self.parts(layer)) - {"kv"} for layer in range(self.n_layers))

    def read(self, layer: int, *parts: str) -> dict[str, Tensor]:
        """Copies of a layer's tensors by name, those of `parts` or all of them. The batch is the first axis.

        A part names all its tensors: `read(3, "kv")` has keys `kv.keys` and `kv.values`.
        """
        tensors = self._tensors(self._layer(layer))
        chosen = {
            name: t.clone() for name, t in tensors.items() if not parts or {name, name.partition(".")[0]} & set(parts)
        }
        missing = [part for part in parts if not any(part in (name, name.partition(".")[0]) for name in chosen)]
        if missing:
            raise SondeError(f"state.{layer}.{missing[0]} does not exist: state.{layer} has {_listed(tensors)}")
        return chosen

    def write(self, layer: int, values: Mapping[str, Tensor]) -> None:
        """Replace tensors of a layer, named as `read` names them. Number type and device stay as they were.

        Raises `SondeError` for a name that the layer does not have or a tensor of another shape.
        """
        tensors = self._tensors(self._layer(layer))
        for name, value in values.items():
            if name not in tensors:
                raise SondeError(f"state.{layer}.{name} does not exist: state.{layer} has {_listed(tensors)}")
            old = tensors[name]
            if value.shape != old.shape:
                raise SondeError(f"state.{layer}.{name} has shape {tuple(old.shape)}, not {tuple(value.shape)}")
            self._put(layer, name, value.to(old.device, old.dtype, copy=True))

    def clone(self) -> "Cache":
        """An independent copy: continuing from one leaves the other as it was."""
        return self._copy(torch.clone)

    def select(self, rows: Int[Tensor, " rows"]) -> "Cache":
        """An independent cache of chosen rows, which may repeat: one prefix, then many rows that differ in an edit."""
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= self.batch:
            raise SondeError(f"rows {rows.tolist()} do not exist in a cache of {self.batch} rows")
        return self._copy(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def _copy(self, change: Callable[[Tensor], Tensor]) -> "Cache":
        new = self._map(change)
        new.length = self.length
        return new

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self.n_layers:
            raise SondeError(f"state.{layer} does not exist: there are state.0 … state.{self.n_layers - 1}")
        return layer


class LayeredCache(Cache):
    """Transformers' own caches: a list of layers with keys and values, recurrent and convolution states."""

    def __init__(self, native: Any) -> None:
        self.native = native

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.native.layers)

    def _tensors(self, layer: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in ("recurrent", "conv"):
            states = getattr(self.native.layers[layer], f"{part}_states", None) or {}
            for index, state in states.items():
                if state is not None:
                    found[part if len(states) == 1 else f"{part}.{index}"] = state
        for name in ("keys", "values"):
            tensor = getattr(self.native.layers[layer], name, None)
            if tensor is not None and tensor.numel():
                found[f"kv.{name}"] = tensor
        return found

    def _put(self, layer: int, name: str, value: Tensor) -> None:
        part, _, key = name.partition(".")
        if part == "kv":
            setattr(self.native.layers[layer], key, value)
        else:
            getattr(self.native.layers[layer], f"{part}_states")[int(key or 0)] = value

    def _map(self, change: Callable[[Tensor], Tensor]) -> "LayeredCache":
        native = copy.copy(self.native)
        native.layers = [_mapped(layer, change) for layer in self.native.layers]
        return LayeredCache(native)


class RwkvCache(Cache):
    """RWKV-4: five tensors (batch, d, layers)."""

    names = ("shift.mlp", "shift.mixer", "recurrent.num", "recurrent.den", "recurrent.max")

    def __init__(self, native: list[Tensor]) -> None:
        self.native = native

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.native[0].shape[-1]

    def _tensors(self, layer: int) -> dict[str, Tensor]:
        tensors = {name: state[..., layer] for name, state in zip(self.names, self.native, strict=True)}
        return {name: tensors[name] for name in (*self.names[2:], *self.names[1::-1])}

    def _put(self, layer: int, name: str, value: Tensor) -> None:
        index = self.names.index(name)
        self.native[index] = self.native[index].clone()
        self.native[index][..., layer] = value

    def _map(self, change: Callable[[Tensor], Tensor]) -> "RwkvCache":
        return RwkvCache([change(state) for state in self.native])


class XlstmCache(Cache):
    """xLSTM: the matrix memory c, its normaliser n and its stabiliser m of every layer."""

    def __init__(self, native: Any) -> None:
        self.native = native

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.native.rnn_state)

    def _tensors(self, layer: int) -> dict[str, Tensor]:
        return dict(zip(("recurrent.c", "recurrent.n", "recurrent.m"), self.native.rnn_state[layer], strict=True))

    def _put(self, layer: int, name: str, value: Tensor) -> None:
        self.native.rnn_state[layer] = tuple({**self._tensors(layer), name: value}.values())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "XlstmCache":
        native = copy.copy(self.native)
        native.rnn_state = {i: tuple(change(t) for t in layer) for i, layer in self.native.rnn_state.items()}
        native.seqlen_offset = self.native.seqlen_offset.clone()
        return XlstmCache(native)


class HeldCache(Cache):
    """RecurrentGemma: the model keeps recurrent and convolution states on its modules, keys and values in a cache.

    `native` is the cache of keys and values. `install` puts the states onto the modules before a call, `collect` takes
    them off afterwards, so that several prefixes of one model do not disturb one another.
    """

    def __init__(self, native: Any, modules: Mapping[int, nn.Module], held: Mapping[int, dict[str, Tensor]]) -> None:
        self.native = native
        self._modules = modules
        self._held = dict(held)
        self._attention = LayeredCache(native)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self._attention.n_layers

    def install(self) -> None:
        """Put the states onto the model's modules."""
        for layer, module in self._modules.items():
            held = self._held.get(layer, {})
            module.rg_lru.recurrent_states = held.get("recurrent")  # type: ignore[union-attr]
            module.conv1d_state = held.get("conv")  # type: ignore[assignment]

    def collect(self) -> None:
        """Take the states off the model's modules."""
        for layer, module in self._modules.items():
            self._held[layer] = {"recurrent": module.rg_lru.recurrent_states, "conv": module.conv1d_state}  # type: ignore[union-attr, dict-item]
            module.rg_lru.recurrent_states = module.conv1d_state = None  # type: ignore[union-attr, assignment]

    def _tensors(self, layer: int) -> dict[str, Tensor]:
        return {**self._held.get(layer, {}), **self._attention._tensors(layer)}

    def _put(self, layer: int, name: str, value: Tensor) -> None:
        if name in self._held.get(layer, {}):
            self._held[layer] = {**self._held[layer], name: value}
        else:
            self._attention._put(layer, name, value)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "HeldCache":
        held = {layer: {name: change(t) for name, t in states.items()} for layer, states in self._held.items()}
        return HeldCache(self._attention._map(change).native, self._modules, held)


def cache_of(output: Any) -> Cache:
    """The cache in what a model returned.

    Raises `SondeError` where the output has none that is known.
    """
    for name in ("past_key_values", "cache_params", "state"):
        native = getattr(output, name, None)
        if hasattr(native, "rnn_state"):
            return XlstmCache(native)
        if hasattr(native, "layers"):
            return LayeredCache(native)
        if isinstance(native, list | tuple) and len(native) == len(RwkvCache.names):
            return RwkvCache(list(native))
    raise SondeError(f"{type(output).__name__} has no cache of a known kind, so this model cannot be continued from")


def held_cache(model: PreTrainedModel) -> HeldCache | None:
    """An empty cache for a model that keeps states on its modules, or None for all others."""
    holders = [module for module in model.modules() if hasattr(module, "conv1d_state") and hasattr(module, "rg_lru")]
    if not holders:
        return None
    from transformers import DynamicCache

    from sonde.lm.structure import find_structure

    layer_of = {id(part): i for i, block in enumerate(find_structure(model).blocks) for part in block.modules()}
    return HeldCache(DynamicCache(config=model.config), {layer_of[id(module)]: module for module in holders}, {})


def _mapped(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(new, name, {key: change(v) if isinstance(v, Tensor) else v for key, v in value.items()})
        elif isinstance(value, Tensor) and value.ndim > 1:
            setattr(new, name, change(value))
    return new


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(tensors) or "no memory"
