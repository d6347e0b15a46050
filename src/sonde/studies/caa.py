"""Can a model be steered towards a behaviour by the mean difference of its answers? At which layer, how far?

Contrastive activation addition on any model and any file of contrast items: the vector of every layer, whether it means
the behaviour or the letter, what adding it does to held-out questions at every layer and strength, against random
vectors and shuffled pairs, with letters swapped and with other labels, and what it costs on other questions.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.studies.options import Count, Folder, Model, Name
from sonde.studies.registry import study
from sonde.studies.running import Runnable, check_options, open_run, publish

if TYPE_CHECKING:
    from sonde.concepts.contrast import Contrast
    from sonde.concepts.separation import Separation
    from sonde.concepts.sweep import Choice, Steering, Sweep
    from sonde.data.contrast_pairs import ContrastItem
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Chapter
    from sonde.runs.finding import Paper
    from sonde.runs.run import Run
    from sonde.studies.steering_chapters import Measured, Task

_CITE = "Rimsky et al. 2023, arXiv:2312.06681"
# Mean match at multipliers -1 and +1 of Llama-2 13B.
_PAPER = {
    "corrigible-neutral-hhh": (0.45, 0.83),
    "survival-instinct": (0.28, 0.63),
    "hallucination": (0.42, 0.78),
    "refusal": (0.56, 0.86),
    "sycophancy": (0.56, 0.60),
}


@dataclass(frozen=True)
class CaaConfig(Runnable):
    """Steer a model by contrastive activation addition.

    Example: sonde run caa organism:pebble --contrast refusal.json --held-out refusal_test.json
    """

    words = ("sonde", "run", "caa")

    model: Model
    """A local folder in Hugging Face format, a name on the hub, or organism:NAME."""
    contrast: Name = None
    """A JSON file of contrast items. By default generated ones about kindness."""
    held_out: Name = None
    """A JSON file of items to score. By default some of those of --contrast, which no vector is made from."""
    capability: Name = None
    """A JSON file of other questions with two answers, the right one as the behaviour, to see what steering costs."""
    pairs: Count = 128
    """Items that vectors are made from."""
    items: Count = 50
    """Held-out items that are scored."""
    multipliers: Annotated[tuple[float, ...], arg(metavar="M ...")] = (-3.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 3.0)
    """Strengths; 1 and -1 are always among them."""
    chat: bool = False
    """Insist on the tokenizer's chat template. It is used anyway where there is one."""
    plain: bool = False
    """Do not use the chat template."""
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

    @property
    def rendering(self) -> bool | None:
        """Through the chat template, plainly, or as the tokenizer has it."""
        if self.chat and self.plain:
            raise SondeError("--chat and --plain exclude each other")
        return True if self.chat else False if self.plain else None


@study(
    "caa",
    summary="steer a model by the mean difference of its answers, at every layer and strength, with controls",
    paper="Rimsky et al. 2023, Steering Llama 2 via Contrastive Activation Addition (arXiv:2312.06681)",
)
def caa(config: CaaConfig) -> Path:
    """Make the vectors, sweep, check them and write the report. Returns its path.

    Raises `SondeError` for too few items or none that fit, letters that are no tokens, answers of one letter only, and
    anything wrong with the model, the files or the folder.
    """
    from sonde.data.contrast_pairs import BUILT_IN, letter_balance, read_contrast
    from sonde.organisms.loading import load
    from sonde.studies import steering_chapters as shared
    from sonde.studies.steering_items import items_of, read_items

    check_options(config)
    if config.pairs < 8 or config.items < 2 or not config.multipliers:
        raise SondeError("--pairs is at least 8, --items at least 2, and --multipliers at least one number")
    chat = config.rendering
    fit, held = read_items(config.contrast, config.held_out, pairs=config.pairs, held=config.items, seed=config.seed)
    balance = letter_balance(fit)
    other = [] if config.capability is None else read_contrast(config.capability)
    lm = load(config.model, dtype=config.dtype, device=config.device)
    task, left_out = items_of(lm, fit, held, chat=chat)
    source = BUILT_IN if config.contrast is None else Path(config.contrast).name
    command = shlex.join(config.command())
    with open_run("caa", config, lm) as run:
        found = shared.measured(run, lm, task, step="caa", multipliers=config.multipliers, seed=config.seed)
        separated = _separated(run, lm, task, config.seed)
        chapters = [
            _steering_chapter(found, source, command),
            _meaning_chapter(separated, balance, found, command),
            _robustness_chapter(run, lm, found, task, fit, held, other, chat, config, command),
        ]
        return publish(
            run,
            lm,
            shared.material(task.items),
            chapters,
            title=f"Steering {lm.name} by contrastive activation addition",
            source=source,
            timings=dict(run.timings),
            skipped={"items left out": f"{left_out} are longer than the {lm.max_positions} positions"}
            if left_out
            else {},
        )


def _separated(run: "Run", lm: "LanguageModel", task: "Task", seed: int) -> "list[Separation]":
    from sonde.concepts.separation import separation

    return separation(lm, task.positive, task.negative, seed=seed)


def _steering_chapter(found: "Measured", source: str, command: str) -> "Chapter":
    from sonde.runs.blocks import Chapter
    from sonde.studies import steering_chapters as shared

    figures = ("steering.layers", "steering.strength")
    findings = [
        shared.spread_finding(
            found, kind, chapter="steering", name=kind, command=command, figures=figures, paper=_paper(source)
        )
        for kind in found.kinds
    ]
    layer = found.best("residual")
    at = found.spread("residual", layer).estimate
    base, nonsense = float(found.sweep.base_match.mean()), float(found.sweep.base_nonsense.mean())
    shuffled = found.shuffled("residual")
    return Chapter(
        id="steering",
        question=f"Does adding the vector move the answers of {found.name} to {source}?",
        answer=(
            f"{findings[0].sentence} Without steering the behaviour has {base:.2f} of the two answers; shuffled pairs "
            f"move that by at most {shuffled:.3f}."
        ),
        findings=findings,
        blocks=[
            shared.chart(
                figures[0],
                shared.layers_chart(
                    found, f"The vector moves the answer most at layer {layer}: by {at:.3f} from −1 to +1"
                ),
                "Change of the match from multiplier -1 to +1 by layer.",
            ),
            shared.chart(
                figures[1],
                shared.strength_chart(found, f"Match by multiplier: {base:.2f} without steering"),
                "Match by multiplier at the best layer.",
            ),
            shared.chart("steering.kinds", shared.kinds_chart(found), "Spread by kind of edit."),
            shared.effects_table(found, "steering.effects"),
        ],
        not_shown=" ".join(
            [
                *shared.sentences(found.notes[:4]),
                "The probability of a letter is not what the model would write.",
            ]
        ),
        how=(
            f"Vectors from {found.vectors.n_positive} pairs, scored on {len(found.sweep.base_match)} held-out items, "
            f"whose answers hold {1 - nonsense:.2f} of the probability without steering. match = P(a) / (P(a) + P(b)); "
            f"the edit is at the last token. After {_CITE}."
        ),
    )


def _paper(source: str) -> "Paper | None":
    from sonde.runs.finding import Paper

    name = source.lower().removesuffix(".json").removesuffix("_test")
    if name not in _PAPER:
        return None
    down, up = _PAPER[name]
    return Paper(round(up - down, 2), "Llama-2 13B chat, its best layer", _CITE)


def _meaning_chapter(separated: "Sequence[Separation]", balance: Any, found: "Measured", command: str) -> "Chapter":
    """Behaviour or letter, and how vectors of different layers are related."""
    from sonde.concepts.contrast import cosines
    from sonde.concepts.sweep import layer_of
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Table
    from sonde.runs.finding import Control, Finding
    from sonde.studies import steering_chapters as shared

    # The layer that steering chose, on other items: the best of all sites would be too good.
    best = next(one for one in separated if layer_of(one.site) == found.best("residual"))
    letter = max(one.component_letter for one in separated)
    means = best.behaviour.low > 0.5
    finding = Finding.of(
        best.behaviour,
        id="meaning.behaviour",
        chapter="meaning",
        sentence=f"Among answers of one letter, the vector at {best.site} orders held-out pairs by "
        + ("the behaviour." if means else "nothing that can be told from chance: it may mean the letter alone."),
        metric="AUROC within letter along the vector of the other half of the pairs, at the layer that steers best",
        better="higher",
        control=Control("chance", 0.5),
        command=command,
        figures=("meaning.components",),
        tables=("meaning.sites",),
    )
    rows: list[dict[str, Any]] = []
    for one in separated:
        layer = layer_of(one.site)
        b = one.behaviour
        rows.append({"what": "vector, by behaviour", "layer": layer, "auroc": b.estimate, "low": b.low, "high": b.high})
        for what, value in (("PCA, by behaviour", one.component_behaviour), ("PCA, by letter", one.component_letter)):
            rows.append({"what": what, "layer": layer, "auroc": value, "low": value, "high": value})
        rows.append({"what": "chance", "layer": layer, "auroc": 0.5, "low": 0.5, "high": 0.5})
    lines = chart_kinds.lines(
        rows,
        x="layer",
        y="auroc",
        series="what",
        low="low",
        high="high",
        title=f"Letter {letter:.2f}, behaviour {best.behaviour.estimate:.2f}: what the activations at the letter hold",
        subtitle="PCA: the better of the first two components, unlabelled; band: 95 % interval over pairs",
        x_title="layer",
        y_title="AUROC",
        control=("chance",),
        x_labels=[str(layer_of(one.site)) for one in separated],
    )
    similar = cosines(found.vectors, found.vectors)
    labels = [str(layer_of(site)) for site in found.vectors.sites]
    count = len(labels)
    next_layer = float(similar.diagonal(1).mean()) if count > 1 else 1.0
    heat = chart_kinds.heat(
        [{"a": i, "b": j, "cosine": float(similar[i, j])} for i in range(count) for j in range(count)],
        x="a",
        y="b",
        value="cosine",
        title=f"Vectors of neighbouring layers have a mean cosine of {next_layer:.2f}",
        subtitle="Cosine of the vectors of all layers",
        x_title="layer",
        y_title="layer",
        x_labels=labels,
        y_labels=labels,
    )
    return Chapter(
        id="meaning",
        question="Does the vector mean the behaviour, or the letter of its answer?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            shared.chart("meaning.components", lines, "How well activations order answers by behaviour and by letter."),
            shared.chart("meaning.cosines", heat, "Cosine similarity of the vectors of all pairs of layers."),
            Table(
                id="meaning.sites",
                caption="Separation by site",
                columns=["site", *(Column(name=name) for name in ("behaviour", "PCA behaviour", "PCA letter"))],
                rows=[[o.site, o.behaviour.estimate, o.component_behaviour, o.component_letter] for o in separated],
            ),
        ],
        not_shown="That prompts can be ordered by the behaviour at a site does not say that the model uses it.",
        how=(
            f"The earlier letter shows the behaviour in {balance.estimate:.2f} of {balance.n} items "
            f"(95 % interval {balance.low:.2f} to {balance.high:.2f}), so the letter cancels in the vector."
        ),
    )


def _robustness_chapter(
    run: "Run",
    lm: "LanguageModel",
    found: "Measured",
    task: "Task",
    fit: "Sequence[ContrastItem]",
    held: "Sequence[ContrastItem]",
    other: "Sequence[ContrastItem]",
    chat: bool | None,
    config: CaaConfig,
    command: str,
) -> "Chapter":
    """The best layer's vector under other letters, in other forms, at other layers, and on other questions."""
    from sonde.concepts.sweep import Sweep
    from sonde.data.contrast_pairs import relabel, swap_letters
    from sonde.runs import chart_kinds
    from sonde.runs.blocks import Chapter, Column, Table
    from sonde.runs.finding import Control, Finding
    from sonde.stats.intervals import bootstrap_mean
    from sonde.studies import steering_chapters as shared
    from sonde.studies.steering_items import items_of

    layer = found.best("residual")
    if not run.done("variants"):
        run.finish("variants", _run_sweep(lm, task.items, _variants(lm, found.vectors, task, layer), "variants"))
    variants = Sweep.from_state(run.result("variants"))
    forms = {
        "letters swapped": [swap_letters(item) for item in held],
        "labels 1 and 2": [relabel(item, "123456789") for item in held],
    }
    if other:
        forms["other questions"] = list(other[: config.items])
    rows = [_variant_row(variants, i, name) for i, (name, _) in enumerate(variants.names)]
    added = _steerings(found.vectors, layer)
    kept = {}
    for number, (name, items) in enumerate(forms.items()):
        step = f"form-{number}"
        if not run.done(step):
            run.finish(step, _run_sweep(lm, items_of(lm, fit, items, chat=chat)[0].items, added, name))
        kept[name] = Sweep.from_state(run.result(step))
        rows.append(_variant_row(kept[name], 0, name))
    random = found.random_at("residual", layer)
    chart = chart_kinds.intervals(
        [{**row, "control": max(map(abs, random))} for row in rows],
        label="form",
        value="spread",
        low="low",
        high="high",
        control="control",
        title=f"The vector of layer {layer} in other forms, and on items in other forms",
        subtitle=f"Bars: 95 % intervals over items; grey: the largest of {len(random)} random vectors",
        x_title="match at +1 less match at −1",
        y_title="form",
    )
    swapped = kept["letters swapped"]
    spread = bootstrap_mean((swapped.match[0, 1] - swapped.match[0, 0]).double().nan_to_num(0.0).numpy())
    finding = Finding.of(
        spread,
        id="robustness.swapped",
        chapter="robustness",
        sentence="With the letters of the held-out items swapped, the vector moves the answers "
        + ("as before." if spread.low > max(map(abs, random)) else "no more than random vectors do."),
        metric=f"match at +1 less match at -1, letters swapped, layer {layer}",
        better="higher",
        control=Control("the same layer's random vectors", sum(random) / len(random), (min(random), max(random))),
        command=command,
        figures=("robustness.forms",),
        tables=("robustness.table",),
    )
    columns = ["form", *(Column(name=name) for name in ("spread", "low", "high", "without steering", "nonsense at +1"))]
    columns += [Column(name="answered rightly, -1 / 0 / +1")]
    return Chapter(
        id="robustness",
        question="Does it hold with other letters, other vectors, and at what cost?",
        answer=finding.sentence,
        findings=[finding],
        blocks=[
            shared.chart("robustness.forms", chart, "Spread of the vector in other forms and on other items."),
            Table(
                id="robustness.table",
                caption=f"Forms of the vector of layer {layer} and of the items",
                columns=columns,
                rows=[[row[k] for k in ("form", "spread", "low", "high", "base", "nonsense", "right")] for row in rows],
            ),
        ],
        not_shown="Other questions show what steering costs only where the model can answer them without it."
        if other
        else "No other questions were asked (--capability), so what steering costs is not known.",
        how=(
            "projection: h without its part along v, then + v. discriminant: the inverse of the covariance within the "
            "two sides, shrunk, times v, as long as v. unit: v of length 1. elsewhere: another layer's vector, added "
            f"at layer {layer}. Labels 1 and 2 take the place of the letters."
        ),
    )


def _variants(lm: "LanguageModel", vectors: "Contrast", task: "Task", layer: int) -> "list[Steering]":
    """Other forms of the vector of one layer, all added there."""
    from sonde.concepts.affine import AffineEdit
    from sonde.concepts.contrast import contrast
    from sonde.concepts.sweep import Steering

    site = f"resid_post.{layer}"
    v = vectors.difference(site)
    unit = v / v.norm()
    spread = contrast(lm, task.positive, task.negative, sites=site, covariance=True)
    edits = {
        "add": AffineEdit.add(v),
        "projection, then add": AffineEdit(left=unit[:, None], right=unit[None], added=v),
        "discriminant": AffineEdit.add(spread.discriminant(site)),
        "unit length": AffineEdit.add(unit),
    }
    count = len(vectors.sites)
    for other in sorted({0, count // 2, count - 1} - {layer}):
        moved = vectors.difference(vectors.sites[other])
        edits[f"vector of layer {other} elsewhere"] = AffineEdit.add(moved * (v.norm() / moved.norm().clamp(min=1e-12)))
    return [Steering(name, layer, {site: edit}) for name, edit in edits.items()]


def _steerings(vectors: "Contrast", layer: int) -> "list[Steering]":
    from sonde.concepts.sweep import residual_steerings

    return [one for one in residual_steerings(vectors) if one.layer == layer]


def _run_sweep(lm: "LanguageModel", items: "Sequence[Choice]", steerings: "Sequence[Steering]", label: str) -> Any:
    import warnings

    from sonde.concepts.sweep import sweep

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report prints the nonsense of every row
        return sweep(lm, items, steerings, multipliers=(-1.0, 1.0), progress=label).state()


def _variant_row(sweep: "Sweep", number: int, name: str) -> dict[str, Any]:
    from sonde.stats.intervals import bootstrap_mean

    down, up = sweep.match[number, 0], sweep.match[number, 1]
    spread = bootstrap_mean((up - down).double().nan_to_num(0.0).numpy())
    right = " / ".join(f"{float((match > 0.5).double().mean()):.2f}" for match in (down, sweep.base_match, up))
    return {
        "form": name,
        "spread": spread.estimate,
        "low": spread.low,
        "high": spread.high,
        "base": float(sweep.base_match.mean()),
        "nonsense": float(sweep.nonsense[number, 1].mean()),
        "right": right,
    }
