"""How well does a sparse dictionary explain a site of a language model, and do two seeds find the same directions?

Dictionaries of all sites, kinds and seeds learn from one pass over a text and are measured on another: reconstruction,
what the model loses with each in place of its activations, and what seeds share; beside k principal components and
random directions.
"""

import shlex
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.features.activation_buffer import Order
    from sonde.features.dictionary import Dictionary
    from sonde.features.metrics import Metrics
    from sonde.features.plan import Plan
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.run import Run

_HELD = 8  # of a text that is given, an eighth is held out
_PAIRED = 1 << 14  # most latents that are paired with those of another seed
RANDOM, COMPONENTS = "random directions", "principal components"


@dataclass(frozen=True)
class SaeConfig(Runnable):
    """Train sparse dictionaries of a model's activations and measure them.

    Example: sonde run sae organism:pebble --sites resid_post.3 --kinds topk --latents 1024 --k 32
    """

    words = ("sonde", "run", "sae")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What is read: seven eighths to learn from, the rest to measure on. By default dictionaries learn from the
    docstrings and comments of Python's library and are measured on its help texts."""
    sites: Names = None
    """Sites or patterns, such as resid_post.3 or mlp_out.*. By default the stream after the middle block."""
    kinds: Names = ("topk",)
    """Kinds of dictionaries: topk, groupmax, batchtopk, matryoshka, jumprelu, relu, gated."""
    latents: Count = 1024
    """Directions in each dictionary."""
    k: Count = 32
    """Active latents of a token: on average for batchtopk and matryoshka, what jumprelu aims at."""
    sparsity: Annotated[float | None, arg(metavar="WEIGHT")] = None
    """Weight of the sparsity penalty of jumprelu (by default 10), relu and gated (2)."""
    lr: Annotated[float, arg(metavar="RATE")] = 5e-3
    """Learning rate of Adam."""
    seeds: Count = 2
    """Dictionaries of each kind at each site, with seeds that count up from --seed."""
    tokens: Count = 1_000_000
    """Tokens to learn from."""
    batch: Count = 1024
    """Tokens of a step."""
    mode: Name = "buffer"
    """Order of the tokens: direct, buffer (mixed over 16 steps) or disk (all are written first, then mixed)."""
    measured: Count = 65536
    """Tokens to measure on; the model runs on a quarter of them with every dictionary in its place."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """Seed of weights, order and resamples."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "sae",
    summary="sparse dictionaries of a model's activations: trained in one pass, measured against components and chance",
    paper="Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093)",
)
def sae(config: SaeConfig) -> Path:
    """Train the dictionaries of `config`, measure them and write the report. Returns its path.

    The dictionaries are in `dictionaries/NAME` of the run folder, each with its numbers in `metrics/NAME.json`. Raises
    `SondeError` for options that do not fit and anything wrong with model, text or folder.
    """
    from sonde.data.text import describe
    from sonde.organisms.loading import load
    from sonde.studies import feature_blocks, sae_chapters

    check_options(config)
    _check(config)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    chosen = plans(config, lm)
    fit, held = _texts(config, lm)
    source = describe(config.text) if config.text else "docstrings of Python's library; measured on its help texts"
    with open_run("sae", config, lm) as run:
        trained = _trained(run, config, lm, fit, chosen)
        found = _measured(run, config, lm, held, trained)
        command = shlex.join(config.command())
        setting = sae_chapters.Setting(config.latents, config.k, command, trained, found)
        chapters = [sae_chapters.reconstruction(setting), sae_chapters.prediction(setting)]
        if config.seeds > 1 and config.latents <= _PAIRED:
            chapters.append(sae_chapters.seeds(setting, chosen))
        first = chosen[0].name
        chapters.append(feature_blocks.examples_chapter(lm, trained[first], first, held, run, seed=config.seed))
        return publish(
            run,
            lm,
            fit,
            chapters,
            title=f"Sparse dictionaries of {lm.name}",
            source=source,
            timings=dict(run.timings),
        )


def plans(config: SaeConfig, lm: "LanguageModel") -> "list[Plan]":
    """What the study trains. Raises `SondeError` for kinds and sizes that do not fit."""
    from sonde.features.recipe import small_plans

    found: list[Plan] = []
    kind = ""
    try:
        for kind in config.kinds or ():
            found += small_plans(
                lm,
                config.sites or (f"resid_post.{lm.n_layers // 2}",),
                kind,  # type: ignore[arg-type] - checked before
                latents=config.latents,
                k=config.k,
                tokens=config.tokens,
                sparsity=config.sparsity,
                lr=config.lr,
                seeds=range(config.seed, config.seed + config.seeds),
            )
    except ValueError as error:
        raise SondeError(f"--kinds {kind} --latents {config.latents} --k {config.k}: {error}") from error
    return found


def _check(config: SaeConfig) -> None:
    from sonde.features.design import KINDS

    kinds = config.kinds or ()
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise SondeError(f"--kinds takes {', '.join(KINDS)}, not {' '.join(unknown) or 'nothing'}")
    for name in ("latents", "k", "seeds", "measured"):
        if getattr(config, name) < 1:
            raise SondeError(f"--{name} is {getattr(config, name)}: give 1 or more")
    if config.lr <= 0:
        raise SondeError(f"--lr is {config.lr}: give a rate above 0, such as 0.005")
    _order(config, None)


def _order(config: SaeConfig, run: "Run | None") -> "Order":
    from sonde.features.activation_buffer import Order
    from sonde.features.recipe import MIXED

    mode: Any = config.mode
    folder = None if mode != "disk" else run.path("checkpoints", "rows") if run else Path()
    return Order(mode, batch=config.batch, size=MIXED * config.batch, folder=folder, seed=config.seed)


def _texts(config: SaeConfig, lm: "LanguageModel") -> "tuple[TokenBatches, TokenBatches]":
    """What is learned from, in random order, and what is measured on."""
    from sonde.data.python_docs import topics
    from sonde.features.recipe import CONTEXT, documentation
    from sonde.lm.batches import TokenBatches

    if lm.tokenizer is None:
        raise SondeError(f"{config.model} has no tokenizer, so it reads no text: save one beside the weights")
    layout: Any = {"context": min(CONTEXT, lm.context), "shuffle": True, "seed": config.seed}
    if config.text is None:
        most = max(CONTEXT, min(4096, config.measured // 8))
        held = TokenBatches(
            topics(), lm.tokenizer, limit_tokens=2 * (config.measured + CONTEXT), tokens_per_batch=most, **layout
        )
        return documentation(lm, config.tokens, seed=config.seed), held
    limit = config.tokens + config.tokens // 8
    text = TokenBatches(config.text, lm.tokenizer, limit_tokens=limit * _HELD // (_HELD - 1) + 2, **layout)
    if text.n_chunks < _HELD:
        raise SondeError(f"{text} are too few: at least {_HELD * text.context:,} are needed")
    return text.split(1 / _HELD)


def _trained(
    run: "Run", config: SaeConfig, lm: "LanguageModel", fit: "TokenBatches", chosen: "list[Plan]"
) -> "dict[str, Dictionary]":
    """The dictionaries by name, and the controls of every site; from the run folder where they are finished."""
    from sonde.features.activation_rows import Selection
    from sonde.features.controls import principal_components, random_directions
    from sonde.features.data_parallel import Processes
    from sonde.features.dictionary import Dictionary
    from sonde.features.training import measured, train_dictionaries

    folders = {plan.name: run.path("dictionaries", plan.name) for plan in chosen}
    if not run.done("training"):
        sites = list(dict.fromkeys(site for plan in chosen for site in plan.reads))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*training was cut short")  # the report says it
            made = train_dictionaries(
                lm,
                fit,
                chosen,
                tokens=config.tokens,
                order=_order(config, run),
                checkpoint=run.checkpoint("training"),
                after=lambda step, points: _note(run, step, points),
                progress="dictionaries",
            )
        for plan, dictionary in zip(chosen, made, strict=True):
            dictionary.save(folders[plan.name])
        samples = measured(lm, fit, sites, Selection(), Processes(lm.device), covariance=True)
        for site, sample in samples.items():
            principal_components(sample, min(config.k, lm.d_model), site=site).save(_control(run, site, COMPONENTS))
            random = random_directions(sample, config.latents, config.k, site=site, seed=config.seed + 1000)
            random.save(_control(run, site, RANDOM))
        run.finish("training", {"sites": sites})
        shutil.rmtree(run.path("checkpoints", "rows"), ignore_errors=True)
    found = {name: Dictionary.load(folder, device=lm.device) for name, folder in folders.items()}
    for site in run.result("training")["sites"]:
        for what in (COMPONENTS, RANDOM):
            found[f"{site}: {what}"] = Dictionary.load(_control(run, site, what), device=lm.device)
    return found


def _control(run: "Run", site: str, what: str) -> Path:
    return run.path("controls", f"{site}-{what.replace(' ', '-')}")


def _note(run: "Run", step: int, points: "Any") -> None:
    for name, point in points.items():
        run.metric(step=step, stage=name, **{key: point[key] for key in ("tokens", "fvu", "l0", "dead")})
    run.progress("training", done=step)


def _measured(
    run: "Run", config: SaeConfig, lm: "LanguageModel", held: "TokenBatches", dictionaries: "dict[str, Dictionary]"
) -> "dict[str, Metrics]":
    """The numbers of all dictionaries and controls, from the run folder where they are finished."""
    from sonde.features.metrics import Metrics, evaluate_all

    paths = {name: run.path("metrics", f"{name.replace(': ', '-').replace(' ', '-')}.json") for name in dictionaries}
    if not run.done("measuring"):
        found = evaluate_all(
            lm,
            dictionaries,
            held,
            tokens=config.measured,
            loss_tokens=max(1, config.measured // 4),
            seed=config.seed,
            progress=True,
        )
        for name, metrics in found.items():
            metrics.save(paths[name])
        run.finish("measuring", {"names": list(found)})
    return {name: Metrics.load(path) for name, path in paths.items()}
