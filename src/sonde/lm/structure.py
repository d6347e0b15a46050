"""Where the parts of a causal language model are, found by structure instead of by class name.

The blocks are the outermost `ModuleList` as long as the configuration's layer count; the final norm is the norm beside
it; the head is what transformers calls the output embedding. Inside a block, the mixer (attention or recurrence) and
the MLP are the children that carry one of the field's few names. What a part is given is read at its own input, or,
where several parts side by side are given the same, at the output of the norm in front of them. The self-check measures
whether what was found is right.
"""

import inspect
import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from sonde.errors import SondeError

_MIXER = re.compile(
    r"(self_)?attn|(self_)?attention|mixer|temporal_block|mamba|linear_attn|conv|short_conv|mlstm_layer|linear_attention"
)
_MLP = re.compile(r"mlp|feed_forward|ffn|mlp_block|block_sparse_moe|moe|fc2|feedforward")
_LAST_PROJECTION = ("dense", "dense_4h_to_h")
_FIRST_OF = {"fc2": "fc1"}  # OPT's block holds the two halves of its MLP itself
# Beside the MLP that `_MLP` names, and given the same.
_BESIDE_MLP = re.compile(r"shared_mlp|shared_expert|dense_mlp")
_MIXER_NORM = re.compile(r"input_layernorm|ln_?1|norm1?|operator_norm|temporal_pre_norm")
_MLP_NORM = re.compile(r"post_attention_layernorm|pre_ff_layernorm|pre_feedforward_layernorm|ffn_norm|ln_?2|norm2")
# Blocks that also normalise what they add: the norm behind the mixer, and the one behind the MLP that gives it away.
_NORM_AFTER = {
    "post_attention_layernorm": "post_feedforward_layernorm",
    "post_self_attn_layernorm": "post_mlp_layernorm",
}


@dataclass(frozen=True)
class Place:
    """A place in the network: the input of a module, or its output."""

    module: nn.Module
    at_input: bool


@dataclass(frozen=True)
class Structure:
    """The modules of a causal language model that sites are attached to."""

    path: str  # dotted path of the list of blocks
    blocks: nn.ModuleList
    embedding: nn.Module
    norm: nn.Module | None  # final norm
    project: nn.Module | None  # map from d_model to the width of the head, where they differ
    head: nn.Linear
    mixers: tuple[nn.Module | None, ...]  # one a block; None where a block has none, or several in parallel
    mlps: tuple[nn.Module | None, ...]
    mixer_inputs: tuple[Place | None, ...]  # what the mixers of each block are given: the output of the norm before
    mlp_inputs: tuple[Place | None, ...]


def find_structure(model: PreTrainedModel) -> Structure:
    """Locate blocks, embedding, final norm, head, mixers and MLPs of `model`.

    Raises `SondeError` for models without an unembedding (encoders) and for encoder-decoders.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise SondeError(f"{name} is an encoder-decoder; Sonde reads decoder-only (causal) language models")
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise SondeError(f"{name} has no unembedding, so it predicts no tokens: give a causal language model")
    n_layers = config.num_hidden_layers
    lists = [
        (path.count("."), -sum(p.numel() for p in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise SondeError(f"{name} has no list of {n_layers} blocks, the layer count of its configuration")
    _, _, path, blocks = min(lists, key=lambda entry: entry[:3])
    backbone = model.get_submodule(path.rpartition(".")[0])
    embedding = model.get_input_embeddings()
    return Structure(
        path=path,
        blocks=blocks,
        embedding=embedding,
        norm=_final_norm(backbone, blocks),
        project=getattr(backbone, "project_out", None),
        head=head,
        mixers=tuple(_part(block, _MIXER, _NORM_AFTER) for block in blocks),
        mlps=tuple(_part(block, _MLP, {mlp: mixer for mixer, mlp in _NORM_AFTER.items()}) for block in blocks),
        mixer_inputs=tuple(_input(block, _MIXER, _MIXER_NORM) for block in blocks),
        mlp_inputs=tuple(_input(block, _MLP, _MLP_NORM) for block in blocks),
    )


def _final_norm(backbone: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    children = list(backbone.named_children())
    place = next(i for i, (_, child) in enumerate(children) if child is blocks)
    norms = [(i, child) for i, (_, child) in enumerate(children) if "norm" in type(child).__name__.lower()]
    after = [child for i, child in norms if i > place]
    if after:
        return after[0]
    return norms[-1][1] if norms else None


def _part(block: nn.Module, names: re.Pattern[str], norms: dict[str, str]) -> nn.Module | None:
    children = dict(block.named_children())
    found = [name for name in children if names.fullmatch(name)]
    if len(found) != 1:
        return None
    part = children[found[0]]
    if "residual" in inspect.signature(part.forward).parameters:  # BLOOM: the part adds the residual itself
        return next(getattr(part, name) for name in _LAST_PROJECTION if hasattr(part, name))
    return next((children[own] for own, pair in norms.items() if own in children and pair in children), part)


def _input(block: nn.Module, names: re.Pattern[str], norms: re.Pattern[str]) -> Place | None:
    """Where what a block's mixer or MLP is given can be read and edited."""
    children = dict(block.named_children())
    found = [name for name in children if names.fullmatch(name)]
    beside = [name for name in children if names is _MLP and _BESIDE_MLP.fullmatch(name)]
    if len(found) == 1 and not beside:
        return Place(children[_FIRST_OF.get(found[0], found[0])], at_input=True)
    before = [name for name in children if norms.fullmatch(name)]
    return Place(children[before[0]], at_input=False) if found and len(before) == 1 else None
