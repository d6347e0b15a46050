"""What the study of explanations is made of: encoders, who is asked, who explains, the scorers.

Back ends are imported one at a time, by the one who is asked.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.features.interp import Explains
    from sonde.features.latent_cache import LatentCache
    from sonde.features.samplers import Sampling
    from sonde.features.scorers.scorer import Scorer
    from sonde.lm.asking.completion import Backend
    from sonde.lm.model import LanguageModel
    from sonde.studies.auto_interp import AutoInterpConfig

_ASKING = ("detection", "fuzzing", "simulation", "intruder", "generation")
_PROMOTED = 10


def encoders(lm: "LanguageModel", folders: Sequence[str] | None) -> dict[str, Any]:
    """Encoders by hookpoint: the site that each reads, with its folder's name where two read the same.

    `folders` are those of dictionaries, or names of bundled ones; for None the middle block's MLP neurons.
    """
    from sonde.features.neurons import MLPNeurons
    from sonde.organisms.pebble_features import load_dictionary

    if folders is None:
        neurons = MLPNeurons(lm, lm.n_layers // 2)
        return {f"neurons.{neurons.layer}": neurons}
    found: dict[str, Any] = {}
    for folder in folders:
        dictionary = load_dictionary(folder, lm=lm).to(lm.device)
        if dictionary.site is None:
            raise SondeError(f"{folder} does not say which site it reads: save it with one")
        name = dictionary.site if dictionary.site not in found else f"{dictionary.site}-{Path(folder).name}"
        if name in found:
            raise SondeError(f"{folder} is given twice, or reads {dictionary.site} under a name that is taken")
        found[name] = dictionary
    return found


def backend(lm: "LanguageModel", config: "AutoInterpConfig") -> "Backend":
    """Who is asked; each kind is imported alone."""
    from sonde.features.readers import CoinReader, LiteralReader

    name = config.ask
    if config.dry_run:
        return CoinReader(config.seed, name=name, context=config.reader_context)
    if config.base_url is not None:
        from sonde.lm.asking.openai_http import OpenAiHttp

        return OpenAiHttp(
            name, config.base_url, key_variable=config.key_variable, context=config.reader_context,
            connections=config.concurrency,
        )  # fmt: skip
    if name == "literal":
        return LiteralReader(tokenize=lambda text: lm.token_strings(_ids(lm, text)))
    if name == "coin":
        return CoinReader(config.seed)
    kind, _, rest = name.partition(":")
    if kind == "local":
        from sonde.lm.asking.local import LocalModel
        from sonde.organisms.loading import load

        return LocalModel(load(rest, dtype=config.dtype, device=config.device))
    if kind == "vllm":
        from sonde.lm.asking.vllm_engine import VllmEngine

        return VllmEngine(rest)
    if "/" in name:
        from sonde.lm.asking.inspect_models import InspectModel

        return InspectModel(name)
    raise SondeError(
        f"--ask {name!r} is nobody: give literal, coin, local:MODEL, vllm:MODEL, PROVIDER/MODEL, or a model's name "
        "with --base-url"
    )


def _ids(lm: "LanguageModel", text: str) -> list[int]:
    assert lm.tokenizer is not None
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def explainer(lm: "LanguageModel", config: "AutoInterpConfig") -> "Explains":
    """Who gives latents their sentences."""
    from sonde.features.explainers import Explainer
    from sonde.features.interp import Given, Lexical, read_explanations

    if config.explanations is not None:
        return Given(read_explanations(config.explanations))
    if config.explainer == "lexical":
        return Lexical(lm.token_strings)
    return Explainer(config.explainer, strengths=config.explainer != "single-token", seed=config.seed)


def drawn(cache: "LatentCache", config: "AutoInterpConfig") -> tuple[dict[str, list[int]], dict[str, int]]:
    """The latents to explain, and how many fire in too few tokens to have enough windows."""
    import numpy as np

    drawn, rare = {}, {}
    for hookpoint in cache.hookpoints:
        counts = cache.counts(hookpoint)
        enough = np.flatnonzero(counts >= config.min_examples)
        rare[hookpoint] = len(counts) - len(enough)
        if not len(enough):
            raise SondeError(
                f"no latent of {hookpoint} fires at {config.min_examples} of {cache.n_tokens} tokens: give more "
                "--tokens, or a smaller --min-examples"
            )
        if config.latents:
            rng = np.random.default_rng([config.seed, len(counts)])
            drawn[hookpoint] = sorted(rng.permutation(enough)[: config.latents].tolist())
        else:
            drawn[hookpoint] = list(range(len(counts)))
    return drawn, rare


def scorers(
    lm: "LanguageModel",
    encoders: Mapping[str, Any],
    cache: "LatentCache",
    names: tuple[str, ...],
    config: "AutoInterpConfig",
) -> "list[Scorer]":
    """The scorers that were chosen; a dry run has those that ask."""
    from sonde.features.scorers import local_scorers
    from sonde.features.scorers.effect import Effect
    from sonde.features.scorers.generation import Generation
    from sonde.features.scorers.intruder import Intruder
    from sonde.features.scorers.simulation import Simulation
    from sonde.features.scorers.verdicts import Detection, Fuzzing

    shown = {"shown": config.shown, "logprobs": config.probabilities, "seed": config.seed}
    windows = cache.n_tokens // config.window
    fires = (lambda *of: [(0.0, 1)] * len(of[-1])) if config.dry_run else local_scorers.fires(lm, encoders)
    made = {
        "detection": lambda: Detection(**shown),
        "fuzzing": lambda: Fuzzing(**shown),
        "simulation": lambda: Simulation(seed=config.seed),
        "surprisal": lambda: local_scorers.surprisal(lm),
        "embedding": lambda: local_scorers.embedding(lm.decode),
        "example-embedding": lambda: local_scorers.example_embedding(lm.decode),
        "intruder": lambda: Intruder(shown=max(2, config.shown), seed=config.seed),
        "generation": lambda: Generation(fires, windows, config.window),
        "intervention": lambda: Effect(lm, written(lm, encoders), cache, seed=config.seed),
    }
    wanted = [name for name in names if not config.dry_run or name in _ASKING]
    return [made[name]() for name in wanted]


def written(lm: "LanguageModel", encoders: Mapping[str, Any]) -> "dict[str, tuple[str, Tensor]]":
    """By hookpoint the site that its latents write to and the vector that each of them adds there."""
    found = {}
    for hookpoint, encoder in encoders.items():
        if hasattr(encoder, "directions"):
            found[hookpoint] = (f"mlp_out.{encoder.layer}", encoder.directions())
        else:
            site = encoder.target if encoder.design.transcodes else encoder.site
            found[hookpoint] = (site or hookpoint, encoder.w_dec.detach().float())
    return found


def promoted(lm: "LanguageModel", writes: "Mapping[str, tuple[str, Tensor]]") -> Callable[[str, int], Sequence[str]]:
    """The tokens that a latent makes likelier most; none where it does not write to the stream."""
    from sonde.features.logit_effects import logit_effects

    def of(hookpoint: str, latent: int) -> list[str]:
        row = writes[hookpoint][1][latent]
        if row.shape != (lm.d_model,):
            return []
        (top,) = logit_effects(lm, row[None], kept=_PROMOTED).promoted.tolist()
        return [repr(token) for token in lm.token_strings(top)]

    return of


def word_overlap(lm: "LanguageModel", cache: "LatentCache", sampling: "Sampling") -> Any:
    """An embedding of windows by their words, rare ones weighing more."""
    from sonde.features.embedding_scores import WordOverlap

    rows = cache.tokens[:512].reshape(-1, sampling.length)
    return WordOverlap([lm.decode(row.tolist()) for row in rows])
