"""How does the answer move when a model is steered, at every layer and strength? All settings in one batch.

The prompt up to its last tokens runs once. Its memory is repeated, one row for each setting (a way to steer at a layer,
times a multiplier) and one that is not steered, and the last tokens run in all rows at once, each row under its own
edit: of the residual stream at these tokens, of the state before them, or both (Rimsky et al. 2023, arXiv:2312.06681;
Paulo, Marshall & Belrose 2024, arXiv:2404.05971). Scores of an item with answers a (shows the behaviour) and b:

    match = P(a) / (P(a) + P(b))        nonsense = 1 - P(a) - P(b)
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sonde.concepts.affine import AffineEdit
from sonde.concepts.contrast import Contrast
from sonde.concepts.state_steering import StateContrast, prefix, prefix_batches, require_ready
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.state_algebra import State, moved
from sonde.stats.intervals import Interval, bootstrap_means

NONSENSE = 0.5  # above it the model no longer answers the question
_ROWS = 128


@dataclass(frozen=True)
class Choice:
    """A prompt whose next token is an answer: its ids, the id that shows the behaviour, and the other's."""

    prompt: Sequence[int]
    match: int
    other: int


@dataclass(frozen=True)
class Steering:
    """One way to steer a model, to be run at several multipliers.

    name: the series that it belongs to, such as residual, state, both or random.
    layer: where it acts, for tables and charts.
    residual: edits by site; their strength is the multiplier.
    state: differences of canonical states by layer; added `multiplier` times.
    """

    name: str
    layer: int
    residual: Mapping[str, AffineEdit] = field(default_factory=dict)
    state: Mapping[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.residual and not self.state:
            raise ValueError(f"steering {self.name!r} at layer {self.layer} edits nothing")


@dataclass(frozen=True)
class Effect:
    """One row of the result: what a steering does at a multiplier, over all items; None where numbers overflowed."""

    name: str
    layer: int
    multiplier: float
    match: Interval | None
    change: Interval | None
    nonsense: float | None

    def row(self) -> dict[str, Any]:
        """The effect as a flat row for tables and charts."""
        pairs = {"match": self.match, "change": self.change}
        spread = {
            key: value
            for name, interval in pairs.items()
            for key, value in (
                (name, interval and interval.estimate),
                (f"{name}_low", interval and interval.low),
                (f"{name}_high", interval and interval.high),
            )
        }
        start = {"steering": self.name, "layer": self.layer, "multiplier": self.multiplier}
        return {**start, **spread, "nonsense": self.nonsense}


@dataclass(frozen=True)
class Sweep:
    """Scores of every item under every setting.

    Attributes:
        names: series and layer of every steering.
        multipliers: the strengths.
        match: Float[Tensor, "steerings multipliers items"].
        nonsense: of the same shape.
        base_match: without steering, Float[Tensor, " items"].
        base_nonsense: without steering, Float[Tensor, " items"].

    """

    names: Sequence[tuple[str, int]]
    multipliers: Sequence[float]
    match: Float[Tensor, "steerings multipliers items"]
    nonsense: Float[Tensor, "steerings multipliers items"]
    base_match: Float[Tensor, " items"]
    base_nonsense: Float[Tensor, " items"]

    def effects(self, *, seed: int = 0) -> list[Effect]:
        """The table: one row a setting, with bootstrap intervals over items."""
        rows = []
        for i, (name, layer) in enumerate(self.names):
            for j, multiplier in enumerate(self.multipliers):
                match = self.match[i, j]
                if not bool(match.isfinite().all()):
                    rows.append(Effect(name, layer, multiplier, None, None, None))
                    continue
                pair = torch.stack([match, match - self.base_match], 1).double()
                at, change = bootstrap_means(pair.numpy(), seed=seed)
                rows.append(Effect(name, layer, multiplier, at, change, float(self.nonsense[i, j].mean())))
        return rows

    def mean(self, name: str, layer: int, multiplier: float) -> float:
        """Mean match of one setting. Raises `SondeError` for one that was not run."""
        if (name, layer) not in self.names or multiplier not in self.multipliers:
            raise SondeError(f"{name} at layer {layer}, multiplier {multiplier:g}, was not run")
        return float(self.match[list(self.names).index((name, layer)), self.multipliers.index(multiplier)].mean())

    def best_layer(self, name: str, multiplier: float = 1.0) -> int:
        """The layer of a series with the largest spread of the mean match between `multiplier` and its negative.

        Raises `SondeError` for a series or multipliers that were not run.
        """
        layers = [layer for other, layer in self.names if other == name]
        if not layers:
            raise SondeError(f"no steering {name!r} was run: there are {', '.join(dict(self.names))}")
        return max(layers, key=lambda k: abs(self.mean(name, k, multiplier) - self.mean(name, k, -multiplier)))

    def largest(self, name: str) -> float:
        """The largest change of the mean match over the layers and multipliers of a series; NaN ones are left out."""
        rows = [i for i, (other, _) in enumerate(self.names) if other == name]
        if not rows:
            raise SondeError(f"no steering {name!r} was run: there are {', '.join(dict(self.names))}")
        return float((self.match[rows].mean(-1) - self.base_match.mean()).abs().nan_to_num(0.0).max())

    def warnings(self) -> list[str]:
        """A line for what overflowed, and for what made the model say something else than the two answers."""
        lines = []
        broken = ~self.match.isfinite().all(-1)
        for i, j in broken.nonzero().tolist():
            name, layer = self.names[i]
            lines.append(
                f"{name} at layer {layer}, multiplier {self.multipliers[j]:g}, gives numbers that are not finite"
            )
        base = float(self.base_nonsense.mean())
        if base > NONSENSE:
            lines.append(f"without steering the model gives {base:.2f} of the probability to neither answer")
        else:
            for i, j in ((self.nonsense.mean(-1) > NONSENSE) & ~broken).nonzero().tolist():
                (name, layer), share = self.names[i], float(self.nonsense[i, j].mean())
                lines.append(
                    f"{name} at layer {layer}, multiplier {self.multipliers[j]:g}, leaves {share:.2f} of the "
                    f"probability to neither answer ({base:.2f} without steering)"
                )
        return lines

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        return {
            "names": [list(name) for name in self.names],
            "multipliers": list(self.multipliers),
            "match": self.match,
            "nonsense": self.nonsense,
            "base_match": self.base_match,
            "base_nonsense": self.base_nonsense,
        }

    @classmethod
    def from_state(cls, tree: Mapping[str, Any]) -> "Sweep":
        """The sweep that `state` was taken from."""
        return cls(**{**tree, "names": [(name, layer) for name, layer in tree["names"]]})


def residual_steerings(vectors: "Contrast | Mapping[str, Tensor]", *, name: str = "residual") -> list[Steering]:
    """Activation addition at every site of a contrast (or of a mapping of vectors), one site at a time."""
    given = vectors.differences() if isinstance(vectors, Contrast) else vectors
    return [Steering(name, layer_of(site), {site: AffineEdit.add(v)}) for site, v in given.items()]


def state_steerings(
    states: StateContrast, *, heads: Sequence[int] | None = None, name: str = "state"
) -> list[Steering]:
    """The state's difference at every layer of a contrast, one layer at a time, of all heads or of some."""
    return [Steering(name, layer, state={layer: states.difference(layer, heads=heads)}) for layer in states.layers]


def both_steerings(vectors: Contrast, states: StateContrast, *, name: str = "both") -> list[Steering]:
    """Residual stream and state of one layer together, at every layer that has both."""
    edits = {layer_of(site): {site: AffineEdit.add(v)} for site, v in vectors.differences().items()}
    return [
        Steering(name, layer, edits[layer], {layer: states.difference(layer)})
        for layer in states.layers
        if layer in edits
    ]


def layer_of(site: str) -> int:
    """The layer in a site's name; the embedding counts as layer -1."""
    number = site.partition(".")[2]
    return int(number) if number else -1


@torch.no_grad()
def sweep(
    lm: LanguageModel,
    items: Sequence[Choice],
    steerings: Sequence[Steering],
    *,
    multipliers: Sequence[float] = (-1.0, 1.0),
    suffix: int = 1,
    rows: int = _ROWS,
    progress: str | None = None,
) -> Sweep:
    """Score every item under every steering at every multiplier.

    Args:
        lm: the model.
        items: what is asked.
        steerings: ways to steer: see `residual_steerings`, `state_steerings`, `both_steerings`.
        multipliers: strengths of each.
        suffix: how many tokens at the end of a prompt the residual edits act on; states are edited before them.
        rows: most rows of a forward pass.
        progress: what a progress bar is called; None shows none.

    Raises:
        SondeError: for prompts that are too short, answers that are one token, sites that do not exist, vectors of
            another width, states that do not fit, and a model that cannot continue from its cache.

    Warns:
        UserWarning: for settings that overflow, and those that leave more than half of the probability to neither
            answer.

    """
    require_ready(lm)
    _check(lm, items, steerings, multipliers, suffix)
    settings = [None, *((i, j) for i in range(len(steerings)) for j in range(len(multipliers)))]
    scores = torch.full((len(settings), len(items), 2), torch.nan, dtype=torch.float64)
    together = max(1, rows // len(settings))
    with tqdm(total=len(items), desc=progress, disable=progress is None, unit="item") as bar:
        for numbers in prefix_batches(lm, [len(item.prompt) - suffix for item in items], together):
            chosen = [items[i] for i in numbers]
            start = prefix(lm, [list(item.prompt[:-suffix]) for item in chosen])
            ends = torch.tensor([list(item.prompt[-suffix:]) for item in chosen], device=lm.device)
            for part in _pieces(len(settings), max(1, rows // len(chosen))):
                own = [settings[k] for k in range(part.start, part.stop)]
                which = torch.arange(len(chosen)).repeat(len(own))
                with ExitStack() as stack:
                    for site, edit in _edits(steerings, multipliers, own, len(chosen)).items():
                        stack.enter_context(lm.editing({site: edit}))
                    logits = lm(ends[which.to(ends.device)], past=start.select(which)).logits
                assert logits is not None
                probability = logits[:, -1].float().softmax(-1).view(len(own), len(chosen), -1)
                answers = torch.tensor([[item.match, item.other] for item in chosen], device=logits.device)
                found = probability.gather(-1, answers.expand(len(own), -1, -1)).double().cpu()
                scores[part, torch.tensor(numbers)] = found
            bar.update(len(chosen))
    match = (scores[..., 0] / scores.sum(-1)).float()
    nonsense = (1 - scores.sum(-1)).float().clamp(min=0)
    shape = (len(steerings), len(multipliers), len(items))
    result = Sweep(
        [(steering.name, steering.layer) for steering in steerings],
        [float(m) for m in multipliers],
        match[1:].reshape(shape),
        nonsense[1:].reshape(shape),
        match[0],
        nonsense[0],
    )
    for line in result.warnings():
        warnings.warn(line, stacklevel=3)  # past the no_grad around this
    return result


def by_suffix(
    lm: LanguageModel,
    items: Sequence[Choice],
    steerings: Sequence[Steering],
    lengths: Sequence[int],
    *,
    multipliers: Sequence[float] = (-1.0, 1.0),
    rows: int = _ROWS,
) -> dict[int, Sweep]:
    """How an edit fades: the sweep with the state edited 1, 2, … tokens before the answer, by that number of tokens."""
    return {n: sweep(lm, items, steerings, multipliers=multipliers, suffix=n, rows=rows) for n in lengths}


def _check(
    lm: LanguageModel, items: Sequence[Choice], steerings: Sequence[Steering], multipliers: Sequence[float], suffix: int
) -> None:
    if not items or not steerings or not multipliers:
        raise SondeError("a sweep needs at least one item, one steering and one multiplier")
    if suffix < 1:
        raise ValueError(f"suffix is {suffix}: at least the last token is steered")
    for number, item in enumerate(items):
        if len(item.prompt) <= suffix:
            raise SondeError(f"item {number} has {len(item.prompt)} tokens: a suffix of {suffix} leaves no prefix")
        if item.match == item.other:
            raise SondeError(f"both answers of item {number} are token {item.match}")
    for steering in steerings:
        for site, edit in steering.residual.items():
            if site == "logits" or site.startswith("state.") or site not in lm.sites:
                lm.match(site)  # which lists the sites where there is none of this name
                raise SondeError(f"{site} is not a site of the residual stream: give its edits as states, or none")
            if edit.d != lm.d_model:
                raise SondeError(f"the vector at {site} has width {edit.d}, {lm.name} has {lm.d_model}")
        for layer in steering.state:
            if f"state.{layer}" not in lm.sites:
                raise SondeError(f"layer {layer} does not exist: {lm.name} has layers 0 … {lm.n_layers - 1}")


Group = list[tuple[Any, list[int], list[float]]]


def _edits(
    steerings: Sequence[Steering], multipliers: Sequence[float], settings: Sequence[Any], items: int
) -> dict[str, Any]:
    """One function a site, which applies to every row the edit of its own setting."""
    groups: dict[str, dict[int, Group]] = {}
    for place, setting in enumerate(settings):
        if setting is None:
            continue
        steering, multiplier = steerings[setting[0]], multipliers[setting[1]]
        mine = list(range(place * items, (place + 1) * items))
        wanted: dict[str, Any] = dict(steering.residual)
        wanted |= {f"state.{layer}": delta for layer, delta in steering.state.items()}
        for site, edit in wanted.items():
            entry = groups.setdefault(site, {}).setdefault(setting[0], [(edit, [], [])])[0]
            entry[1].extend(mine)
            entry[2].extend([multiplier] * items)
    return {
        site: (_StateRows if site.startswith("state.") else _ResidualRows)([e for es in parts.values() for e in es])
        for site, parts in groups.items()
    }


class _ResidualRows:
    """Edits of the residual stream, each on its own rows and with a strength for each."""

    def __init__(self, group: Group) -> None:
        self.parts = [(edit.at(torch.tensor(strengths)), torch.tensor(rows)) for edit, rows, strengths in group]

    def __call__(self, h: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        for edit, rows in self.parts:
            rows = rows.to(h.device)
            h[rows] = edit.to(h.device)(h[rows])
        return h


class _StateRows:
    """Differences of states, each on its own rows and with a strength for each."""

    def __init__(self, group: Group) -> None:
        self.parts = [(delta, torch.tensor(rows), torch.tensor(strengths)) for delta, rows, strengths in group]

    def __call__(self, tensors: Mapping[str, Tensor]) -> State:
        new = dict(tensors)
        for delta, rows, strengths in self.parts:
            changed = moved({name: tensor[rows.to(tensor.device)] for name, tensor in new.items()}, delta, strengths)
            for name, value in changed.items():
                new[name] = new[name].index_copy(0, rows.to(value.device), value)
        return new


def _pieces(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
