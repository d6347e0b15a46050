"""One behaviour, steered at one place or at many: an edit for each site, the tokens it acts on, and where it is from.

Fitted from two sets of prompts: mu₊, mu₋ at each site and the row of the table that is asked for (`sonde.concepts.
affine`). With several sites, *sequential* fitting measures each site's means with the edits of earlier sites on, their
strength included; otherwise later vectors belong to activations that never occur. With many sites effects add up, so
useful strengths are much smaller. Directional ablation of one direction everywhere (Arditi et al. 2024,
arXiv:2406.11717) edits what every block is given and what every sublayer adds.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.concepts.affine import AffineEdit, mean_difference, overlap
from sonde.concepts.contrast import PLAIN, Contrast, check_width, contrast, template_hash
from sonde.errors import SondeError
from sonde.files import write_json

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.lm.prompt_rows import Prompts

Method = Literal["add", "ablate", "patch", "mean", "ace"]
Where = Literal["all", "prompt", "reply"]
METHODS: tuple[Method, ...] = get_args(Method)
FORMAT = "sonde site edits 1"
_CONFIG = "config.json"
# From the end of the prompt: up to the token before its last; its last token and all that is generated.
_POSITIONS: dict[str, slice | None] = {"all": None, "prompt": slice(0, -1), "reply": slice(-1, None)}


class SiteEdits:
    """Edits of one model by site. Made by `SiteEdits.fit`, `.of`, `.everywhere` or `.load`, or from edits at hand.

    Attributes:
        edits: an edit by site, in order of depth.
        where: the tokens that are edited: "all", "prompt" (up to the token before its last) or "reply" (from the
            prompt's last token on).
        model_name, model_hash, template: what the edits were fitted on; empty for edits at hand.
        facts: JSON-able facts: the method, the number of prompts, norms by site.

    """

    def __init__(
        self,
        edits: Mapping[str, nn.Module],
        *,
        where: Where = "all",
        model_name: str = "",
        model_hash: str = "",
        template: str = PLAIN,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if not edits:
            raise SondeError("there are no edits: give one for at least one site")
        if where not in _POSITIONS:
            raise SondeError(f"where is {where!r}: use all, prompt or reply")
        self.edits = dict(edits)
        self.where: Where = where
        self.model_name, self.model_hash, self.template = model_name, model_hash, template
        self.facts: dict[str, Any] = dict(facts or {})

    @staticmethod
    def fit(
        lm: "LanguageModel",
        positive: "Prompts",
        negative: "Prompts",
        *,
        sites: str | Sequence[str],
        method: Method = "ace",
        strength: float = 0.0,
        where: Where = "all",
        sequential: bool = False,
        position: int = -1,
        batch: int = 32,
        template: str = PLAIN,
    ) -> "SiteEdits":
        """Edits at `sites` from means at token `position` of two sets of prompts.

        `strength` counts in differences of means ("patch": in the positive mean's projection), so that 0 and 1 are the
        negative and the positive mean under "ace". With `sequential` it is part of the fit. Raises `SondeError` where
        the means do not differ at a site, and as `contrast` does.
        """
        options: dict[str, Any] = {"position": position, "batch": batch, "template": template}
        names = lm.match(*([sites] if isinstance(sites, str) else sites))
        if not sequential:
            means = contrast(lm, positive, negative, sites=names, **options)
            return SiteEdits.of(means, method, strength=strength, where=where)
        made: dict[str, nn.Module] = {}
        norms: dict[str, float] = {}
        last: Contrast | None = None
        for site in names:
            with lm.editing(made, positions=_POSITIONS[where]):
                last = contrast(lm, positive, negative, sites=site, **options)
            made[site] = _edit(last, site, method, strength)
            norms[site] = float(last.difference(site).norm())
        assert last is not None
        facts = {**_facts(last, method), "sequential": True, "norms": norms}
        return SiteEdits(made, where=where, facts=facts, **_origin(last))

    @staticmethod
    def of(
        means: Contrast,
        method: Method = "ace",
        *,
        strength: float = 0.0,
        where: Where = "all",
        sites: Sequence[str] | None = None,
    ) -> "SiteEdits":
        """Edits at the sites of a contrast (or at some of them). Raises `SondeError` where the means do not differ."""
        chosen = means.sites if sites is None else sites
        edits = {site: _edit(means, site, method, strength) for site in chosen}
        norms = {site: float(means.difference(site).norm()) for site in chosen}
        return SiteEdits(edits, where=where, facts={**_facts(means, method), "norms": norms}, **_origin(means))

    @staticmethod
    def everywhere(
        lm: "LanguageModel",
        direction: Float[Tensor, " d"],
        *,
        mean: Float[Tensor, " d"] | None = None,
        strength: float = 0.0,
    ) -> "SiteEdits":
        """One direction in the whole stream: nothing writes it, and its projection is the same at every token.

        Without `mean` the projection is 0 (directional ablation). With it, ACE: the projection is that of `mean` plus
        `strength` times the length of `direction`.
        """
        check_width({"every site": len(direction)}, lm, "the direction")
        ablate = AffineEdit.ablate(direction)
        at_least: nn.Module = ablate
        if mean is not None:
            unit = direction / direction.norm()
            at_least = AffineEdit.patch(direction, float(unit @ mean + strength * direction.norm()))
        streams = [site for site in lm.sites if site.startswith("resid_pre")]
        streams.append(f"resid_post.{lm.n_layers - 1}")
        parts = [site for site in lm.sites if site.startswith(("mixer_out", "mlp_out"))]
        edits: dict[str, nn.Module] = {**dict.fromkeys(parts, ablate), **dict.fromkeys(streams, at_least)}
        facts = {"method": "ablate" if mean is None else "ace", "everywhere": True, "strength": strength}
        return SiteEdits({site: edits[site] for site in lm.sites if site in edits}, facts=facts)

    def __repr__(self) -> str:
        names = list(self.edits)
        return f"SiteEdits({self.facts.get('method', 'given')}, {names[0]} … {names[-1]}, {self.where})"

    def on(self, lm: "LanguageModel", *, rows: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Edit while the context is open: `with edits.on(lm): lm.generate(...)`. Contexts nest, in order.

        Raises `SondeError` for a model without a site, or of another width.
        """
        missing = [site for site in self.edits if site not in lm.sites]
        if missing:
            raise SondeError(f"the edits are at {missing[0]}, which {lm.name} does not have")
        widths = {site: edit.d for site, edit in self.edits.items() if isinstance(edit, AffineEdit)}
        check_width(widths, lm, "the edit")
        return lm.editing(self.edits, rows=rows, positions=_POSITIONS[self.where])

    def at(self, strength: float | Float[Tensor, " batch"]) -> "SiteEdits":
        """The same edits at another strength, or at one for each row of a batch. Edits without one stay as they are."""
        edits = {site: edit.at(strength) if hasattr(edit, "at") else edit for site, edit in self.edits.items()}  # type: ignore[operator]
        return self._with(edits, self.where)

    def acting(self, where: Where) -> "SiteEdits":
        """The same edits on other tokens."""
        return self._with(self.edits, where)

    def overlap(self, other: "SiteEdits") -> dict[str, float]:
        """By shared site, the largest cosine between what the two take or add: 0 where they leave each other alone."""
        shared = [site for site in self.edits if site in other.edits]
        pairs = {site: (self.edits[site], other.edits[site]) for site in shared}
        return {
            site: overlap({"one": one, "other": two})["one", "other"]
            for site, (one, two) in pairs.items()
            if isinstance(one, AffineEdit) and isinstance(two, AffineEdit)
        }

    def save(self, folder: str | Path) -> None:
        """Write one folder a site and a configuration. Raises `SondeError` for edits that are not affine."""
        folder = Path(folder)
        for site, edit in self.edits.items():
            if not isinstance(edit, AffineEdit):
                raise SondeError(f"the edit at {site} is a {type(edit).__name__}: only affine edits are saved")
            edit.save(folder / site)
        config = {
            "format": FORMAT,
            "sites": list(self.edits),
            "where": self.where,
            "model": self.model_name,
            "model_hash": self.model_hash,
            "template": self.template,
            "facts": self.facts,
        }
        write_json(folder / _CONFIG, config)

    @staticmethod
    def load(folder: str | Path, lm: "LanguageModel", *, force: bool = False) -> "SiteEdits":
        """Read what `save` wrote, for `lm`.

        Raises `SondeError` for another width, sites that the model lacks and, unless `force`, other weights or another
        chat template than those that the edits were fitted on.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SondeError(f"{folder} is not the folder of edits: {_CONFIG} is missing or damaged") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise SondeError(f"{folder / _CONFIG} is not the configuration of edits")
        missing = [site for site in config["sites"] if site not in lm.sites]
        if missing:
            raise SondeError(f"the edits in {folder} are at {missing[0]}, which {lm.name} does not have")
        edits = {site: AffineEdit.load(folder / site) for site in config["sites"]}
        check_width({site: edit.d for site, edit in edits.items()}, lm, f"the edit in {folder}")
        if not force and config["model_hash"] not in ("", lm.hash):
            raise SondeError(
                f"the edits in {folder} were fitted on {config['model']}, whose weights are not those of {lm.name}: "
                "force=True loads them all the same"
            )
        if not force and config["template"] not in (PLAIN, template_hash(lm)):
            raise SondeError(
                f"the edits in {folder} were fitted with another chat template than that of {lm.name}: "
                "force=True loads them all the same"
            )
        return SiteEdits(
            {site: edit.to(lm.device) for site, edit in edits.items()},
            where=config["where"],
            model_name=config["model"],
            model_hash=config["model_hash"],
            template=config["template"],
            facts=config["facts"],
        )

    def _with(self, edits: Mapping[str, nn.Module], where: Where) -> "SiteEdits":
        origin = {"model_name": self.model_name, "model_hash": self.model_hash, "template": self.template}
        return SiteEdits(edits, where=where, facts=self.facts, **origin)


def _edit(means: Contrast, site: str, method: Method, strength: float) -> AffineEdit:
    if method not in METHODS:
        raise SondeError(f"method {method!r} is unknown: use {', '.join(METHODS)}")
    positive, negative = means.positive[site], means.negative[site]
    try:
        mean_difference(positive, negative)
    except SondeError as error:
        raise SondeError(f"{error} at {site} ({means.n_positive} and {means.n_negative} prompts)") from error
    difference = means.difference(site)
    unit = difference / difference.norm()
    edit = {
        "add": lambda: AffineEdit.add(difference, strength),
        "ablate": lambda: AffineEdit.ablate(difference),
        "patch": lambda: AffineEdit(
            left=unit[:, None], right=unit[None], added=unit * (unit @ positive), strength=strength
        ),
        "mean": lambda: AffineEdit.mean_ablate(difference, negative),
        "ace": lambda: AffineEdit.ace(positive, negative, strength),
    }[method]()
    edit.facts = {"site": site, "method": method, "model": means.model_name}
    return edit


def _facts(means: Contrast, method: Method) -> dict[str, Any]:
    return {
        "method": method,
        "n_positive": means.n_positive,
        "n_negative": means.n_negative,
        "position": means.position,
    }


def _origin(means: Contrast) -> dict[str, str]:
    return {"model_name": means.model_name, "model_hash": means.model_hash, "template": means.template}


def mean_norms(means: Contrast) -> dict[str, tuple[float, float]]:
    """By site: the length of the difference, and that of the mean activation, to choose strengths by."""
    both = {site: (means.positive[site] + means.negative[site]) / 2 for site in means.sites}
    return {site: (float(means.difference(site).norm()), float(torch.linalg.vector_norm(both[site]))) for site in both}
