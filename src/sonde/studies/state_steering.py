"""Can a recurrent network be steered by its state, and by state and residual stream together?

The mean difference of states after two kinds of prompts is added once to the state before the last token; the vector of
the residual stream is added at that token; and both. By default on the three mode-recall organisms, where the bit that
is to be moved is known; with a file of contrast items on any models.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Name
from sonde.studies.registry import study
from sonde.studies.running import Named, Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.run import Run
    from sonde.studies.steering_chapters import Measured, Task

TOYS = ("organism:mode-recall-mamba", "organism:mode-recall-mamba2", "organism:mode-recall-rwkv")
_CITE = "Paulo, Marshall & Belrose 2024, arXiv:2404.05971"
_LENGTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class StateSteeringConfig(Runnable):
    """Steer recurrent networks by residual stream, by state, and by both.

    Example: sonde run state-steering --models organism:pebble-mamba2 --contrast refusal.json
    """

    words = ("sonde", "run", "state-steering")

    models: Annotated[tuple[str, ...], arg(metavar="MODEL ...")] = TOYS
    """Local folders in Hugging Face format, names on the hub, or organism:NAME. By default the three toys."""
    contrast: Name = None
    """A JSON file of contrast items. By default the toys' own rows, which other models cannot read."""
    pairs: Count = 64
    """Pairs that vectors and states are made from."""
    items: Count = 64
    """Held-out items that are scored."""
    multipliers: Annotated[tuple[float, ...], arg(metavar="M ...")] = (-3.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 3.0)
    """Strengths; 1 and -1 are always among them."""
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
    "state-steering",
    summary="steer recurrent networks by their state, their residual stream, and both",
    paper="Paulo, Marshall & Belrose 2024, Does Transformer Interpretability Transfer to RNNs? (arXiv:2404.05971)",
)
def state_steering(config: StateSteeringConfig) -> Path:
    """Measure every model of `config` and write the report. Returns its path.

    Raises `SondeError` for models without a recurrent state, models that are not toys without a file of items, and
    anything wrong with a model, the file or the folder.
    """
    from sonde.concepts.state_steering import require_states
    from sonde.organisms.loading import load
    from sonde.studies import steering_chapters as shared
    from sonde.studies.steering_items import items_of, read_items

    check_options(config)
    if not config.models or len(set(config.models)) < len(config.models):
        raise SondeError(f"--models takes one or more different models, not {' '.join(config.models) or 'none'}")
    if min(config.pairs, config.items) < 2 or not config.multipliers:
        raise SondeError("--pairs and --items are at least 2, and --multipliers at least one number")
    foreign = [name for name in config.models if "mode-recall" not in name]
    if foreign and config.contrast is None:
        raise SondeError(f"{foreign[0]} needs --contrast FILE: the toys' rows are words that only they know")
    loaded = [load(name, dtype=config.dtype, device=config.device) for name in config.models]
    for lm in loaded:
        require_states(lm)
    if config.contrast is None:
        tasks, source = [_toy_task(config) for _ in loaded], "mode-recall rows"
    else:
        fit, held = read_items(config.contrast, None, pairs=config.pairs, held=config.items, seed=config.seed)
        tasks, source = [items_of(lm, fit, held)[0] for lm in loaded], Path(config.contrast).name
    command = shlex.join(config.command())
    with open_run("state-steering", config, Named("models", device=str(loaded[0].device))) as run:
        chapters, found = [], []
        for number, (lm, task) in enumerate(zip(loaded, tasks, strict=True)):
            one = shared.measured(
                run, lm, task, step=f"model-{number}", multipliers=config.multipliers, seed=config.seed
            )
            found.append(one)
            chapters.append(_model_chapter(one, number, command))
            chapters.append(_decay_chapter(run, lm, task, one, number, command))
        chapters.insert(0, _summary(found, command))
        return publish(
            run,
            Named.of(loaded),
            shared.material(tasks[0].items),
            chapters,
            title="Steering recurrent networks by state and residual stream",
            source=source,
            timings=dict(run.timings),
        )


def _toy_task(config: StateSteeringConfig) -> "Task":
    from sonde.concepts.sweep import Choice
    from sonde.organisms.mode_recall import answer_ids, draw, pairs
    from sonde.studies.steering_chapters import Task

    day, night = pairs(config.pairs, seed=config.seed + 1)
    match, other = answer_ids().tolist()
    rows = draw(config.items, seed=config.seed + 2)[0].tolist()
    states = [row[:-1] for row in day], [row[:-1] for row in night]
    return Task(day, night, states, [Choice(row, match, other) for row in rows])


def _summary(found: "list[Measured]", command: str) -> "Chapter":
    """The largest change by kind of edit and model, as the paper's bars."""
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Table
    from sonde.studies import steering_chapters as shared

    rows, table, findings = [], [], []
    for number, one in enumerate(found):
        cells: list[Any] = [one.name]
        for kind in one.kinds:
            spread, random = one.spread(kind, one.best(kind)), one.random(kind)
            label = f"{one.name.rpartition(':')[2].removeprefix('mode-recall-')}, {kind}"
            mean = sum(random) / len(random)
            rows.append(
                {"edit": label, "spread": spread.estimate, "low": spread.low, "high": spread.high, "random": mean}
            )
            cells += [one.sweep.largest(kind)]
        shuffled = max(one.shuffled(kind) for kind in one.kinds)
        table.append([*cells, shuffled, float(one.sweep.base_match.mean())])
        findings.append(
            shared.spread_finding(
                one, "both", chapter="summary", name=f"both-{number}", command=command, figures=("summary.spread",)
            )
        )
    clear = sum(finding.status == "found" for finding in findings)
    chart = chart_kinds.intervals(
        rows,
        label="edit",
        value="spread",
        low="low",
        high="high",
        control="random",
        title=f"Both edits together steer {clear} of {len(found)} models more than random ones do",
        subtitle=f"Best layers; bars: 95 % intervals; grey: mean of {shared.N_RANDOM} random sets at their best layers",
        x_title="match at +1 less match at −1",
        y_title="model and edit",
    )
    return Chapter(
        id="summary",
        question="How far do the answers move when the state, the residual stream or both are edited?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            shared.chart("summary.spread", chart, "How far the answers move by model and edit, beside random ones."),
            Table(
                id="summary.table",
                caption="Largest change of the mean match over layers and multipliers; shuffled pairs at ±1",
                columns=["model", "residual", "state", "both", "shuffled pairs", "match without steering"],
                rows=table,
            ),
        ],
        not_shown=(
            "The largest change over many settings is larger than that of a setting chosen before; the finding's "
            "control is chosen in the same way. The toys know one bit: what a language model does is another matter."
        ),
        how=(
            "Vectors and states are means over pairs of prompts that differ in one thing. Each row of the batch is one "
            "layer, multiplier and edit behind the same prefix. match = P(a) / (P(a) + P(b)) for the two answers. "
            f"After {_CITE}."
        ),
    )


def _model_chapter(found: "Measured", number: int, command: str) -> "Chapter":
    from sonde.runs.blocks import Chapter
    from sonde.studies import steering_chapters as shared

    name = f"model-{number}"
    figures = (f"{name}.layers", f"{name}.strength", f"{name}.kinds")
    findings = [
        shared.spread_finding(found, kind, chapter=name, name=kind, command=command, figures=figures)
        for kind in ("residual", "state")
    ]
    layers = shared.layers_chart(found, f"Residual edits act best at layer {found.best('residual')}, state edits at "
                                        f"layer {found.best('state')}")  # fmt: skip
    strength = shared.strength_chart(found, _strength_title(found))
    return Chapter(
        id=name,
        question=f"At which layer and strength can {found.name} be steered?",
        answer=" ".join(finding.sentence for finding in findings),
        findings=findings,
        blocks=[
            shared.chart(figures[0], layers, f"Spread by layer of {found.name}."),
            shared.chart(figures[1], strength, f"Match by multiplier of {found.name}."),
            shared.chart(figures[2], shared.kinds_chart(found), f"Spread by kind of edit of {found.name}."),
            shared.effects_table(found, f"{name}.effects"),
        ],
        not_shown=" ".join(
            [*(f"{note[0].upper()}{note[1:]}." for note in found.notes[:4]), "One contrast and one kind of prompt."]
        ),
        how="Intervals are a bootstrap over items; the best layer is chosen on them, as it is for the control.",
    )


def _strength_title(found: "Measured") -> str:
    ends = {kind: _at_ends(found, kind) for kind in ("residual", "state")}
    return "From {:.2f} to {:.2f} by the residual stream, from {:.2f} to {:.2f} by the state".format(
        *ends["residual"], *ends["state"]
    )


def _at_ends(found: "Measured", kind: str) -> tuple[float, float]:
    strengths = found.sweep.multipliers
    layer = found.best(kind)
    return found.sweep.mean(kind, layer, min(strengths)), found.sweep.mean(kind, layer, max(strengths))


def _decay_chapter(
    run: "Run", lm: "LanguageModel", task: "Task", found: "Measured", number: int, command: str
) -> "Chapter":
    """Spread of the state edit by the tokens that follow it, and what the state writes into the residual stream."""
    import warnings

    from sonde.concepts.state_steering import residual_alignment
    from sonde.concepts.sweep import Sweep, by_suffix, state_steerings
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean, paired_difference
    from sonde.studies import steering_chapters as shared

    name, layer = f"decay-{number}", found.best("state")
    assert found.states is not None
    lengths = [n for n in _LENGTHS if n < min(len(item.prompt) for item in task.items)]
    steering = [one for one in state_steerings(found.states) if one.layer == layer]
    if not run.done(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            swept = by_suffix(lm, task.items, steering, lengths, rows=256)
        aligned = residual_alignment(lm, [list(item.prompt) for item in task.items], found.states, found.vectors)
        run.finish(name, {"swept": [[n, one.state()] for n, one in swept.items()], "aligned": aligned})
    result = run.result(name)
    kept = {n: Sweep.from_state(tree) for n, tree in result["swept"]}
    spreads = {n: (one.match[0, 1] - one.match[0, 0]).double().nan_to_num(0.0).numpy() for n, one in kept.items()}
    rows = [
        {"edit": "state", "tokens": n, "spread": m.estimate, "low": m.low, "high": m.high}
        for n, m in ((n, bootstrap_mean(values)) for n, values in spreads.items())
    ]
    rows += [
        {"edit": "no edit", "tokens": n, "spread": 0.0, "low": 0.0, "high": 0.0} for n in (lengths[0], lengths[-1])
    ]
    lost = paired_difference(spreads[lengths[-1]], spreads[lengths[0]])
    faded = lost.high < 0
    finding = Finding.of(
        lost,
        id=f"{name}.lost",
        chapter=name,
        sentence=f"In {found.name}, what is added to the state of layer {layer} "
        + (
            "loses effect with the tokens after it."
            if faded
            else "is not seen to lose effect with the tokens after it."
        ),
        metric=f"spread with {lengths[-1]} tokens after the edit less that with {lengths[0]}",
        control=Control("no change", 0.0),
        command=command,
        figures=(f"{name}.tokens",),
    )
    decay = chart_kinds.lines(
        rows,
        x="tokens",
        y="spread",
        series="edit",
        low="low",
        high="high",
        title=f"{lengths[-1]} tokens later, the edit moves the answer by {rows[len(lengths) - 1]['spread']:.2f}",
        subtitle=f"State of layer {layer} edited at ±1, this many tokens before the answer",
        x_title="tokens after the edit",
        y_title="match at +1 less match at −1",
        control=("no edit",),
    )
    aligned = result["aligned"]
    own = aligned[found.states.layers.index(layer)]
    heat = chart_kinds.heat(
        [
            {"site": j, "state": i, "cosine": float(aligned[i, j])}
            for i in range(aligned.shape[0])
            for j in range(aligned.shape[1])
        ],
        x="site",
        y="state",
        value="cosine",
        title=f"The state of layer {layer} writes along the vector with a cosine of up to {float(own.max()):.2f}",
        subtitle="Cosine of what an edited state changes in the residual stream with the steering vector there",
        x_title="residual stream after layer",
        y_title="layer whose state is edited",
        x_labels=[site.rpartition(".")[2] for site in found.vectors.sites],
        y_labels=[str(i) for i in found.states.layers],
    )
    return Chapter(
        id=name,
        question=f"What becomes of an edit of the state of {found.name}?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            shared.chart(f"{name}.tokens", decay, "Spread by the number of tokens between the edit and the answer."),
            shared.chart(f"{name}.alignment", heat, "Alignment of edited states with steering vectors, by layer."),
        ],
        not_shown="The difference was taken at the end of the prompts; earlier in them states may differ otherwise.",
        how="The prompt is split that many tokens before its end; the state is edited once there, and the rest runs.",
    )
