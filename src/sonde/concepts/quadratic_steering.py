"""Steering by more than a mean: activations are carried to the target kind's whole Gaussian.

    h  ->  T (h - mu_source) + mu_target,        T = optimal transport from S_source to S_target

(the editor of QLEACE, Belrose et al. 2025, arXiv:2502.02820). At run time the kind of a vector is not known. *Pooled*
takes the Gaussian of both kinds together for the source, one affine map for all; *lda* assigns each vector by linear
discriminant analysis and leaves those of the target kind alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.concepts.contrast import PLAIN
from sonde.concepts.quadratic import QuadraticEditor
from sonde.concepts.site_edits import SiteEdits, Where
from sonde.errors import SondeError
from sonde.lm.prompt_rows import at_position, prompt_ids
from sonde.stats.solve import solve_spd

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.lm.prompt_rows import Prompts

Source = Literal["pooled", "lda"]
Target = Literal["positive", "negative"]
_NEGATIVE, _POSITIVE, _POOLED = 0, 1, 2
_SHRINKAGE = 0.1  # of the covariance within the kinds, towards its mean variance


class QuadraticEdit(nn.Module):
    """Carries vectors to one kind's Gaussian. Made by `fit_quadratic` or `QuadraticEdit.fit`.

    Args:
        editor: fitted on three classes: negative, positive, and both together.
        target: the class to carry to.
        weight: of the discriminant, Float[Tensor, "d"], positive for the positive kind; None to pool.
        bias: of the discriminant.

    """

    def __init__(
        self, editor: QuadraticEditor, target: int, weight: Float[Tensor, " d"] | None = None, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.editor, self.target, self.bias = editor, target, bias
        self.register_buffer("weight", weight)

    @staticmethod
    def fit(
        positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"], *, source: Source = "pooled", target: Target
    ) -> "QuadraticEdit":
        """From activations of both kinds. Raises `SondeError` for fewer than two rows of a kind."""
        if source not in ("pooled", "lda") or target not in ("positive", "negative"):
            raise SondeError(f"source is pooled or lda and target positive or negative, not {source!r} and {target!r}")
        if min(len(positive), len(negative)) < 2:
            raise SondeError("a Gaussian needs at least two prompts of each kind")
        both = torch.cat([negative, positive])
        kinds = torch.cat([torch.full((len(negative),), _NEGATIVE), torch.full((len(positive),), _POSITIVE)])
        rows, labels = torch.cat([both, both]), torch.cat([kinds, torch.full((len(both),), _POOLED)])
        editor = QuadraticEditor(shrinkage=True).fit(rows, labels.to(rows.device))
        wanted = _POSITIVE if target == "positive" else _NEGATIVE
        if source == "pooled":
            return QuadraticEdit(editor, wanted)
        up, down = positive.double(), negative.double()
        within = torch.cat([up - up.mean(0), down - down.mean(0)])
        covariance = within.T @ within / max(1, len(within) - 2)
        mean_variance = covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        mixed = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * mean_variance
        weight = solve_spd(mixed, (up.mean(0) - down.mean(0))[:, None])[:, 0]
        bias = -float(weight @ (up.mean(0) + down.mean(0)) / 2)
        return QuadraticEdit(editor, wanted, weight.float(), bias)

    def kinds(self, h: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch"]:
        """The class from which each vector is carried."""
        if self.weight is None:
            return torch.full(h.shape[:-1], _POOLED, device=h.device)
        return (h.float() @ self.weight + self.bias > 0).long()  # type: ignore[operator]

    def forward(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The vectors, carried."""
        return self.editor(h, self.kinds(h), self.target)


@torch.no_grad()
def fit_quadratic(
    lm: "LanguageModel",
    positive: "Prompts",
    negative: "Prompts",
    *,
    sites: str | Sequence[str],
    source: Source = "pooled",
    target: Target = "negative",
    where: Where = "all",
    position: int = -1,
    batch: int = 32,
    template: str = PLAIN,
) -> SiteEdits:
    """Quadratic edits at `sites` from activations at token `position`. Covariances are shrunk: prompts are few.

    Raises `SondeError` as `contrast` does, and for fewer than two prompts of a kind.
    """
    names = lm.match(*([sites] if isinstance(sites, str) else sites))
    kept: list[dict[str, list[Tensor]]] = []
    for prompts in (positive, negative):
        found: dict[str, list[Tensor]] = {site: [] for site in names}
        for _, acts in at_position(lm, prompt_ids(lm, prompts), names, position=position, batch=batch):
            for site, values in acts.items():
                found[site].append(values)
        if not found[names[0]]:
            raise SondeError("there are no prompts of one kind: a contrast needs both")
        kept.append(found)
    edits = {
        site: QuadraticEdit.fit(*(torch.cat(found[site]) for found in kept), source=source, target=target)
        for site in names
    }
    facts = {"method": "quadratic", "source": source, "target": target}
    return SiteEdits(
        edits, where=where, model_name=lm.name, model_hash=lm.hash, template=template, facts=facts
    )  # fmt: skip
