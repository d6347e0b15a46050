"""Edits that stay: a direction taken out of everything that writes to the residual stream.

For each matrix that writes, W <- W - u uᵀ W, and b <- b - u uᵀ b for its bias, embeddings included; then no token has a
projection on u (Arditi et al. 2024, arXiv:2406.11717). The everywhere-form of ACE does the same and adds
(uᵀ mu₋ + a |r|) u once, at the first writer. Writers are found by structure: in each mixer and MLP the linear map whose
output is the part's own, and the embeddings before the blocks. What was found is measured afterwards on random tokens;
where another operation has the last word (a norm behind the sublayer, a gate), the edit is taken back and refused.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.concepts.contrast import check_width
from sonde.errors import SondeError
from sonde.files import write_json
from sonde.lm.continuation import random_tokens
from sonde.lm.model import LanguageModel

Tied = Literal["untie", "exclude"]
_TOLERANCE = 1e-4  # projection that may be left, of the stream's size
_EXPERTS = ("down_proj", "down_proj.weight", "output_linear.weight", "w2.weight")


@dataclass
class WeightEdit:
    """What was changed in a model's weights, until `undo`.

    `changed` names the parameters; `manifest` says what was done to which model, as JSON.
    """

    changed: tuple[str, ...]
    manifest: dict[str, Any]
    _lm: LanguageModel = field(repr=False)
    _kept: dict[str, Tensor] = field(repr=False)
    _tied_head: bool = field(repr=False, default=False)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the weights back, bit for bit. A second time does nothing."""
        parameters = _parameters(self._lm)
        for name, value in self._kept.items():
            parameters[name].copy_(value)
        if self._kept and self._tied_head:
            self._lm.structure.head.weight = self._lm.structure.embedding.weight  # type: ignore[assignment]
            self._lm.model.config.tie_word_embeddings = True
        self._kept = {}
        self._lm.__dict__.pop("hash", None)

    def save(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face folder, with `manifest.json` beside it."""
        folder = Path(folder)
        self._lm.model.save_pretrained(folder)
        if self._lm.tokenizer is not None:
            self._lm.tokenizer.save_pretrained(folder)
        write_json(folder / "manifest.json", self.manifest)


@torch.no_grad()
def edit_weights(
    lm: LanguageModel,
    direction: Float[Tensor, " d"],
    *,
    mean: Float[Tensor, " d"] | None = None,
    strength: float = 0.0,
    tied: Tied | None = None,
) -> WeightEdit:
    """Take `direction` out of all weights that write to the residual stream; the model is changed in place.

    With hooks the same is `SiteEdits.everywhere`. `mean` and `strength` give the everywhere-form of ACE. Where the
    embedding is also the unembedding, `tied` says what happens: "untie" gives the unembedding its own copy first,
    "exclude" leaves the embedding alone, so that a token's own projection stays.

    Raises `SondeError` for a model with tied embeddings and no word on it, a direction of another width, and families
    in which a norm or a gate has the last word on what is written.
    """
    check_width({"the residual stream": direction.shape[-1]}, lm, "the direction")
    if not direction.norm() > 0 or not direction.isfinite().all():
        raise SondeError("the direction is zero or not finite: there is nothing to take out")
    if mean is not None and tied == "exclude":
        raise SondeError("with a mean the embedding must be edited: use tied='untie'")
    unit = (direction.double() / direction.double().norm()).to(lm.device)
    # Where an embedding is narrower than the stream it does not write to it, tied or not.
    is_tied = lm.structure.head.weight is lm.structure.embedding.weight and lm.structure.head.in_features == lm.d_model
    if is_tied and tied is None:
        raise SondeError(
            f"{lm.name} ties its embedding to its unembedding, and an edit would change both: tied='untie' gives the "
            "unembedding its own copy, tied='exclude' leaves the embedding as it is"
        )
    writers = _writers(lm) | ({} if is_tied and tied == "exclude" else _embeddings(lm))
    before = lm.hash
    constant = 0.0 if mean is None else float(unit @ mean.to(unit) + strength * direction.double().norm())
    untied = is_tied and tied == "untie"
    if untied:
        lm.structure.head.weight = nn.Parameter(lm.structure.head.weight.clone(), requires_grad=False)
        lm.model.config.tie_word_embeddings = False
    parameters = _parameters(lm)
    kept = {name: parameters[name].clone() for name in writers}
    edit = WeightEdit(tuple(writers), {}, lm, kept, untied)
    try:
        for name, axis in writers.items():
            _project_out(parameters[name], unit, axis)
        if constant:
            _add_constant(lm, unit, constant)
        if not (is_tied and tied == "exclude"):
            _require_constant(lm, unit, constant)
    except SondeError:
        edit.undo()
        raise
    lm.__dict__.pop("hash", None)
    edit.manifest = {
        "format": "sonde weight edit 1",
        "model": lm.name,
        "hash_before": before,
        "hash_after": lm.hash,
        "direction_sha256": hashlib.sha256(direction.detach().cpu().float().numpy().tobytes()).hexdigest(),
        "projection": constant,
        "tied_embeddings": tied if is_tied else "none",
        "changed": list(writers),
    }
    return edit


@contextmanager
def edited_weights(lm: LanguageModel, direction: Float[Tensor, " d"], **options: Any) -> Iterator[WeightEdit]:
    """`edit_weights` while the context is open; undone at its end, also after an error."""
    edit = edit_weights(lm, direction, **options)
    try:
        yield edit
    finally:
        edit.undo()


@torch.no_grad()
def add_to_bias(lm: LanguageModel, site: str, vector: Float[Tensor, " d"]) -> WeightEdit:
    """Activation addition for good: `vector` (times its strength) joins the bias of what writes at `site`.

    `site` is `mixer_out.i`, `mlp_out.i`, or `resid_post.i`, which stands for the block's MLP (its mixer, where it has
    no MLP). Raises `SondeError` for another site and for a writer without a bias.
    """
    check_width({site: vector.shape[-1]}, lm, "the vector")
    kind, _, number = site.partition(".")
    kinds = {"mixer_out": ("mixer_out",), "mlp_out": ("mlp_out",), "resid_post": ("mlp_out", "mixer_out")}
    if site not in lm.sites or kind not in kinds:
        raise SondeError(f"a bias can be added to at mixer_out, mlp_out or resid_post, not at {site!r}")
    writers = _written_by(lm)
    place = next((name for part in kinds[kind] if (name := f"{part}.{number}") in writers), None)
    bias = None if place is None else writers[place].removesuffix("weight") + "bias"
    parameters = _parameters(lm)
    if bias is None or bias not in parameters:
        raise SondeError(f"what writes at {site} of {lm.name} has no bias that could carry the vector")
    before = lm.hash
    edit = WeightEdit((bias,), {}, lm, {bias: parameters[bias].clone()})
    parameters[bias].add_(vector.to(parameters[bias]))
    lm.__dict__.pop("hash", None)
    edit.manifest = {
        "format": "sonde weight edit 1",
        "model": lm.name,
        "hash_before": before,
        "hash_after": lm.hash,
        "added_at": site,
        "changed": [bias],
    }
    return edit


def _parameters(lm: LanguageModel) -> dict[str, Tensor]:
    return dict(lm.model.named_parameters(remove_duplicate=False))


def _embeddings(lm: LanguageModel) -> dict[str, int]:
    """What writes before the blocks, by parameter, with the axis of the stream: tables of tokens and of positions.

    Where token embeddings are narrower than the stream (OPT), it is the matrix that widens them.
    """
    found: dict[str, int] = {}
    ends = (lm.structure.head, lm.structure.project)
    for path, module in lm.model.named_modules():
        if path.startswith(lm.structure.path + ".") or any(module is end for end in ends):
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == lm.d_model:
            found[f"{path}.weight"] = 1
        elif isinstance(module, nn.Linear) and module.out_features == lm.d_model:
            found[f"{path}.weight"] = 0
    return found


def _writers(lm: LanguageModel) -> dict[str, int]:
    """Parameters in the blocks that write to the stream, with the axis that is the stream's.

    Raises `SondeError` for a part in which none is found.
    """
    found: dict[str, int] = {}
    parameters = _parameters(lm)
    by_site = _written_by(lm)
    for i in range(lm.n_layers):
        for kind, parts in (("mixer_out", lm.structure.mixers), ("mlp_out", lm.structure.mlps)):
            site, part = f"{kind}.{i}", parts[i]
            if site in by_site:
                weight = by_site[site]
                names = {weight: _axis(lm, weight)}
                bias = weight.removesuffix("weight") + "bias"
                names |= {bias: 0} if bias in parameters else {}
            elif part is not None:
                names = _experts(lm, part)
            else:
                names = {}
            if part is not None and not names:
                raise SondeError(
                    f"{site} of {lm.name} is not the output of a matrix (a norm or a gate has the last word), so no "
                    "weights can be edited for good: use SiteEdits.everywhere"
                )
            found |= names
    return found


def _written_by(lm: LanguageModel) -> dict[str, str]:
    """By site, the weight of the linear map whose output is what the site holds, measured on random tokens."""
    sites = [site for site in lm.sites if site.startswith(("mixer_out", "mlp_out"))]
    linear = {
        path: module
        for path, module in lm.model.named_modules()
        if path.startswith(lm.structure.path + ".") and _is_linear(module) and _width(module) == lm.d_model
    }
    outputs: dict[str, Tensor] = {}

    def keep(path: str):
        return lambda module, args, output: outputs.__setitem__(path, output.detach().clone())

    hooks = [module.register_forward_hook(keep(path)) for path, module in linear.items()]
    try:
        with lm.reading(*sites) as acts:
            lm(random_tokens(lm.model, 6))
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for site in sites:
        for path, output in outputs.items():
            if output.numel() == acts[site].numel() and torch.equal(output.flatten(), acts[site].flatten()):
                found[site] = f"{path}.weight"
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _width(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.nf  # type: ignore[return-value]


def _axis(lm: LanguageModel, weight: str) -> int:
    module = lm.model.get_submodule(weight.removesuffix(".weight"))
    return 0 if isinstance(module, nn.Linear) else 1


def _experts(lm: LanguageModel, part: nn.Module) -> dict[str, int]:
    """The last matrices of a mixture's experts: (experts, d, width), or one matrix each."""
    prefix = next(path for path, module in lm.model.named_modules() if module is part)
    found = {}
    for name, parameter in part.named_parameters():
        if name.endswith(_EXPERTS) and parameter.ndim in (2, 3) and parameter.shape[-2] == lm.d_model:
            found[f"{prefix}.{name}"] = parameter.ndim - 2
    return found


def _project_out(weight: Tensor, unit: Tensor, axis: int) -> None:
    """Take the direction out of `weight` along `axis`, in float64."""
    moved = weight.double().movedim(axis, -1)
    weight.copy_((moved - (moved @ unit)[..., None] * unit).movedim(-1, axis))


def _add_constant(lm: LanguageModel, unit: Tensor, constant: float) -> None:
    """Add `constant` u to every embedding; where the family scales embeddings, so that it arrives as given."""
    parameters = _parameters(lm)
    tables = {name: parameters[name] for name, axis in _embeddings(lm).items() if axis == 1}
    own = [table for table in tables.values() if table is lm.structure.embedding.weight]
    table = (own or list(tables.values()))[0]
    table.add_((constant * unit).to(table.dtype))
    arrived = float((_streams(lm)["resid_pre.0"] @ unit).mean())
    if not abs(arrived) > 1e-3 * abs(constant):
        raise SondeError(f"a constant in the embedding of {lm.name} does not reach its first block")
    table.add_(((constant / arrived - 1) * constant * unit).to(table.dtype))


def _require_constant(lm: LanguageModel, unit: Tensor, constant: float) -> None:
    """The theorem, measured: every token's projection is `constant` in the whole stream."""
    allowed = _TOLERANCE if lm.dtype.itemsize > 2 else 0.02
    for site, values in _streams(lm).items():
        off = float((values @ unit - constant).abs().max() / values.norm(dim=-1).max())
        if not off <= allowed:
            raise SondeError(
                f"after the edit the stream of {lm.name} still has a projection at {site} (off by {off:.1e} of its "
                "size): something besides matrices writes there; use SiteEdits.everywhere"
            )


def _streams(lm: LanguageModel) -> dict[str, Tensor]:
    """The stream on random tokens, between all blocks and at both ends, in float64."""
    sites = (*lm.match("resid_pre.*"), f"resid_post.{lm.n_layers - 1}")
    with lm.reading(*sites) as acts:
        lm(random_tokens(lm.model, 8))
    return {site: acts[site].double() for site in sites}
