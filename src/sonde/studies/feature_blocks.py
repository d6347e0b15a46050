"""Blocks about latents that several studies and the audit show: cards with their index, and how often latents fire."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.features.reconstruction import density_edges
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Figure
from sonde.runs.feature_cards import FeatureView

if TYPE_CHECKING:
    from sonde.features.dictionary import Dictionary
    from sonde.features.latent_cache import LatentCache
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.runs.feature_cards import Feature
    from sonde.runs.run import Run

EXAMPLES = 12
_RARE = 10  # fewer tokens are no windows to show
_READ = 16384


def density_figure(
    name: str, counts: Mapping[str, Sequence[int]], *, control: Sequence[str] = (), title: str, caption: str
) -> Figure:
    """Numbers of latents by how often they fire; `counts` are histograms of `reconstruction.density_histogram`."""
    edges = density_edges()
    shown = [i for i in range(len(edges) - 1) if any(count[i] for count in counts.values())] or [len(edges) - 2]
    rows = [
        {"log": (edges[i] + edges[i + 1]) / 2, "latents": count[i], "dictionary": label}
        for label, count in counts.items()
        for i in range(max(0, shown[0] - 1), min(len(edges) - 1, shown[-1] + 2))
    ]
    chart = chart_kinds.lines(
        rows,
        x="log",
        y="latents",
        series="dictionary",
        control=control,
        title=title,
        subtitle="Latents by the share of tokens on which they fire, in quarters of a power of ten",
        x_title="log10 of the share of tokens",
        y_title="latents",
    )
    return Figure(id=name, chart=chart, caption=caption)


def chosen_latents(
    cache: "LatentCache", hookpoint: str, *, first: Sequence[int] = (), most: int, seed: int = 0
) -> list[int]:
    """The latents whose cards are shown in full where not all can be: `first`, then others that fire, drawn by seed."""
    alive = np.flatnonzero(cache.counts(hookpoint)).tolist()
    if len(alive) <= most:
        return alive
    kept = dict.fromkeys(first)
    rest = [i for i in np.random.default_rng(seed).permutation(alive).tolist() if i not in kept]
    return [*kept, *rest][:most]


def drawn_latents(cache: "LatentCache", hookpoint: str, *, seed: int = 0) -> list[int]:
    """A dozen latents at random, of those that fire often enough to have windows to show."""
    enough = np.flatnonzero(cache.counts(hookpoint) >= _RARE)
    return np.random.default_rng(seed).permutation(enough)[:EXAMPLES].tolist()


def examples_chapter(
    lm: "LanguageModel", dictionary: "Dictionary", name: str, text: "TokenBatches", run: "Run", *, seed: int
) -> Chapter:
    """What a dozen latents of a dictionary of one site respond to, on the first part of a text."""
    from sonde.features.latent_cache import LatentCache

    site = dictionary.site
    assert site is not None
    cache = LatentCache.build(
        lm, {site: dictionary}, text, run.path("examples"), tokens=_READ, seed=seed, progress="examples"
    )
    view, _ = feature_view(
        "examples.latents",
        lm,
        cache,
        site,
        title=f"Latents of {name}",
        command=shlex.join(["sonde", "features", "show", str(run.path("dictionaries", name))]),
        directions=dictionary.w_dec,
        shown=drawn_latents(cache, site, seed=seed),
        left_out="not among the examples",
        seed=seed,
    )
    return Chapter(
        id="examples",
        question="What do some of the latents respond to?",
        answer=f"{EXAMPLES} latents of {name}, drawn at random from those that fire at {_RARE} tokens or more.",
        blocks=[view],
        not_shown="The other latents: the command under the card writes the pages of all.",
        how=f"{cache.n_tokens:,} tokens of the text that dictionaries were measured on; windows of 32 tokens.",
    )


def feature_view(
    name: str,
    lm: "LanguageModel",
    cache: "LatentCache",
    hookpoint: str,
    *,
    title: str,
    command: str,
    start: int | None = None,
    **options: Any,
) -> "tuple[FeatureView, list[Feature]]":
    """Cards and index of a hookpoint; options are those of `sonde.features.cards.feature_cards`."""
    from sonde.features.cards import feature_cards

    cards = feature_cards(lm, cache, hookpoint, **options)
    fire = sum(card.fires > 0 for card in cards)
    full = sum(bool(card.windows) for card in cards)
    caption = (
        f"{fire:,} of {len(cards):,} latents fire in {cache.n_tokens:,} tokens; windows are shown of {full:,}. The "
        "index has all of them, also those that never fire."
    )
    view = FeatureView(id=name, title=title, caption=caption, features=cards, start=start, command=command)
    return view, cards
