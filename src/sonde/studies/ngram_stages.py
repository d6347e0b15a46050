"""Does a network learn single tokens first, then pairs, then triples? Its distance to n-gram models over training.

By default small transformers are trained on the characters of source code, from several seeds, and watched on the way;
with --model the checkpoints of a language model are read instead. The control is the distance of the same networks to
n-gram models of the same text with its tokens shuffled, which has no order beyond single tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Named, Read, Runnable, check_options, halves, open_run, publish, read_text

if TYPE_CHECKING:
    from sonde.data.characters import CharacterText
    from sonde.dynamics.ngram_stages import Yardsticks
    from sonde.lm.model import LanguageModel
    from sonde.runs.run import Run
    from sonde.studies.ngram_chapters import Trace

_HEADS = 4
_SEEDS = 3
_HELD = 7919  # apart from the seeds of weights and batches


@dataclass(frozen=True)
class NgramStagesConfig(Runnable):
    """Which order of n-grams does a network resemble, at each point of its training?

    Example: sonde run ngram-stages --model EleutherAI/pythia-14m --revisions step1,step16,step256,step4000
    """

    words = ("sonde", "run", "ngram-stages")

    text: Text = None
    """What is read. By default the source code of Python's standard library; with --model, Python's help texts."""
    characters: Count = 3_000_000
    """How many characters of the text are read, without --model."""
    seeds: Count = _SEEDS
    """Networks that are trained, from --seed on."""
    steps: Count = 1024
    """Training steps; the network is looked at after 0, 1, 2, 4, …"""
    width: Count = 128
    """Width of the network; it has two layers."""
    layers: Count = 2
    """Layers of the network."""
    batch: Count = 16
    """Sequences in a training step."""
    context: Count = 64
    """Tokens in a sequence."""
    lr: Annotated[float, arg(metavar="RATE")] = 1e-3
    """Learning rate of AdamW."""
    orders: Count = 3
    """The longest n-grams."""
    smoothing: Name = "kneser-ney"
    """kneser-ney or absolute."""
    sequences: Count = 256
    """Held-out sequences, and sequences drawn from each n-gram model."""
    model: Name = None
    """A language model whose checkpoints are read instead: a name on the hub with --revisions, or a folder of folders
    such as step1000 or checkpoint-500."""
    revisions: Names = None
    """Branches on the hub, or folders in the model's folder, that are its checkpoints; the last number in a name is
    the step."""
    tokens: Count = 65536
    """How many tokens of the text are read, with --model; n-grams are counted on the first half."""
    device: Name = None
    """cpu, cuda, cuda:1. By default the CPU."""
    out: Folder = None
    """The run folder. By default a new one under runs/."""
    seed: Count = 0
    """Seed of the weights, the batches and everything else that is drawn."""
    resume: bool = False
    """Go on with the interrupted run in the folder given as --out."""


@study(
    "ngram-stages",
    summary="networks resemble unigrams, then bigrams, then trigrams while they are trained: when, and how closely",
    paper="Belrose et al. 2024, Neural Networks Learn Statistics of Increasing Complexity (arXiv:2402.04362)",
)
def ngram_stages(config: NgramStagesConfig) -> Path:
    """Train or read the checkpoints, measure each and write the report. Returns its path.

    Raises `SondeError` for options that do not fit, checkpoints that do not exist, and anything wrong with the text,
    the models or the folder.
    """
    _check(config)
    return _of_checkpoints(config) if config.model else _of_training(config)


def _check(config: NgramStagesConfig) -> None:
    check_options(config)
    if config.smoothing not in ("kneser-ney", "absolute"):
        raise SondeError(f"--smoothing is {config.smoothing!r}: give kneser-ney or absolute")
    if not 1 <= config.orders < config.context:
        raise SondeError(f"--orders is {config.orders}: give 1 or more, below the context of {config.context}")
    if min(config.seeds, config.steps, config.width, config.layers, config.batch) < 1 or config.sequences < 2:
        raise SondeError("--seeds, --steps, --width, --layers and --batch take 1 or more, --sequences 2 or more")
    if config.lr <= 0 or config.width % _HEADS:
        raise SondeError(f"--lr takes a number above 0, --width a multiple of {_HEADS}")
    if config.revisions and not config.model:
        raise SondeError("--revisions needs --model, the model whose checkpoints they are")


def _of_training(config: NgramStagesConfig) -> Path:
    import hashlib

    import torch

    from sonde.data.characters import read_characters
    from sonde.studies.ngram_chapters import chapters

    text = read_characters(config.text, limit=config.characters)
    held = text.windows(config.context + 1, config.sequences, seed=_HELD, held=True)
    name = f"{config.layers}-layer transformers"
    with open_run("ngram-stages", config, Named(name)) as run:
        yardsticks, notes = _yardsticks(config, text.train, torch.from_numpy(held), len(text.alphabet))
        traces, parameters = {}, 0
        for seed in range(config.seed, config.seed + config.seeds):
            traces[seed], parameters = _trained(config, run, text, yardsticks, seed)
        digest = hashlib.sha256(b"".join(ids.tobytes() for ids in [*text.train, *text.held])).hexdigest()
        return publish(
            run,
            Named(name, n_parameters=parameters),
            Read(sum(map(len, [*text.train, *text.held])), digest),
            chapters(config, traces, yardsticks, tokens_per_byte=1 / text.bytes_per_token, notes=notes),
            title="Which order of statistics a network has learned, and when",
            source=f"{text.source}: {sum(map(len, text.train)):,} characters trained on, {len(text.alphabet)} kinds",
            timings=dict(run.timings),
        )


def _trained(
    config: NgramStagesConfig, run: "Run", text: "CharacterText", yardsticks: "Yardsticks", seed: int
) -> "tuple[Trace, int]":
    """What a network looked like on its way, and its number of parameters."""
    import dataclasses

    import torch

    from sonde.dynamics.ngram_stages import measure
    from sonde.nets.loop import Schedule, Watch, log_steps, train
    from sonde.nets.transformer import Transformer, TransformerShape

    shape = TransformerShape(
        len(text.alphabet), width=config.width, layers=config.layers, heads=_HEADS, context=config.context
    )
    network = Transformer(shape, seed=seed)
    parameters = sum(p.numel() for p in network.parameters())
    if run.done(f"seed-{seed}"):
        return run.result(f"seed-{seed}"), parameters
    device = torch.device(config.device or "cpu")
    network.to(device)

    def on_device(tokens: torch.Tensor) -> torch.Tensor:
        return network(tokens.to(device))

    def loss(step: int) -> torch.Tensor:
        drawn = text.windows(config.context + 1, config.batch, seed=(seed << 32) + step)
        tokens = torch.from_numpy(drawn).to(device)
        logits = network(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    watch = Watch(log_steps(config.steps), lambda done: measure(on_device, yardsticks))
    train(
        network,
        loss,
        [torch.optim.AdamW(network.parameters(), lr=config.lr)],
        steps=config.steps,
        schedule=Schedule(warmup=0, decay=0),
        checkpoint=run.checkpoint(f"seed-{seed}"),
        identity={"shape": dataclasses.asdict(shape), "seed": seed, "lr": config.lr, "batch": config.batch},
        watch=watch,
        progress=f"seed {seed}",
    )
    run.finish(f"seed-{seed}", watch.seen)
    return watch.seen, parameters


def _of_checkpoints(config: NgramStagesConfig) -> Path:
    import torch

    from sonde.data.text import describe
    from sonde.dynamics.ngram_stages import logits_of, measure
    from sonde.studies.ngram_chapters import chapters

    series = _series(config)
    first = _load(config, series[0][1])
    text = read_text(config, first)
    fit, held = halves(text, describe(config.text))
    windows = torch.cat([batch.tokens for batch in fit])
    rows = torch.cat([batch.tokens for batch in held])[: config.sequences, : config.context + 1]
    with open_run("ngram-stages", config, first) as run:
        yardsticks, notes = _yardsticks(config, windows.numpy(), rows, first.vocab_size)
        found: Trace = {}
        for i, (step, place) in enumerate(series):
            name = f"step-{step}"
            if not run.done(name):
                lm = first if i == 0 else _load(config, place)
                run.finish(name, measure(logits_of(lm), yardsticks))
            found[step] = run.result(name)
            run.progress("checkpoints", done=i + 1, total=len(series))
        return publish(
            run,
            first,
            text,
            chapters(
                config, {config.seed: found}, yardsticks, tokens_per_byte=text.n_tokens / text.n_bytes, notes=notes
            ),
            title=f"Which order of statistics {config.model} has learned, and when",
            source=describe(config.text),
            timings=dict(run.timings),
        )


def _series(config: NgramStagesConfig) -> list[tuple[int, str]]:
    """Steps of the checkpoints and where to load them: `FOLDER`, or `NAME@REVISION` on the hub."""
    from sonde.dynamics.ngram_stages import checkpoints_in, step_of

    assert config.model is not None
    folder = Path(config.model)
    names = [name for given in config.revisions or () for name in given.split(",") if name]
    if not names:
        found = [(step, str(path)) for step, path in checkpoints_in(folder)]
        if not found:
            raise SondeError(
                f"{config.model} holds no folders such as step1000 or checkpoint-500: name the checkpoints with "
                "--revisions step1,step2,…"
            )
        return found
    series = []
    for i, name in enumerate(names):
        step = step_of(name)
        local = folder.is_dir()
        if local and not (folder / name).is_dir():
            raise SondeError(f"{folder / name} does not exist: --revisions are folders in {folder}")
        series.append((i if step is None else step, str(folder / name) if local else f"{config.model}@{name}"))
    if len({step for step, _ in series}) < len(series):
        raise SondeError(f"--revisions {', '.join(names)}: two of them have the same step")
    return sorted(series)


def _load(config: NgramStagesConfig, place: str) -> "LanguageModel":
    from sonde.organisms.loading import load

    if Path(place).is_dir():
        return load(place, device=config.device, name=str(config.model))
    name, _, revision = place.rpartition("@")
    return load(name, device=config.device, revision=revision)


def _yardsticks(config: NgramStagesConfig, train: Any, held: Any, vocab: int) -> "tuple[Yardsticks, tuple[str, ...]]":
    """N-gram models of the text and of the shuffled text, and what they say of the held sequences."""
    import numpy as np

    from sonde.dynamics.ngram_stages import Yardsticks, shuffled
    from sonde.stats.ngram import NgramModel

    flat = train.ravel() if isinstance(train, np.ndarray) else np.concatenate(train)
    smoothing: Any = config.smoothing
    model = NgramModel.fit(train, vocab_size=vocab, order=config.orders, smoothing=smoothing)
    mixed = NgramModel.fit(shuffled(flat), vocab_size=vocab, order=config.orders, smoothing=smoothing)
    models = {str(n): (model, n) for n in range(1, config.orders + 1)}
    return (
        Yardsticks.build(
            models | {f"shuffled {n}": (mixed, n) for n in range(2, config.orders + 1)},
            held,
            sampled=tuple(models),
            sequences=config.sequences,
            seed=config.seed,
        ),
        model.notes,
    )
