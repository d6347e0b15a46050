"""What does every latent of a dictionary respond to, in a sentence, and how far can the sentence be trusted?

The model reads a text, the latents' windows are cut, each latent gets an explanation, and all scorers test it on
windows that the explainer did not see. By default nothing outside is asked: explanations are token sets, and the reader
that judges them goes by the tokens that they name. With --ask a language model explains and judges, within a budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.features.latent_cache import LatentCache
    from sonde.features.samplers import Sampling
    from sonde.features.scorers.scorer import Scorer
    from sonde.lm.asking.client import Client
    from sonde.lm.asking.completion import Backend
    from sonde.lm.asking.ledger import Price
    from sonde.lm.model import LanguageModel

SCORERS = (
    "detection",
    "fuzzing",
    "simulation",
    "surprisal",
    "embedding",
    "example-embedding",
    "intruder",
    "generation",
    "intervention",
)
_UNPAID = ("literal", "coin")
# They decide what is asked and paid, not what comes out.
_OF_THE_CALLS = {
    "budget", "no_budget", "price", "dry_run", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout",
    "key_variable",
}  # fmt: skip

Number = Annotated[float | None, arg(metavar="X")]


@dataclass(frozen=True)
class AutoInterpConfig(Runnable):
    """Explain the latents of dictionaries in words and score the explanations.

    Example: sonde run auto-interp organism:pebble --dictionary runs/sae/dictionary --latents 20
    """

    words = ("sonde", "run", "auto-interp")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    dictionary: Names = None
    """Folders of dictionaries, of any format that is read, or organism:pebble. By default the middle block's MLP
    neurons, 32 a token."""
    text: Text = None
    """A file, a folder or a data set in which latents are watched. By default the help() topics of Python."""
    tokens: Count = 262144
    """Tokens of text to read."""
    context: Count = 128
    """Tokens in a sequence; --window divides it."""
    latents: Count = 20
    """Latents to explain at each hookpoint, drawn from those that fire often enough; 0 for all."""
    explainer: Literal["lexical", "plain", "chain-of-thought", "logits", "single-token", "contrastive"] = "lexical"
    """Who explains: the best set of tokens (lexical, nobody is asked), or the model of --ask in one of five ways."""
    explanations: Name = None
    """A file of explanations to score instead, as explanations.jsonl of an earlier run."""
    scorers: Names = None
    """Which tests are made, of detection, fuzzing, simulation, surprisal, embedding, example-embedding, intruder,
    generation and intervention. By default all."""
    ask: str = "literal"
    """Who is asked: literal (a reader that goes by quoted tokens), coin (chance), local:MODEL, vllm:MODEL,
    PROVIDER/MODEL through inspect-ai, or the name of a model at --base-url."""
    base_url: Name = None
    """The address of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the server's key."""
    reader_context: Annotated[int | None, arg(metavar="N")] = None
    """Tokens that prompt and answer of the asked model share, where it is known."""
    probabilities: bool = False
    """Ask for log-probabilities of answers, from which detection and fuzzing get an AUC."""
    price: Annotated[tuple[float, ...] | None, arg(metavar="PROMPT ANSWER [CACHED]")] = None
    """Dollars per million tokens of prompts, of answers and, if they cost less, of cached prompts."""
    budget: Number = None
    """Dollars at most; no call is made that could exceed them."""
    no_budget: bool = False
    """Ask without a limit."""
    dry_run: bool = False
    """Say what it would cost, and ask nobody."""
    concurrency: Count = 64
    """Calls in flight."""
    requests_per_minute: Number = None
    """Most requests a minute. By default no limit."""
    tokens_per_minute: Number = None
    """Most tokens a minute. By default no limit."""
    timeout: Annotated[float, arg(metavar="SECONDS")] = 120.0
    """Seconds after which a call is given up and made again."""
    window: Count = 32
    """Tokens in a window."""
    sampler: Literal["top", "random", "quantiles", "mix"] = "quantiles"
    """How the explainer's windows are chosen."""
    negatives: Literal["random", "neighbours", "hard"] = "random"
    """Windows in which the latent is silent: any, ones in which a latent fires that often fires with it, or ones that
    share words with its strongest."""
    min_examples: Count = 200
    """Windows in which a latent has to fire; others are too rare."""
    examples: Count = 50
    """Held-out windows of each kind."""
    shown: Count = 5
    """Passages in a question of detection, fuzzing and intruder."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    dtype: Name = None
    """float32, bfloat16 or float16. By default float32 on a CPU, the stored type elsewhere."""
    seed: Count = 0
    """Seed of everything that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out: no answer is paid for twice."""

    def settings(self) -> dict[str, Any]:
        """What decides the numbers: not what a call costs or how fast it is made."""
        return {key: value for key, value in super().settings().items() if key not in _OF_THE_CALLS}

    @property
    def chosen(self) -> tuple[str, ...]:
        """The scorers, in their order. Raises `SondeError` for one that does not exist."""
        for name in self.scorers or ():
            if name not in SCORERS:
                raise SondeError(f"there is no scorer {name!r}: use some of {', '.join(SCORERS)}")
        return tuple(name for name in SCORERS if self.scorers is None or name in self.scorers)

    def sampling(self) -> "Sampling":
        """How windows are cut and chosen. Raises `SondeError` for what does not fit."""
        from sonde.features.samplers import Sampling
        from sonde.features.windows import check_length

        check_length(self.window, self.context)
        return Sampling(
            length=self.window,
            sampler=self.sampler,
            negative_kind=self.negatives,
            test=self.examples,
            negatives=self.examples,
            min_examples=self.min_examples,
        )

    def paid(self) -> "Price | None":
        """What asking costs. Raises `SondeError` where somebody outside is asked without a price and a budget."""
        from sonde.lm.asking.ledger import Ledger, Price, price_of

        if self.price is not None and len(self.price) not in (2, 3):
            raise SondeError(f"--price takes two or three numbers, dollars per million tokens, not {len(self.price)}")
        price = Price(*self.price) if self.price is not None else price_of(self.ask)
        outside = self.base_url is not None or not self.ask.startswith((*_UNPAID, "local:", "vllm:"))
        if outside and not self.no_budget:
            if price is None:
                raise SondeError(
                    f"the price of {self.ask} is not known: give --price PROMPT ANSWER, dollars per million tokens, "
                    "or --no-budget"
                )
            if self.budget is None and not self.dry_run:
                raise SondeError(f"asking {self.ask} costs money: give --budget DOLLARS, or --no-budget")
        Ledger(price, None if self.no_budget else self.budget)
        return price


@study(
    "auto-interp",
    summary="a sentence for every latent of a dictionary, and nine tests of how far it can be trusted",
    paper="Paulo et al. 2024, Automatically Interpreting Millions of Features in Large Language Models "
    "(arXiv:2410.13928)",
)
def auto_interp(config: AutoInterpConfig) -> Path:
    """Cache, explain, score and write the report. Returns its path.

    Raises `SondeError` for options that do not fit, dictionaries that cannot be read, prices that are not known, and
    anything wrong with the model, the text or the folder.
    """
    from sonde.data.text import describe
    from sonde.features.latent_cache import LatentCache
    from sonde.organisms.loading import load
    from sonde.studies import auto_interp_chapters as chapters
    from sonde.studies import auto_interp_sources as sources
    from sonde.studies.running import Read

    check_options(config)
    sampling, price, names = config.sampling(), config.paid(), config.chosen
    lm = load(config.model, dtype=config.dtype, device=config.device)
    encoders = sources.encoders(lm, config.dictionary)
    backend = sources.backend(lm, config)
    with open_run("auto-interp", config, lm) as run:
        cache = LatentCache.build(
            lm, encoders, config.text, run.path("cache"), tokens=config.tokens, context=config.context,
            seed=config.seed, progress="latents",
        )  # fmt: skip
        drawn, rare = sources.drawn(cache, config)
        scorers = sources.scorers(lm, encoders, cache, names, config)
        done = "estimate" if config.dry_run else "scores"
        if not run.done(done):
            summary = _interpreted(run, lm, encoders, cache, drawn, scorers, sampling, backend, price, config)
            if not summary["stopped"]:
                run.finish(done, summary)
        else:
            summary = run.result(done)
        material = Read(cache.n_tokens, cache.config["text"]["hash"])
        written = (
            [chapters.cost_chapter(summary, config)]
            if config.dry_run
            else chapters.chapters(
                run.path(), summary, rare, config, chapters.views(run.path(), lm, encoders, cache, config)
            )
        )
        return publish(
            run,
            lm,
            material,
            written,
            title=f"What the latents of {lm.name} respond to",
            source=describe(config.text),
            timings=dict(run.timings),
            skipped={"latents not asked about": summary["stopped"]} if summary["stopped"] else {},
        )


def _interpreted(
    run: Any,
    lm: "LanguageModel",
    encoders: Mapping[str, Any],
    cache: "LatentCache",
    drawn: Mapping[str, list[int]],
    scorers: "list[Scorer]",
    sampling: "Sampling",
    backend: "Backend",
    price: "Price | None",
    config: AutoInterpConfig,
) -> dict[str, Any]:
    """Explain and score; for a dry run with a coin in the model's place, in a folder of its own."""
    from sonde.features.interp import candidates, interpret
    from sonde.features.neighbours import by_cooccurrence
    from sonde.features.samplers import HardPool
    from sonde.studies import auto_interp_sources as sources

    pool = near = None
    if config.negatives == "hard":
        pool = HardPool(
            cache, sources.word_overlap(lm, cache, sampling), lm.decode, length=config.window, seed=config.seed
        )
    if config.negatives == "neighbours":
        tables = {hookpoint: by_cooccurrence(cache, hookpoint) for hookpoint in cache.hookpoints}
        near = lambda hookpoint, latent: tables[hookpoint].of(latent)  # noqa: E731
    client = _client(run, backend, price, config)
    try:
        return interpret(
            candidates(
                cache,
                drawn,
                sampling=sampling,
                seed=config.seed,
                neighbours=near,
                pool=pool,
                promoted=sources.promoted(lm, sources.written(lm, encoders)),
            ),
            explainer=sources.explainer(lm, config),
            scorers=scorers,
            client=client,
            words=lm.token_strings,
            folder=run.path("estimate") if config.dry_run else run.path(),
            total=sum(map(len, drawn.values())),
            progress="explaining and scoring",
        ).to_json()
    finally:
        client.answers.close()


def _client(run: Any, backend: "Backend", price: "Price | None", config: AutoInterpConfig) -> "Client":
    from sonde.lm.asking.client import Client, Limits

    limits = Limits(
        concurrency=config.concurrency,
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
        timeout=config.timeout,
    )
    if config.dry_run:
        return Client(backend, price=price, limits=limits)
    budget = None if config.no_budget else config.budget
    return Client(
        backend, answers=run.path("calls.sqlite"), price=price, budget=budget, limits=limits, seed=config.seed
    )
