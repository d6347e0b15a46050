"""Do neighbouring layers mean the same? Dictionaries of all layers, explained by token sets, matched by what they say.

Explanations of two layers are matched one to one (Hungarian); the similarity is the mean cosine of the pairs. The
baseline deals the tokens of each layer's explanations out anew and matches again. Latents are also matched by their
decoder rows, against pairs at random.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    import numpy as np

    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run
    from sonde.stats.intervals import Interval

_FEWEST = 20  # explained latents of a layer
_MATCHES = ("cosines", "by decoder")
_SERIES = {
    "cosines": "matched by explanations",
    "shuffled": "tokens dealt out anew",
    "by decoder": "matched by decoder rows",
    "random pairs": "pairs at random",
}
_PAPER = "Paulo et al. 2024, arXiv:2410.13928"


@dataclass(frozen=True)
class LayerSimilarityConfig(Runnable):
    """Match the explained latents of every two layers.

    Example: sonde run layer-similarity organism:pebble --latents 384
    """

    words = ("sonde", "run", "layer-similarity")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    text: Text = None
    """What is read. By default the help texts of Python."""
    tokens: Count = 98304
    """How many tokens of the text are read."""
    sites: Names = None
    """Sites that dictionaries are trained at, at least three. By default the residual stream after every block."""
    latents: Count = 384
    """Latents of each dictionary."""
    k: Count = 16
    """Active latents of a token."""
    epochs: Count = 6
    """How often the dictionaries see the text."""
    explained: Count = 100
    """Latents of each site that are matched: those whose explanations hold best."""
    draws: Count = 20
    """Shuffles of the baseline."""
    min_examples: Count = 100
    """Windows in which a latent must fire to be explained."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """Seed of dictionaries, windows and shuffles."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "layer-similarity",
    summary="explanations of the latents of all layers matched one to one: near layers against distant ones",
    paper="Paulo et al. 2024, Automatically Interpreting Millions of Features in Large Language Models "
    "(arXiv:2410.13928)",
)
def layer_similarity(config: LayerSimilarityConfig) -> Path:
    """Train a dictionary at every site, explain, match and write the report. Returns its path.

    Raises `SondeError` for anything wrong with options, model, text or folder, and for too few latents that fire.
    """
    from sonde.data.text import describe
    from sonde.organisms.loading import load
    from sonde.studies.latent_steps import text_rows

    check_options(config)
    if config.k < 1 or config.k > config.latents or config.epochs < 1 or config.draws < 2:
        raise SondeError("--k takes 1 to the number of latents, --epochs 1 or more, --draws 2 or more")
    if config.explained < _FEWEST:
        raise SondeError(f"--explained is {config.explained}: give {_FEWEST} or more")
    lm = load(config.model, dtype=config.dtype, device=config.device)
    sites = lm.match(*(config.sites or ("resid_post.*",)))
    if len(sites) < 3:
        raise SondeError(f"{', '.join(sites)}: near and distant layers need at least three sites")
    text = text_rows(config, lm)
    with open_run("layer-similarity", config, lm) as run:
        if not run.done("matches"):
            run.finish("matches", _matches(run, lm, text, sites, config))
        found = run.result("matches")
        run.table("similarity.pairs", found["pairs"])
        run.table("similarity.latents", found["latents"])
        return publish(
            run,
            lm,
            text,
            [_chapter(sites, found, config)],
            title=f"What the layers of {lm.name} mean",
            source=describe(config.text),
            timings=dict(run.timings),
        )


def _matches(
    run: "Run", lm: "LanguageModel", text: Any, sites: Sequence[str], config: LayerSimilarityConfig
) -> dict[str, Any]:
    """A row for every two sites, with its shuffles, and one for every explained latent."""
    import numpy as np
    from tqdm import tqdm

    from sonde.features.design import Design
    from sonde.features.lexical import lexical_survey
    from sonde.features.plan import Plan
    from sonde.features.samplers import Sampling
    from sonde.features.similarity import TermVectors, matched, matched_by, random_pairs, shuffled_means
    from sonde.studies.latent_steps import cached, trained

    design = Design("topk", lm.d_model, config.latents, config.k)
    plans = [Plan(site, design, seed=config.seed) for site in sites]
    made = dict(zip(sites, trained(run, lm, text, plans, epochs=config.epochs, seed=config.seed), strict=True))
    cache = cached(run, lm, made, text, seed=config.seed)
    sampling = Sampling(min_examples=config.min_examples)
    surveyed: dict[str, list[tuple[float, Any]]] = {}
    terms: dict[str, list[list[int]]] = {}
    rows: dict[str, np.ndarray] = {}
    latents = []
    for site in sites:
        found = lexical_survey(
            cache, site, range(config.latents), config=sampling, seed=config.seed, progress=f"explaining {site}"
        )
        good = [(one.score.balanced_accuracy, one) for one in found if one.explanation and one.score]
        if len(good) < _FEWEST:
            raise SondeError(
                f"{len(good)} latents of {site} can be explained, fewer than {_FEWEST}: give more --tokens or a "
                "smaller --min-examples"
            )
        surveyed[site] = sorted(good, key=lambda pair: -pair[0])
    count = min(config.explained, *map(len, surveyed.values()))
    for site, good in surveyed.items():
        kept = [one for _, one in good[:count]]
        terms[site] = [list(one.explanation.ids) for one in kept if one.explanation]
        rows[site] = made[site].w_dec.detach().cpu().numpy()[[one.latent for one in kept]]
        latents += [
            {"site": site, "latent": one.latent, "accuracy": accuracy, "tokens": lm.token_strings(one.explanation.ids)}
            for accuracy, one in good[:count]
            if one.explanation
        ]
    embed = TermVectors(*terms.values())
    vectors = {site: embed(terms[site]) for site in sites}
    pairs = []
    places = [(i, j) for i in range(len(sites)) for j in range(i + 1, len(sites))]
    for number, (i, j) in enumerate(tqdm(places, desc="matching", unit="pair")):
        a, b = sites[i], sites[j]
        match = matched(vectors[a], vectors[b])
        written = matched_by((rows[a], rows[b]), (vectors[a], vectors[b]))
        dealt = shuffled_means(terms[a], terms[b], embed, draws=config.draws, seed=config.seed + number)
        chance = random_pairs(written, (vectors[a], vectors[b]), draws=config.draws, seed=config.seed)
        pairs.append(
            {
                "first": a,
                "second": b,
                "distance": j - i,
                "cosines": match.cosine.tolist(),
                "shuffled": dealt.tolist(),
                "by decoder": written.cosine.tolist(),
                "random pairs": chance.tolist(),
            }
        )
    return {"pairs": pairs, "latents": latents}


def _chapter(sites: Sequence[str], found: dict[str, Any], config: LayerSimilarityConfig) -> "Chapter":
    import numpy as np

    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.finding import Control, Finding
    from sonde.runs.report.numbers import number
    from sonde.stats.intervals import percentile_interval

    pairs = found["pairs"]
    apart = np.array([pair["distance"] for pair in pairs])
    far = max(2, len(sites) // 2)
    near_by, distant = apart == 1, apart >= far
    means = {key: np.array([np.mean(pair[key]) for pair in pairs]) for key in _SERIES}
    rng = np.random.default_rng(config.seed)
    drawn = {
        key: np.array([_resampled(np.array(pair[key]), rng) if key in _MATCHES else pair[key] for pair in pairs])
        for key in _SERIES
    }
    n = len(found["latents"])

    def interval(key: str, some: Any) -> Any:
        """Mean over pairs of sites; resampled over matched pairs, or over the draws of a baseline."""
        units = n if key in _MATCHES else config.draws
        return percentile_interval(float(means[key][some].mean()), drawn[key][some].mean(0), units)

    def margin(key: str) -> Any:
        units = n if key in _MATCHES else config.draws
        values = drawn[key][near_by].mean(0) - drawn[key][distant].mean(0)
        return percentile_interval(float(means[key][near_by].mean() - means[key][distant].mean()), values, units)

    command = shlex.join(config.command())
    shown: dict[str, Any] = {
        "chapter": "similarity", "better": "higher", "command": command,
        "figures": ("similarity.distance",), "tables": ("similarity.pairs-shown",),
    }  # fmt: skip
    gap, written = margin("cosines"), margin("by decoder")
    chance, at_random = margin("shuffled"), margin("random pairs")
    findings = [
        Finding.of(
            gap,
            id="similarity.margin",
            sentence="Matched by what they say, explanations of adjacent layers are "
            f"{_more(gap, chance)} those of layers {far} or more apart.",
            metric="mean matched cosine of explanations of adjacent layers less that of distant ones",
            control=Control.of("tokens dealt out anew within each layer", chance),
            **shown,
        ),
        Finding.of(
            written,
            id="similarity.margin-written",
            sentence="Matched by what they write, latents of adjacent layers have explanations that are "
            f"{_more(written, at_random)} those of layers {far} or more apart.",
            metric="mean cosine of the explanations of latents with matching decoder rows, adjacent less distant",
            control=Control.of("pairs at random", at_random),
            **shown,
        ),
        Finding.of(
            interval("cosines", near_by),
            id="similarity.adjacent",
            sentence="Explanations of adjacent layers match at a mean cosine of "
            f"{means['cosines'][near_by].mean():.2f}.",
            metric="mean matched cosine of the explanations of adjacent layers",
            control=Control.of("tokens dealt out anew within each layer", interval("shuffled", near_by)),
            **shown,
        ),
    ]
    curve = [
        {"distance": distance, "of": name, "cosine": band.estimate, "low": band.low, "high": band.high}
        for distance in sorted(set(apart.tolist()))
        for key, name in _SERIES.items()
        for band in [interval(key, apart == distance)]
    ]
    chart = chart_kinds.lines(
        curve,
        x="distance",
        y="cosine",
        low="low",
        high="high",
        series="of",
        control=("tokens dealt out anew", "pairs at random"),
        title=f"Latents that write alike: {number(means['by decoder'][near_by].mean(), 2)} in adjacent layers, "
        f"{number(means['by decoder'][distant].mean(), 2)} in layers {far} or more apart",
        subtitle="Mean cosine between the explanations of matched latents, 95 % bands",
        x_title="blocks between the two sites",
        y_title="cosine of explanations",
    )
    short = [site.replace("resid_post.", "") for site in sites]
    heat = chart_kinds.heat(
        [
            {"x": sites.index(p[one]), "y": sites.index(p[other]), "cosine": float(np.mean(p["by decoder"]))}
            for p in pairs
            for one, other in (("first", "second"), ("second", "first"))
        ],
        x="x",
        y="y",
        value="cosine",
        title="The nearer two layers, the more alike their explanations" if written.low > 0 else "All layers",
        subtitle="Mean cosine between the explanations of latents with matching decoder rows",
        x_title="site",
        y_title="site",
        x_labels=short,
        y_labels=short,
    )
    return Chapter(
        id="similarity",
        question="Do neighbouring layers mean the same?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            Figure(
                id="similarity.distance", chart=chart, caption="Similarity of explanations by distance of the layers."
            ),
            Figure(id="similarity.layers", chart=heat, caption="Similarity of explanations of every two layers."),
            Table(
                id="similarity.pairs-shown",
                caption="Every two sites: matched by explanations, after a shuffle, matched by decoder rows, at random",
                columns=[
                    "first",
                    "second",
                    *(Column(name=name) for name in ("similarity", "shuffled", "decoder", "random")),
                ],
                rows=[[p["first"], p["second"], *(float(np.mean(p[key])) for key in _SERIES)] for p in pairs],
            ),
        ],
        not_shown=(
            "Token sets see single tokens alone, so layers that treat the same tokens look alike whatever they do with "
            "them. Latents that fire too rarely or everywhere have no explanation and are left out, and so are those "
            "whose explanation holds least."
        ),
        how=(
            f"TopK dictionaries of {config.latents} latents ({config.k} active) at {len(sites)} sites, one pass of the "
            "model. Token sets of highest F1 on 40 active and 40 silent windows; of each site the latents whose sets "
            f"hold best on other windows, at most {config.explained}. Tokens weighted by how rare they are "
            "among all explanations, cosine, Hungarian match. Shuffle: the tokens of all explanations of a layer dealt "
            f"out anew, lengths kept, and matched again, {config.draws} times ({_PAPER})."
        ),
    )


def _more(ours: "Interval", control: "Interval") -> str:
    return "more alike than" if ours.low > control.high else "no more alike than"


def _resampled(cosines: "np.ndarray", rng: "np.random.Generator", draws: int = 500) -> "np.ndarray":
    """Means of resampled pairs."""
    return cosines[rng.integers(len(cosines), size=(draws, len(cosines)))].mean(1)
