"""What the studies of steering share: measure one model under every edit and its controls, and show what came out.

The controls are random vectors (and states) of the lengths of the true ones, each a set of one vector a layer, and
pairs whose sides were exchanged for half of them. The spread of a setting is the mean match at multiplier +1 less that
at -1; the random sets choose their best layer as the true one does, so that the choice is no advantage.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.studies.running import Read

if TYPE_CHECKING:
    from sonde.concepts.contrast import Contrast
    from sonde.concepts.state_steering import StateContrast
    from sonde.concepts.sweep import Choice, Steering, Sweep
    from sonde.lm.model import LanguageModel
    from sonde.runs.blocks import Figure, Table
    from sonde.runs.finding import Finding, Paper
    from sonde.runs.run import Run
    from sonde.stats.intervals import Interval

MULTIPLIERS = (-3.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 3.0)
KINDS = ("residual", "state", "both")
N_RANDOM = 8
RANDOM, SHUFFLED = "random", "shuffled pairs"


@dataclass(frozen=True)
class Task:
    """What a model is steered towards: prompts to make vectors from, states to make differences from, items to score.

    Vectors are taken at the last token of `positive` and `negative`, states at the end of `states`.
    """

    positive: list[list[int]]
    negative: list[list[int]]
    states: tuple[list[list[int]], list[list[int]]]
    items: "list[Choice]"


@dataclass(frozen=True)
class Measured:
    """One model's vectors, states (None without a recurrent state) and sweeps: the true ones' and the controls'."""

    name: str
    vectors: "Contrast"
    states: "StateContrast | None"
    sweep: "Sweep"
    controls: "Sweep"
    notes: list[str]

    @property
    def kinds(self) -> list[str]:
        """Which kinds of edits were made: residual, and state and both where there is a state."""
        return [kind for kind in KINDS if any(name == kind for name, _ in self.sweep.names)]

    def spread(self, kind: str, layer: int) -> "Interval":
        """Mean match at +1 less that at -1, over the items."""
        from sonde.stats.intervals import bootstrap_mean

        up, down = (self._match(self.sweep, (kind, layer), m) for m in (1.0, -1.0))
        return bootstrap_mean((up - down).double().nan_to_num(0.0).numpy())

    def best(self, kind: str) -> int:
        """The layer with the largest spread."""
        return self.sweep.best_layer(kind)

    def random(self, kind: str) -> list[float]:
        """The largest spread over layers, by random set."""
        return [max(map(abs, spreads)) for spreads in self._random(kind).values()]

    def random_at(self, kind: str, layer: int) -> list[float]:
        """The spread of every random set at one layer."""
        return [spreads[layer - self.first(kind)] for spreads in self._random(kind).values()]

    def first(self, kind: str) -> int:
        """The first layer of a kind."""
        return min(layer for name, layer in self.sweep.names if name == kind)

    def shuffled(self, kind: str) -> float:
        """The largest change of the mean match, at ±1, by the vectors of shuffled pairs."""
        return self.controls.largest(f"{SHUFFLED} {kind}")

    def _random(self, kind: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for name, layer in self.controls.names:
            if name.startswith(f"{RANDOM} {kind} "):
                up, down = (self._match(self.controls, (name, layer), m) for m in (1.0, -1.0))
                found.setdefault(name, []).append(float((up - down).nan_to_num(0.0).mean()))
        return found

    @staticmethod
    def _match(sweep: "Sweep", which: tuple[str, int], multiplier: float) -> Any:
        return sweep.match[list(sweep.names).index(which), list(sweep.multipliers).index(multiplier)]


def measured(
    run: "Run", lm: "LanguageModel", task: Task, *, step: str, multipliers: Sequence[float], seed: int
) -> Measured:
    """Vectors, states, sweep and controls of one model; the sweeps from the run folder where they are finished."""
    import random

    from sonde.concepts.contrast import contrast
    from sonde.concepts.state_steering import state_contrast
    from sonde.concepts.sweep import Sweep, both_steerings, residual_steerings, state_steerings

    vectors = contrast(lm, task.positive, task.negative, progress=f"{lm.name} vectors")
    vectors.save(run.path("vectors", step))
    states, why = None, _without_states(lm)
    if why is None:
        states = state_contrast(lm, *task.states)
        states.save(run.path("states", step))
    steerings = residual_steerings(vectors)
    if states is not None:
        steerings += [*state_steerings(states), *both_steerings(vectors, states)]
    swap = set(random.Random(seed).sample(range(len(task.positive)), len(task.positive) // 2))
    shuffled = contrast(lm, *_exchanged(task.positive, task.negative, swap))
    controls = [*residual_steerings(shuffled, name=f"{SHUFFLED} residual")]
    if states is not None:
        mixed = state_contrast(lm, *_exchanged(*task.states, swap))
        controls += [
            *state_steerings(mixed, name=f"{SHUFFLED} state"),
            *both_steerings(shuffled, mixed, name=f"{SHUFFLED} both"),
        ]
    controls += _random_steerings(vectors, states, seed)
    swept = {}
    for name, those, strengths in (
        ("sweep", steerings, sorted({*multipliers, -1.0, 1.0})),
        ("controls", controls, (-1.0, 1.0)),
    ):
        if not run.done(f"{step}.{name}"):
            run.finish(f"{step}.{name}", _swept(lm, task, those, strengths, f"{lm.name} {name}"))
        swept[name] = Sweep.from_state(run.result(f"{step}.{name}"))
    notes = swept["sweep"].warnings() + ([f"no state was steered: {why}"] if why else [])
    return Measured(lm.name, vectors, states, swept["sweep"], swept["controls"], notes)


def _swept(
    lm: "LanguageModel", task: Task, steerings: "list[Steering]", multipliers: Sequence[float], label: str
) -> dict[str, Any]:
    from sonde.concepts.sweep import sweep

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are printed in the report
        return sweep(lm, task.items, steerings, multipliers=multipliers, rows=256, progress=label).state()


def _without_states(lm: "LanguageModel") -> str | None:
    from sonde.concepts.state_steering import require_states

    try:
        require_states(lm)
    except SondeError as error:
        return str(error)
    return None


def _exchanged(one: list[Any], other: list[Any], swap: set[int]) -> tuple[list[Any], list[Any]]:
    """Both sides with those pairs exchanged whose number is in `swap`."""
    pairs = [(b, a) if i in swap else (a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _random_steerings(vectors: "Contrast", states: "StateContrast | None", seed: int) -> "list[Steering]":
    """Random sets: at each layer a vector (and a state) of the length of the true one."""
    import torch

    from sonde.concepts.affine import AffineEdit
    from sonde.concepts.sweep import Steering, layer_of

    generator = torch.Generator().manual_seed(seed)

    def like(v: Any) -> Any:
        drawn = torch.randn(v.shape, generator=generator)
        return (drawn * (v.norm().cpu() / drawn.norm())).to(v.device)

    made = []
    for number in range(N_RANDOM):
        edits = {layer_of(site): {site: AffineEdit.add(like(v))} for site, v in vectors.differences().items()}
        made += [Steering(f"{RANDOM} residual {number}", layer, edit) for layer, edit in edits.items()]
        for layer in states.layers if states is not None else ():
            delta = {name: like(part) for name, part in states.difference(layer).items()}  # type: ignore[union-attr]
            made += [
                Steering(f"{RANDOM} state {number}", layer, state={layer: delta}),
                Steering(f"{RANDOM} both {number}", layer, edits[layer], {layer: delta}),
            ]
    return made


def layers_chart(found: Measured, title: str) -> Any:
    """Spread by layer, by kind of edit, with the band of the random vectors."""
    from sonde.runs import chart_kinds

    rows = []
    for kind in found.kinds:
        for name, layer in found.sweep.names:
            if name == kind:
                spread = found.spread(kind, layer)
                rows.append({"edit": kind, "layer": layer, "spread": spread.estimate, **_ends(spread)})
    for _, layer in [name for name in found.sweep.names if name[0] == "residual"]:
        values = found.random_at("residual", layer)
        mean = sum(values) / len(values)
        rows.append({"edit": RANDOM, "layer": layer, "spread": mean, "low": min(values), "high": max(values)})
    return chart_kinds.lines(
        rows,
        x="layer",
        y="spread",
        series="edit",
        low="low",
        high="high",
        title=title,
        subtitle=f"Bands: 95 % intervals over items; grey: the range of {N_RANDOM} random vectors of the same length",
        x_title="layer that is edited",
        y_title="match at +1 less match at −1",
        control=(RANDOM,),
        x_labels=_layer_labels(found),
    )


def kinds_chart(found: Measured) -> Any:
    """Bars: the spread of each kind of edit at its best layer, beside the random sets at theirs."""
    from sonde.runs import chart_kinds

    rows = []
    for place, kind in enumerate(found.kinds):
        spread, random = found.spread(kind, found.best(kind)), found.random(kind)
        rows.append({"bar": place, "spread": spread.estimate, **_ends(spread), "random": sum(random) / len(random)})
    largest = max(found.kinds, key=lambda kind: found.spread(kind, found.best(kind)).estimate)
    what = {
        "residual": "an edit of the residual stream",
        "state": "an edit of the state",
        "both": "both edits together",
    }
    return chart_kinds.bars(
        rows,
        x="bar",
        y="spread",
        low="low",
        high="high",
        control="random",
        control_name=RANDOM,
        title=f"At ±1 the answers move farthest under {what[largest]}",
        subtitle=f"Each at its best layer; whiskers: 95 % intervals; grey: mean of {N_RANDOM} random sets at theirs",
        x_title="what is edited",
        y_title="match at +1 less match at −1",
        x_labels=found.kinds,
    )


def strength_chart(found: Measured, title: str) -> Any:
    """Match by multiplier at each kind's best layer."""
    from sonde.runs import chart_kinds
    from sonde.stats.intervals import bootstrap_mean

    base = bootstrap_mean(found.sweep.base_match.double().numpy())
    rows = []
    effects = found.sweep.effects()
    for kind in found.kinds:
        at = {e.multiplier: e.match for e in effects if (e.name, e.layer) == (kind, found.best(kind)) and e.match}
        for multiplier, match in sorted({**at, 0.0: base}.items()):
            rows.append({"edit": kind, "multiplier": multiplier, "match": match.estimate, **_ends(match)})
    rows += [
        {"edit": "no steering", "multiplier": m, "match": base.estimate, "low": base.low, "high": base.high}
        for m in (min(found.sweep.multipliers), max(found.sweep.multipliers))
    ]
    return chart_kinds.lines(
        rows,
        x="multiplier",
        y="match",
        series="edit",
        low="low",
        high="high",
        title=title,
        subtitle="Each edit at its best layer: " + ", ".join(f"{kind} {found.best(kind)}" for kind in found.kinds),
        x_title="multiplier",
        y_title="P(shows it) of the two answers",
        control=("no steering",),
    )


def effects_table(found: Measured, name: str) -> "Table":
    """Every setting with its match, change and nonsense."""
    from sonde.runs.blocks import Column, Table

    columns = ["steering", "layer", "multiplier", "match", "match_low", "match_high", "change", "change_low"]
    columns += ["change_high", "nonsense"]
    rows = [effect.row() for effect in found.sweep.effects()]
    return Table(
        id=name,
        caption=f"Every setting on {len(found.sweep.base_match)} held-out items, {found.name}",
        columns=[columns[0], *(Column(name=column.replace("_", " ")) for column in columns[1:])],
        rows=[[row[column] for column in columns] for row in rows],
    )


def spread_finding(
    found: Measured,
    kind: str,
    *,
    chapter: str,
    name: str,
    command: str,
    figures: Sequence[str],
    paper: "Paper | None" = None,
) -> "Finding":
    """The spread at the best layer, against the random sets at theirs."""
    from sonde.runs.finding import Control, Finding

    layer = found.best(kind)
    spread = found.spread(kind, layer)
    random = found.random(kind)
    control = Control(
        f"the best layer of {N_RANDOM} random sets", sum(random) / len(random), (min(random), max(random))
    )
    what = {"residual": "vector", "state": "difference of states", "both": "vector and difference of states"}[kind]
    clear = spread.low > max(random)
    sentence = (
        f"Adding the {what} at layer {layer} of {found.name} moves its answers, more than any random one does."
        if clear
        else f"On {found.name}, adding the {what} moves the answers no more than random ones of the same length do."
    )
    return Finding.of(
        spread,
        id=f"{chapter}.{name}",
        chapter=chapter,
        sentence=sentence,
        metric=f"mean match at multiplier +1 less that at -1, {kind} edit at layer {layer}",
        better="higher",
        control=control,
        paper=paper,
        command=command,
        figures=figures,
    )


def chart(name: str, made: Any, caption: str) -> "Figure":
    """A figure block."""
    from sonde.runs.blocks import Figure

    return Figure(id=name, chart=made, caption=caption)


def material(items: "Sequence[Choice]") -> Read:
    """What a report says it has read: the number of tokens of the items, and a hash of them."""
    return Read.of([item.prompt for item in items])


def sentences(notes: Sequence[str]) -> list[str]:
    """Notes as sentences."""
    return [f"{note[0].upper()}{note[1:]}." for note in notes]


def _layer_labels(found: Measured) -> list[str]:
    return [str(layer) for layer in range(max(layer for _, layer in found.sweep.names) + 1)]


def _ends(interval: "Interval") -> dict[str, float]:
    return {"low": interval.low, "high": interval.high}
