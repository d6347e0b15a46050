"""How much worse does a language model predict when a concept is erased from everything that its parts are given?

Erasers are fitted at the input of every attention (or recurrence) and MLP on one half of a labelled text, and the loss
is taken on the other: LEACE one after another, LEACE fitted on the clean run, SAL, a random subspace of as many
dimensions, and no edit. Other seeds take other halves and other random subspaces.

An edit also makes a model less sure, which lowers the loss of one that is too sure of a text. The loss is therefore
also taken with the logits of each condition divided by the temperature that was best for it on the first half.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name, Names, Text
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.concepts.scrubbing import Scrub
    from sonde.lm.batches import TokenBatches
    from sonde.lm.model import LanguageModel
    from sonde.lm.row_loss import RowLoss
    from sonde.lm.token_labels import TokenLabels
    from sonde.runs.blocks import Chapter
    from sonde.runs.finding import Finding
    from sonde.runs.run import Run
    from sonde.stats.intervals import Interval

# Name, method and order of each condition, in the order of expected loss.
CONDITIONS = (
    ("no edit", "", True),
    ("random subspace", "random", True),
    ("LEACE on the clean run", "leace", False),
    ("LEACE", "leace", True),
    ("SAL", "sal", True),
)
_CLEAN, _RANDOM, _STILL, _LEACE, _SAL = (name for name, *_ in CONDITIONS)
_CONTEXT = 256
_LEAST_ROWS = 8


@dataclass(frozen=True)
class ConceptScrubbingConfig(Runnable):
    """Erase a concept from all that a model's parts are given, and measure the loss.

    Example: sonde run concept-scrubbing organism:pebble --labels en_ewt-ud-test.conllu
    """

    words = ("sonde", "run", "concept-scrubbing")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    labels: Names = None
    """Files of labelled text: CoNLL-U (.conllu), or one .jsonl or .json with text and spans or label. By default
    --text is labelled by rules."""
    column: Name = "upos"
    """Which column of CoNLL-U: upos, xpos, deprel or feats:NAME."""
    text: Text = None
    """What is labelled by rules where no --labels are given. By default the help texts of Python."""
    concept: Literal["pos", "capitals", "class"] = "pos"
    """What the rules label: part of speech, capitals of words, or class of token."""
    where: Literal["all", "mixers", "mlps"] = "all"
    """Cut points: the inputs of all parts, of attention or recurrence alone, or of the MLPs alone."""
    layers: tuple[int, ...] | None = None
    """The blocks that are scrubbed. By default all."""
    tokens: Count = 32768
    """How many tokens are read: half to fit the erasers, half to score."""
    seeds: Count = 3
    """How many halves and random subspaces."""
    keep: Literal["memory", "disk", "recompute"] = "memory"
    """Where activations are kept between cut points: in memory or on disk (in half precision), or recomputed."""
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
    "concept-scrubbing",
    summary="the loss of a language model from which a concept, such as part of speech, is erased at every layer",
    paper="Belrose et al. 2023, LEACE: Perfect linear concept erasure in closed form (arXiv:2306.03819)",
)
def concept_scrubbing(config: ConceptScrubbingConfig) -> Path:
    """Scrub the model of `config` in every way, score it and write the report. Returns its path.

    Raises `SondeError` for anything wrong with model, labels, text or folder, before any work.
    """
    from sonde.concepts.scrubbing import cut_points
    from sonde.organisms.loading import load

    if config.seeds < 1:
        raise SondeError(f"--seeds is {config.seeds}: give at least 1")
    if config.labels and config.text is not None:
        raise SondeError("--labels bring their own text: leave --text out")
    check_options(config)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    sites = cut_points(lm, config.where, layers=config.layers)
    batches, labels, source = _labelled(config, lm)
    if batches.n_chunks < _LEAST_ROWS:
        raise SondeError(
            f"{source}: {batches.n_chunks} windows of {batches.context} tokens are too few; at least {_LEAST_ROWS} "
            "are needed: give more text or a larger --tokens"
        )
    with open_run("concept-scrubbing", config, lm) as run:
        losses: dict[str, list[RowLoss]] = {name: [] for name, *_ in CONDITIONS}
        ranks: list[int] = []
        fit = batches
        for number in range(config.seeds):
            fit, held = batches.split(0.5, start=(0.5 + number / config.seeds) % 1)
            found, rank = _scored(run, lm, fit, held, labels, sites, config, number)
            ranks.append(rank)
            for name, loss in found.items():
                losses[name].append(loss)
        chapter = _chapter(losses, lm, labels, fit, ranks, len(sites), config)
        title = f"{lm.name} without {labels.concept}"
        return publish(run, lm, batches, [chapter], title=title, source=source, timings=dict(run.timings))


def _labelled(config: ConceptScrubbingConfig, lm: "LanguageModel") -> "tuple[TokenBatches, TokenLabels, str]":
    """The text as windows, the class of each token, and what to call the text."""
    from sonde.data.labels import plain_texts, read_conllu, read_labels
    from sonde.data.rule_tags import tagged
    from sonde.data.text import describe
    from sonde.lm.batches import TokenBatches
    from sonde.lm.token_labels import TokenLabels

    if lm.tokenizer is None or not lm.tokenizer.is_fast:
        raise SondeError(f"{config.model} has no fast tokenizer, which says where in the text its tokens are")
    layout: dict[str, Any] = {"context": min(_CONTEXT, lm.context), "limit_tokens": config.tokens}
    if config.labels:
        first, *others = config.labels
        several = bool(others) or first.lower().endswith(".conllu")
        labelled = read_conllu(config.labels, column=config.column or "upos") if several else read_labels(first)
        batches = TokenBatches(list(labelled.texts), lm.tokenizer, **layout)
        source = ", ".join(Path(name).name for name in config.labels)
    else:
        batches = TokenBatches(config.text, lm.tokenizer, **layout)
        texts = plain_texts(config.text, int(batches.extents()[0][-1]) + 1)
        labelled = tagged(texts, config.concept)
        source = f"{describe(config.text)}, labelled by rules"
    return batches, TokenLabels.of(batches, labelled), source


def _scored(
    run: "Run",
    lm: "LanguageModel",
    fit: "TokenBatches",
    held: "TokenBatches",
    labels: "TokenLabels",
    sites: tuple[str, ...],
    config: ConceptScrubbingConfig,
    number: int,
) -> "tuple[dict[str, RowLoss], int]":
    """Losses of every condition of one seed, from the run folder where they are there, and the rank of LEACE."""
    from sonde.lm.row_loss import RowLoss, best_temperature, row_loss

    found: dict[str, RowLoss] = {}
    scrubs: dict[str, Scrub] = {}
    for name, method, _ in (CONDITIONS[i] for i in (0, 3, 1, 2, 4)):
        step = f"seed-{number}-{name.lower().replace(' ', '-')}"
        if method:
            scrubs[name] = _fitted(run, lm, fit, labels, sites, config, number, name, scrubs.get(_LEACE), step)
        if run.done(step):
            found[name] = RowLoss(**{key: value.numpy() for key, value in run.result(step).items()})
            continue
        edits = scrubs[name].edits if method else {}
        warmth = best_temperature(lm, fit, edits)
        found[name] = row_loss(lm, held, edits, temperature=warmth, progress=f"loss, {name}, seed {number}")
        run.finish(step, _tensors(found[name]))
    return found, max(scrubs[_LEACE].ranks.values())


def _fitted(
    run: "Run",
    lm: "LanguageModel",
    fit: "TokenBatches",
    labels: "TokenLabels",
    sites: tuple[str, ...],
    config: ConceptScrubbingConfig,
    number: int,
    name: str,
    leace: "Scrub | None",
    step: str,
) -> "Scrub":
    from sonde.concepts.scrubbing import Scrub, scrub

    folder = run.path("scrubs", step)
    if (folder / "scrub.json").exists():
        return Scrub.load(folder, device=lm.device)
    method, sequential = next((method, order) for other, method, order in CONDITIONS if other == name)
    return scrub(
        lm,
        fit,
        labels,
        method=method,  # type: ignore[arg-type]
        sites=sites,
        sequential=sequential,
        ranks=leace.ranks if leace else None,
        keep=config.keep,
        folder=folder,
        seed=config.seed + 7919 * number,
        progress=f"{name}, seed {number}",
    )


def _tensors(loss: "RowLoss") -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(values) for name, values in vars(loss).items()}


def _chapter(
    losses: "dict[str, list[RowLoss]]",
    lm: "LanguageModel",
    labels: "TokenLabels",
    fit: "TokenBatches",
    ranks: list[int],
    n_sites: int,
    config: ConceptScrubbingConfig,
) -> "Chapter":
    from sonde.lm.row_loss import RowLoss
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Figure, Table
    from sonde.runs.report.numbers import number

    joined = {name: RowLoss.joined(parts) for name, parts in losses.items()}
    seed, clean = config.seed, joined[_CLEAN]
    drawn: dict[str, Any] = {"clusters": clean.chunks, "seed": seed}
    totals = {name: loss.bits_per_byte(tempered=True, **drawn).estimate for name, loss in joined.items()}
    plain = {name: loss.bits_per_byte(**drawn).estimate for name, loss in joined.items()}
    above = {name: loss.above(clean, tempered=True, **drawn) for name, loss in joined.items() if name != _CLEAN}
    findings = _findings(joined, labels, shlex.join(config.command()), seed)
    chart = chart_kinds.intervals(
        [
            {"model": name, "bits": t.estimate, "low": t.low, "high": t.high, "as_it_is": plain[name] - plain[_CLEAN]}
            for name, t in above.items()
        ],
        label="model",
        value="bits",
        low="low",
        high="high",
        control="as_it_is",
        title=f"Without {labels.concept} the model needs {number(above[_LEACE].estimate, 2)} bits per byte more",
        subtitle="Above no edit, on held-out text at each one's best temperature; 95 % intervals; grey ticks: as it is",
        x_title="added loss (bits per byte)",
        y_title="what is erased",
    )
    counts = labels.counts(fit)
    return Chapter(
        id="scrubbing",
        question=f"How much does the model lean on {labels.concept}?",
        answer=(
            f"{findings[0].sentence} It needs {number(totals[_CLEAN])} bits per byte with no edit, "
            f"{number(totals[_RANDOM])} without a random subspace of as many dimensions and "
            f"{number(totals[_LEACE])} after LEACE."
        ),
        findings=findings,
        blocks=[
            Figure(
                id="scrubbing.loss",
                chart=chart,
                caption=f"Loss with {labels.concept} erased in several ways; controls: no edit, random subspace.",
            ),
            Table(
                id="scrubbing.seeds",
                caption=(
                    f"Bits per byte on each of {config.seeds} held halves of the text and on all of them, at the best "
                    "temperature of each condition; the last column has all of them at temperature 1"
                ),
                columns=[
                    "what is erased",
                    *(Column(name=f"seed {i}", digits=4) for i in range(config.seeds)),
                    Column(name="all", digits=4),
                    Column(name="as it is", digits=4),
                ],
                rows=[
                    [
                        name,
                        *(p.bits_per_byte(tempered=True, seed=config.seed).estimate for p in parts),
                        totals[name],
                        plain[name],
                    ]
                    for name, parts in losses.items()
                ],
            ),
            Table(
                id="scrubbing.classes",
                caption="Tokens of each class in the half that the erasers of the last seed were fitted on",
                columns=["class", Column(name="tokens", digits=6)],
                rows=[[name, count] for name, count in sorted(counts.items(), key=lambda pair: -pair[1])],
            ),
        ],
        not_shown=(
            "Erasing takes out every linear trace of the concept, and with it what goes along with the concept: a "
            "loss shows that the model's parts are given it, not which of them uses it. What could be read by a "
            "nonlinear classifier may still be there."
        ),
        how=(
            f"{n_sites} cut points: what attention or recurrence and the MLP of each block are given. At each, in "
            f"order of depth, an eraser of at most {max(ranks)} dimensions is fitted on half of the windows, run "
            "through those before it. LEACE is the erasure that changes activations least; SAL projects orthogonally; "
            "on the clean run: all erasers fitted without the others in place. Tokens without a label are run and "
            "scored, but not fitted on. An edit also makes a model less sure, and on text that a model is too sure of "
            "that alone lowers the loss; so the logits of each condition are divided by the temperature that is best "
            "for it on the fitting half. Intervals: bootstrap over windows, which are drawn with all their seeds."
        ),
    )


def _findings(joined: "dict[str, RowLoss]", labels: "TokenLabels", command: str, seed: int) -> "list[Finding]":
    from sonde.runs.finding import Control, Finding, Paper

    clean = joined[_CLEAN]
    drawn: dict[str, Any] = {"clusters": clean.chunks, "seed": seed}
    above = {name: joined[name].above(clean, tempered=True, **drawn) for name in (_RANDOM, _LEACE)}
    plain = {name: joined[name].above(clean, **drawn) for name in (_RANDOM, _LEACE)}
    still = joined[_LEACE].above(joined[_STILL], tempered=True, **drawn)
    dearer = joined[_SAL].above(joined[_LEACE], tempered=True, **drawn)
    shared: dict[str, Any] = {
        "chapter": "scrubbing",
        "unit": "bits per byte",
        "command": command,
        "figures": ("scrubbing.loss",),
        "tables": ("scrubbing.seeds",),
    }
    control = "random subspace of as many dimensions"
    return [
        Finding.of(
            above[_LEACE],
            id="scrubbing.added-loss",
            sentence=_verdict(labels.concept, above[_LEACE], above[_RANDOM]),
            metric="loss added by LEACE at every cut point, at the best temperature",
            control=Control.of(control, above[_RANDOM]),
            **shared,
        ),
        Finding.of(
            plain[_LEACE],
            id="scrubbing.plain-loss",
            sentence="That is the loss that LEACE adds to the model as it is.",
            metric="loss added by LEACE at every cut point, at temperature 1",
            control=Control.of(control, plain[_RANDOM]),
            paper=Paper(1.04, "LLaMA 7B, part of speech, 0.69 to 1.73", "Belrose et al. 2023, arXiv:2306.03819"),
            **shared,
        ),
        Finding.of(
            still,
            id="scrubbing.sequential",
            sentence="Erasers fitted one after another cost more than those of the clean run, which leave some of it."
            if still.low > 0
            else "Fitting erasers one after another makes no difference that shows.",
            metric="loss of LEACE above that of LEACE on the clean run",
            control=Control("no difference", 0.0),
            **shared,
        ),
        Finding.of(
            dearer,
            id="scrubbing.sal",
            sentence="SAL, which guards as well, costs more than LEACE."
            if dearer.low > 0
            else "SAL does not cost more than LEACE.",
            metric="loss of SAL above that of LEACE",
            better="higher",
            control=Control("no difference", 0.0),
            **shared,
        ),
    ]


def _verdict(concept: str, leace: "Interval", random: "Interval") -> str:
    """What LEACE costs beside a random subspace, in a sentence."""
    from sonde.runs.report.numbers import number

    if leace.low <= random.high:
        return f"Erasing {concept} costs no more than erasing a random subspace: the model does not lean on it."
    if random.low <= 0:
        return f"Erasing {concept} costs, and erasing a random subspace costs nothing: the model leans on it."
    times = number(leace.estimate / random.estimate, 2)
    return f"Erasing {concept} costs {times} times what erasing a random subspace costs: the model leans on it."
