"""Reading and editing activations at named sites, with forward hooks and nothing else.

A tap is a place in the network: the input or the output of a module. Hooks exist only while something reads or edits
there. A visit edits first, in the order in which the edits were entered, and reads afterwards; once every site that is
read has been seen and nobody wants the logits, the forward pass stops. `state.i` lives in the cache instead of in a
module: it is read after a pass, and edited once, before a pass continues from it. Blocks return tensors or tuples, and
no output is written in place. Some models do write in place into what their parts return (Falcon adds the attention to
the MLP's output), so outputs of parts are copied when they are read, and a stream that changed after it was read is an
error.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.lm.state import Cache
from sonde.lm.structure import Place, Structure

Edit = Callable[[Any], Any]
Positions = int | slice | Sequence[int] | None
_SLICE = re.compile(r"(?P<stem>[a-z_]+)\.(?P<start>-?\d+)?:(?P<stop>-?\d+)?(:(?P<step>-?\d+))?")


class Stopped(Exception):
    """Raised inside a forward pass when all that was wanted has been read."""


@dataclass(frozen=True)
class Frame:
    """Which real tokens the columns of the present forward pass are: for edits at positions.

    `position` is the place of each column in its row's real tokens (pads have negative places), `prompt` the number of
    real tokens of each row's prompt.
    """

    position: Int[Tensor, "batch pos"]
    prompt: Int[Tensor, " batch"]

    @staticmethod
    def of(mask: Bool[Tensor, "batch pos"], before: Int[Tensor, " batch"], prompt: Int[Tensor, " batch"]) -> "Frame":
        """The frame of columns with this `mask`, after `before` real tokens a row."""
        position = before[:, None] + mask.cumsum(-1) - 1
        return Frame(torch.where(mask, position, -1), prompt)

    def columns(self, part: slice) -> "Frame":
        """The frame of some of the columns."""
        return Frame(self.position[:, part], self.prompt)

    def chosen(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """The columns that `positions` names. Negative positions count from the end of the prompt."""
        real = self.position >= 0
        if positions is None:
            return real
        if isinstance(positions, slice):
            if positions.step not in (None, 1):
                raise ValueError(f"positions take slices of step 1, not {positions}")
            start = self._absolute(0 if positions.start is None else positions.start)
            chosen = self.position >= start
            return (
                chosen & real
                if positions.stop is None
                else chosen & real & (self.position < self._absolute(positions.stop))
            )
        wanted = [positions] if isinstance(positions, int) else list(positions)
        chosen = torch.zeros_like(real)
        for place in wanted:
            chosen |= self.position == self._absolute(place)
        return chosen & real

    def _absolute(self, place: int) -> Int[Tensor, "batch 1"]:
        return (self.prompt + place if place < 0 else torch.full_like(self.prompt, place))[:, None]


@dataclass(frozen=True)
class _Reading:
    sites: frozenset[str]
    acts: dict[str, Any]
    versions: dict[str, int]
    pieces: list[dict[str, Any]]


@dataclass(frozen=True)
class _Editing:
    site: str
    edit: Edit
    rows: tuple[int, ...] | None
    positions: Positions
    everywhere: bool


class Taps:
    """The sites of one model, `sites` in the order of depth, and who reads and edits them at the moment."""

    def __init__(self, structure: Structure, name: str) -> None:
        self._name = name
        self._depth = len(structure.blocks)
        self._points: dict[str, Place] = {"embed": Place(structure.embedding, at_input=False)}
        for i, block in enumerate(structure.blocks):
            places = {
                "resid_pre": Place(block, at_input=True),
                "mixer_in": structure.mixer_inputs[i],
                "mixer_out": _output(structure.mixers[i]),
                "mlp_in": structure.mlp_inputs[i],
                "mlp_out": _output(structure.mlps[i]),
                "resid_post": Place(block, at_input=False),
            }
            self._points |= {f"{kind}.{i}": place for kind, place in places.items() if place is not None}
        states = (f"state.{i}" for i in range(self._depth))
        self.sites: tuple[str, ...] = (*self._points, *states, "logits")
        self._readings: list[_Reading] = []
        self._editings: list[_Editing] = []
        self._hooks: dict[str, Any] = {}
        self._missing: set[str] = set()
        self._stoppable = False
        self._frame: Frame | None = None

    def match(self, *patterns: str) -> tuple[str, ...]:
        """Site names in order of depth: exact names, globs (`mlp_out.*`) and slices (`resid_post.2:5`).

        Raises `SondeError` for a pattern that names no site.
        """
        found: set[str] = set()
        for pattern in patterns:
            names = self._sliced(pattern) if _SLICE.fullmatch(pattern) else fnmatch.filter(self.sites, pattern)
            if not names:
                raise SondeError(f"site {pattern!r} does not exist: {self._name} has {self._summary()}")
            found.update(names)
        return tuple(site for site in self.sites if site in found)

    @contextmanager
    def reading(self, *patterns: str) -> Iterator[dict[str, Any]]:
        """Collect activations of the named sites into the dict that is yielded; each forward pass overwrites them."""
        reading = _Reading(frozenset(self.match(*patterns)), {}, {}, [])
        self._readings.append(reading)
        try:
            self._rehook()
            yield reading.acts
        finally:
            self._readings = [other for other in self._readings if other is not reading]
            self._rehook()

    @contextmanager
    def editing(
        self, edits: Mapping[str, Edit], *, rows: Sequence[int] | None = None, positions: Positions = None
    ) -> Iterator[None]:
        """Replace activations at the named sites by functions of themselves."""
        entered = [
            _Editing(site, edit, None if rows is None else tuple(rows), positions, rows is None and positions is None)
            for pattern, edit in edits.items()
            for site in self.match(pattern)
        ]
        self._editings += entered
        try:
            self._rehook()
            yield
        finally:
            self._editings = [other for other in self._editings if not any(other is mine for mine in entered)]
            self._rehook()

    @contextmanager
    def forward(self, frame: Frame, *, stoppable: bool) -> Iterator[None]:
        """Surround one forward pass of the model; `Stopped` ends it early and is caught here."""
        wanted = {site for reading in self._readings for site in reading.sites}
        self._missing = wanted & set(self._points)
        self._stoppable = stoppable and bool(wanted) and wanted <= set(self._points)
        self._frame = frame
        for reading in self._readings:
            reading.acts.clear()
            reading.versions.clear()
        try:
            yield
        except Stopped:
            pass
        finally:
            self._frame = None
        for reading in self._readings:
            for site, version in reading.versions.items():
                if reading.acts[site]._version != version:
                    raise SondeError(
                        f"{self._name} overwrote {site} after it was read; what was read is not what was there"
                    )

    @property
    def reads(self) -> bool:
        """Whether somebody reads anything."""
        return bool(self._readings)

    @property
    def reads_state(self) -> bool:
        """Whether somebody reads a state, so that the pass must leave a cache."""
        return any(site.startswith("state.") for reading in self._readings for site in reading.sites)

    @contextmanager
    def joined(self) -> Iterator[Callable[[], None]]:
        """Surround several passes over consecutive columns: what is read is joined along the positions.

        The function that is yielded is called after each pass.
        """

        def keep() -> None:
            for reading in self._readings:
                reading.pieces.append(dict(reading.acts))

        yield keep
        for reading in self._readings:
            # One piece is what was read: joining it would copy it.
            for site in reading.pieces[0] if len(reading.pieces) > 1 else ():
                reading.acts[site] = torch.cat([piece[site] for piece in reading.pieces], 1)
            reading.pieces.clear()

    def read_states(self, cache: Cache) -> None:
        """Read `state.i`: the tensors of the layer's memory by name, with the batch first."""
        for reading in self._readings:
            for site in self.sites:
                if site in reading.sites and site.startswith("state."):
                    reading.acts[site] = cache.read(int(site.removeprefix("state.")))

    def edit_states(self, cache: Cache) -> None:
        """Replace what `state.i` edits change in a cache that is about to be continued from."""
        for editing in self._editings:
            if not editing.site.startswith("state."):
                continue
            if editing.positions is not None:
                raise SondeError(f"{editing.site} has no positions: it is the memory of all tokens so far")
            layer = int(editing.site.removeprefix("state."))
            old = cache.read(layer)
            new = dict(editing.edit({name: value.clone() for name, value in old.items()}))
            if editing.rows is not None:
                kept = _rows_mask(editing.rows, cache.batch, next(iter(old.values())).device)
                new = {
                    name: torch.where(kept.view(-1, *[1] * (value.ndim - 1)), value, old[name])
                    for name, value in new.items()
                    if name in old
                }
            cache.write(layer, new)

    def visit_logits(self, logits: Tensor) -> Tensor:
        """Edit and read the logits, which are not the output of one module in every family."""
        return self._visit("logits", logits)

    def _visit(self, site: str, value: Tensor) -> Tensor:
        for editing in self._editings:
            if editing.site == site:
                value = self._edited(editing, value)
        for reading in self._readings:
            if site in reading.sites:
                kept = value.clone() if site.startswith(("mixer_out", "mlp_out")) else value
                reading.acts[site] = kept
                if not kept.is_inference():
                    reading.versions[site] = kept._version
        self._missing.discard(site)
        return value

    def _edited(self, editing: _Editing, value: Tensor) -> Tensor:
        new = editing.edit(value.clone())
        if not isinstance(new, Tensor) or new.shape != value.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise SondeError(
                f"the edit at {editing.site} returned {got}; expected a tensor of shape {tuple(value.shape)}"
            )
        new = new.to(value.dtype)
        if editing.everywhere:
            return new
        if self._frame is None:
            raise SondeError(
                "edits of chosen rows or positions work in lm(...) and lm.generate(...), not in lm.model(...)"
            )
        where = self._frame.chosen(editing.positions)
        if editing.rows is not None:
            where = where & _rows_mask(editing.rows, len(where), where.device)[:, None]
        return torch.where(where[..., None], new, value)

    def _rehook(self) -> None:
        """Have hooks at exactly the sites that somebody reads or edits."""
        used = {site for reading in self._readings for site in reading.sites}
        used |= {editing.site for editing in self._editings}
        used &= set(self._points)
        for site in set(self._hooks) - used:
            self._hooks.pop(site).remove()
        for site in sorted(used - set(self._hooks), key=self.sites.index):
            place = self._points[site]
            if place.at_input:
                self._hooks[site] = place.module.register_forward_pre_hook(self._on_input(site), with_kwargs=True)
            else:
                self._hooks[site] = place.module.register_forward_hook(self._on_output(site))

    def _on_input(self, site: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict):
            value = args[0] if args else kwargs["hidden_states"]
            shaped = self._shaped(value)
            new = self._visit(site, shaped)
            self._stop_if_done()
            if new is shaped:
                return None
            new = new.reshape(value.shape)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def _on_output(self, site: str):
        def hook(module: nn.Module, args: tuple, output: Any):
            value = output[0] if isinstance(output, tuple | list) else output
            shaped = self._shaped(value)
            new = self._visit(site, shaped)
            self._stop_if_done()
            if new is shaped:
                return None
            new = new.reshape(value.shape)
            return (new, *output[1:]) if isinstance(output, tuple | list) else new

        return hook

    def _shaped(self, value: Tensor) -> Tensor:
        """OPT runs its MLP on (batch · pos, d): give it the shape of every other site."""
        if value.ndim == 2 and self._frame is not None:
            return value.reshape(*self._frame.position.shape, -1)
        return value

    def _stop_if_done(self) -> None:
        if self._stoppable and not self._missing:
            raise Stopped

    def _sliced(self, pattern: str) -> list[str]:
        part = _SLICE.fullmatch(pattern)
        assert part is not None
        bounds = (int(part[key]) if part[key] else None for key in ("start", "stop", "step"))
        chosen = set(range(self._depth)[slice(*bounds)])
        numbered = ((site, *site.split(".")) for site in self.sites if "." in site)
        return [site for site, stem, number in numbered if stem == part["stem"] and int(number) in chosen]

    def _summary(self) -> str:
        kinds: dict[str, list[str]] = {}
        for site in self.sites:
            kinds.setdefault(site.partition(".")[0], []).append(site)
        return ", ".join(
            names[0] if len(names) == 1 else f"{names[0]} … {names[-1].partition('.')[2]}" for names in kinds.values()
        )


def _output(part: nn.Module | None) -> Place | None:
    return None if part is None else Place(part, at_input=False)


def _rows_mask(rows: Sequence[int], batch: int, device: torch.device) -> Bool[Tensor, " batch"]:
    if not all(-batch <= row < batch for row in rows):
        raise SondeError(f"rows {tuple(rows)} do not exist in a batch of {batch}")
    chosen = torch.zeros(batch, dtype=torch.bool, device=device)
    chosen[list(rows)] = True
    return chosen
