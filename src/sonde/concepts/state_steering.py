"""What does a recurrent state hold that differs between two sets of prompts, and what follows when that is added?

Each prompt is processed to its end and the state of every layer is taken in its canonical form c (see
`sonde.lm.state_algebra`: the form in which sums mean something). The difference d = mean(c | positive) - mean(c |
negative) is added once, c <- c + m d, to the cached state of a prefix, before the tokens after it run (Paulo, Marshall
& Belrose 2024, arXiv:2404.05971). Unlike an edit of the residual stream it is not repeated at later tokens: what is
left of it after t tokens is up to the model's own gates.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sonde.concepts.contrast import Contrast
from sonde.errors import SondeError
from sonde.files import replacing, write_json
from sonde.lm.continuation import continuation
from sonde.lm.generation import left_padded
from sonde.lm.model import LanguageModel, Past
from sonde.lm.prompt_rows import Prompts, like_lengths, prompt_ids
from sonde.lm.state_algebra import State, Strength, moved, on_heads, states

FORMAT = "sonde state contrast 1"
_CONFIG, _TENSORS = "config.json", "states.safetensors"
_SPREAD = 1e-6  # share of the states' size below which their difference is rounding


class StateEdit:
    """An edit of `state.i`: `strength * delta` is added to the canonical form of what the layer remembers.

    Args:
        delta: the difference in canonical form, by part and without a batch axis.
        strength: a number, or one for each row of the batch.

    """

    def __init__(self, delta: State, strength: Strength = 1.0) -> None:
        self.delta, self.strength = delta, strength

    def __call__(self, tensors: Mapping[str, Tensor]) -> State:
        """The layer's tensors after the edit. Raises `SondeError` where shapes or parts do not fit."""
        return moved(tensors, self.delta, self.strength)

    def at(self, strength: Strength) -> "StateEdit":
        """The same edit at another strength."""
        return StateEdit(self.delta, strength)


class StateContrast:
    """Mean canonical states after two sets of prompts. Made by `state_contrast` or `StateContrast.load`.

    Attributes:
        positive: mean state by layer, each a dict of float32 tensors by part, without a batch axis.
        negative: mean state after the negative prompts by layer.
        parts: which parts of the memory were read: recurrent, conv, shift.
        n_positive: number of positive prompts.
        n_negative: number of negative prompts.
        model_name: name of the model.
        model_hash: hash of the model's weights.

    """

    def __init__(
        self,
        positive: Mapping[int, State],
        negative: Mapping[int, State],
        *,
        parts: Sequence[str],
        n_positive: int,
        n_negative: int,
        model_name: str = "model",
        model_hash: str = "",
    ) -> None:
        self.positive, self.negative = dict(positive), dict(negative)
        self.parts = tuple(parts)
        self.n_positive, self.n_negative = n_positive, n_negative
        self.model_name, self.model_hash = model_name, model_hash

    def __repr__(self) -> str:
        return (
            f"StateContrast({self.model_name!r}, {self.n_positive} against {self.n_negative} prompts, "
            f"{', '.join(self.parts)} of layers {', '.join(map(str, self.layers))})"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have the parts."""
        return tuple(self.positive)

    def difference(self, layer: int, *, heads: Sequence[int] | None = None) -> State:
        """Mean of the positive less mean of the negative states of a layer, of all heads or of `heads` alone.

        Raises `SondeError` for a layer without these parts, and for heads that do not exist.
        """
        if layer not in self.positive:
            have = ", ".join(map(str, self.layers))
            raise SondeError(f"layer {layer} has no state in this contrast: it has layers {have}")
        positive, negative = self.positive[layer], self.negative[layer]
        delta = {name: positive[name] - negative[name] for name in positive}
        return delta if heads is None else on_heads(delta, heads)

    def edit(self, layer: int, strength: Strength = 1.0, *, heads: Sequence[int] | None = None) -> StateEdit:
        """The edit for `lm.editing({"state.LAYER": edit})`. Raises `SondeError` where the difference is zero."""
        delta = self.difference(layer, heads=heads)
        size = sum(float(part.norm()) for part in self.positive[layer].values())
        if not sum(float(part.norm()) for part in delta.values()) > _SPREAD * size:
            raise SondeError(f"the states after the positive and negative prompts do not differ at layer {layer}")
        return StateEdit(delta, strength)

    def save(self, folder: str | Path) -> None:
        """Write `states.safetensors` and `config.json` to a folder."""
        folder = Path(folder)
        tensors = {
            f"{side}.{layer}.{name}": tensor
            for side, means in (("positive", self.positive), ("negative", self.negative))
            for layer, state in means.items()
            for name, tensor in state.items()
        }
        with replacing(folder / _TENSORS) as beside:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
        config = {
            "format": FORMAT,
            "layers": list(self.layers),
            "parts": list(self.parts),
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "model": self.model_name,
            "model_hash": self.model_hash,
        }
        write_json(folder / _CONFIG, config)

    @staticmethod
    def load(folder: str | Path, lm: LanguageModel, *, force: bool = False) -> "StateContrast":
        """Read a state contrast for `lm`.

        Raises `SondeError` for missing or damaged files, for a model with fewer layers, and, unless `force`, for one of
        other weights. A state of another shape is refused where it is added.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS, device=str(lm.device))
        except FileNotFoundError as error:
            raise SondeError(f"{folder} is not the folder of a state contrast: a file is missing") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise SondeError(f"the state contrast in {folder} is damaged: {error}") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise SondeError(f"{folder / _CONFIG} is not the configuration of a state contrast")
        if max(config["layers"]) >= lm.n_layers:
            raise SondeError(
                f"the state contrast in {folder} has layer {max(config['layers'])}, {lm.name} has {lm.n_layers} layers"
            )
        if not force and config["model_hash"] != lm.hash:
            raise SondeError(
                f"the state contrast in {folder} was made from {config['model']}, whose weights are not those of "
                f"{lm.name}: force=True loads it all the same"
            )
        sides: dict[str, dict[int, State]] = {"positive": {}, "negative": {}}
        for key, tensor in tensors.items():
            side, layer, name = key.split(".", 2)
            sides[side].setdefault(int(layer), {})[name] = tensor
        return StateContrast(
            {layer: sides["positive"][layer] for layer in config["layers"]},
            {layer: sides["negative"][layer] for layer in config["layers"]},
            parts=config["parts"],
            n_positive=config["n_positive"],
            n_negative=config["n_negative"],
            model_name=config["model"],
            model_hash=config["model_hash"],
        )


@torch.no_grad()
def state_contrast(
    lm: LanguageModel,
    positive: Prompts,
    negative: Prompts,
    *,
    layers: Sequence[int] | None = None,
    parts: Sequence[str] = ("recurrent",),
    batch: int = 32,
) -> StateContrast:
    """Mean states after two sets of prompts, in canonical form, in one pass over each.

    Args:
        lm: a model with a recurrent state, whose self-check passed for edits of it.
        positive: prompts, as strings or token ids; the state is that after their last token.
        negative: prompts of the other kind.
        layers: by default all layers that have the parts.
        parts: recurrent; conv and shift (what a convolution or an RWKV layer has seen last) as options.
        batch: most rows of a forward pass. Where a model looks at pads, rows of one length go together.

    Raises:
        SondeError: for an empty set, for a model without such a state, for one whose self-check refuses edits of it,
            and for prompts whose states do not differ at any layer.

    """
    require_states(lm, parts)
    found: list[dict[int, State]] = []
    sizes = []
    for which, prompts in (("positive", positive), ("negative", negative)):
        rows = prompt_ids(lm, prompts)
        if not rows:
            raise SondeError(f"there are no {which} prompts: a contrast needs prompts of both kinds")
        totals: dict[int, State] = {}
        for numbers in prefix_batches(lm, [len(ids) for ids in rows], batch):
            past = prefix(lm, [rows[i] for i in numbers])
            chosen = _layers(lm, past, layers, parts)
            for layer in chosen:
                state = states(past.cache, layer, *parts)
                total = totals.setdefault(layer, {name: torch.zeros_like(t[0]).double() for name, t in state.items()})
                for name, tensor in state.items():
                    total[name] += tensor.double().sum(0)
        found.append({i: {name: (t / len(rows)).float() for name, t in state.items()} for i, state in totals.items()})
        sizes.append(len(rows))
    made = StateContrast(
        found[0],
        found[1],
        parts=parts,
        n_positive=sizes[0],
        n_negative=sizes[1],
        model_name=lm.name,
        model_hash=lm.hash,
    )
    if not any(bool(part.any()) for layer in made.layers for part in made.difference(layer).values()):
        raise SondeError("the positive and negative prompts leave the same states: every difference is zero")
    return made


def prefix(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Past:
    """The memory after prompts of nearly one length, padded on the left where they differ."""
    tokens, mask = left_padded(rows, lm.device)
    past = lm(tokens, mask, use_cache=True).past
    assert past is not None
    return past


def prefix_batches(lm: LanguageModel, lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Numbers of rows that can share a pass that leaves a memory: of one length where the model looks at pads."""
    return like_lengths(lengths, batch, equal=continuation(lm.model).ignores_mask)


def require_states(lm: LanguageModel, parts: Sequence[str] = ("recurrent",)) -> None:
    """Raise `SondeError` unless edits of these parts of the memory were measured to act in `lm` as they should."""
    require_ready(lm)
    continuation(lm.model).require(lm.name)
    check = lm.check()
    for part in parts:
        if part not in ("recurrent", "conv", "shift"):
            raise SondeError(f"a state has no part {part!r} that can be steered: choose recurrent, conv or shift")
        if part not in check.states:
            raise SondeError(
                f"{lm.name} ({lm.family}) has no {part} state to steer: it keeps {', '.join(check.states) or 'nothing'}"
            )
    refused = [line for line in check.refusals if any(line.startswith(f"edits of state.*.{p}") for p in parts)]
    refused += [line for line in check.refusals if line.startswith("state edits")]
    if refused:
        raise SondeError(f"{lm.name} failed the self-check for {refused[0]}")


def require_ready(lm: LanguageModel) -> None:
    """Raise `SondeError` where the model is in training mode or recomputes its activations."""
    if lm.model.training:
        raise SondeError(f"{lm.name} is in training mode, where activations are random: call lm.model.eval() first")
    if any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules()):
        raise SondeError(f"{lm.name} recomputes activations: call lm.model.gradient_checkpointing_disable() first")


@torch.no_grad()
def residual_alignment(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], state: StateContrast, vectors: Contrast, *, batch: int = 64
) -> Float[Tensor, "layers sites"]:
    """Does a state's difference write the steering vector? Cosine of the two, by layer of the state and site.

    The difference of one layer is added at strength 1 to the state before the last token of `prompts`; entry (i, j) is
    the cosine of the mean change of the residual stream at site j (at that token) with the vector of site j; 0 where
    nothing changes, as at sites before the layer.
    """
    change = torch.zeros(len(state.layers), len(vectors.sites), lm.d_model, dtype=torch.float64, device=lm.device)
    for numbers in prefix_batches(lm, [len(ids) - 1 for ids in prompts], batch):
        rows = [list(prompts[i]) for i in numbers]
        start = prefix(lm, [ids[:-1] for ids in rows])
        last = torch.tensor([ids[-1:] for ids in rows], device=lm.device)
        everything = torch.arange(len(rows))
        read = []
        for layer in (None, *state.layers):
            edits = {} if layer is None else {f"state.{layer}": StateEdit(state.difference(layer))}
            with lm.editing(edits), lm.reading(*vectors.sites) as acts:
                lm(last, past=start.select(everything))
            read.append(torch.stack([acts[site][:, -1].double() for site in vectors.sites]))
        for i, steered in enumerate(read[1:]):
            change[i] += (steered - read[0]).sum(1)
    directions = torch.stack([vectors.difference(site).double() for site in vectors.sites])
    return torch.nn.functional.cosine_similarity(change, directions[None], dim=-1).float()


def _layers(lm: LanguageModel, past: Past, layers: Sequence[int] | None, parts: Sequence[str]) -> list[int]:
    able = [i for i in range(past.cache.n_layers) if set(parts) <= set(past.cache.parts(i))]
    if layers is None:
        return able
    wrong = [layer for layer in layers if layer not in able]
    if wrong:
        raise SondeError(
            f"layer {wrong[0]} of {lm.name} has no {' and '.join(parts)} state: choose from {', '.join(map(str, able))}"
        )
    return list(layers)
