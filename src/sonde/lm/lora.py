"""Adapters of low rank on a language model: W + (alpha / r) B A, B and A alone trained (Hu et al., arXiv:2106.09685).

While they are attached the model reads through them, in `lm(tokens)` as in everything else; `merge` adds them to the
weights and `remove` forgets them. What is trained, and how, is the caller's: `Adapters` is a module whose parameters
are the adapters, so any loop can train and checkpoint it (`sonde.nets.loop.train`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sonde.errors import MissingExtra, SondeError
from sonde.lm.model import LanguageModel

_SCANNED = ("mamba", "mamba2", "rwkv")
# matrices that a family's fused code reads without calling their module: an adapter there would not be seen
_UNSEEN = {
    "mamba": ("out_proj", "dt_proj"),
    "falcon_mamba": ("out_proj", "dt_proj"),
    "jamba": ("dt_proj",),
    "mamba2": ("out_proj",),
    "falcon_h1": ("out_proj",),
}


class Adapters(nn.ParameterList):
    """The trained part of an adapted model, made by `attach`. Its parameters are those of all adapters, in order."""

    def __init__(self, lm: LanguageModel, adapted: Any) -> None:
        super().__init__([parameter for parameter in adapted.parameters() if parameter.requires_grad])
        self._parts: tuple[LanguageModel, Any] = (lm, adapted)  # in a tuple: the model is no part of this module

    def merge(self) -> None:
        """Add the adapters to the weights of the language model and take them off; its weights are frozen again."""
        self._end("merge_and_unload")

    def remove(self) -> None:
        """Take the adapters off: the language model is what it was."""
        self._end("unload")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Passes inside go through the weights alone: the model from before the training, as a reference."""
        with self._parts[1].disable_adapter():
            yield

    def _end(self, how: str) -> None:
        lm, adapted = self._parts
        lm.model = getattr(adapted, how)().eval().requires_grad_(False)
        vars(lm).pop("hash", None)


def attach(
    lm: LanguageModel, *, rank: int, alpha: int | None = None, modules: tuple[str, ...] = (), seed: int = 0
) -> Adapters:
    """Put adapters of `rank` on the linear maps of the blocks. `lm` is changed in place until `merge` or `remove`.

    `alpha` is twice the rank by default; `modules` limits them to maps whose names end so, such as `query_key_value`.
    A fresh adapter changes nothing (B = 0). Raises `MissingExtra` without peft, and `SondeError` for a rank below 1 and
    for names that no map has.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("training adapters", "tune") from error
    from transformers.pytorch_utils import Conv1D

    if rank < 1:
        raise SondeError(f"the rank of the adapters is {rank}; give 1 or more")
    unseen = _UNSEEN.get(lm.family, ())
    maps = [
        name
        for name, module in lm.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not lm.structure.head and not name.endswith(unseen)
    ]
    targets = [name for name in maps if not modules or name.endswith(modules)]
    if not targets:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in maps})
        raise SondeError(f"no linear map of {lm.name} ends in {', '.join(modules)}: it has {', '.join(kinds)}")
    conv = any(isinstance(lm.model.get_submodule(name), Conv1D) for name in targets)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        warnings.simplefilter("ignore", RuntimeWarning)  # and has patterns for experts, which are left alone
        settings = LoraConfig(
            r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, fan_in_fan_out=conv, task_type="CAUSAL_LM"
        )
        adapted: Any = get_peft_model(lm.model, settings)
    return Adapters(lm, adapted)


def fast_training(lm: LanguageModel) -> Any:
    """A context in which a recurrent family trains on chunked scans: the library's go token by token."""
    from sonde.lm.chunked import chunked_scans

    return chunked_scans(lm.model) if lm.family in _SCANNED else nullcontext()
