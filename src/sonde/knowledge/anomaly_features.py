"""What of a model's work on an input can be held against its work on trusted inputs? Features for anomaly detection.

All are taken at the last token of a prompt, in batches. Activations h at sites; codes of sparse encoders; a trusted
probe's log-odds over layers; and effects to first order (attribution patching, Nanda 2023; Kramár et al. 2403.00745):
with y the difference of the two answers' logits and g = ∂y/∂h, by site,

    mean         (m - h) · g             of ablation to the trusted mean m
    zero         -h · g                  of ablation to nothing
    components   ((m - h) · v)(v · g)    of ablation along each leading principal direction v of trusted inputs
    gradient     |g|                     how much anything there matters

Probe effects are the same of a probe's reading w · h at each layer in the place of y, by ablation to the mean. Effects
of all sites come from one backward pass for each y, and gradients stay in the pass: only effects are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.knowledge.states import Answer, States, answer_tokens, extract
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import Prompts, at_position, like_lengths, prompt_ids
from sonde.stats.gaussian_novelty import Gaussian

ABLATIONS = ("mean", "zero", "components", "gradient")
SITES = ("mixer_out.*", "mlp_out.*", "resid_post.*")
"""Where effects are measured unless told otherwise; a family without one of these kinds is measured at the others."""

_ROUNDING = 1e-6

Answers = Sequence[tuple[Answer, Answer]] | tuple[Answer, Answer]


class Probe(Protocol):
    """A probe that was fitted on trusted inputs, on last-token states; `sonde.knowledge.probes.fit` makes them."""

    @property
    def direction(self) -> Float[Tensor, "layers d"]:
        """What a state is multiplied with, by layer."""
        ...

    def log_odds(self, states: States) -> Float[Tensor, "n layers"]:
        """What the probe reads."""
        ...


@dataclass(frozen=True)
class Feature:
    """One way to look at inputs: `[n, d]`, or `[layers, n, d]` with a matrix for each layer.

    `sparse`: features are codes of which most are 0, so that newly active ones can be counted.
    Raises `SondeError` for trusted and test rows of other layers or widths.
    """

    name: str
    trusted: Float[Tensor, "*layers n d"]
    test: Float[Tensor, "*layers m d"]
    sparse: bool = False

    def __post_init__(self) -> None:
        a, b = self.trusted.shape, self.test.shape
        if a[:-2] != b[:-2] or a[-1] != b[-1]:
            raise SondeError(f"{self.name}: trusted features of shape {tuple(a)} and test features of {tuple(b)}")

    @property
    def layers(self) -> int:
        """Number of matrices."""
        return len(self.trusted) if self.trusted.ndim == 3 else 1

    def dealt_again(self, seed: int = 0) -> "Feature":
        """The control: trusted and test rows pooled and dealt out again, in the same numbers."""
        pool = torch.cat([self.trusted, self.test], -2)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(pool.shape[-2]))
        n = self.trusted.shape[-2]
        return replace(self, trusted=pool[..., order[:n], :], test=pool[..., order[n:], :])


@dataclass(frozen=True)
class Looked:
    """Features of trusted and test inputs, and the model's own log-odds on both."""

    features: tuple[Feature, ...]
    trusted_log_odds: Float[Tensor, " n"]
    test_log_odds: Float[Tensor, " m"]

    @property
    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether the model gives the positive answer, to trusted and to test inputs."""
        return (self.trusted_log_odds > 0).numpy(), (self.test_log_odds > 0).numpy()


def look(
    lm: LanguageModel,
    probe: Probe,
    trusted: tuple[Prompts, Answers],
    test: tuple[Prompts, Answers],
    *,
    sites: str = "resid_post.*",
    effects_at: Sequence[str] = SITES,
    encoders: Sequence[Callable[[Tensor], Tensor]] | None = None,
    components: int = 8,
    batch: int = 32,
    progress: str | None = None,
) -> Looked:
    """Every feature of trusted and of test inputs.

    Args:
        lm: the model.
        probe: fitted on trusted inputs with labels, on states at `sites`; other inputs than `trusted`.
        trusted: prompts, and the two answers of all or of each.
        test: the same of inputs that may be anomalous.
        sites: of the probe, and of "residual stream".
        effects_at: where effects of ablations are measured.
        encoders: of sparse codes, one for each of `sites`: any callables from `[n, d]` to `[n, codes]`.
        components: principal directions for "effects: components".
        batch: most prompts of a pass.
        progress: what progress bars are called; None shows none.

    Raises:
        SondeError: as `extract` and `effects` do.

    """
    places = present(lm, effects_at)
    states = [extract(lm, *side, sites=sites, batch=batch, progress=progress) for side in (trusted, test)]
    stream = [side.by_layer("last") for side in states]
    normal = activations(lm, trusted[0], places, batch=batch)
    plan = Ablations.of(places, normal, components=min(components, lm.d_model))
    reading = (states[0].sites, probe.direction)
    found = [effects(lm, *side, plan, probe=reading, batch=batch, progress=progress) for side in (trusted, test)]
    rows: dict[str, list[Tensor]] = {
        "probe's log-odds": [probe.log_odds(side) for side in states],
        "residual stream": stream,
    }
    for name, kind in (("mixers", "mixer_out"), ("MLPs", "mlp_out")):
        own = [place for place, site in enumerate(places) if site.startswith(kind)]
        rows[name] = [made.values[own] for made in found] if own else []
    for kind in ABLATIONS:
        single = kind != "components"
        rows[f"effects: {kind}"] = [made.answer[kind][..., 0].T if single else made.answer[kind] for made in found]
    rows["effects on the probe"] = [made.probe for made in found if made.probe is not None and len(made.probe)]
    if encoders is not None:
        rows["codes"] = [codes(side, encoders) for side in stream]
    return Looked(
        tuple(Feature(name, *pair, sparse=name == "codes") for name, given in rows.items() if (pair := _varied(given))),
        *(side.lm_log_odds for side in states),
    )


@dataclass(frozen=True)
class Ablations:
    """What activations are ablated to: the mean of trusted inputs and their leading principal directions, by site."""

    sites: tuple[str, ...]
    mean: Float[Tensor, "sites d"]
    directions: Float[Tensor, "sites k d"]

    @staticmethod
    def of(sites: Sequence[str], trusted: Float[Tensor, "sites n d"], *, components: int = 8) -> "Ablations":
        """Means and `components` principal directions of trusted activations, as `activations` gives them.

        Raises `SondeError` for more directions than features.
        """
        if not 1 <= components <= trusted.shape[-1]:
            raise SondeError(f"{components} components of {trusted.shape[-1]} features: give 1 to {trusted.shape[-1]}")
        made = Gaussian.of(trusted.double())
        return Ablations(tuple(sites), made.mean.float(), made.vectors[..., -components:].flip(-1).mT.float())

    def effects(
        self, values: Float[Tensor, "sites b d"], gradients: Float[Tensor, "sites b d"]
    ) -> dict[str, Float[Tensor, "sites b k"]]:
        """First-order effects of each kind of ablation; k is the number of directions for "components", otherwise 1."""
        off = self.mean.to(values.device)[:, None] - values
        directions = self.directions.to(values.device)
        along, slope = (torch.einsum("sbd,skd->sbk", part, directions) for part in (off, gradients))
        single = {
            "mean": (off * gradients).sum(-1),
            "zero": -(values * gradients).sum(-1),
            "gradient": gradients.norm(dim=-1),
        }
        return {**{name: effect[..., None] for name, effect in single.items()}, "components": along * slope}


@dataclass(frozen=True)
class Effects:
    """Effects on the model's answer and on a probe's readings.

    `values`: the activations. `answer`: by kind of ablation. `probe`: effects of ablating each site to the mean on the
    probe's reading at each layer but the first; 0 at sites that come after it. None without a probe.
    """

    values: Float[Tensor, "sites n d"]
    answer: dict[str, Float[Tensor, "sites n k"]]
    probe: Float[Tensor, "layers n sites"] | None = None


def present(lm: LanguageModel, patterns: Sequence[str] = SITES) -> tuple[str, ...]:
    """The sites that patterns name, passing over kinds that the family does not have. Raises `SondeError` for none."""
    kinds = {site.partition(".")[0] for site in lm.sites}
    return lm.match(*([pattern for pattern in patterns if pattern.partition(".")[0] in kinds] or patterns))


def activations(
    lm: LanguageModel, prompts: Prompts, sites: Sequence[str], *, batch: int = 32, progress: str | None = None
) -> Float[Tensor, "sites n d"]:
    """Activations at the last token of every prompt, float32. Raises `SondeError` as `at_position` does."""
    names = lm.match(*sites)
    rows = prompt_ids(lm, prompts)
    found: Tensor | None = None
    with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
        for numbers, values in at_position(lm, rows, names, batch=batch):
            stacked = torch.stack([values[site] for site in names]).cpu()
            if found is None:
                found = stacked.new_empty(len(names), len(rows), stacked.shape[-1])
            found[:, numbers] = stacked
            bar.update(len(numbers))
    if found is None:
        raise SondeError("no prompts: there is nothing to read")
    return found


def codes(
    states: Float[Tensor, "sites n d"], encoders: Sequence[Callable[[Tensor], Tensor]]
) -> Float[Tensor, "sites n codes"]:
    """Codes of sparse encoders, one for each site: any callables from `[n, d]` to `[n, codes]` of one width.

    Raises `SondeError` for another number of encoders than sites and for codes of other shapes.
    """
    if len(encoders) != len(states):
        raise SondeError(f"{len(encoders)} encoders for {len(states)} sites: give one for each")
    with torch.no_grad():
        found = [encode(rows) for encode, rows in zip(encoders, states, strict=True)]
    shapes = {tuple(made.shape) for made in found}
    if len(shapes) != 1 or found[0].ndim != 2 or len(found[0]) != states.shape[1]:
        raise SondeError(f"codes of shapes {sorted(shapes)}: expected (n, codes) of one width at every site")
    return torch.stack(found)


def effects(
    lm: LanguageModel,
    prompts: Prompts,
    answers: Sequence[tuple[Answer, Answer]] | tuple[Answer, Answer],
    ablations: Ablations,
    *,
    probe: tuple[Sequence[str], Float[Tensor, "layers d"]] | None = None,
    batch: int = 32,
    progress: str | None = None,
) -> Effects:
    """First-order effects of ablating each site on the answer, and on the readings of a probe.

    Args:
        lm: the model.
        prompts: strings, or token ids.
        answers: the negative and the positive answer, of all prompts or of each, each one token.
        ablations: of which sites, and to what.
        probe: sites that a probe reads, from the first layer to the last, and its direction at each.
        batch: most prompts of a pass.
        progress: what a progress bar is called; None shows none.

    Raises:
        SondeError: for empty prompts, answers that are not one token, sites that are not a probe's, and a model that
            does not lead from a site to its logits.

    """
    rows = prompt_ids(lm, prompts)
    tokens = answer_tokens(lm, prompts, rows, answers)
    read, directions = _readings(lm, probe)
    found = {name: torch.empty(0) for name in ("values", *ABLATIONS)}
    on_probe = torch.zeros(max(len(read) - 1, 0), len(rows), len(ablations.sites))
    with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
        for numbers in like_lengths([len(ids) for ids in rows], batch):
            passed = _Pass(lm, [rows[i] for i in numbers], ablations.sites, read)
            made = ablations.effects(passed.values, passed.gradients(passed.log_odds(tokens[numbers])))
            for name, values in {"values": passed.values, **made}.items():
                if not found[name].numel():
                    found[name] = torch.empty(len(values), len(rows), values.shape[-1])
                found[name][:, numbers] = values.cpu()
            for layer in range(1, len(read)):
                slope = passed.gradients((passed.states[read[layer]] @ directions[layer]).float())
                on_probe[layer - 1, numbers] = ablations.effects(passed.values, slope)["mean"][..., 0].T.cpu()
            bar.update(len(numbers))
    return Effects(found.pop("values"), found, None if probe is None else on_probe)


def _varied(rows: list[Tensor]) -> list[Tensor]:
    """Trusted and test features without the layers at which all trusted inputs are alike, up to rounding.

    A block's MLP at the last token, for one, sees nothing of the prompt in a model that reads its position elsewhere.
    """
    if not rows or rows[0].ndim == 2:
        return rows
    spread, size = rows[0].std(1).amax(-1), rows[0].square().mean((1, 2)).sqrt()
    kept = spread > _ROUNDING * size
    return [part[kept] for part in rows] if bool(kept.any()) else []


class _Pass:
    """One forward pass in which something can be added at the last token of every site; `values` are what is there."""

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]], sites: Sequence[str], read: Sequence[str]):
        lengths = torch.tensor([len(ids) for ids in rows], device=lm.device)
        width = int(lengths.max())
        # pads to the right, where no causal model sees them
        tokens = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids in rows], device=lm.device)
        mask = torch.arange(width, device=lm.device) < lengths[:, None]
        self._last = torch.arange(len(rows), device=lm.device), lengths - 1
        self._name = lm.name
        place = torch.zeros(*mask.shape, 1, device=lm.device)
        place[self._last] = 1
        self._added: dict[str, Tensor] = {}

        def adding(site: str) -> Callable[[Tensor], Tensor]:
            def add(x: Tensor) -> Tensor:
                self._added[site] = torch.zeros(len(rows), x.shape[-1], device=x.device, requires_grad=True)
                return x + (place * self._added[site][:, None]).to(x.dtype)

            return add

        edits = {site: adding(site) for site in sites}
        with torch.enable_grad(), lm.editing(edits), lm.reading(*sites, *read, "logits") as acts:
            lm(tokens, mask)
        self._logits = acts["logits"][self._last].float()
        self.states = {site: acts[site][self._last].float() for site in {*sites, *read}}
        self._sites = sites
        self.values = torch.stack([self.states[site].detach() for site in sites])

    def log_odds(self, answers: Int[Tensor, "b 2"]) -> Float[Tensor, " b"]:
        """Logit of the positive answer less that of the negative one."""
        given = self._logits.gather(1, answers.to(self._logits.device))
        return given[:, 1] - given[:, 0]

    def gradients(self, y: Float[Tensor, " b"]) -> Float[Tensor, "sites b d"]:
        """Gradient of each row's `y` with respect to what is added at each site; 0 where it does not lead there."""
        if not y.requires_grad:
            raise SondeError(f"nothing at {', '.join(self._sites)} reaches what {self._name} answers")
        leaves = [self._added[site] for site in self._sites]
        # rows do not see each other: the gradient of the sum is that of each
        return torch.stack(
            torch.autograd.grad(y.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        )


def _readings(
    lm: LanguageModel, probe: tuple[Sequence[str], Float[Tensor, "layers d"]] | None
) -> tuple[tuple[str, ...], Float[Tensor, "layers d"]]:
    if probe is None:
        return (), torch.empty(0)
    sites, directions = probe
    if tuple(sites) != lm.match(*sites) or directions.shape != (len(sites), lm.d_model):
        raise SondeError(
            f"a probe with directions of shape {tuple(directions.shape)} at {', '.join(sites)}: expected sites in "
            f"order of depth and a direction of width {lm.d_model} for each"
        )
    return tuple(sites), directions.to(lm.device, torch.float32)
