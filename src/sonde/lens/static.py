"""What do a model's weights say in tokens? Directions of the residual stream, read through a lens without any text.

A direction is a singular vector, or a raw column, of one of a block's matrices: what MLP neurons read (`w_in`) and
write (`w_out`), what a head's OV circuit reads and writes, what its QK circuit compares. Matrices that read the stream
are folded with the norm before them, W diag(γ) C, those that write to it are centred where the final norm centres.
Through lens l a direction v promotes the tokens with the largest W_U diag(γ) (I + A_l) v, and suppresses the others;
both signs are read. Its score is the mean pairwise cosine of the embeddings of its top k tokens, for the better sign:
high where the tokens belong together. The control is a random matrix of the same shape (Belrose et al. 2303.08112,
appendix; Millidge and Black 2022; Dar et al. 2209.02535).

Nothing is looked up by family. A matrix reads the stream where its input is that of its part; values are measured as
what one token alone leaves in front of the output matrix, which is linear for attention and refused where it is not;
queries and keys stand beside the values. Rotations by position and norms of queries and keys are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sonde.errors import SondeError
from sonde.lens.causal_basis import logit_effects
from sonde.lens.direction_loss import ClosedNorm
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel
from sonde.lm.taps import Edit

Part = Literal["w_in", "w_out", "ov_in", "ov_out", "qk_query", "qk_key"]
_LINEAR = 1e-3  # how far what one token leaves may be from linear, relative to its size


@dataclass(frozen=True)
class Directions:
    """Unit directions of the residual stream at one block, the strongest of each matrix first.

    `strength` is the singular value, or the length of a raw column; `matrices` names the matrix of each.
    """

    layer: int
    part: Part
    vectors: Float[Tensor, "n d_model"]
    strength: Float[Tensor, " n"]
    matrices: Sequence[str]


@dataclass(frozen=True)
class StaticReading:
    """Tokens at both ends of n directions, most strongly moved first, and how well those of the better end agree."""

    promotes: Int[Tensor, "n k"]
    suppresses: Int[Tensor, "n k"]
    score: Float[np.ndarray, " n"]
    """Mean pairwise cosine of the embeddings of the k tokens at the better end."""
    positive: np.ndarray
    """Whether the better end is the promoted one."""

    def best(self, direction: int) -> list[int]:
        """The tokens at the better end of a direction."""
        return (self.promotes if self.positive[direction] else self.suppresses)[direction].tolist()


def weight_directions(
    lm: LanguageModel,
    layer: int,
    part: Part,
    *,
    k: int = 8,
    raw: bool = False,
    random: int | None = None,
) -> Directions:
    """Directions of the matrices of one block: of its MLP, or of each of its heads.

    Args:
        lm: the model.
        layer: number of the block; negative ones count from the last.
        part: "w_in" and "w_out" of the MLP (gate and up matrix together), "ov_in" and "ov_out" (what heads read and
            write), "qk_query" and "qk_key" (what a query looks for, and what a key offers).
        k: how many of each matrix, at most its rank.
        raw: the columns of "w_in" and "w_out" as they are (neurons), the longest first, instead of singular vectors.
        random: a seed: directions of random matrices of the same shapes, folded alike. The control.

    Raises:
        SondeError: for layers and parts that do not exist, and parts whose matrices cannot be told apart by
            measurement (recurrent mixers, gated attention, experts).

    """
    if part not in get_args(Part):
        raise SondeError(f"part {part!r} is unknown: use one of {', '.join(get_args(Part))}")
    if not -lm.n_layers <= layer < lm.n_layers:
        raise SondeError(f"layer {layer} does not exist: {lm.name} has layers 0 to {lm.n_layers - 1}")
    if k < 1:
        raise SondeError(f"k is {k}: ask for 1 direction of each matrix or more")
    if raw and not part.startswith("w_"):
        raise SondeError(f"raw columns are those of w_in and w_out; {part} is a product of two matrices")
    layer %= lm.n_layers
    generator = None if random is None else torch.Generator().manual_seed(random)

    def drawn(matrix: Tensor) -> Float[Tensor, "rows d"]:
        if generator is None:
            return matrix.double().cpu()
        return torch.randn(matrix.shape, generator=generator, dtype=torch.float64)

    found: list[tuple[Tensor, Tensor]] = []
    if part == "w_in":
        found.append(_of_rows(_folded(drawn(_w_in(lm, layer)), _norm_before(lm, layer, "mlp")), k, raw))
    elif part == "w_out":
        found.append(_of_rows(_centred(drawn(_w_out(lm, layer)), lm), k, raw))
    elif part in ("ov_in", "ov_out"):
        norm = _norm_before(lm, layer, "mixer")
        for values, out in zip(*_values_and_outputs(lm, layer), strict=True):
            pair = _of_product(_centred(drawn(out), lm), _folded(drawn(values), norm), k)
            found.append(pair[0] if part == "ov_out" else pair[1])
    else:
        norm = _norm_before(lm, layer, "mixer")
        for query, key in zip(*_queries_and_keys(lm, layer), strict=True):
            pair = _of_product(_folded(drawn(query), norm), _folded(drawn(key), norm), k)
            found.append(pair[0] if part == "qk_query" else pair[1])
    whole = len(found) == 1 and part.startswith("w_")
    names = ["MLP"] if whole else [f"head {head}" for head in range(len(found))]
    return Directions(
        layer,
        part,
        torch.cat([vectors for vectors, _ in found]).float(),
        torch.cat([strength for _, strength in found]).float(),
        [name for name, (vectors, _) in zip(names, found, strict=True) for _ in vectors],
    )


def read_directions(
    lm: LanguageModel, lens: TunedLens, layer: int | str, vectors: Float[Tensor, "n d_model"], *, k: int = 10
) -> StaticReading:
    """Tokens of any directions (of weights, of a dictionary, of steering) through one layer of a lens.

    `layer` is a number or site of the lens; the number of blocks is the stream after the last block, which the
    unembedding reads as it is. The bias of the lens is left out: it belongs to states, not to directions.

    Raises:
        SondeError: for vectors of another width or that are zero or not finite, and k outside 2 … vocabulary.

    """
    if vectors.ndim != 2 or vectors.shape[1] != lm.d_model:
        raise SondeError(f"directions have shape (n, {lm.d_model}), not {tuple(vectors.shape)}")
    if not bool((vectors.isfinite().all(-1) & (vectors != 0).any(-1)).all()):
        raise SondeError("a direction is zero, or holds nan or infinity")
    if not 2 <= k <= lm.vocab_size:
        raise SondeError(f"k is {k}: give 2 to {lm.vocab_size} tokens, of which pairs can be made")
    if layer == lm.n_layers:
        lens, layer = TunedLens.logit(lm), 0
    effects = logit_effects(lens, lens.layer(layer), vectors)
    ends = [(sign * effects).topk(k, -1).indices for sign in (1, -1)]
    scores = torch.stack([token_coherence(lm, end) for end in ends]).numpy()
    return StaticReading(ends[0], ends[1], scores.max(0), scores[0] >= scores[1])


@torch.no_grad()
def token_coherence(lm: LanguageModel, tokens: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Mean cosine of the embeddings of all pairs of the k tokens of each row, float64."""
    k = tokens.shape[-1]
    embedding: Tensor = lm.structure.embedding.weight  # type: ignore[assignment]
    unit = nn.functional.normalize(embedding[tokens.to(embedding.device)].double(), dim=-1)
    return ((unit.sum(-2).square().sum(-1) - k) / (k * (k - 1))).cpu()


def _of_rows(matrix: Float[Tensor, "m d"], k: int, raw: bool) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Right singular vectors, or rows by length, as unit vectors."""
    if raw:
        length = matrix.norm(dim=-1)
        longest = length.argsort(descending=True)[:k]
        return matrix[longest] / length[longest, None], length[longest]
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    values, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1).T
    kept = min(k, int((values > 1e-6 * values[0]).sum()))
    return vectors[:kept], values[:kept]


def _of_product(
    left: Float[Tensor, "r d"], right: Float[Tensor, "r d"], k: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Left and right singular vectors of leftᵀ right, by QR of its thin factors."""
    q, r = torch.linalg.qr(left.T)
    other_q, other_r = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r @ other_r.T)
    kept = min(k, int((s > 1e-6 * s[0]).sum()))
    return ((q @ u[:, :kept]).T, s[:kept]), ((other_q @ v[:kept].T).T, s[:kept])


def _folded(matrix: Float[Tensor, "m d"], norm: ClosedNorm | None) -> Float[Tensor, "m d"]:
    """W diag(γ) C: what a matrix reads of the stream before the norm."""
    if norm is None:
        return matrix
    return norm.centre(matrix * norm.gain.double().cpu())


def _centred(matrix: Float[Tensor, "m d"], lm: LanguageModel) -> Float[Tensor, "m d"]:
    """Without what the final norm takes away of everything that is written."""
    norm = ClosedNorm.of(lm.unembedding.norm, lm.d_model, lm.device)
    return matrix if norm is None else norm.centre(matrix)


class _Before(nn.Module):
    """The way from the stream in front of a block to what its mixer or MLP is given, as a module of vectors."""

    def __init__(self, lm: LanguageModel, layer: int, part: str) -> None:
        super().__init__()
        self._run = lambda x: _run(lm, layer, part, x)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return self._run(x.reshape(-1, x.shape[-1])).reshape(x.shape)


@torch.no_grad()
def _run(lm: LanguageModel, layer: int, part: str, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """What a part of the block is given when `x` is the stream, one token a row, and the mixer is silent."""
    site = _site(lm, f"{part}_in.{layer}")
    edits: dict[str, Edit] = {f"resid_pre.{layer}": lambda h: x[:, None].to(h.dtype)}
    if part == "mlp":
        edits[_site(lm, f"mixer_out.{layer}")] = torch.zeros_like
    with lm.editing(edits), lm.reading(site) as acts:
        lm(torch.zeros(len(x), 1, dtype=torch.long))
    return acts[site][:, 0].to(x.dtype)


def _norm_before(lm: LanguageModel, layer: int, part: str) -> ClosedNorm | None:
    """The norm in front of a block's mixer or MLP; None where there is none."""
    before = _Before(lm, layer, part)
    x = torch.randn(4, lm.d_model, generator=torch.Generator().manual_seed(0)).to(lm.device)
    if torch.allclose(before(x), x, atol=1e-4):
        return None
    norm = ClosedNorm.of(before, lm.d_model, lm.device)
    if norm is None:
        raise SondeError(f"what block {layer} of {lm.name} gives its {part} is no LayerNorm or RMSNorm of the stream")
    return norm


@torch.no_grad()
def _calls(lm: LanguageModel, layer: int, part: str, x: Float[Tensor, "n d"]) -> list[tuple[str, nn.Module, Tensor]]:
    """Name, module and input of every matrix that the mixer or MLP applies when it is given `x`, in order."""
    site = _site(lm, f"{part}_in.{layer}")
    block = lm.structure.blocks[layer]
    own = _inside_mixer(lm, layer)
    seen: list[tuple[str, nn.Module, Tensor]] = []
    hooks = []
    # hooks that see what is edited are set after those that edit it
    with lm.editing({site: lambda h: x[:, None].to(h.dtype)}), lm.reading(f"resid_post.{layer}"):
        try:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear | Conv1D) and (id(module) in own) == (part == "mixer"):

                    def see(module: nn.Module, args: tuple, name: str = name) -> None:
                        seen.append((name, module, args[0].reshape(len(x), -1)))

                    hooks.append(module.register_forward_pre_hook(see))
            lm(torch.zeros(len(x), 1, dtype=torch.long))
        finally:
            for hook in hooks:
                hook.remove()
    return seen


def _inside_mixer(lm: LanguageModel, layer: int) -> set[int]:
    """Modules of the block's mixer: those of the child that holds it, or stands in front of the norm that ends it."""
    mixer, mlp = lm.structure.mixers[layer], lm.structure.mlps[layer]
    if mixer is None:
        raise SondeError(f"block {layer} of {lm.name} has no single mixer, so its matrices cannot be told apart")
    children = list(lm.structure.blocks[layer].children())
    holding = next(child for child in children if any(module is mixer for module in child.modules()))
    if not any(isinstance(module, nn.Linear | Conv1D) for module in holding.modules()):
        holding = next(
            child
            for child in children
            if any(isinstance(module, nn.Linear | Conv1D) for module in child.modules())
            and not any(module is mlp for module in child.modules())
        )
    return {id(module) for module in holding.modules()}


def _readers(lm: LanguageModel, layer: int, part: str) -> list[tuple[str, Float[Tensor, "m d"]]]:
    """Names and weights of the matrices that read what a part is given."""
    x = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(0)).to(lm.device)
    return [
        (name, _weight(module))
        for name, module, given in _calls(lm, layer, part, x)
        if given.shape == x.shape and torch.equal(given, x.to(given.dtype))
    ]


def _w_in(lm: LanguageModel, layer: int) -> Float[Tensor, "m d"]:
    readers = _readers(lm, layer, "mlp")
    if not readers or _has_experts(lm, layer):
        raise SondeError(f"the MLP of block {layer} of {lm.name} has no single matrix that reads the stream")
    return torch.cat([weight for _, weight in readers])


def _w_out(lm: LanguageModel, layer: int) -> Float[Tensor, "m d"]:
    """What each neuron writes, as rows."""
    reading = {name for name, _ in _readers(lm, layer, "mlp")}
    writers = [call for call in _writers(lm, layer, "mlp") if call[0] not in reading]
    if len(writers) != 1 or _has_experts(lm, layer):
        raise SondeError(f"the MLP of block {layer} of {lm.name} has no single matrix that writes to the stream")
    return _weight(writers[0][1]).T


def _has_experts(lm: LanguageModel, layer: int) -> bool:
    """Experts hold their matrices in one tensor."""
    own = _inside_mixer(lm, layer)
    modules = [module for module in lm.structure.blocks[layer].modules() if id(module) not in own]
    return any(p.ndim > 2 for module in modules for p in module.parameters(recurse=False))


def _writers(lm: LanguageModel, layer: int, part: str) -> list[tuple[str, nn.Module, Tensor]]:
    x = torch.zeros(2, lm.d_model, device=lm.device)
    return [call for call in _calls(lm, layer, part, x) if _weight(call[1]).shape[0] == lm.d_model]


def _values_and_outputs(lm: LanguageModel, layer: int) -> tuple[list[Tensor], list[Tensor]]:
    """By head: the matrix from what the mixer is given to the head's values (d_head, d), and what it writes likewise.

    One token attends to itself alone, so that what stands in front of the output matrix is its value.
    """
    d = lm.d_model
    writers = _writers(lm, layer, "mixer")
    heads = getattr(lm.config, "num_attention_heads", 0)
    refusal = f"the mixer of block {layer} of {lm.name} is no plain attention, so it has no OV circuit"
    if not writers or not heads:
        raise SondeError(refusal)
    name, out, _ = writers[-1]
    unit = torch.eye(d, device=lm.device)
    x = torch.cat([torch.zeros_like(unit[:1]), unit, unit[:1] - 2 * unit[1:2]])
    (given,) = [seen.double() for other, _, seen in _calls(lm, layer, "mixer", x) if other == name]
    values = given[1 : d + 1] - given[0]
    mixed = values[0] - 2 * values[1]
    if not float((given[-1] - given[0] - mixed).abs().max()) <= _LINEAR * float(values.abs().max()):
        raise SondeError(refusal)
    weight = _weight(out).double()
    if weight.shape[1] % heads:
        raise SondeError(refusal)
    return list(values.T.chunk(heads)), list(weight.T.chunk(heads))


def _queries_and_keys(lm: LanguageModel, layer: int) -> tuple[list[Tensor], list[Tensor]]:
    """By head: the matrices of queries and keys (d_head, d).

    The rows that hold a head's values are found by what was measured; fused matrices have keys in front of values and
    queries in front of keys, head by head or all together.
    """
    values, _ = _values_and_outputs(lm, layer)
    size = len(values[0])
    readers = _readers(lm, layer, "mixer")
    refusal = f"queries and keys of block {layer} of {lm.name} cannot be told apart"
    for _, weight in readers:
        blocks = list(weight.double().split(size))
        places = [_place(value, blocks) for value in values]
        if None not in places:
            break
    else:
        raise SondeError(refusal)
    kv = sorted({place for place in places if place is not None})
    named = {name.rpartition(".")[2][0]: other for name, other in readers if len(readers) >= 3}
    if len(blocks) == len(kv) and {"q", "k"} <= set(named):
        queries, keys = (list(named[letter].double().split(size)) for letter in "qk")
        own_keys = [keys[kv.index(place)] for place in places if place is not None]
    elif len(blocks) == len(values) + 2 * len(kv):
        together = kv == list(range(len(blocks) - len(kv), len(blocks)))
        key_of = {place: place - len(kv) if together else place - 1 for place in kv}
        rest = [i for i in range(len(blocks)) if i not in key_of and i not in key_of.values()]
        queries = [blocks[i] for i in rest]
        own_keys = [blocks[key_of[place]] for place in places if place is not None]
    else:
        raise SondeError(refusal)
    if len(queries) != len(values) or len(own_keys) != len(values):
        raise SondeError(refusal)
    return queries, own_keys


def _place(value: Float[Tensor, "r d"], blocks: list[Tensor]) -> int | None:
    scale = float(value.abs().max())
    for i, block in enumerate(blocks):
        if block.shape == value.shape and float((block - value).abs().max()) <= _LINEAR * scale:
            return i
    return None


def _weight(module: nn.Module) -> Float[Tensor, "out in"]:
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _site(lm: LanguageModel, site: str) -> str:
    if site not in lm.sites:
        raise SondeError(f"{lm.name} has no site {site}, so what is read and written there cannot be told apart")
    return site
