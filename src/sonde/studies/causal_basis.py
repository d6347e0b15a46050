"""Which directions of each layer do predictions depend on, and does the model agree with the lens about them?

A tuned lens and its causal basis are fitted on the first half of a text. On the second, every direction is ablated in
the lens and in the model: energies against effects, their rank correlation, and random directions as control. Then
whole subspaces are exchanged between rows of text, and the model's response is held against the lens's.
"""

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, halves, open_run, publish, read_text

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.lens.alignment import Alignment
    from sonde.lens.causal_basis import CausalBasis
    from sonde.lens.fidelity import Fidelity
    from sonde.lens.tuned import TunedLens
    from sonde.lens.update_gradient import UpdateGradient
    from sonde.lm.batches import TokenBatch, TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.run import Run

_LAYERS = 8  # spread over the depth of models that have more
_STATES = 1024  # on which directions are found
_ROWS, _LENGTH = 16, 64  # on which they are ablated in the model
_SUBSPACE = 8  # directions that are exchanged together


@dataclass(frozen=True)
class CausalBasisConfig(Runnable):
    """Find the directions that predictions depend on, and ablate them in the model.

    Example: sonde run causal-basis organism:pebble --directions 16
    """

    words = ("sonde", "run", "causal-basis")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What is read. By default the help texts of Python."""
    directions: Count = 32
    """How many directions of each layer, at least 8."""
    tokens: Count = 65536
    """How many tokens of the text are read: half to train the lens and find directions, half to ablate them."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "causal-basis",
    summary="the directions of each layer that predictions depend on, ablated in the lens and in the model",
    paper="Belrose et al. 2023, Eliciting Latent Predictions from Transformers with the Tuned Lens (arXiv:2303.08112)",
)
def causal_basis(config: CausalBasisConfig) -> Path:
    """Fit the lens, extract the bases, ablate them and write the report. Returns its path.

    Raises `SondeError` for more directions than the model is wide, and anything wrong with model, text or folder.
    """
    from sonde.data.text import describe
    from sonde.organisms.loading import load
    from sonde.studies import alignment_chapters, causal_basis_chapters

    check_options(config)
    if config.directions < _SUBSPACE:
        raise SondeError(f"--directions is {config.directions}: correlations and subspaces need at least {_SUBSPACE}")
    lm = load(config.model, dtype=config.dtype, device=config.device)
    if config.directions > lm.d_model:
        raise SondeError(f"--directions is {config.directions}: {lm.name} of width {lm.d_model} has no more than that")
    text = read_text(config, lm)
    fit, held = halves(text, describe(config.text))
    command = shlex.join(config.command())
    with open_run("causal-basis", config, lm) as run:
        lens = _lens(run, lm, fit, config.seed)
        bases = _bases(run, lm, lens, fit, config)
        sample = _sample(held)
        found = _fidelity(run, lm, lens, bases, sample, config.seed)
        aligned = _alignment(run, lm, lens, bases, sample, config.seed)
        updates = _updates(run, lm, sample)
        run.weights("bases", {basis.site: basis.directions for basis in bases})
        tokens = sum(int(batch.mask.sum()) for batch in sample)
        return publish(
            run,
            lm,
            text,
            [
                causal_basis_chapters.directions(lm, lens, bases, found, tokens, command),
                causal_basis_chapters.agreement(found, tokens, command),
                alignment_chapters.response(aligned, _SUBSPACE, tokens, command),
                alignment_chapters.updates(updates, tokens, command),
            ],
            title=f"Causal directions of {lm.name}",
            source=describe(config.text),
            timings=dict(run.timings),
        )


def _lens(run: "Run", lm: "LanguageModel", fit: "TokenBatches", seed: int) -> "TunedLens":
    from sonde.lens.tuned import TunedLens

    folder = run.path("lens")
    if run.done("lens"):
        return TunedLens.load(folder, lm)
    lens = TunedLens.fit(lm, fit, checkpoint=run.checkpoint("lens"), seed=seed, progress="tuned lens")
    lens.save(folder)
    run.finish("lens")
    return lens


def _bases(
    run: "Run", lm: "LanguageModel", lens: "TunedLens", fit: "TokenBatches", config: CausalBasisConfig
) -> "list[CausalBasis]":
    """The causal basis of each chosen layer; each is a step of the run."""
    from sonde.lens.causal_basis import CausalBasis, extract

    count = min(len(lens), _LAYERS)
    places = sorted({round(i * (len(lens) - 1) / max(count - 1, 1)) for i in range(count)})
    steps = {place: f"basis-{place}" for place in places}
    missing = [place for place in places if not run.done(steps[place])]
    states = _states(lm, fit, [lens.sites[place] for place in missing], config.seed) if missing else {}
    for place in missing:
        hidden = states[lens.sites[place]]
        label = f"directions of layer {place}"
        basis = extract(lens, place, hidden, k=config.directions, seed=config.seed, progress=label)
        run.finish(steps[place], basis.state())
    return [CausalBasis.from_state(run.result(steps[place])) for place in places]


def _states(lm: "LanguageModel", fit: "TokenBatches", sites: list[str], seed: int) -> "dict[str, Tensor]":
    """Hidden states of tokens drawn from the whole half."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    each = math.ceil(_STATES / fit.n_batches)
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in lm.stream(fit, sites=sites):
        chosen = torch.randperm(int(batch.mask.sum()), generator=generator)[:each].to(lm.device)
        for site in sites:
            parts[site].append(batch.acts[site][batch.mask][chosen])
    return {site: torch.cat(states) for site, states in parts.items()}


def _sample(held: "TokenBatches") -> "list[TokenBatch]":
    """The beginnings of rows from the whole half, in batches of several rows."""
    import torch

    from sonde.lm.batches import TokenBatch

    every = max(1, held.n_chunks // _ROWS)
    parts = {"tokens": [], "mask": [], "documents": [], "chunks": [], "n_bytes": []}
    number = 0
    for batch in held:
        chosen = [row for row in range(len(batch.tokens)) if (number + row) % every == 0]
        number += len(batch.tokens)
        for name, rows in parts.items():
            rows.append(getattr(batch, name)[chosen])
    whole: dict[str, Any] = {name: torch.cat(rows)[:_ROWS] for name, rows in parts.items()}
    whole |= {name: whole[name][:, :_LENGTH] for name in ("tokens", "mask")}
    return [TokenBatch(index=0, **whole)]


def _fidelity(
    run: "Run",
    lm: "LanguageModel",
    lens: "TunedLens",
    bases: "list[CausalBasis]",
    sample: "list[TokenBatch]",
    seed: int,
) -> "list[Fidelity]":
    from sonde.lens.fidelity import Fidelity, fidelity

    if not run.done("fidelity"):
        found = fidelity(lm, lens, bases, sample, seed=seed, progress="ablating in the model")
        run.finish("fidelity", [layer.state() for layer in found])
    return [Fidelity.from_state(state) for state in run.result("fidelity")]


def _alignment(
    run: "Run",
    lm: "LanguageModel",
    lens: "TunedLens",
    bases: "list[CausalBasis]",
    sample: "list[TokenBatch]",
    seed: int,
) -> "dict[str, list[Alignment]]":
    """Alignment by way of reading: lens and subspace."""
    from sonde.lens.alignment import Alignment, alignment
    from sonde.lens.causal_basis import principal_directions, random_basis
    from sonde.lens.tuned import TunedLens

    logit = TunedLens.logit(lm)
    sites = [basis.site for basis in bases]
    causal = {basis.site: basis.directions[:_SUBSPACE] for basis in bases}
    ways = {
        "tuned, causal": (lens, causal),
        "tuned, singular": (lens, {site: principal_directions(lens, site, _SUBSPACE) for site in sites}),
        "logit, singular": (logit, {site: principal_directions(logit, site, _SUBSPACE) for site in sites}),
        "random": (lens, {site: random_basis(_SUBSPACE, lm.d_model, seed=seed + i) for i, site in enumerate(sites)}),
    }
    if not run.done("alignment"):
        found = {
            way: [dataclasses.asdict(layer) for layer in alignment(lm, *how, sample, seed=seed, progress=way)]
            for way, how in ways.items()
        }
        run.finish("alignment", found)
    return {way: [_of_intervals(Alignment, layer) for layer in run.result("alignment")[way]] for way in ways}


def _updates(run: "Run", lm: "LanguageModel", sample: "list[TokenBatch]") -> "list[UpdateGradient]":
    from sonde.lens.update_gradient import UpdateGradient, update_gradient

    if not run.done("updates"):
        run.finish("updates", [dataclasses.asdict(block) for block in update_gradient(lm, sample, progress="updates")])
    return [_of_intervals(UpdateGradient, block) for block in run.result("updates")]


def _of_intervals(kind: Any, fields: dict[str, Any]) -> Any:
    """A dataclass of intervals from its dict."""
    from sonde.stats.intervals import Interval

    return kind(**{name: Interval(**value) if isinstance(value, dict) else value for name, value in fields.items()})
