"""The direction along which activations say how likely the behaviour is, from unlabelled prompts.

Instead of two sets of prompts, activations x are regressed on the log-odds y of the behaviour's first tokens, which the
model gives itself: r = Cov(x, y) / sd(y) is the move of x that goes with one standard deviation of y. The same
statistics give the eraser: along r itself (orthogonal), or the least-squares one, which changes x least,

    h - r (rᵀ S⁻¹ r)⁻¹ rᵀ S⁻¹ (h - mean)        S = Cov(x)

(LEACE for one real-valued concept, Belrose et al. 2023, arXiv:2306.03819). Strength counts in standard deviations of y
from the mean.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sonde.concepts.affine import AffineEdit
from sonde.concepts.contrast import PLAIN
from sonde.concepts.judges import log_odds
from sonde.concepts.site_edits import SiteEdits, Where
from sonde.errors import SondeError
from sonde.lm.prompt_rows import like_lengths, prompt_ids
from sonde.stats.moments import Moments
from sonde.stats.solve import solve_spd

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.lm.prompt_rows import Prompts

Projector = Literal["none", "orthogonal", "oblique"]
_SHRINKAGE = 1e-3  # of the mean variance, for the inverse of a covariance of few prompts


@torch.no_grad()
def fit_logit_direction(
    lm: "LanguageModel",
    prompts: "Prompts",
    tokens: Int[Tensor, " n"],
    *,
    sites: str | Sequence[str],
    projector: Projector = "orthogonal",
    strength: float = 0.0,
    where: Where = "all",
    batch: int = 32,
    template: str = PLAIN,
) -> SiteEdits:
    """Edits at `sites` from the covariance of activations with the log-odds of `tokens`, both at the last token.

    Raises `SondeError` for fewer than three prompts, log-odds that do not vary, and sites at which nothing goes with
    them.
    """
    if projector not in ("none", "orthogonal", "oblique"):
        raise SondeError(f"projector {projector!r} is unknown: use none, orthogonal or oblique")
    names = lm.match(*([sites] if isinstance(sites, str) else sites))
    if "logits" in names:
        raise SondeError("logits has no vector at a token: give sites such as resid_post.* or mlp_out.*")
    rows = prompt_ids(lm, prompts)
    if len(rows) < 3:
        raise SondeError(f"{len(rows)} prompts cannot be regressed on: give at least 3")
    moments = {site: Moments(lm.d_model, 1) for site in names}
    odds: list[Tensor] = []
    for numbers in like_lengths([len(ids) for ids in rows], batch, equal=True):
        with lm.reading(*names, "logits") as acts:
            lm(torch.tensor([rows[i] for i in numbers]))
        y = log_odds(acts["logits"][:, -1], tokens)
        odds.append(y)
        for site in names:
            moments[site].update(acts[site][:, -1].double(), y[:, None])
    deviation = torch.cat(odds).std()
    if not deviation > 1e-6:
        raise SondeError("the log-odds of the behaviour are the same on all prompts: give prompts on which they vary")
    edits = {site: _edit(moments[site], deviation, site, projector, strength) for site in names}
    facts = {"method": "logit", "projector": projector, "n": len(rows), "sd_log_odds": float(deviation)}
    return SiteEdits(
        edits, where=where, model_name=lm.name, model_hash=lm.hash, template=template, facts=facts
    )  # fmt: skip


def _edit(moments: Moments, deviation: Tensor, site: str, projector: Projector, strength: float) -> AffineEdit:
    covariance, mean = moments.cross_covariance[:, 0], moments.mean
    r = covariance / deviation
    spread = moments.covariance
    if not r.norm() > 1e-6 * spread.diagonal().sum().sqrt():
        raise SondeError(f"nothing at {site} goes with the log-odds of the behaviour")
    if projector == "none":
        return AffineEdit(added=r.float(), strength=strength)
    if projector == "orthogonal":
        right = r / r.norm()
        left = right
    else:
        ridge = _SHRINKAGE * spread.diagonal().mean() * torch.eye(len(r)).to(spread)
        read = solve_spd(spread + ridge, r[:, None])[:, 0]
        right, left = read / (read @ r), r
    return AffineEdit(
        left=left[:, None].float(),
        right=right[None].float(),
        reference=mean.float(),
        added=r.float(),
        strength=strength,
    )
