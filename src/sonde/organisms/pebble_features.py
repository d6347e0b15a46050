"""`organism:pebble-features`: a small sparse dictionary of `organism:pebble`, with sentences and scores of its latents.

TopK, 16 of 1,024 latents a token, on the stream after block 3; explained by sets of tokens and judged by a reader that
goes by these, so that nobody outside is asked. The folder has the dictionary in half precision, `latents.jsonl` as
`sonde.features.interp` writes it (main measures alone), `metrics.json` and the card. `load_dictionary` finds it by the
name of its model.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import ORGANISMS, PREFIX, folder_of, has_weights, organism

if TYPE_CHECKING:
    from sonde.features.dictionary import Dictionary
    from sonde.features.metrics import Metrics
    from sonde.lm.model import LanguageModel

SUFFIX = "-features"
LATENTS, METRICS = "latents.jsonl", "metrics.json"
MODEL = "organism:pebble"
CONTEXT, MIN_EXAMPLES = 128, 100
_READ = 262_144
_MEASURED, _PREDICTED = 65_536, 32_768
_SAMPLES = 6
_KEPT_FACTS = ("text", "text_hash", "wanted", "truncated", "steps", "tokens", "alive")


@dataclass(frozen=True)
class PebbleFeaturesConfig:
    """Train a sparse dictionary of organism:pebble, measure and explain it, in about five minutes of one core.

    Example: sonde organism train pebble-features --out my-features
    """

    site: Annotated[str, arg(metavar="SITE")] = "resid_post.3"
    """What it reads."""
    latents: Annotated[int, arg(metavar="N")] = 1024
    """Directions in the dictionary."""
    k: Annotated[int, arg(metavar="N")] = 16
    """Active latents of a token."""
    tokens: Annotated[int, arg(metavar="N")] = 1_000_000
    """Tokens to learn from: docstrings and comments of Python's library."""
    read: Annotated[int, arg(metavar="N")] = _READ
    """Tokens of Python's help topics on which latents are explained and scored."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("pebble-features")
    """Where dictionary, explanations and card are written."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of everything that is drawn."""

    @property
    def command(self) -> str:
        """The command line that makes the same dictionary."""
        return recipe_command("pebble-features", self)


@organism(
    "pebble-features",
    summary="a sparse dictionary of organism:pebble: 1,024 latents with sentences and scores; no language model",
    paper="Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093)",
)
def train_pebble_features(config: PebbleFeaturesConfig) -> Path:
    """Train, measure, explain and describe. Returns the folder. Resumes a training that was killed.

    Raises `SondeError` for options that do not fit.
    """
    from sonde.features.metrics import evaluate
    from sonde.features.recipe import small_dictionary
    from sonde.organisms.loading import load

    lm = load(MODEL)
    work = config.out / "training"
    made = small_dictionary(
        lm, config.site, latents=config.latents, k=config.k, tokens=config.tokens, seed=config.seed,
        checkpoint=work / "checkpoint", progress="dictionary",
    )  # fmt: skip
    made.facts = {key: made.facts[key] for key in _KEPT_FACTS if key in made.facts}
    dictionary = made.half()
    dictionary.save(config.out)
    dictionary = dictionary.float()
    measured = evaluate(
        lm, dictionary, tokens=_MEASURED, loss_tokens=_PREDICTED, seed=config.seed, progress=True
    )  # fmt: skip
    measured.save(config.out / METRICS)
    summary = _explained(lm, dictionary, config, work)
    _describe(lm, dictionary, measured, summary, config)
    return config.out


def load_dictionary(name_or_folder: str | Path, *, lm: "LanguageModel | None" = None) -> "Dictionary":
    """A bundled dictionary by its name or its model's, such as `organism:pebble`, or one in a folder, in any format.

    What is stored in half precision is computed in float32. Raises `SondeError` for an organism without a dictionary,
    and as `sonde.features.formats.detection` does.
    """
    import torch

    from sonde.features.formats.detection import load_dictionary as load

    text = str(name_or_folder)
    found = load(bundled_folder(text) if text.startswith(PREFIX) else text, lm=lm)
    return found.float() if found.w_enc.dtype == torch.float16 else found


def bundled_folder(name: str) -> Path:
    """The folder of the dictionary `organism:NAME-features`, or of that of the model `organism:NAME`.

    Raises `SondeError` where the package brings none.
    """
    from sonde.features.dictionary_files import WEIGHTS

    own = name.removeprefix(PREFIX)
    for known in (own, own + SUFFIX):
        if known in ORGANISMS.entries and has_weights(known) and (folder_of(known) / WEIGHTS).is_file():
            return folder_of(known)
    raise SondeError(
        f"no dictionary of {PREFIX}{own} is bundled, {MODEL} has one: train one with `sonde run sae {PREFIX}{own}`"
    )


def has_dictionary(model: str) -> bool:
    """Whether a dictionary of the model of this name is bundled."""
    if not model.startswith(PREFIX):
        return False
    try:
        return bundled_folder(model).is_dir()
    except SondeError:
        return False


def read_records(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """What latents.jsonl in a folder says, by hookpoint and number; empty where there is none.

    Raises `SondeError` for lines that are something else.
    """
    path = folder / LATENTS
    found: dict[str, dict[int, dict[str, Any]]] = {}
    if not path.is_file():
        return found
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            one = json.loads(line)
            found.setdefault(one["hookpoint"], {})[int(one["latent"])] = one
        except (ValueError, KeyError, TypeError) as error:
            raise SondeError(f"{path}, line {number}: expected an object with hookpoint and latent") from error
    return found


def _explained(
    lm: "LanguageModel", dictionary: "Dictionary", config: PebbleFeaturesConfig, work: Path
) -> dict[str, Any]:
    """Explain all latents by token sets, score them, and keep what a card shows in latents.jsonl."""
    from sonde.features.interp import Lexical, candidates, interpret
    from sonde.features.latent_cache import LatentCache
    from sonde.features.readers import LiteralReader
    from sonde.features.samplers import Sampling
    from sonde.features.scorers.simulation import Simulation
    from sonde.features.scorers.verdicts import Detection, Fuzzing
    from sonde.files import write_text
    from sonde.lm.asking.client import Client

    cache: LatentCache = LatentCache.build(
        lm, {config.site: dictionary}, None, work / "cache", tokens=config.read, context=CONTEXT, seed=config.seed,
        progress="latents",
    )  # fmt: skip

    def pieces(text: str) -> list[str]:
        assert lm.tokenizer is not None
        return lm.token_strings(list(lm.tokenizer(text, add_special_tokens=False)["input_ids"]))

    client = Client(LiteralReader(tokenize=pieces), seed=config.seed)
    shown: dict[str, Any] = {"shown": 5, "logprobs": False, "seed": config.seed}
    scorers: list[Any] = [Detection(**shown), Fuzzing(**shown), Simulation(seed=config.seed)]
    summary = interpret(
        candidates(
            cache, {config.site: range(config.latents)}, sampling=Sampling(min_examples=MIN_EXAMPLES), seed=config.seed
        ),
        explainer=Lexical(lm.token_strings),
        scorers=scorers,
        client=client,
        words=lm.token_strings,
        folder=work / "interp",
        total=config.latents,
        progress="explaining and scoring",
    ).to_json()
    client.answers.close()
    lines = (work / "interp" / LATENTS).read_text(encoding="utf-8").splitlines()
    write_text(config.out / LATENTS, "".join(_compact(lines)))
    return summary | {"read": cache.n_tokens}


def _compact(lines: list[str]) -> Iterator[str]:
    """Lines of latents.jsonl without windows, promoted tokens and measures that are not a scorer's own."""
    for line in lines:
        one = json.loads(line)
        del one["windows"], one["promoted"]
        for scored in one["measures"].values():
            main = scored["values"][scored["main"]]
            scored["values"] = {scored["main"]: {key: _rounded(value) for key, value in main.items()}}
        yield json.dumps(one, ensure_ascii=False, separators=(",", ":")) + "\n"


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _describe(
    lm: "LanguageModel",
    dictionary: "Dictionary",
    measured: "Metrics",
    summary: Mapping[str, Any],
    config: PebbleFeaturesConfig,
) -> None:
    from sonde.organisms.card import write_card

    design, found, losses = dictionary.design, measured.reconstruction, measured.losses
    assert losses is not None
    rates = [
        ("variance that it misses (FVU)", found.fvu),
        ("active latents of a token (L0)", found.l0),
        ("rise of the model's loss with it in place, nats per token", losses.delta),
        *((f"loss recovered, against {kind} ablation", share.interval) for kind, share in losses.ce_recovered.items()),
        *((f"{name} of the explanations, mean ({of})", interval) for name, of, interval in _means(summary)),
    ]
    records = read_records(config.out)[config.site].values()
    scored = [one for one in records if one["status"] == "scored"]
    best = sorted(scored, key=lambda one: -(one["measures"]["detection"]["values"]["balanced_accuracy"]["estimate"]))
    picked = [best[round(i * (len(best) - 1) / (_SAMPLES - 1))] for i in range(_SAMPLES)] if best else []
    statuses = ", ".join(f"{n} {status}" for status, n in summary["statuses"].items())
    write_card(
        config.out,
        {
            "name": "pebble-features",
            "summary": f"A sparse dictionary of {lm.name} at {config.site}, with lexical explanations of its latents. "
            "No language model.",
            "truth": [
                "Nothing is known to be true of its latents: the model was trained on plain text, nothing is planted.",
                f"{found.alive:.1%} of its latents fire in {found.tokens:,} tokens of text that it was not trained on.",
                f"Latents by what came of explaining them: {statuses}.",
                "A sentence is a set of tokens. It was judged by a reader that goes by these tokens, on windows that "
                "it was not made from; chance is 0.5 for detection and fuzzing and 0 for simulation.",
            ],
            "command": config.command,
            "architecture": {
                "kind": f"{design.kind}, k = {design.k}",
                "latents": design.latents,
                "width": design.inputs,
                "site": config.site,
                "model": f"{lm.name} ({lm.hash[:12]})",
                "parameters": sum(p.numel() for p in dictionary.parameters()),
                "stored_as": "float16",
            },
            "data": {
                "learned_from": "docstrings and comments of Python's library",
                "measured_on": measured.text,
                "explained_on": f"{summary['read']:,} tokens of help topics, {MIN_EXAMPLES} windows at least",
            },
            "training": {
                "tokens": dictionary.facts.get("tokens", config.tokens),
                "steps": dictionary.facts.get("steps", 0),
                "seed": config.seed,
            },
            "behaviour": [{"what": what, "rate": dataclasses.asdict(rate)} for what, rate in rates if rate is not None],
            "sampling": {"temperature": 0.0, "seed": config.seed},
            "samples": [
                {"prompt": f"latent {one['latent']}", "text": f" {one['explanation']}"} for one in picked
            ],
        },
    )  # fmt: skip


def _means(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    from sonde.stats.intervals import Interval

    for scorer, by_hookpoint in summary["scores"].items():
        for one in by_hookpoint.values():
            mean = one["mean"]
            if "low" in mean:
                measure = {"balanced_accuracy": "balanced accuracy", "all": "correlation"}[one["measure"]]
                yield scorer, measure, Interval(mean["estimate"], mean["low"], mean["high"], mean["n"])
