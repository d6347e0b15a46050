"""What would the model predict if it stopped at layer l? One affine map per layer, then the model's own unembedding U.

With h_l the input of block l: the logit lens (nostalgebraist 2020) reads U(h_l), the bias-only lens U(h_l + b_l) and
the tuned lens U(h_l + A_l h_l + b_l) (Belrose et al. 2023, arXiv:2303.08112). A_l and b_l are 0 in the logit lens, so
that weight decay pulls towards it. The translators of all layers are one tensor (layers, d, d): one product translates
all.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.unembedding import Unembedding

if TYPE_CHECKING:
    from sonde.lens.descent import LensTraining
    from sonde.lm.batches import TokenBatches

Kind = Literal["logit", "bias", "tuned"]
DEFAULT_SITES = ("resid_pre.*",)


class TunedLens(nn.Module):
    """A lens on chosen sites of one model: `lens(hidden, layer)` gives logits.

    Made by `TunedLens.logit(lm)`, `TunedLens.fit(lm, batches)` or `TunedLens.load(path, lm)`.

    Attributes:
        sites: the sites, in order of depth; a layer is a number into these, or a site's name.
        weight: A, Float[Parameter, "layers d d"], float32; None unless the kind is "tuned".
        bias: b, Float[Parameter, "layers d"], float32; None for the logit lens.
        unembedding: the model's own; its weights are shared and are no parameters of the lens.
        model_name: name of the model that the lens was made for.
        facts: JSON-able facts about how the lens was made, saved with it.

    """

    def __init__(
        self,
        unembedding: Unembedding,
        sites: Sequence[str],
        d_model: int,
        *,
        kind: Kind = "tuned",
        model_name: str = "model",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not sites:
            raise SondeError("a lens needs at least one site, such as resid_pre.*")
        if kind not in ("logit", "bias", "tuned"):
            raise SondeError(f"lens kind {kind!r} is unknown: use logit, bias or tuned")
        self.kind: Kind = kind
        self.sites = tuple(sites)
        self.d_model = d_model
        self.unembedding = unembedding
        self.model_name = model_name
        self.facts: dict[str, Any] = {}
        layers = len(self.sites)
        tuned, biased = kind == "tuned", kind != "logit"
        self.weight = nn.Parameter(torch.zeros(layers, d_model, d_model, device=device)) if tuned else None
        self.bias = nn.Parameter(torch.zeros(layers, d_model, device=device)) if biased else None

    @staticmethod
    def zeros(lm: LanguageModel, kind: Kind = "tuned", *, sites: Iterable[str] = DEFAULT_SITES) -> "TunedLens":
        """An untrained lens: every kind of it reads the same as the logit lens.

        `sites` are names or patterns of any sites of width d_model. Raises `SondeError` for others.
        """
        found = lm.match(*([sites] if isinstance(sites, str) else sites))
        if "logits" in found:
            raise SondeError("a lens reads hidden states of width d_model, not the site 'logits'")
        return TunedLens(lm.unembedding, found, lm.d_model, kind=kind, model_name=lm.name, device=lm.device)

    @staticmethod
    def logit(lm: LanguageModel, *, sites: Iterable[str] = DEFAULT_SITES) -> "TunedLens":
        """The logit lens: nothing to train."""
        return TunedLens.zeros(lm, "logit", sites=sites)

    @staticmethod
    def fit(
        lm: LanguageModel,
        batches: "TokenBatches | Iterable[str] | str | Path | None",
        settings: "LensTraining | None" = None,
        *,
        sites: Iterable[str] = DEFAULT_SITES,
        checkpoint: str | Path | None = None,
        progress: str | None = None,
        **changes: Any,
    ) -> "TunedLens":
        """Train a lens in one pass over `batches`; `changes` are fields of `LensTraining`.

        See `sonde.lens.training.fit`.
        """
        from sonde.lens.descent import LensTraining
        from sonde.lens.training import fit

        chosen = LensTraining(**changes) if settings is None else settings
        return fit(lm, batches, chosen, sites=sites, checkpoint=checkpoint, progress=progress)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        return (
            f"TunedLens({self.kind}, {self.model_name!r}, {len(self)} sites from {self.sites[0]} to {self.sites[-1]})"
        )

    def layer(self, layer: int | str) -> int:
        """The number of a layer that is given as number (negative: from the end) or as site."""
        if isinstance(layer, str):
            if layer not in self.sites:
                raise SondeError(f"the lens has no site {layer!r}: it reads {self.sites[0]} … {self.sites[-1]}")
            return self.sites.index(layer)
        if not -len(self) <= layer < len(self):
            raise SondeError(f"layer {layer} is out of range: the lens has {len(self)} layers, 0 to {len(self) - 1}")
        return layer % len(self)

    def forward(self, hidden: Float[Tensor, "... d_model"], layer: int | str) -> Float[Tensor, "... vocab"]:
        """Logits of hidden states of one layer: the model's own unembedding of the translated state."""
        return self.unembedding(self.translate(hidden, layer))

    def translate(self, hidden: Float[Tensor, "... d_model"], layer: int | str) -> Float[Tensor, "... d_model"]:
        """The states h + A h + b of one layer, computed in float32 and returned in the type of `hidden`."""
        place = self.layer(layer)
        if self.bias is None:
            return hidden
        moved = hidden.float()
        if self.weight is not None:
            moved = moved + moved @ self.weight[place].T
        return (moved + self.bias[place]).to(hidden.dtype)

    def translate_all(self, hidden: Float[Tensor, "layers n d_model"]) -> Float[Tensor, "layers n d_model"]:
        """The states h + A h + b of all layers at once, in float32."""
        hidden = hidden.float()
        if self.bias is None:
            return hidden
        if self.weight is None:
            return hidden + self.bias[:, None]
        return hidden + torch.baddbmm(self.bias[:, None], hidden, self.weight.mT)

    def attach(self, lm: LanguageModel, *, force: bool = False) -> "TunedLens":
        """The same translators before another model's unembedding: a fine-tuned version of the lens's model.

        `sonde.lens.evaluation.attach_report` measures what that costs. Raises `SondeError` when width or sites differ,
        and when the family does unless `force`.
        """
        self.check_fits(lm, f"a lens of {self.model_name}", None if force else self.facts.get("family"))
        attached = TunedLens(
            lm.unembedding, self.sites, self.d_model, kind=self.kind, model_name=lm.name, device=lm.device
        )
        attached.load_state_dict(self.state_dict())
        attached.facts = {**self.facts, "trained_on": self.facts.get("trained_on", self.model_name)}
        return attached

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `translators.safetensors` to a folder."""
        from sonde.lens.formats import save

        save(self, folder)

    @staticmethod
    def load(folder: str | Path, lm: LanguageModel, *, force: bool = False) -> "TunedLens":
        """Read a lens that Sonde saved, or one in the published format (`config.json` and `params.pt`).

        Raises `SondeError` when width, layers or the unembedding's hash differ from the model's; `force` lets another
        hash pass.
        """
        from sonde.lens.formats import load

        return load(folder, lm, force=force)

    def check_fits(self, lm: LanguageModel, what: str, family: str | None = None) -> None:
        """Raise `SondeError` unless width, sites and (where given) family are those of `lm`."""
        if lm.d_model != self.d_model:
            raise SondeError(f"{what} has width {self.d_model}, {lm.name} has {lm.d_model}")
        missing = [site for site in self.sites if site not in lm.sites]
        if missing:
            raise SondeError(f"{what} reads {missing[0]}, which {lm.name} with {lm.n_layers} layers does not have")
        if family is not None and family != lm.family:
            raise SondeError(
                f"{what} is of the family {family}, {lm.name} of {lm.family}: pass force=True to attach it"
            )
