"""`sonde features show`: what each latent of a dictionary responds to, as a page that opens offline.

Windows are read from the cache that a run of explanations left, or the model reads a text first. Explanations and
scores are those of that run, or those that are bundled with a dictionary; a dictionary alone has none, and its pages
say so.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Text
from sonde.studies.running import Runnable, check_options

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.features.latent_cache import LatentCache
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.feature_cards import Feature
    from sonde.runs.finding import Finding

DEFAULT = "organism:pebble"
_CONTEXT = 128
_VIEW = "latents"


@dataclass(frozen=True)
class FeaturesShowConfig(Runnable):
    """Write pages that show what each latent of a dictionary responds to.

    Example: sonde features show organism:pebble 12 --out my-pages
    """

    words = ("sonde", "features", "show")

    source: Annotated[Positional[str], arg(metavar="[DICTIONARY_OR_RUN]")] = DEFAULT
    """A dictionary's folder, the folder of a run of auto-interp, or organism:NAME of a bundled model or dictionary."""
    latent: Annotated[Positional[int | None], arg(metavar="[LATENT]")] = None
    """Show this latent in full, instead of all of them."""
    hookpoint: Name = None
    """Of a run with several, the one to show. By default the first."""
    model: Name = None
    """The model that the dictionary belongs to. By default the one that it says."""
    text: Text = None
    """What is read to see where latents fire. By default the help topics of Python. A run has read its own."""
    tokens: Count = 131072
    """Tokens of text to read."""
    out: Folder = None
    """Where the pages are written. By default a new folder under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """Seed of the windows that are drawn."""
    resume = False

    def command(self, *left_out: str) -> list[str]:
        """The words of the command line, the source and the latent without an option's name."""
        options = super().command("source", "latent", *left_out)[len(self.words) :]
        latent = [] if self.latent is None else [str(self.latent)]
        source = [self.source] if latent or self.source != DEFAULT else []
        return [*self.words, *source, *latent, *options]


@dataclass(frozen=True)
class _Source:
    """Where the latents come from: a model, a cache, what they write, and what is known of them."""

    lm: "LanguageModel"
    cache: "LatentCache"
    hookpoint: str
    directions: "Tensor | None"
    records: Mapping[int, Mapping[str, Any]]
    text: str
    note: str


def features_show(config: FeaturesShowConfig) -> Path:
    """Write the page of all latents, or of one, and return its path.

    Raises `SondeError` for a source that is neither dictionary nor run, a latent or hookpoint that does not exist,
    and a folder that cannot be written.
    """
    from sonde.runs.run import new_folder

    config = _checked(config)
    run = Path(config.source)
    finished = (run / "latents.jsonl").is_file() and (run / "cache").is_dir()
    folder = config.out or new_folder("runs", f"features-{Path(config.source.replace(':', '-')).name}")
    source = _of_run(config, run) if finished else _of_dictionary(config, folder)
    return _page(config, source, folder)


def _checked(config: FeaturesShowConfig) -> FeaturesShowConfig:
    """The options, with a number that stands alone taken for a latent of the bundled dictionary."""
    check_options(config)
    if config.latent is None and config.source.isdigit() and not Path(config.source).exists():
        config = replace(config, source=DEFAULT, latent=int(config.source))
    if config.latent is not None and config.latent < 0:
        raise SondeError(f"latent {config.latent} does not exist: latents are counted from 0")
    return config


def _of_run(config: FeaturesShowConfig, folder: Path) -> _Source:
    from sonde.features.latent_cache import LatentCache
    from sonde.organisms.loading import load
    from sonde.organisms.pebble_features import read_records
    from sonde.runs.folder import read_json
    from sonde.studies.auto_interp_sources import encoders, written

    settings = read_json(folder / "config.json")
    if config.text is not None:
        raise SondeError(f"{folder} has read its text already: leave --text out, or give the dictionary instead")
    lm = load(config.model or settings["model"], dtype=config.dtype, device=config.device)
    cache = LatentCache.open(folder / "cache")
    if lm.tokenizer is not None:
        cache.check_tokenizer(lm.tokenizer)
    hookpoint = config.hookpoint or cache.hookpoints[0]
    if hookpoint not in cache.hookpoints:
        raise SondeError(f"{folder} has no hookpoint {hookpoint!r}: it has {', '.join(cache.hookpoints)}")
    directions, note = None, ""
    try:
        directions = written(lm, encoders(lm, settings["dictionary"]))[hookpoint][1]
    except SondeError as error:
        note = f" The dictionary cannot be read ({error}), so nothing is said of tokens and of decoders."
    records = read_records(folder).get(hookpoint, {})
    return _Source(lm, cache, hookpoint, directions, records, str(cache.config["text"]["source"]), note)


def _of_dictionary(config: FeaturesShowConfig, folder: Path) -> _Source:
    from sonde.data.text import describe
    from sonde.features.latent_cache import LatentCache
    from sonde.organisms.loading import load
    from sonde.organisms.pebble_features import bundled_folder, load_dictionary, read_records
    from sonde.organisms.registry import PREFIX
    from sonde.studies.auto_interp_sources import written

    bundled = config.source.startswith(PREFIX)
    if not bundled and not Path(config.source).exists():
        raise SondeError(
            f"{config.source} does not exist: give the folder of a dictionary or of a run of auto-interp, or {DEFAULT}"
        )
    dictionary = load_dictionary(config.source)
    name = config.model or dictionary.model
    if name is None:
        raise SondeError(f"{config.source} does not say which model it belongs to: give --model")
    site = dictionary.site
    if site is None:
        raise SondeError(f"{config.source} does not say which site it reads: save it with one")
    if config.hookpoint not in (None, site):
        raise SondeError(f"{config.source} reads {site}, not {config.hookpoint}")
    width = dictionary.design.latents
    if config.latent is not None and config.latent >= width:
        raise SondeError(f"latent {config.latent} does not exist: {config.source} has {width}, counted from 0")
    lm = load(name, dtype=config.dtype, device=config.device)
    dictionary = dictionary.to(lm.device)
    cache = LatentCache.build(
        lm, {site: dictionary}, config.text, folder / "cache", tokens=config.tokens,
        context=min(_CONTEXT, lm.context - 1), seed=config.seed, progress="latents",
    )  # fmt: skip
    where = bundled_folder(config.source) if bundled else Path(config.source)
    records = read_records(where).get(site, {})
    directions = written(lm, {site: dictionary})[site][1]
    return _Source(lm, cache, site, directions, records, describe(config.text), "")


def _page(config: FeaturesShowConfig, source: _Source, folder: Path) -> Path:
    from datetime import UTC, datetime

    import sonde
    from sonde.features.cards import MOST
    from sonde.runs.blocks import Header
    from sonde.runs.report import write_report
    from sonde.studies.feature_blocks import chosen_latents, feature_view

    width = source.cache.latents(source.hookpoint)
    if config.latent is not None and config.latent >= width:
        raise SondeError(f"latent {config.latent} does not exist: {source.hookpoint} has {width}, counted from 0")
    known = [number for number, record in source.records.items() if record["status"] == "scored"]
    command = shlex.join(config.command())
    shown = chosen_latents(source.cache, source.hookpoint, first=known, most=MOST, seed=config.seed)
    view, cards = feature_view(
        _VIEW,
        source.lm,
        source.cache,
        source.hookpoint,
        title=f"Latents of {source.hookpoint}",
        command=command,
        start=config.latent,
        directions=source.directions,
        records=source.records,
        shown=shown if config.latent is None else [config.latent],
        left_out="" if source.records == {} else "not explained in this run",
        seed=config.seed,
        progress="cards",
    )
    chapter = _chapter(config, source, view, cards, command)
    name = "features.html" if config.latent is None else f"latent-{config.latent}.html"
    title = "What each latent responds to" if config.latent is None else f"Latent {config.latent}"
    return write_report(
        folder / name,
        header=Header(
            id=folder.name,
            title=f"{title}: {source.lm.name}, {source.hookpoint}",
            study="features",
            model=source.lm.name,
            model_hash=source.lm.hash,
            params=source.lm.n_parameters,
            command=command,
            created=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
            text=source.text,
            tokens=source.cache.n_tokens,
            seed=config.seed,
            sonde=sonde.__version__,
        ),
        findings=chapter.findings,
        chapters=[chapter],
    )


def _chapter(config: FeaturesShowConfig, source: _Source, view: Any, cards: "list[Feature]", command: str) -> "Chapter":
    import torch

    from sonde.features.reconstruction import density_histogram
    from sonde.runs.blocks import Block, Chapter
    from sonde.runs.finding import Finding
    from sonde.stats.intervals import wilson
    from sonde.studies.feature_blocks import density_figure

    fires, tokens = torch.tensor([card.fires for card in cards]), source.cache.n_tokens
    alive = int((fires > 0).sum())
    explained = sum(bool(card.explanation) for card in cards)
    findings = _score_findings(cards, command)[:1] or [
        Finding.of(
            wilson(alive, len(cards)),
            id="features.alive",
            chapter="features",
            sentence=f"{alive:,} of {len(cards):,} latents fire at least once in {tokens:,} tokens.",
            metric="share of latents that fire",
            better="higher",
            control_reason="how many latents fire says nothing of chance; none has an explanation that was scored.",
            command=command,
        )
    ]
    blocks: list[Block] = [view]
    if config.latent is None and alive:
        blocks.append(
            density_figure(
                "features.density", {"latents": density_histogram(fires, tokens)}, title="How often the latents fire",
                caption="Numbers of latents by the share of tokens at which they fire.",
            )
        )  # fmt: skip
    said = f"{explained:,} of {len(cards):,} latents have an explanation" if explained else "None is explained"
    return Chapter(
        id="features",
        question="What does each latent respond to?" if config.latent is None else f"What is latent {config.latent}?",
        answer=f"{said}; {alive:,} fire in this text.{source.note}",
        findings=findings,
        blocks=blocks,
        not_shown=(
            "What a latent is for. Windows come from one text; on another it may fire elsewhere. Promoted tokens are "
            "those of its direct way to the head, which tells less the earlier the layer."
        ),
        how=(
            "Six strongest windows and one drawn from every lower tenth of strength, of 32 tokens each, coloured by "
            "the share of the latent's largest activation. Promoted tokens: the decoder row at the length of a normed "
            "stream, through final norm and head. Nearness: cosine of decoder rows; Jaccard index of the tokens at "
            "which two latents fire. Scores as in sonde run auto-interp, where one was made."
        ),
    )


def _score_findings(cards: "list[Feature]", command: str) -> "list[Finding]":
    """The mean of every test over the latents that have a score of it, beside chance."""
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean

    by_test: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for card in cards:
        for score in card.scores:
            if score.main and score.estimate is not None and score.chance is not None:
                by_test.setdefault((score.test, score.measure), []).append((score.estimate, score.chance))
    found = []
    for (test, measure), values in by_test.items():
        if len(values) < 2:
            continue
        mean = bootstrap_mean([value for value, _ in values])
        chance = sum(chance for _, chance in values) / len(values)
        better = mean.low > chance
        found.append(
            Finding.of(
                mean,
                id=f"features.{test}",
                chapter="features",
                sentence=f"By {test} the explanations are {'better' if better else 'no better'} than chance.",
                metric=f"{measure} of {test}, mean over latents",
                better="higher",
                control=Control("chance", chance),
                command=command,
            )
        )
    return found
