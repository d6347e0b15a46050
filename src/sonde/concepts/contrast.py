"""How do activations differ between two sets of prompts? v = mean(h | positive) - mean(h | negative), by site.

The prompts differ in one thing: the letter of the answer that shows a behaviour (contrastive activation addition,
Rimsky et al. 2023, arXiv:2312.06681), a topic, a mode. One pass over each set reads all sites at one position of every
row, stops after the deepest site, and keeps sums only. With the covariance within the sets, S = (S+ + S-) / (n+ + n- -
2), the same pass gives Fisher's discriminant S^-1 v, S shrunk towards its mean variance.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.files import replacing, write_json
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import Prompts, at_position, prompt_ids
from sonde.stats.moments import Moments
from sonde.stats.solve import solve_spd

FORMAT = "sonde contrast 1"
PLAIN = "plain"
_CONFIG, _TENSORS = "config.json", "contrast.safetensors"


class Contrast:
    """Means of activations on two sets of prompts. Made by `contrast` or `Contrast.load`.

    Attributes:
        sites: where activations were read, in order of depth.
        positive: mean on the positive prompts by site, Float[Tensor, " d"], float32.
        negative: mean on the negative prompts by site.
        n_positive: number of positive prompts.
        n_negative: number of negative prompts.
        within: covariance within the two sets by site, Float[Tensor, "d d"] in float64; None unless it was asked for.
        position: which token of a prompt was read.
        template: hash of the chat template that the prompts were rendered with, or "plain".
        model_name: name of the model.
        model_hash: hash of the model's weights.

    """

    def __init__(
        self,
        positive: Mapping[str, Float[Tensor, " d"]],
        negative: Mapping[str, Float[Tensor, " d"]],
        *,
        n_positive: int,
        n_negative: int,
        position: int = -1,
        within: Mapping[str, Float[Tensor, "d d"]] | None = None,
        template: str = PLAIN,
        model_name: str = "model",
        model_hash: str = "",
    ) -> None:
        self.sites = tuple(positive)
        self.positive = {site: mean.float() for site, mean in positive.items()}
        self.negative = {site: mean.float() for site, mean in negative.items()}
        # Of the means as given: in float32 a small difference of large means would lose digits.
        self._difference = {site: (positive[site] - negative[site]).float() for site in self.sites}
        self.n_positive, self.n_negative = n_positive, n_negative
        self.within = None if within is None else dict(within)
        self.position = position
        self.template = template
        self.model_name, self.model_hash = model_name, model_hash

    def __repr__(self) -> str:
        return (
            f"Contrast({self.model_name!r}, {self.n_positive} against {self.n_negative} prompts, "
            f"{len(self.sites)} sites from {self.sites[0]} to {self.sites[-1]})"
        )

    def difference(self, site: str) -> Float[Tensor, " d"]:
        """Mean of the positive less mean of the negative prompts, float32. Zeros where the prompts do not differ."""
        return self._difference[self._known(site)].clone()

    def differences(self, *, unit: bool = False, norm: float | None = None) -> dict[str, Float[Tensor, " d"]]:
        """The differences of all sites; with `unit` of norm 1, with `norm` of that norm (zeros stay zeros)."""
        length = 1.0 if unit else norm
        return {
            site: v.clone() if length is None else v * (length / v.norm().clamp(min=torch.finfo(v.dtype).tiny))
            for site, v in self._difference.items()
        }

    def discriminant(self, site: str, *, shrinkage: float = 0.1) -> Float[Tensor, " d"]:
        """Fisher's direction S^-1 v, of the norm of v, with S the covariance within the sets.

        `shrinkage` in [0, 1] mixes S with its mean variance times the identity, because there are rarely more prompts
        than dimensions. Raises `SondeError` where no covariance was kept or the difference is zero.
        """
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage is {shrinkage}: expected 0 to 1")
        v = self.difference(site)
        if self.within is None:
            raise SondeError("this contrast kept no covariance: make it with contrast(..., covariance=True)")
        self.require_difference(site)
        s = self.within[site]
        mixed = (1 - shrinkage) * s + shrinkage * s.diagonal().mean() * torch.eye(len(s)).to(s)
        direction = solve_spd(mixed, v.double()[:, None])[:, 0].float()
        return direction * (v.norm() / direction.norm())

    def require_difference(self, site: str) -> Float[Tensor, " d"]:
        """The difference at `site`. Raises `SondeError` where it is zero, so that steering with it could do nothing."""
        v = self.difference(site)
        scale = self.positive[site].norm() + self.negative[site].norm()
        if not v.norm() > 1e-6 * scale:
            raise SondeError(f"the positive and negative prompts do not differ at {site}: the vector is zero")
        return v

    def save(self, folder: str | Path) -> None:
        """Write `contrast.safetensors` and `config.json` to a folder."""
        folder = Path(folder)
        tensors = {}
        for site in self.sites:
            tensors[f"positive.{site}"] = self.positive[site].double()
            # Beside the rounded positive mean, so that the difference comes back exactly.
            tensors[f"negative.{site}"] = self.positive[site].double() - self._difference[site].double()
            if self.within is not None:
                tensors[f"within.{site}"] = self.within[site]
        with replacing(folder / _TENSORS) as beside:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside)
        config = {
            "format": FORMAT,
            "sites": list(self.sites),
            "width": {site: len(v) for site, v in self._difference.items()},
            "position": self.position,
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "template": self.template,
            "covariance": self.within is not None,
            "model": self.model_name,
            "model_hash": self.model_hash,
        }
        write_json(folder / _CONFIG, config)

    @staticmethod
    def load(folder: str | Path, lm: LanguageModel, *, force: bool = False) -> "Contrast":
        """Read a contrast for `lm`.

        Raises `SondeError` for files that are missing or damaged, for a model without these sites or of another width,
        and, unless `force`, for other weights or another chat template than the contrast was made with.
        """
        folder = Path(folder)
        config = _read_config(folder)
        sites = config["sites"]
        missing = [site for site in sites if site not in lm.sites]
        if missing:
            raise SondeError(f"the contrast in {folder} has {missing[0]}, which {lm.name} does not have")
        check_width({site: config["width"][site] for site in sites}, lm, f"the contrast in {folder}")
        if not force and config["model_hash"] != lm.hash:
            raise SondeError(
                f"the contrast in {folder} was made from {config['model']}, whose weights are not those of {lm.name}: "
                "force=True loads it all the same"
            )
        if not force and config["template"] not in (PLAIN, template_hash(lm)):
            raise SondeError(
                f"the contrast in {folder} was made with another chat template than that of {lm.name}: "
                "force=True loads it all the same"
            )
        try:
            tensors = load_file(folder / _TENSORS, device=str(lm.device))
            parts = {
                part: {site: tensors[f"{part}.{site}"] for site in sites}
                for part in ("positive", "negative", *(["within"] if config["covariance"] else []))
            }
        except (OSError, SafetensorError, KeyError) as error:
            raise SondeError(f"{folder / _TENSORS} is missing or damaged: {error}") from error
        return Contrast(
            parts["positive"],
            parts["negative"],
            within=parts.get("within"),
            n_positive=config["n_positive"],
            n_negative=config["n_negative"],
            position=config["position"],
            template=config["template"],
            model_name=config["model"],
            model_hash=config["model_hash"],
        )

    def _known(self, site: str) -> str:
        if site not in self._difference:
            raise SondeError(f"the contrast has no site {site!r}: it has {self.sites[0]} … {self.sites[-1]}")
        return site


@torch.no_grad()
def contrast(
    lm: LanguageModel,
    positive: Prompts,
    negative: Prompts,
    *,
    sites: str | Sequence[str] = "resid_post.*",
    position: int = -1,
    batch: int = 32,
    covariance: bool = False,
    template: str = PLAIN,
    progress: str | None = None,
) -> Contrast:
    """Means of activations on two sets of prompts, at many sites in one pass over each.

    Args:
        lm: the model.
        positive: prompts, as strings or as token ids. The sets need not be of one size.
        negative: prompts of the other kind.
        sites: names or patterns of sites as wide as the residual stream or a part of it; no logits, no states.
        position: which token of each prompt is read; negative ones count from its end.
        batch: most rows of a forward pass. Rows of like length go together.
        covariance: keep the covariance within the sets, which the discriminant needs: d² numbers a site.
        template: how the prompts were rendered: "plain", or `template_hash(lm)`.
        progress: what a progress bar is called; None shows none.

    Raises:
        SondeError: for an empty set, prompts without the position, sets that do not differ at any site, activations
            that are not finite, and sites that have no vector at a token.

    """
    names = lm.match(*([sites] if isinstance(sites, str) else sites))
    means: list[dict[str, Tensor]] = []
    scatters: list[dict[str, Tensor]] = []
    rows = [prompt_ids(lm, prompts) for prompts in (positive, negative)]
    for which, prompts in zip(("positive", "negative"), rows, strict=True):
        if not prompts:
            raise SondeError(f"there are no {which} prompts: a contrast needs prompts of both kinds")
    with tqdm(total=sum(map(len, rows)), desc=progress, disable=progress is None, unit="prompt") as bar:
        for prompts in rows:
            sums: dict[str, Tensor] = {}
            moments: dict[str, Moments] = {}
            for chosen, acts in at_position(lm, prompts, names, position=position, batch=batch):
                for site, values in acts.items():
                    if covariance:
                        moments.setdefault(site, Moments(values.shape[-1])).update(values)
                    else:
                        sums[site] = sums.get(site, 0) + values.double().sum(0)
                bar.update(len(chosen))
            means.append(
                {site: m.mean for site, m in moments.items()} or {s: t / len(prompts) for s, t in sums.items()}
            )
            scatters.append({site: m.scatter for site, m in moments.items()})
    up, down = means
    within = None
    if covariance:
        freedom = max(1, len(rows[0]) + len(rows[1]) - 2)
        within = {site: (scatters[0][site] + scatters[1][site]) / freedom for site in names}
    made = Contrast(
        {site: up[site] for site in names},
        {site: down[site] for site in names},
        within=within,
        n_positive=len(rows[0]),
        n_negative=len(rows[1]),
        position=position,
        template=template,
        model_name=lm.name,
        model_hash=lm.hash,
    )
    if not any(bool(made.difference(site).any()) for site in names):
        raise SondeError(f"the positive and negative prompts do not differ at token {position}: every vector is zero")
    return made


def common_norm(contrasts: Mapping[str, Contrast]) -> dict[str, dict[str, Float[Tensor, " d"]]]:
    """Vectors of several behaviours, by name and site, rescaled at each site to the mean norm of the set.

    Then one multiplier means the same for all. Raises `SondeError` where the contrasts do not have the same sites.
    """
    sites = {made.sites for made in contrasts.values()}
    if len(sites) != 1:
        raise SondeError("vectors of one norm need contrasts, and these at the same sites")
    (names,) = sites
    mean = {
        site: float(sum(made.difference(site).norm() for made in contrasts.values())) / len(contrasts) for site in names
    }
    return {name: {site: made.differences(norm=mean[site])[site] for site in names} for name, made in contrasts.items()}


def cosines(one: Contrast, other: Contrast) -> Float[Tensor, "sites other_sites"]:
    """Cosine of every vector of one contrast with every vector of another: layers, behaviours, or models of one width.

    0 where a vector is zero. Raises `SondeError` for other widths.
    """
    rows = [torch.stack(list(made.differences(unit=True).values())) for made in (one, other)]
    if rows[0].shape[1] != rows[1].shape[1]:
        raise SondeError(
            f"vectors of width {rows[0].shape[1]} ({one.model_name}) and {rows[1].shape[1]} ({other.model_name}) have "
            "no cosine"
        )
    return rows[0] @ rows[1].to(rows[0].device).T


def template_hash(lm: LanguageModel) -> str:
    """A short hash of the chat template of the model's tokenizer, or "plain" where it has none."""
    import hashlib

    text = getattr(lm.tokenizer, "chat_template", None)
    return hashlib.sha256(str(text).encode()).hexdigest()[:16] if text else PLAIN


def check_width(widths: Mapping[str, int], lm: LanguageModel, what: str) -> None:
    """Raise `SondeError` where a vector of one of these widths does not fit the residual stream of `lm`."""
    for site, width in widths.items():
        if width != lm.d_model:
            raise SondeError(f"{what} has width {width} at {site}, {lm.name} has {lm.d_model}")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SondeError(f"{folder} is not the folder of a contrast: it has no {_CONFIG}") from error
    except (OSError, ValueError) as error:
        raise SondeError(f"{folder / _CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SondeError(f"{folder / _CONFIG} is not the configuration of a contrast")
    return config
